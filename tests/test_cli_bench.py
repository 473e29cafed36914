"""`vitedge bench` as it is typed: what it compares, chooses, refuses and lets through."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import test_cli
from tests.engines import Made
from tests.test_cli import Vitedge
from vitedge.bench.document import Document, load_document, save_document

pytest.importorskip("torch")
pytest.importorskip("openvino")

vitedge = test_cli.vitedge
QUICK = ("--seconds", 0.01, "--no-memory")


@pytest.fixture(scope="module")
def engines(made: Made) -> list[Path]:
    return [made.engines["openvino", variant] for variant in ("fp32", "int8")]


@pytest.fixture
def base(made: Made, engines: list[Path], vitedge: Vitedge, tmp_path: Path) -> Path:
    path = tmp_path / "base.json"
    said = vitedge("bench", *engines, "--images", made.images, *QUICK, "--json", path)
    assert said.code == 0, said
    return path


def test_everything_at_once(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    names = [made.engines["openvino", "fp32"], made.graphs["int8"], f"{made.graphs['int8']}@openvino"]
    files = {option: tmp_path / f"out.{option}" for option in ("report", "md", "csv", "json")}
    options = ["--threads", "1", "--streams", "1,2", "--batch", "1", "--batch", "2", "--seconds", 0.01]
    written = [part for option, path in files.items() for part in (f"--{option}", path)]
    said = vitedge("bench", *names, "--images", made.images, *options, *written)
    assert said.code == 0, said
    document = load_document(files["json"])
    assert [one.runtime for one in document.candidates] == ["openvino", "onnxruntime", "openvino"]
    for one in document.candidates:
        assert [(timed.batch, timed.threads, timed.streams) for timed in one.timings] == [
            (batch, 1, streams) for streams in (1, 2) for batch in (1, 2)
        ]
        assert one.peak_mib and one.peak_mib > 1 and one.judged and one.judged.images == 48
    assert document.candidates[0].layers and not document.candidates[1].layers
    assert files["report"].read_text().startswith("<!doctype html>") or "<html" in files["report"].read_text()
    assert files["md"].read_text().count("\n") > 5 and files["csv"].read_text().count("\n") > 12


def test_a_choice_is_told_with_its_reason(made: Made, engines: list[Path], vitedge: Vitedge) -> None:
    said = vitedge("bench", *engines, "--images", made.images, *QUICK, "--budget-ms", 10000, "--max-drop", 50)
    assert said.code == 0 and "choice: fashion-vit/" in said.out, said
    said = vitedge("bench", *engines, "--images", made.images, *QUICK, "--budget-ms", 0.000001)
    assert said.code == 1 and said.err.count("error: ") == 1 and "int8" in said.out, "it is shown all the same"


def test_one_output_that_fails_keeps_no_other_from_being_written(
    engines: list[Path], made: Made, vitedge: Vitedge, tmp_path: Path
) -> None:
    table = tmp_path / "full.md"
    said = vitedge("bench", engines[0], "--images", made.images, *QUICK, "--json", "/dev/full", "--md", table)
    assert said.code == 1 and "cannot write /dev/full" in said.err and table.is_file(), said


def test_an_impossible_limit_is_said_before_measuring(engines: list[Path], made: Made, vitedge: Vitedge) -> None:
    for option in ("--budget-ms", "--max-drop"):
        said = vitedge("bench", *engines, "--images", made.images, *QUICK, option, "nan")
        assert said.code == 1 and "nan" in said.err and not said.out, said


def test_an_engine_that_fails_is_shown_and_the_others_finish(
    made: Made,
    engines: list[Path],
    vitedge: Vitedge,
    tmp_path: Path,
) -> None:
    broken = made.copy("openvino", "int8", tmp_path)
    (broken / "model.bin").write_bytes(b"")
    said = vitedge("bench", engines[0], broken, "--images", made.images, *QUICK, "--json", tmp_path / "x.json")
    assert said.code == 0 and "damaged" in said.out + said.err, said
    first, second = load_document(tmp_path / "x.json").candidates
    assert first.timings and second.failed.startswith("opening: ") and not second.timings
    alone = vitedge("bench", broken, "--images", made.images, *QUICK)
    assert alone.code == 1 and "damaged" in alone.err and "Traceback" not in alone.err


def rewritten(path: Path, change: Any) -> None:
    """Let the baseline have been what `change` makes of its INT8 candidate."""
    document = load_document(path)
    first, second = document.candidates
    save_document(dataclasses.replace(document, candidates=(first, change(second))), path)


def quicker(document_candidate: Any) -> Any:
    """A thousand times as fast as now."""
    (timed,) = document_candidate.timings
    interval = dataclasses.replace(timed.speedup_interval, low=timed.speedup * 999, high=timed.speedup * 1001)
    return dataclasses.replace(
        document_candidate, timings=(dataclasses.replace(timed, speedup=timed.speedup * 1000, speedup_interval=interval),)
    )


def test_the_gate_lets_through_what_is_as_it_was(made: Made, engines: list[Path], vitedge: Vitedge, base: Path) -> None:
    options = ("--baseline", base, "--max-slower", "100000%", "--max-drop", "0")
    said = vitedge("bench", *engines, "--images", made.images, *QUICK, *options)
    assert said.code == 0, said
    assert "gate: fashion-vit/int8@openvino at batch 1 is no more than 100000 % slower than" in said.out


def test_the_gate_stops_what_is_slower(made: Made, engines: list[Path], vitedge: Vitedge, base: Path) -> None:
    rewritten(base, quicker)
    said = vitedge("bench", *engines, "--images", made.images, *QUICK, "--baseline", base)
    assert said.code == 1, said
    assert "error: fashion-vit/int8@openvino at batch 1 is" in said.err and "that --max-slower allows" in said.err
    assert "int8" in said.out, "the table is shown all the same"


def test_the_gate_stops_what_is_less_accurate(made: Made, engines: list[Path], vitedge: Vitedge, base: Path) -> None:
    def flawless(one: Any) -> Any:
        right = dataclasses.replace(one.judged, top1=100.0, right="f" * len(one.judged.right))
        return dataclasses.replace(one, judged=right)

    wrong = shutil.copytree(made.images, base.parent / "images")
    rewritten(base, flawless)
    document = load_document(base)
    said = vitedge("bench", *engines, "--images", wrong, *QUICK, "--baseline", base, "--max-slower", "100000", "--max-drop", 0)
    mistakes = 48 - round(48 * (document.candidates[0].judged or pytest.fail()).top1 / 100)
    assert (said.code == 1) == (mistakes >= 6), "fewer may be chance"
    if said.code:
        assert "points of top-1" in said.err


def test_a_baseline_may_be_an_engine_which_is_then_measured_too(
    made: Made,
    engines: list[Path],
    vitedge: Vitedge,
    tmp_path: Path,
) -> None:
    options = ("--baseline", engines[1], "--max-slower", "100000", "--max-drop", "100", "--json", tmp_path / "x.json")
    said = vitedge("bench", engines[0], "--images", made.images, *QUICK, *options)
    assert said.code == 0 and "gate: fashion-vit/fp32@openvino" in said.out, said
    assert load_document(tmp_path / "x.json").reference == "fashion-vit/int8@openvino"


@pytest.fixture
def elsewhere(base: Path) -> Iterator[Path]:
    content = json.loads(base.read_text())
    content["environment"]["machine"] = "a computer far away"
    base.write_text(json.dumps(content))
    yield base


def test_a_baseline_of_another_machine_is_refused_before_anything_is_timed(
    made: Made,
    engines: list[Path],
    vitedge: Vitedge,
    elsewhere: Path,
) -> None:
    said = vitedge("bench", *engines, "--images", made.images, "--seconds", 600, "--baseline", elsewhere)
    assert said.code == 1 and "was measured on another machine: machine a computer far away, here" in said.err, said


def test_mistakes_are_one_sentence(made: Made, engines: list[Path], vitedge: Vitedge, base: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}')
    newer: Document = load_document(base)
    save_document(dataclasses.replace(newer, schema=99), tmp_path / "newer.json")
    for options, sentence in (
        ([engines[0], engines[0]], "is given twice"),
        ([engines[0], "--max-slower", "2%"], "--max-slower needs --baseline"),
        ([engines[0], "--baseline", tmp_path / "none.json"], "cannot read"),
        ([engines[0], "--baseline", tmp_path / "other.json"], "is not a benchmark of vitedge"),
        ([engines[0], "--baseline", tmp_path / "newer.json"], "has schema 99"),
        ([engines[0], "--baseline", base, "--batch", "2"], "was timed at batch 1, and this run is at batch 2"),
        ([made.engines["onnxruntime", "int8"], "--baseline", base], "has none of fashion-vit/int8@onnxruntime"),
        ([engines[0], "--baseline", base, "--json", base], "would be overwritten"),
        ([engines[0], "--baseline", base, "--max-slower", "nan"], "--max-slower is nan"),
        ([f"{made.graphs['int8']}@caffe"], "there is no runtime 'caffe'"),
    ):
        said = vitedge("bench", *options, "--images", made.images, *QUICK)
        assert said.code == 1 and sentence in said.err and said.err.count("error: ") == 1, (options, said)


@pytest.mark.parametrize(
    "options", [("--batch", "0"), ("--batch", "1,x"), ("--threads", "-1"), ("--streams", "1.5"), ("--max-slower", "much")]
)
def test_what_is_no_number_exits_2(vitedge: Vitedge, options: tuple[str, str]) -> None:
    said = vitedge("bench", "x", "--images", "y", "--baseline", "z", *options)
    assert said.code == 2 and said.out == "" and "Usage" in said.err, said
