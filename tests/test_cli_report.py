"""`vitedge report`: benchmarks of several machines in, one page and one frontier out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.bench.documents import candidate, document, labelled
from vitedge.bench.document import Document, save_document
from vitedge.cli import app
from vitedge.errors import VitEdgeError

FP32 = candidate("vit/fp32", 5.0, labelled(91.2))
INT8 = candidate("vit/int8", 3.0, labelled(91.0, 0.2, 98.6))
LAPTOP = document(FP32, INT8, machine="laptop")
BOARD = document(FP32, INT8, candidate("vit/fp16", 1.0, failed="no driver"), machine="board")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, doc in (("laptop", LAPTOP), ("board", BOARD), ("later", replace(LAPTOP, environment={"machine": "laptop"}))):
        save_document(doc, tmp_path / f"{name}.json")
    return tmp_path


def report(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)


def test_machines_are_merged_into_one_page(folder: Path) -> None:
    result = report("laptop.json", "board.json", "--md", "r.md", "--csv", "r.csv", "--budget-ms", "4")
    assert result.exit_code == 0
    assert "vit/int8 on laptop is the most accurate within 4 ms" in " ".join(result.stdout.split())
    assert "fp16 on board failed: no driver" in result.stdout and "report: report.html" in result.stdout
    page = (folder / "report.html").read_text("utf-8")
    assert "laptop" in page and "board" in page and "budget 4 ms" in page
    assert (folder / "r.md").read_text("utf-8").startswith("vit/int8 on laptop is")
    assert (folder / "r.csv").read_text("utf-8").count("\n") == 6


def test_the_same_machine_twice_is_told_apart_by_its_date(folder: Path) -> None:
    result = report("laptop.json", "later.json", "-o", "two.html")
    assert "laptop, 2026-11-27 17:00 UTC" in result.stdout
    assert "laptop, 2026-11-27 17:00 UTC" in (folder / "two.html").read_text("utf-8")


def test_different_models_and_images_are_noted(folder: Path) -> None:
    other: Document = document(candidate("x/fp32", 1.0, labelled(50.0), model="x"), images_key="other", dataset="others")
    save_document(other, folder / "other.json")
    said = " ".join(report("laptop.json", "other.json").output.split())
    assert "different models, vit, x" in said and "not judged on the same images" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.json",), "none.json"),
        (("board.json", "newer.json"), "newer.json has schema 99"),
        (("board.json", "-o", "board.json"), "board.json is an input"),
        (("board.json", "--budget-ms", "0.1"), "no candidate is within 0.1 ms; the nearest is vit/int8: 3.00 ms"),
        (("board.json", "--max-drop", "-1"), "a drop is 0 to 100 points"),
        (("board.json", "-o", "r", "--md", "r"), "r is to hold two outputs"),
        (("board.json", "-o", "."), "it is a folder"),
        (("board.json", "-o", "laptop.json/r.html"), "is not a folder"),
        (("nan.json",), "an accuracy of vit/fp32 is none"),
    ],
)
def test_what_it_cannot_do_is_a_sentence_and_nothing_is_written(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    content = json.loads((folder / "laptop.json").read_text("utf-8"))
    (folder / "newer.json").write_text(json.dumps({**content, "schema": 99}))
    content["candidates"][0]["judged"]["top1"] = float("nan")
    (folder / "nan.json").write_text(json.dumps(content))
    with pytest.raises(VitEdgeError, match=said):
        report(*arguments)
    assert not (folder / "report.html").exists()


def test_names_that_are_not_utf_8_are_written_with_escapes(folder: Path) -> None:
    save_document(replace(LAPTOP, dataset="photos\udcff"), folder / "odd.json")
    assert report("odd.json", "--md", "r.md", "--csv", "r.csv").exit_code == 0
    assert "photos\\udcff" in (folder / "report.html").read_text("utf-8")


def test_a_picture_that_cannot_be_drawn_keeps_no_page_from_being_written(folder: Path) -> None:
    save_document(document(candidate("vit/fp32", 1.0, failed="no driver")), folder / "failed.json")
    with pytest.raises(VitEdgeError, match="no frontier to draw"):
        report("failed.json", "--png", "frontier.png")
    assert "no driver" in (folder / "report.html").read_text("utf-8")
