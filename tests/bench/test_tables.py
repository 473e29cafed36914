"""What the tables say in a terminal of any width, in Markdown and in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from tests.bench.documents import candidate, document, labelled, timed
from vitedge.bench.choice import Choice, choose
from vitedge.bench.document import Document
from vitedge.bench.lines import columns, display_names, failures, lines
from vitedge.bench.tables import csv_text, markdown, terminal

FP32 = candidate("vit/fp32", 5.0, labelled(91.2), batches=(1, 8))
INT8 = candidate("vit/int8", 3.0, labelled(91.0, 0.2, 98.6), batches=(1, 8))
FAILED = candidate("vit/fp16", 1.0, failed="opening: no | driver", timings=())
DOC = document(FP32, INT8, FAILED)


def printed(documents: Sequence[Document], width: int = 160, choice: Choice | None = None, color: bool = False) -> str:
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        console.print(terminal(documents, choice, width))
    return capture.get()


def heads(*documents: Document) -> list[str]:
    return [column.head for column in columns(lines(documents))]


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    bare = document(candidate("fp32", 5.0))
    always = ["", "candidate", "batch", "p50 ms", "p99 ms", "images/s", "size MiB"]
    assert heads(bare) == always
    assert heads(document(FP32, INT8)) == [*always[:-1], "top-1 %", "drop", "agreement %", "SQNR dB", "size MiB"]
    two = document(FP32, replace(INT8, runtime="onnxruntime"))
    assert "runtime" in heads(two) and "machine" not in heads(two)
    assert "machine" in heads(two, document(FP32, machine="board"))
    assert {"threads", "streams"} <= set(heads(document(replace(FP32, timings=(timed(5.0), timed(6.0, threads=1, streams=2))))))
    bound = document(replace(FP32, timings=(timed(5.0, bound_ms=2.0),)))
    assert "× bound" in heads(bound) and re.search(r" 2\.5 ", printed([bound]))


@pytest.mark.parametrize("width", [160, 120, 100, 80, 60, 40])
def test_a_narrow_terminal_gets_fewer_columns_and_none_that_is_cut(width: int) -> None:
    table = printed([DOC], width).partition("★")[0].splitlines()
    assert len(table) == 5 and max(map(len, table)) <= width
    assert "p50 ms" in table[0] and "top-1 %" in table[0]
    assert "…" not in "".join(table)
    assert ("±" in "".join(table)) == (width > 40)


def test_a_long_name_gives_way_before_the_figures_do() -> None:
    doc = document(FP32, replace(INT8, name="vit/" + "int8-of-a-very-long-name" * 4))
    text = printed([doc], 70)
    assert "…" in text and "3.00" in text and "91.00" in text


def test_intervals_stand_behind_their_figures() -> None:
    assert "3.00 ±0.06" in printed([DOC]) and "0.20 ±0.40" in printed([DOC]) and "91.20 ±1.80" in printed([DOC])


def test_the_best_are_bold_within_their_batch() -> None:
    bold = re.findall(r"\x1b\[1m\s*(\S+)(?: ±\S+)?\x1b\[0m", printed([DOC], color=True))
    assert bold.count("3.00") == 1 and bold.count("19.49") == 1 and "5.00" not in bold
    assert "\x1b[1m91" not in printed([document(FP32, replace(FP32, name="vit/twin"))], color=True)


def test_what_is_to_ship_and_on_the_frontier_is_marked() -> None:
    doc = document(FP32, INT8, candidate("vit/far", 4.0, labelled(70.0, 21.2), batches=(1, 8)))
    marks = [(line.name, line.timed.batch, line.mark) for line in lines([doc], choose([doc]))]
    assert marks == [
        ("fp32", 1, "○"), ("int8", 1, "★"), ("far", 1, ""), ("fp32", 8, "○"), ("int8", 8, "●"), ("far", 8, ""),
    ]  # fmt: skip
    assert choose([doc]).why in " ".join(printed([doc], 400, choose([doc])).split("\n"))


def test_what_failed_stands_at_the_end_with_its_reason() -> None:
    assert failures([DOC]) == [("fp16", "opening: no | driver")]
    assert printed([DOC]).rstrip().endswith("fp16 failed: opening: no | driver")
    assert failures([DOC, document(FP32, machine="board")])[0][0] == "fp16 on a CPU"


def test_markup_in_a_name_is_text() -> None:
    doc = document(replace(FP32, name="[red]x[/nonsense]"), replace(FAILED, name="[b]", failed="[/b]"))
    text = printed([doc], choice=choose([doc]))
    assert "[red]x[/nonsense]" in text and "[b] failed: [/b]" in text


def test_names_are_short_where_all_are_of_one_model_or_on_one_runtime() -> None:
    on = [candidate(name, 1.0) for name in ("vit/fp32@openvino", "vit/int8@openvino")]
    assert list(display_names([document(*on)]).values()) == ["fp32", "int8"]
    assert list(display_names([document(*on, candidate("vit/int8@torch", 1.0))]).values())[1:] == ["int8@openvino", "int8@torch"]
    assert list(display_names([document(*on, candidate("vit/int8", 1.0))]).values()) == ["fp32@openvino", "int8@openvino", "int8"]
    assert display_names([DOC]) == {"vit/fp32": "fp32", "vit/int8": "int8", "vit/fp16": "fp16"}
    assert display_names([document(FP32, candidate("other/fp32", 1.0))])["vit/fp32"] == "vit/fp32"
    assert display_names([document(FP32, candidate("model.py:vit", 1.0))])["vit/fp32"] == "vit/fp32"


def test_markdown_is_a_table_that_nothing_breaks() -> None:
    doc = document(FP32, replace(INT8, name="a|b <i>*x*"), FAILED, notes=("line\nbreak",))
    text = markdown([doc], choose([doc]))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(heads(doc)) + 1}
    assert r"a\|b \<i\>\*x\*" in text and "* line break" in text and "fp16 failed" in text
    assert "<i>" not in text.replace(r"\<i\>", "")


def test_the_csv_has_every_figure_of_every_timing() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([DOC], choose([DOC])))))
    assert [(row["name"], row["batch"]) for row in rows] == [
        ("vit/fp32", "1"), ("vit/fp32", "8"), ("vit/int8", "1"), ("vit/int8", "8"), ("vit/fp16", ""),
    ]  # fmt: skip
    found = rows[2]
    assert float(found["p50_ms"]) == 3.0 and float(found["p50_low"]) == pytest.approx(2.94)
    assert float(found["drop_interval_high"]) == pytest.approx(0.6) and found["chosen"] == "True"
    assert rows[4]["failed"] == "opening: no | driver"
    assert {"energy_mj", "peak_mib", "sustained_per_s", "sqnr_db", "speedup_interval_low"} <= set(found)


def test_no_text_of_the_csv_is_a_formula() -> None:
    doc = document(replace(FP32, name="=cmd()", model="@x", variant="+1"), dataset="-2")
    (row, _) = csv.DictReader(io.StringIO(csv_text([doc])))
    assert [row[key] for key in ("name", "model", "variant", "dataset")] == ["'=cmd()", "'@x", "'+1", "'-2"]
