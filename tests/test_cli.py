"""The commands as a user types them: what they print, what they write, how they exit, and what they say when they cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from PIL import Image

from tests.engines import (
    CHECKPOINT,
    IMAGES,
    MODEL,
    ROOT,
    Made,
    edit_manifest,
    quantize_plainly,
    run_python,
    start_python,
    write_images,
)
from vitedge import cli
from vitedge.bench.document import load_document, rows_of
from vitedge.compiler import graph
from vitedge.runtime.camera import open_source
from vitedge.runtime.overlay import open_recorder
from vitedge.specs import Target, to_dict

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

COMMANDS = (
    "make", "tune", "export", "calibrate", "quantize", "build", "pack", "refit", "run", "bench", "report", "estimate",
    "sensitivity", "verify", "explain", "doctor", "init", "models",
)  # fmt: skip
WRITTEN = 18  # files, by `vitedge init`: two READMEs, four recipes, twelve targets
RECORD = {
    "source", "index", "name", "captured_ns", "captured_at", "latency_ms", "timing", "captured", "dropped", "top",
}  # fmt: skip
VITEDGE = "import sys; from vitedge.cli import main; sys.argv[0] = 'vitedge'; main()"
TINY = '''
import torch
from torch import nn
from vitedge import ModelCard, Preprocess

class Tiny(nn.Module):
    """Two patches by two, one block without attention, two classes."""
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))

def tiny():
    torch.manual_seed(0)
    return Tiny(), ModelCard("tiny", "classify", Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3), labels=("dark", "light"))
'''


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """How a command ended. err: on one line each, whatever the width of the terminal."""

    code: int
    out: str
    err: str


Vitedge = Callable[..., Said]


@pytest.fixture
def vitedge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Vitedge:
    """Runs a command line in this process, as the installed script does: `vitedge("run", engine, ...)`."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["vitedge", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which a user has typed `vitedge init`, put a model and 40 images, and typed `vitedge make`."""
    folder = tmp_path_factory.mktemp("a user's [new] folder")
    done = run_python(VITEDGE, "init", folder=folder)
    assert (done.returncode, done.stdout.count("wrote ")) == (0, WRITTEN), done
    (folder / "model.py").write_text(TINY)
    random = np.random.default_rng(0)
    for index in range(40):
        label, low = ("dark", 0) if index % 2 else ("light", 128)
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(low, low + 128, (30 + index, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / label / f"{index}.jpg")
    done = run_python(VITEDGE, *MAKE, "--json", "bench.json", folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    (folder / "told.txt").write_text(done.stderr)
    return folder


MAKE = ("make", "model.py:tiny", "--images", "photos", "--seconds", "0.01")


def steps(err: str) -> list[str]:
    return [line.split()[0] for line in err.splitlines() if line.split()[:1] and line.split()[0] in (*COMMANDS, "bench")]


def modified(folder: Path) -> dict[Path, int]:
    """When each file was written; a manifest is touched to say which engine was asked for last."""
    files = [path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "manifest.json"}


def test_make_in_a_new_workspace_does_every_step(workspace: Path) -> None:
    out, err = (workspace / "said.txt").read_text(), (workspace / "told.txt").read_text()
    assert steps(err) == ["export", "calibrate", "quantize", "build", "build", "bench"]
    assert "fresh" not in err and "torch and ONNX differ by" in err
    named = dict(re.findall(r"^(engine|report): (.+)$", out, re.MULTILINE))
    assert (workspace / named["engine"] / "manifest.json").is_file() and (workspace / named["report"]).is_file()
    assert re.search(r"^. *fp32\S* .*\n. *int8\S* ", out, re.MULTILINE)
    assert (workspace / "calibration" / "scales" / "tiny.int8.json").is_file()
    rows = rows_of(load_document(workspace / "bench.json"))
    assert [(row.variant, row.images) for row in rows] == [("fp32", 40), ("int8", 40)]
    assert rows[0].top1 is not None and rows[1].agreement > 80 and rows[1].sqnr_db > 20
    assert not [path for path in workspace.rglob("*") if ".partial" in path.name or path.suffix == ".old"]


def test_a_second_make_is_all_fresh_and_touches_nothing_but_the_report(
    workspace: Path, vitedge: Vitedge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = modified(workspace)
    said = vitedge(*MAKE)
    assert said.code == 0
    assert steps(said.err) == ["export", "calibrate", "quantize", "build", "build", "bench"]
    assert said.err.count("is fresh") == 5
    after = modified(workspace)
    assert {path for path in after if after[path] != before.get(path)} == {workspace / "engines" / "tiny" / "report.html"}
    assert after.keys() == before.keys()


def test_make_goes_on_where_it_was_interrupted(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    for path in Path("engines/tiny").glob("int8-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = vitedge(*MAKE)
    assert said.code == 0
    states = [(line.split()[0], "is fresh" in line) for line in said.err.splitlines() if line.split()[0] in COMMANDS]
    assert states[:5] == [("export", True), ("calibrate", True), ("quantize", False), ("build", True), ("build", False)]


def test_make_does_again_what_its_inputs_changed(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    Path("calibration/recipes/int8.toml").write_text("method = 'percentile'\npercentile = 99.9\n")
    said = vitedge(*MAKE)
    assert said.code == 0 and said.err.count("is fresh") == 2  # the export and its engine
    assert json.loads(Path("calibration/scales/tiny.int8.json").read_text())["recipe"]["method"] == "percentile"
    next(Path("photos/dark").iterdir()).unlink()
    assert vitedge(*MAKE).err.count("is fresh") == 2


def test_a_missed_bound_exits_1_after_the_table(workspace: Path, vitedge: Vitedge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    said = vitedge(*MAKE, "--max-drop", "-101")
    assert said.code == 1
    assert re.search(r"^.. int8 ", said.out, re.MULTILINE) and "report: engines" in said.out
    assert "error: int8 loses" in said.err and "that --max-drop allows" in said.err and "hint:" in said.err
    assert vitedge(*MAKE, "--max-drop", "101").code == 0


def test_sensitivity_prints_the_layers_and_draws_them(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    graph = next(Path("engines/tiny").glob("fp32-*.onnx"))
    command = ("sensitivity", graph, "--images", "photos", "--limit", 4, "--json", "costs.json", "--plot", "new/layers.html")
    said = vitedge(*command)
    assert said.code == 0, said
    assert all(re.search(rf"^{name} +[\d.]+ +[\d.]+ +[\d.]+$", said.out, re.MULTILINE) for name in ("patches", "up", "head"))
    assert "predicted dB" in said.out and "modelled" in said.out and "plot: new/layers.html" in said.out
    content = json.loads(Path("costs.json").read_text())
    assert {cost["name"] for cost in content["costs"]} == {"patches", "up", "down", "head"} and content["images"] == 4
    assert list(content["measured"]) == ["0", "1", "2", "4"] and content["measured"]["4"] > 100
    page = Path("new/layers.html").read_text()
    assert page.count("<svg") == 2 and "patches" in page and "src=" not in page
    assert "calibrate" in said.err and said.err.count("is fresh") == 2  # make has been here before
    assert vitedge("sensitivity", graph, "--images", "photos", "--plot", "x.pdf").err.startswith("error: cannot draw x.pdf")
    assert vitedge("sensitivity", graph, "--images", "photos", "--recipe", "bf16").code == 1


def test_a_bound_on_the_output_frees_layers(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    Path("calibration/recipes/int8.toml").write_text("float_type = 'fp32'\n")
    assert vitedge(*MAKE, "--json", "before.json").code == 0
    before = rows_of(load_document(Path("before.json")))[1].sqnr_db
    assert before is not None
    said = vitedge(*MAKE, "--min-sqnr", before + 3, "--json", "after.json")
    assert said.code == 0, said.err
    assert (rows_of(load_document(Path("after.json")))[1].sqnr_db or 0) >= before + 3
    assert re.search(r"^bound +.* in float \(.*a modelled", said.err, re.MULTILINE)
    again = vitedge(*MAKE, "--min-sqnr", before + 3)
    assert again.code == 0 and re.search(r"^bound .* is fresh$", again.err, re.MULTILINE)
    said = vitedge(*MAKE, "--min-sqnr", 1000)
    assert said.code == 1 and said.err.count("error: int8 has an SQNR of") == 1
    assert "note: int8: the bound on accuracy is missed even with all 4 Linears in floating point" in said.err


def test_several_recipes_and_judge_images_are_measured_side_by_side(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "copy"))
    Path("calibration/recipes/headless.toml").write_text("skip = ['head']\nfloat_type = 'fp32'\n")
    shutil.copytree("photos/dark", "judge/dark")
    said = vitedge(*MAKE, "--recipe", "int8", "--recipe", "headless", "--judge", "judge", "--json", "rows.json")
    assert said.code == 0
    rows = rows_of(load_document(Path("rows.json")))
    assert [(row.variant, row.images) for row in rows] == [("fp32", 20), ("int8", 20), ("headless", 20)]
    assert len(re.findall("^engine: ", said.out, re.MULTILINE)) == 3
    assert "judge, 20 images" in Path("engines/tiny/report.html").read_text()


def test_paths_are_printed_as_they_are_whatever_stands_in_them(
    made: Made, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich would take [bold] for markup and :cat: for a picture of one; scripts read these paths."""
    folder = tmp_path / "my [bold] :cat: engines"
    monkeypatch.chdir(tmp_path)
    said = vitedge("build", made.graphs["int8"], "--output", folder)
    assert said.code == 0 and Path(said.out.strip()).is_dir(), said
    assert str(said.out.strip()) in said.err
    said = vitedge("init", folder)
    assert all(Path(line[7:]).is_file() for line in said.out.splitlines()) and len(said.out.splitlines()) == WRITTEN
    said = vitedge("run", folder / "none", "--source", folder)
    assert f"error: {folder / 'none'} is not an engine" in said.err


def test_the_single_steps_do_what_make_does(
    workspace: Path, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(workspace / "model.py", tmp_path)
    module: dict[str, Any] = {}
    exec(TINY, module)
    torch.save({name: 2 * weight for name, weight in module["tiny"]()[0].state_dict().items()}, "twice.pth")
    photos = workspace / "photos"
    exported = vitedge("export", "model.py:tiny", "--checkpoint", "twice.pth", "--images", photos)
    assert exported.code == 0 and "real images" in exported.err
    graph = Path(exported.out.strip())
    assert graph.parts[:2] == ("engines", "tiny") and graph.name.startswith("fp32-")
    assert "is fresh" in vitedge("export", "model.py:tiny", "--checkpoint", "twice.pth").err

    (tmp_path / "mine.toml").write_text("float_type = 'fp32'\nskip = ['head']\n")
    calibrated = vitedge("calibrate", graph, "--images", photos, "--recipe", "mine.toml", "-o", "scales.json")
    assert (calibrated.code, calibrated.out) == (0, "scales.json\n")
    assert "from 40 images" in calibrated.err

    quantized = vitedge("quantize", graph, "--scales", "scales.json", "--images", photos, "-o", "mine.onnx")
    assert (quantized.code, quantized.out) == (0, "mine.onnx\n")
    assert "3 Linears in INT8" in quantized.err

    built = vitedge("build", "mine.onnx")
    assert built.code == 0 and Path(built.out.strip()).name.startswith("mine-")
    assert json.loads(Path(built.out.strip(), "manifest.json").read_text())["recipe"]["skip"] == ["head"]
    assert "is fresh" in vitedge("build", "mine.onnx").err

    ran = vitedge("run", "tiny/mine", "--source", photos, "--limit", 3)
    assert ran.code == 0 and len(ran.out.splitlines()) == 3


def test_run_over_a_folder_prints_a_line_an_image(made: Made, vitedge: Vitedge) -> None:
    said = vitedge("run", made.engines["openvino", "int8"], "--source", made.images, "--top", 2)
    lines = said.out.splitlines()
    assert said.code == 0 and len(lines) == IMAGES
    for line in lines:
        assert re.fullmatch(r"\d{3}\.png  \S.* [\d.]+%  \S.* [\d.]+%  preprocess [\d.]+  infer [\d.]+ ms", line), line
    assert re.search(rf"^{IMAGES} frames, [\d.]+ a second$", said.err, re.MULTILINE)


def test_run_with_json_prints_an_object_a_frame(made: Made, vitedge: Vitedge) -> None:
    said = vitedge("run", made.engines["openvino", "int8"], "--source", made.images, "--json", "--top", 3, "--limit", 7)
    frames = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 0 and [frame["index"] for frame in frames] == list(range(7))
    for frame in frames:
        assert set(frame) == RECORD and len(frame["top"]) == 3
        probabilities = [top["probability"] for top in frame["top"]]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1.0001
        assert set(frame["timing"]) == {"capture_ms", "queue_ms", "preprocess_ms", "infer_ms", "postprocess_ms"}
    assert '"probability"' not in said.err


def test_run_saves_annotated_pictures(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    said = vitedge("run", made.engines["openvino", "int8"], "--source", made.images, "--save", tmp_path / "out", "--limit", 3)
    assert said.code == 0 and f"wrote {tmp_path / 'out'}" in said.err
    pictures = sorted((tmp_path / "out").iterdir())
    assert len(pictures) == 3 and all(path.suffix == ".jpg" for path in pictures)
    assert all(Image.open(path).width >= 320 for path in pictures)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 frames, each a JPEG of its own."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    with open_recorder(path, 10) as recorder:
        for index in range(12):
            recorder.write(np.full((64, 96, 3), 20 * index, np.uint8))
    return path


@pytest.mark.parametrize("name", ["out.mp4", "out.avi"])
def test_run_over_a_video_saves_one_with_as_many_frames(
    made: Made, vitedge: Vitedge, clip: Path, tmp_path: Path, name: str
) -> None:
    said = vitedge("run", made.engines["openvino", "int8"], "--source", clip, "--save", tmp_path / name)
    assert said.code == 0 and len(said.out.splitlines()) == 12 and "note:" not in said.err
    with open_source(str(tmp_path / name)) as source:
        assert source.fps == 10
        assert len(list(source)) == 12


def test_a_video_that_ends_in_a_corrupt_frame_exits_0_with_a_note(
    made: Made, vitedge: Vitedge, clip: Path, tmp_path: Path
) -> None:
    data = bytearray(clip.read_bytes())
    last = data.rindex(b"\xff\xd8\xff")
    end = data.index(b"\xff\xd9", last)
    data[last:end] = bytes(end - last)
    (tmp_path / "broken.avi").write_bytes(data)
    said = vitedge("run", made.engines["openvino", "int8"], "--source", tmp_path / "broken.avi", "--save", tmp_path / "out.mp4")
    assert said.code == 0 and len(said.out.splitlines()) == 11
    assert "note: " in said.err and "12 frames, only 11 could be decoded" in said.err
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert len(list(source)) == 11


def test_corrupt_images_are_left_out_and_counted(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    folder = shutil.copytree(made.images, tmp_path / "images")
    for index in range(7):
        (folder / "Bag" / f"broken{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    engine = made.engines["openvino", "int8"]
    ran = vitedge("run", engine, "--source", folder)
    assert ran.code == 0 and len(ran.out.splitlines()) == IMAGES and f"{IMAGES} frames" in ran.err
    measured = vitedge("bench", engine, "--images", folder, "--seconds", 0.01, "--json", tmp_path / "rows.json")
    assert measured.code == 0 and rows_of(load_document(tmp_path / "rows.json"))[0].images == IMAGES
    calibrated = vitedge("calibrate", made.graphs["fp32"], "--images", folder, "-o", tmp_path / "scales.json")
    assert calibrated.code == 0 and f"from {IMAGES} images" in calibrated.err
    for said in (ran, measured, calibrated):
        told = said.err.count("broken")  # a remark on a busy machine may take the place of one
        assert told in (4, 5) and f"and {7 - told} more of the kind" in said.err, said.err


def test_bench_compares_engines_at_several_batches_and_writes_a_report(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    engines = [made.engines["openvino", "fp32"], made.engines["openvino", "int8"]]
    files = ["--json", tmp_path / "rows.json", "--report", tmp_path / "new" / "report.html"]
    said = vitedge("bench", *engines, "--images", made.images, "--batch", 1, "--batch", 4, "--seconds", 0.01, *files)
    assert said.code == 0
    document = load_document(tmp_path / "rows.json")
    rows = rows_of(document)
    assert [(row.variant, row.batch) for row in rows] == [("fp32", 1), ("int8", 1), ("fp32", 4), ("int8", 4)]
    assert all(row.images_per_s > 0 and row.top1 > 80 for row in rows)
    assert rows[0].agreement is None and rows[1].agreement > 90
    assert document.environment["python"] == sys.version.split()[0]
    assert "<html" in (tmp_path / "new" / "report.html").read_text()
    assert len(re.findall(r"^.  (?:fp32|int8)\S* +[14] ", said.out, re.MULTILINE)) == 4


def test_bench_counts_the_files_a_second_where_asked(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    engines = [made.engines["openvino", "fp32"], made.engines["openvino", "int8"]]
    options = [
        "--images",
        made.images,
        "--batch",
        1,
        "--batch",
        2,
        "--seconds",
        0.3,
        "--throughput",
        "--json",
        tmp_path / "rows.json",
    ]
    said = vitedge("bench", *engines, *options)
    assert said.code == 0 and "files/s" in said.out and "images a batch" in said.err, said
    rates = [row.sustained_per_s for row in rows_of(load_document(tmp_path / "rows.json"))]
    assert rates[:2] == rates[2:] and min(rates) > 10


def test_estimate_tells_certain_from_expected_for_devices_that_are_not_here(
    made: Made, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.root)
    targets = ("--target", "orin-nano-super", "--target", "h100")
    said = vitedge("estimate", "fashion-vit/int8.onnx", *targets, "--json", tmp_path / "found.json")
    assert said.code == 0, said
    head, nano, h100 = said.out.splitlines()
    assert head.split("  ")[0] == "target" and head.endswith("expected ms")
    assert nano.split()[0] == "orin-nano-super" and h100.split()[0] == "h100" and nano.endswith("–") and h100.endswith("–")
    assert "orin-nano-super: no expectation, as the bound of" in said.err, "a hundred-thousandth of what was measured there"
    assert "h100: no expectation, as no measurement" in said.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["work"]["macs"].keys() == {"int8", "fp32"}
    assert [one["target"] for one in found["estimates"]] == ["orin-nano-super", "h100"]
    model = graph.load(made.graphs["int8"])
    onnx.helper.set_model_props(model, {key: value for key, value in graph.metadata(model).items() if key != "vitedge.work"})
    graph.save(model, tmp_path / "older.onnx")
    assert vitedge("estimate", tmp_path / "older.onnx", *targets).out == said.out, "it is counted where the file does not tell"


def test_verify_shows_layer_by_layer_where_accuracy_went(
    made: Made, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(made.images, tmp_path / "images")
    (images / "a [broken] one.png").write_bytes(b"no image")
    monkeypatch.chdir(made.root)
    options = ("--images", images, "--limit", IMAGES + 1, "--json", tmp_path / "found.json")
    said = vitedge("verify", "fashion-vit/int8.onnx", "--against", "fashion-vit/fp32.onnx", *options)
    assert said.code == 0, said
    head, *lines, last = said.out.splitlines()
    assert head.split() == ["#", "layer", "own", "dB", "SQNR", "dB"]
    own = [float(line.split()[-2]) for line in lines]
    assert own == sorted(own)  # the worst first
    found = json.loads((tmp_path / "found.json").read_text())
    assert {loss["name"] for loss in found["layers"]} == {line.split()[-3] for line in lines}
    assert len(found["layers"]) + len(found["unmatched"]) == 18
    assert found["images"] == IMAGES and "machine" in found["environment"]
    assert last.startswith(f"{IMAGES} images: SQNR {found['sqnr_db']:.1f} dB (worst: {found['worst_db']:.1f} dB, {images}")
    assert "same top-1 for" in last
    assert "a [broken] one.png" in said.err


def test_verify_fails_below_a_bound_and_has_still_written_what_it_found(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    engine, files = made.engines["openvino", "int8"], ("--images", made.images, "--limit", 4)
    against = ("--against", MODEL, "--checkpoint", CHECKPOINT)
    assert vitedge("verify", engine, *against, *files, "--min-sqnr", 15).code == 0
    said = vitedge("verify", engine, *against, *files, "--min-sqnr", 90, "--json", tmp_path / "found.json")
    assert said.code == 1 and "below the 90 dB that --min-sqnr asks for" in said.err and "hint: " in said.err
    assert said.out.startswith("4 images: SQNR ") and len(said.out.splitlines()) == 1  # no layers, of an engine
    assert json.loads((tmp_path / "found.json").read_text())["layers"] == []


def test_verify_says_which_linears_it_could_not_compare(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    from vitedge.compiler import graph
    from vitedge.compiler.layers import find_layers

    model = graph.load(quantize_plainly(made, tmp_path))
    tensor = find_layers(model)[3].output
    graph.rename_tensor(model, tensor, "another", graph.producers(model)[tensor])
    graph.save(model, tmp_path / "int8.onnx")
    said = vitedge("verify", tmp_path / "int8.onnx", "--against", made.graphs["fp32"], "--images", made.images, "--limit", 1)
    assert said.code == 0 and len(said.out.splitlines()) == 19
    assert f"note: 1 of 18 Linears has no counterpart of the same name in both graphs: {find_layers(model)[3].name}" in said.err


def test_explain_shows_where_the_time_of_an_engine_goes(made: Made, vitedge: Vitedge, tmp_path: Path) -> None:
    said = vitedge("explain", made.engines["openvino", "int8"], "--seconds", 0.01, "--all", "--json", tmp_path / "found.json")
    assert said.code == 0, said.err
    for name in (
        "blocks.0.attention.qkv",
        "blocks.3.mlp.2",
        "between layers",
        "All 18 Linears that the graph quantizes run in INT8",
    ):
        assert name in said.out
    (found,) = json.loads((tmp_path / "found.json").read_text())["engines"]
    total = sum(entry["layer"]["ms"] for entry in found["layers"]) + found["between_ms"]
    assert total == pytest.approx(found["profiled_ms"]) and all(sentence in said.out for sentence in found["findings"])


def test_explain_sets_two_engines_side_by_side(made: Made, vitedge: Vitedge) -> None:
    said = vitedge(
        "explain", *(made.engines["openvino", variant] for variant in ("fp32", "int8")), "--batch", 2, "--seconds", 0.01
    )
    assert said.code == 0, said.err
    assert re.search(r"int8 is \d+\.\d times (faster|slower) than fp32 .* of int8's time is not in Linears\.", said.out)
    assert re.search(r"^fc1 +\d.* fp32 +int8", said.out, re.MULTILINE) and "batch 2" in said.out


def test_explain_says_what_it_cannot_do(made: Made, vitedge: Vitedge) -> None:
    said = vitedge("explain", made.engines["onnxruntime", "int8"])
    assert said.code == 1 and "is an engine of the reference" in said.err and "hint:" in said.err
    said = vitedge("explain", made.engines["openvino", "int8"], "--batch", 17)
    assert said.code == 1 and "was built for 1 to 16 images at once, not 17" in said.err


def test_models_lists_the_ways_to_name_one(vitedge: Vitedge) -> None:
    said = vitedge("models")
    assert said.code == 0 and said.err == ""
    for word in ("path/file.py:factory", "hf:", "timm:", "torchvision:", ".[compile]"):
        assert word in said.out


def test_doctor_passes_every_backend_here(vitedge: Vitedge) -> None:
    said = vitedge("doctor")
    assert said.code == 0
    assert re.search("^PASS  openvino", said.out, re.MULTILINE) and re.search("^PASS  onnxruntime", said.out, re.MULTILINE)


def test_init_keeps_what_is_there(vitedge: Vitedge, tmp_path: Path) -> None:
    assert vitedge("init", tmp_path).out.count("wrote ") == WRITTEN
    said = vitedge("init", tmp_path)
    assert (said.code, said.out.count("kept "), said.out.count("wrote ")) == (0, WRITTEN, 0)


def test_the_newest_engine_of_exactly_that_variant_is_found(
    made: Made, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 is not int8-smooth, and what a killed build left behind is no engine."""
    folder = tmp_path / "engines" / "vit"
    for name, variant in (("int8-000000000000", "int8"), ("int8-smooth-111111111111", "fp32"), (".int8-22.7.partial", "fp32")):
        shutil.copytree(made.engines["onnxruntime", variant], folder / name, copy_function=shutil.copyfile)
    (tmp_path / "calibration").mkdir()
    monkeypatch.chdir(tmp_path)
    said = vitedge("bench", "vit/int8", "--images", made.images, "--seconds", 0.01)
    assert said.code == 0 and re.search("^int8 ", said.out, re.MULTILINE), said
    said = vitedge("run", "vit/int", "--source", made.images)
    assert said.code == 1 and "hint:  there are vit/int8, vit/int8-smooth\n" in said.err


def test_a_newer_engine_for_another_machine_is_passed_over_and_that_is_said(
    made: Made, vitedge: Vitedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, foreign = (tmp_path / "engines" / "vit" / f"int8-{name * 12}" for name in "01")
    for folder in (mine, foreign):
        shutil.copytree(made.engines["openvino", "int8"], folder, copy_function=shutil.copyfile)
    target = to_dict(Target("nowhere", "tensorrt-rtx", capability="99.0"))
    edit_manifest(foreign, backend="tensorrt-rtx", target=target)
    os.utime(mine / "manifest.json", (1000, 1000))
    (tmp_path / "calibration").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in (["bench", "vit/int8", "--images", made.images, "--seconds", 0.01], ["explain", "vit/int8", "--seconds", 0.1]):
        said = vitedge(*command)
        assert said.code == 0, said
        assert f"engine: engines/vit/{mine.name}\n" in said.err
        assert f"note: engines/vit/{foreign.name} is newer, but is for another machine\n" in said.err
    edit_manifest(mine, backend="tensorrt-rtx", target=target)
    os.utime(mine / "manifest.json", (1000, 1000))
    said = vitedge("bench", "vit/int8", "--images", made.images, "--seconds", 0.01)
    assert said.code == 1 and f"engine: engines/vit/{foreign.name}\n" in said.err, "none opens here: the newest is asked"


BENCH = ["bench", "engine", "--images", "images"]
VERIFY = ["verify", "fp32.onnx", "--images", "images", "--against"]
OVERWRITTEN = "is an input of this command and would be overwritten"
MISTAKES = {
    "missing folder": (["make", MODEL, "--images", "none"], "there is no folder none"),
    "empty folder": (["make", MODEL, "--images", "empty"], "there are no images in empty"),
    "missing judge folder": (["make", MODEL, "--images", "images", "--judge", "none"], "there is no folder none"),
    "unknown recipe": (["make", MODEL, "--images", "images", "--recipe", "int9"], "there is no recipe 'int9'"),
    "unknown target": (["make", MODEL, "--images", "images", "--target", "fpga"], "there is no target 'fpga'"),
    "a tolerance that is no number": (["export", MODEL, "--tolerance", "nan"], "no difference is within nan"),
    "recipe with a typing mistake": (["make", MODEL, "--images", "images", "--recipe", "typo.toml"], "no key 'skipp'"),
    "recipe that is no TOML": (["make", MODEL, "--images", "images", "--recipe", "broken.toml"], "cannot read broken.toml"),
    "no model": (["make", "resnet50", "--images", "images"], "'resnet50' does not name a model"),
    "model file missing": (["make", "none.py:vit", "--images", "images"], "there is no file none.py"),
    "model function missing": (["export", f"{MODEL}x"], "has no function 'vitx'"),
    "checkpoint missing": (["export", MODEL, "--checkpoint", "none.pth"], "none.pth"),
    "preprocess file missing": (["export", MODEL, "--preprocess", "none.toml"], "none.toml"),
    "scales over the model": (["calibrate", "fp32.onnx", "--images", "images", "-o", "fp32.onnx"], "would be overwritten"),
    "too few images": (["calibrate", "fp32.onnx", "--images", "few"], "only 3 images can be read"),
    "recipe without calibration": (["calibrate", "fp32.onnx", "--images", "images", "--recipe", "bf16"], "bf16"),
    "calibrating what is no ONNX": (["calibrate", "typo.toml", "--images", "images"], "typo.toml is not a readable ONNX model"),
    "scales missing": (["quantize", "fp32.onnx", "--scales", "none.json"], "cannot read none.json"),
    "scales of another model": (["quantize", "fp32.onnx", "--scales", "other.json"], "another model"),
    "quantizing without images": (
        ["quantize", "fp32.onnx", "--scales", "scales.json"],
        "looks at the calibration images once more",
    ),
    "quantizing with others": (["quantize", "fp32.onnx", "--scales", "scales.json", "--images", "few"], "these are other images"),
    "building what is missing": (["build", "none.onnx"], "none.onnx does not exist"),
    "building a folder": (["build", "images"], "images is a folder, and no ONNX file"),
    "unknown engine": (["run", "none", "--source", "images"], "there is no engine none"),
    "unknown variant": (["run", "vit/int4", "--source", "images"], "there is no engine vit/int4"),
    "unknown engine to measure": (["bench", "vit/int4", "--images", "images"], "there is no engine vit/int4"),
    "source missing": (["run", "engine", "--source", "none.mp4"], "there is no file or folder none.mp4"),
    "source that is no video": (["run", "engine", "--source", "typo.toml"], "typo.toml holds no frame"),
    "source of an unknown kind": (["run", "engine", "--source", "rtsp://camera"], "rtsp://"),
    "no camera": (["run", "engine", "--source", "98"], "camera 98"),
    "unknown video format": (["run", "engine", "--source", "images", "--save", "out.gif"], "cannot record out.gif"),
    "batch beyond the profile": ([*BENCH, "--batch", "17"], "1 to 16 images at once, not 17"),
    "result over a folder": ([*BENCH, "--seconds", "0.01", "--json", "empty"], "cannot write empty: it is a folder"),
    "estimating what is missing": (["estimate", "none.onnx", "--target", "h100"], "none.onnx does not exist"),
    "estimating an unknown variant": (["estimate", "vit/int4.onnx", "--target", "h100"], "there is no ONNX file vit/int4.onnx"),
    "estimating for an unknown target": (["estimate", "fp32.onnx", "--target", "h101"], "there is no target 'h101'"),
    "estimating for an unknown backend": (
        ["estimate", "fp32.onnx", "--target", "h100", "--backend", "abacus"],
        "no backend 'abacus'",
    ),
    "packing for an unknown backend": (["pack", "fp32.onnx", "--target", "h100", "--backend", "abacus"], "no backend 'abacus'"),
    "refitting with an unknown variant": (["refit", "engine", "--onnx", "vit/int4.onnx"], "there is no ONNX file vit/int4.onnx"),
    "estimating for any GPU": (["estimate", "fp32.onnx", "--target", "local"], "no peaks are known of the target 'local'"),
    "verifying what is missing": ([*VERIFY, "none.onnx"], "none.onnx does not exist"),
    "verifying an unknown variant": ([*VERIFY, "vit/int4.onnx"], "there is no ONNX file vit/int4.onnx"),
    "verifying against what is no ONNX": ([*VERIFY, "typo.toml"], "typo.toml is not a readable ONNX model"),
    "verifying against an unknown engine": ([*VERIFY, "resnet50"], "there is no engine resnet50"),
    "verifying on an empty folder": (["verify", "fp32.onnx", "--against", "engine", "--images", "empty"], "no images in empty"),
    "verifying images that are none": (["verify", "fp32.onnx", "--against", "engine", "--images", "typo.toml"], "typo.toml"),
    "a checkpoint for nobody": ([*VERIFY, "engine", "--checkpoint", "x.pth"], "--checkpoint x.pth is for a torch model"),
    "measurements over a model": (["estimate", "fp32.onnx", "--target", "h100", "--json", "fp32.onnx"], OVERWRITTEN),
    "measurements over a picture": ([*BENCH, "--json", "images/../{picture}"], OVERWRITTEN),
    "a report over an engine": ([*BENCH, "--report", "engine/manifest.json"], OVERWRITTEN),
    "an explanation over an engine": (["explain", "engine", "--json", "engine/manifest.json"], OVERWRITTEN),
    "a comparison over a model": ([*VERIFY, "engine", "--json", "fp32.onnx"], OVERWRITTEN),
    "costs over the model": (["sensitivity", "fp32.onnx", "--images", "images", "--json", "fp32.onnx"], OVERWRITTEN),
    "rows over a picture": (["make", MODEL, "--images", "images", "--json", "{picture}"], OVERWRITTEN),
    "an endless benchmark": ([*BENCH, "--seconds", "inf"], "not for inf"),
    "no time to explain": (["explain", "engine", "--seconds", "0"], "not for 0"),
    "less than no time to explain": (["explain", "engine", "--seconds", "-1"], "not for -1"),
    "no number of seconds to explain": (["explain", "engine", "--seconds", "nan"], "not for nan"),
    "a name that no file has": (["run", 300 * "x", "--source", "images"], f"cannot read {200 * 'x'}...: File name too long"),
    "an archive of another kind": (["pack", "fp32.onnx", "--target", "cpu", "-o", "box.zip"], "box.zip would be a folder"),
    "workspace in a file": (["init", "typo.toml"], "cannot write typo.toml"),
}


@pytest.fixture(scope="module")
def mistaken(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which things are missing or wrong."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "empty").mkdir()
    write_images(folder / "images", 20)
    write_images(folder / "few", 3)
    shutil.copy(made.graphs["fp32"], folder / "fp32.onnx")
    shutil.copytree(made.engines["openvino", "int8"], folder / "engine")
    (folder / "typo.toml").write_text("skipp = ['head']\n")
    (folder / "broken.toml").write_text("skip = [\n")
    table = json.loads((made.root / "calibration" / "scales" / "fashion-vit.int8.json").read_text())
    (folder / "scales.json").write_text(json.dumps(table))
    (folder / "other.json").write_text(json.dumps(table | {"model_sha256": "0" * 64}))
    return folder


@pytest.mark.parametrize("case", MISTAKES)
def test_a_users_mistake_exits_1_with_one_sentence_and_no_traceback(
    mistaken: Path, vitedge: Vitedge, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, sentence = MISTAKES[case]
    monkeypatch.chdir(mistaken)
    picture = min(Path("images").rglob("*.png"))
    arguments = [argument.replace("{picture}", str(picture)) for argument in arguments]
    before = modified(mistaken)
    said = vitedge(*arguments)
    assert said.code == 1, said
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], said.err
    assert "Traceback" not in said.err
    assert modified(mistaken) == before


@pytest.mark.parametrize(
    "case",
    ["missing folder", "empty folder", "unknown recipe", "unknown target", "no model", "unknown engine", "unknown variant"],
)
def test_a_common_mistake_comes_with_a_hint(mistaken: Path, vitedge: Vitedge, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(mistaken)
    said = vitedge(*MISTAKES[case][0])
    assert said.err.splitlines()[-1].startswith("hint: ") and len(said.err.splitlines()[-1]) > 15
    assert said.out == ""


WRONG = (
    ["fly"],
    ["make"],
    ["make", MODEL],
    ["make", MODEL, "--images", "x", "--max-drop", "much"],
    ["run", "x"],
    ["run", "x", "--source", "y", "--top", "0"],
    ["bench", "x", "--images", "y", "--batch", "0"],
    ["estimate", "x"],
    ["estimate", "x", "--target", "h100", "--batch", "0"],
    ["estimate", "x", "--target", "h100", "--batch", "4097"],
    ["verify", "x", "--images", "y"],
    ["verify", "x", "--against", "y", "--images", "z", "--limit", "0"],
    ["doctor", "now"],
    ["models", "--colour"],
)


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_command_typed_wrongly_exits_2(vitedge: Vitedge, arguments: list[str]) -> None:
    said = vitedge(*arguments)
    assert said.code == 2 and said.out == "" and "Usage: vitedge" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_it_and_all_its_options(vitedge: Vitedge, command: str) -> None:
    said = vitedge(command, "--help")
    assert said.code == 0 and f"Usage: vitedge {command}" in said.out
    parsed = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert set(parsed) == set(COMMANDS)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.out).split())
    assert parsed[command].help.split(".")[0] in text
    for parameter in parsed[command].params:
        assert parameter.name == "help" or len(parameter.help or "") > 10, f"{command} does not explain {parameter.name}"


def test_help_names_every_command_and_where_to_begin(vitedge: Vitedge) -> None:
    said = vitedge("--help")
    assert said.code == 0 and "vitedge doctor" in said.out
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b +\S", said.out)
    assert vitedge("--version").out.startswith("vitedge 0.")
    bare = vitedge()
    assert "Usage: vitedge" in bare.out + bare.err


def test_the_package_runs_as_a_module_and_exits_with_the_same_status(tmp_path: Path) -> None:
    for arguments, code in ((["--version"], 0), (["run", "none", "--source", "x"], 1), (["fly"], 2)):
        command = [sys.executable, "-m", "vitedge", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr


def test_an_interrupted_command_says_so_and_exits_130(made: Made, tmp_path: Path) -> None:
    tells = """
import vitedge.bench.timing as timing
measure = timing.measure
def told(*arguments, **options):
    print("timing", flush=True)
    return measure(*arguments, **options)
timing.measure = told
"""
    command = ("bench", made.engines["openvino", "int8"], "--images", made.images, "--seconds", 600)
    process = start_python(tells + VITEDGE, *command, folder=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "timing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; nothing was written" and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(made: Made) -> None:
    process = start_python(VITEDGE, "run", made.engines["onnxruntime", "int8"], "--source", made.images, "--json")
    assert process.stdout is not None and json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in said and "Exception" not in said, said
