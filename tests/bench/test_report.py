"""What the table, the JSON and the page say, and that the page is one sound file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from vitedge.bench.environment import environment
from vitedge.bench.report import beaten, headline, rows_to_json, table, write_report
from vitedge.errors import VitEdgeError
from vitedge.specs import BenchRow, from_dict

FP32 = BenchRow("vit", "fp32", "openvino", 1, 5.2, 5.4, 6.0, 190.0, 23.1, 10_000, 91.2, 99.8)
INT8 = BenchRow("vit", "int8", "openvino", 1, 3.21, 3.4, 4.0, 308.0, 6.3, 10_000, 91.1, 99.8, 98.6, 27.3)
BOUND = replace(INT8, bound_ms=1.0)
BARE = BenchRow("vit", "fp32", "openvino", 1, 5.2, 5.4, 6.0, 190.0, 23.1, 0)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in the order they opened; keeps tags, texts and the places of the points."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def points(self) -> list[tuple[float, float]]:
        circles = [attrs for tag, attrs in self.tags if tag == "circle" and attrs.get("class") == "point"]
        return [(float(c["cx"] or ""), float(c["cy"] or "")) for c in circles]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def page(tmp_path: Path, rows: list[BenchRow], details: dict[str, str] | None = None) -> tuple[Page, str]:
    path = tmp_path / "report.html"
    write_report(path, rows, details or {"machine": "a CPU"})
    html = path.read_text("utf-8")
    return Page(html), html


def printed(rows: list[BenchRow], color: bool = False) -> str:
    console = Console(width=160, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        console.print(table(rows))
    return capture.get()


def heads(result: Table) -> list[str]:
    return [str(column.header) for column in result.columns]


def test_the_table_has_units_and_leaves_out_what_was_not_measured() -> None:
    always = ["variant", "backend", "batch", "p50 ms", "p99 ms", "images/s", "size MiB"]
    assert heads(table([BARE])) == always
    assert heads(table([FP32])) == [*always, "top-1 %"]
    assert heads(table([FP32, INT8])) == [*always, "top-1 %", "agreement %", "SQNR dB"]
    assert heads(table([FP32, replace(INT8, model="other")]))[0] == "model"
    assert "5.20" in printed([FP32, INT8])
    assert "–" in printed([FP32, INT8])  # the reference has no agreement


def test_the_best_values_are_bold() -> None:
    bold = re.findall(r"\x1b\[1m\s*(\S+)\x1b\[0m", printed([FP32, INT8], color=True))
    assert bold == ["91.20", "3.21", "4.00", "308", "6.3"]
    assert "\x1b[1m" not in printed([FP32, FP32], color=True)


def test_latencies_compete_within_their_batch() -> None:
    batch = [replace(row, batch=16, p50_ms=row.p50_ms * 12, images_per_s=row.images_per_s * 1.3) for row in (FP32, INT8)]
    bold = re.findall(r"\x1b\[1m\s*(\S+)\x1b\[0m", printed([FP32, INT8, *batch], color=True))
    assert "3.21" in bold
    assert "38.52" in bold
    assert bold.count("400") == 1  # images/s, over all batches
    assert "308" not in bold


def test_numbers_are_whole_in_a_narrow_terminal() -> None:
    rows = [replace(BOUND, variant="a-variant-of-a-very-long-name", top1=90.12, agreement=98.76, sqnr_db=41.3)]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(rows))
    text = capture.get()
    assert "90.12" in text and "98.76" in text and "41.3" in text and "…" in text


def test_a_row_that_beats_its_bound_is_noted() -> None:
    rows = [replace(INT8, bound_ms=INT8.p50_ms * factor) for factor in (0.5, 2.0)]
    (note,) = beaten(rows)
    assert "faster than its bound" in note and "busy machine" in note


def test_markup_in_a_name_is_text_in_the_terminal() -> None:
    assert "[red]x[/nonsense]" in printed([replace(FP32, variant="[red]x[/nonsense]")])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([FP32, INT8], "int8 is 1.62× as fast as fp32 and loses 0.10 points of top-1, within the noise of 10,000 images."),
        ([FP32, replace(INT8, top1=91.5)], "int8 is 1.62× as fast as fp32 and gains 0.30 points of top-1."),
        ([FP32, replace(INT8, top1=91.2)], "int8 is 1.62× as fast as fp32 and keeps its top-1 of 91.20%."),
        (
            [FP32, replace(INT8, p50_ms=6.5)],
            "int8 takes 1.25× as long as fp32 and loses 0.10 points of top-1, within the noise of 10,000 images.",
        ),
        (
            [FP32, replace(INT8, p50_ms=5.2)],
            "int8 is as fast as fp32 and loses 0.10 points of top-1, within the noise of 10,000 images.",
        ),
        (
            [replace(FP32, top1=None), replace(INT8, top1=None)],
            "int8 is 1.62× as fast as fp32 and agrees with it on 98.60% of 10,000 images.",
        ),
        (
            [BARE, replace(BARE, variant="int8", p50_ms=2.6, sqnr_db=30.04)],
            "int8 is 2.00× as fast as fp32 and matches its output to 30.0 dB.",
        ),
        ([BARE, replace(BARE, variant="int8", p50_ms=2.6)], "int8 is 2.00× as fast as fp32."),
        ([FP32], "fp32 takes 5.20 ms for an image and gets 91.20% of 10,000 images right."),
        ([replace(BARE, batch=8)], "fp32 takes 5.20 ms for a batch of 8."),
        ([BARE, replace(BARE, backend="onnxruntime", p50_ms=2.6)], "fp32 on onnxruntime is 2.00× as fast as fp32 on openvino."),
        ([FP32, replace(INT8, batch=16, p50_ms=0.1)], "fp32 takes 5.20 ms for an image and gets 91.20% of 10,000 images right."),
    ],
)
def test_the_headline_is_made_of_measured_numbers(rows: list[BenchRow], expected: str) -> None:
    assert headline(rows) == expected


def test_the_page_is_one_sound_file_without_outside_assets(tmp_path: Path) -> None:
    parsed, html = page(tmp_path, [FP32, INT8], environment())
    assert len(html) < 100_000
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object"}
    assert not any("src" in attrs or "href" in attrs for _, attrs in parsed.tags)
    assert "prefers-color-scheme: dark" in html
    assert headline([FP32, INT8]) in parsed.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_the_table_and_the_environment(tmp_path: Path) -> None:
    parsed, html = page(tmp_path, [FP32, INT8], {"machine": "Cortex-A78", "command": "vitedge bench a b"})
    assert [tag for tag, _ in parsed.tags].count("tr") == 3
    assert "<b>3.21</b>" in html
    assert "Cortex-A78" in parsed.text
    assert "vitedge bench a b" in parsed.text


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = """</title><script>alert("1")</script><img src=x onerror='x'>&amp;{style}{0}"""
    rows = [replace(row, model=evil, variant=evil + row.variant, backend=evil, top1=None) for row in (FP32, INT8)]
    parsed, html = page(tmp_path, rows, {evil: evil, "machine": evil})
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}
    assert "<script" not in html
    assert "<img" not in html
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert evil in parsed.text


def test_points_stand_where_their_numbers_say(tmp_path: Path) -> None:
    slow = replace(INT8, variant="mixed", p50_ms=7.0, p90_ms=7.2, top1=91.15)
    parsed, _ = page(tmp_path, [FP32, INT8, slow])
    (x0, y0), (x1, y1), (x2, y2) = parsed.points
    assert x1 < x0 < x2
    assert y0 < y2 < y1  # SVG counts downwards
    assert (x2 - x0) / (x0 - x1) == pytest.approx((7.0 - 5.2) / (5.2 - 3.21), abs=0.01)
    assert (y1 - y2) / (y2 - y0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("metric", ["top1", "agreement", "sqnr_db", None])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_every_row_has_a_point_inside_the_frame(tmp_path: Path, metric: str | None, count: int) -> None:
    rows = [replace(BARE, variant=f"v{index}", p50_ms=5.2 + index, p90_ms=6 + index) for index in range(count)]
    if metric == "top1":
        rows = [replace(row, top1=80 + index % 3) for index, row in enumerate(rows)]
    elif metric:
        rows = [rows[0], *(replace(row, **{metric: 20 + index}) for index, row in enumerate(rows[1:]))]
    else:
        rows = rows[:1]  # with nothing to compare by, there is the reference alone
    parsed, _ = page(tmp_path, rows)
    assert len(parsed.points) == len(rows)
    for x, y in parsed.points:
        assert 62 <= x <= 542
        assert 22 <= y <= 336


@pytest.mark.parametrize(
    "rows",
    [
        [FP32, FP32],
        [FP32, replace(FP32, variant="int8")],
        [replace(FP32, top1=100.0), replace(INT8, top1=100.0)],
        [replace(FP32, top1=0.0), replace(INT8, top1=0.0)],
        [replace(FP32, top1=None), replace(INT8, top1=None, agreement=100.0)],
        [replace(FP32, p50_ms=1e-3, p90_ms=1e-3), replace(INT8, p50_ms=9e5, p90_ms=1e6)],
    ],
)
def test_equal_and_extreme_values_make_a_page(tmp_path: Path, rows: list[BenchRow]) -> None:
    parsed, html = page(tmp_path, rows)
    assert len(parsed.points) == 2
    assert not re.search(r'"(nan|inf)', html)
    ticks = re.findall(r'dy=".35em" text-anchor="end">([-\d.,]+)<', html)
    assert ticks
    assert all(0 <= float(tick) <= 100 for tick in ticks)


def test_the_plot_is_of_the_smallest_batch_and_the_table_of_all(tmp_path: Path) -> None:
    rows = [FP32, INT8, replace(FP32, batch=16, p50_ms=60.0), replace(INT8, batch=16, p50_ms=40.0)]
    parsed, _ = page(tmp_path, rows)
    assert len(parsed.points) == 2
    assert [tag for tag, _ in parsed.tags].count("tr") == 5


def test_each_model_has_its_own_headline_and_plot(tmp_path: Path) -> None:
    other = [replace(row, model="other") for row in (FP32, INT8)]
    parsed, _ = page(tmp_path, [FP32, INT8, *other])
    assert [tag for tag, _ in parsed.tags].count("svg") == 2
    assert [tag for tag, _ in parsed.tags].count("h1") == 2
    assert len(parsed.points) == 4


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VitEdgeError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", [FP32], {})


def test_json_round_trips() -> None:
    document = json.loads(json.dumps(rows_to_json([FP32, INT8], {"machine": "a CPU"}), allow_nan=False))
    assert document["environment"] == {"machine": "a CPU"}
    assert [from_dict(BenchRow, row) for row in document["rows"]] == [FP32, INT8]


def test_the_distance_from_the_bound_is_a_column_where_a_bound_is_known(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", [FP32, BOUND], environment())
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "× bound" in page.text and "3.2" in page.texts and page.texts.count("–") >= 1
    heads = [str(column.header) for column in table([FP32, BOUND]).columns]
    assert heads.index("× bound") == heads.index("images/s") + 1
    assert "× bound" not in [column.header for column in table([FP32, INT8]).columns]
    assert rows_to_json([BOUND], {})["rows"][0]["bound_ms"] == 1.0
