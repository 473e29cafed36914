"""What is fresh is skipped, what its inputs changed is made again, and a bound on the loss is held."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import CHECKPOINT, FASHION, IMAGES, MODEL, Made, Silent, run_python
from vitedge import pipeline
from vitedge.backends.build import read_manifest
from vitedge.bound import Bound, check_bound
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import list_images
from vitedge.pipeline import Job, ModelSource
from vitedge.runtime.engine import open_engine
from vitedge.specs import BenchRow, Recipe, Target

pytest.importorskip("torch")
pytest.importorskip("openvino")


@pytest.fixture
def copy(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace of its own, with the exported model and its engines in it, and the current folder."""
    root = Path(shutil.copytree(made.root, tmp_path / "workspace"))
    monkeypatch.chdir(root)
    return root


def fresh(watcher: Silent) -> list[tuple[str, bool]]:
    return [(line.partition(":")[0], line.endswith(" is fresh")) for line in watcher.lines]


def test_make_tells_each_step_in_order_and_gives_all_that_it_made(copy: Path) -> None:
    (copy / "plain.toml").write_text("method = 'none'\nfloat_type = 'fp32'\n")
    watcher = Silent()
    job = Job(ModelSource(MODEL, CHECKPOINT), copy / "images", copy, recipes=("int8", "plain.toml"), seconds=0)
    result = pipeline.make(job, watcher)
    steps = [step for step, _ in fresh(watcher)]
    assert steps == ["export", "calibrate", "quantize", "quantize", "build", "build", "build", "bench"]
    assert [read_manifest(folder).variant for folder in result.engines] == ["fp32", "int8", "plain"]
    assert [row.variant for row in result.rows] == ["fp32", "int8", "plain"] and result.rows[0].images == IMAGES
    assert result.rows[2].sqnr_db is not None and result.rows[2].sqnr_db > 100  # plain is FP32 once more
    assert result.report.is_file()
    assert [note for note in result.notes if "another process" not in note and "--judge" not in note] == []
    again = Silent()
    assert pipeline.make(job, again).engines == result.engines
    assert [is_fresh for _, is_fresh in fresh(again)] == [True] * 7 + [False]  # measuring is never fresh


def test_a_target_file_chooses_the_backend(copy: Path) -> None:
    (copy / "engines" / "targets").mkdir()
    (copy / "engines" / "targets" / "reference.toml").write_text("backend = 'onnxruntime'\nbatch = [1, 1, 4]\n")
    job = Job(ModelSource(MODEL, CHECKPOINT), copy / "images", copy, target="reference", seconds=0)
    result = pipeline.make(job, Silent())
    assert {row.backend for row in result.rows} == {"onnxruntime"}
    assert read_manifest(result.engines[1]).target == Target("reference", "onnxruntime", (1, 1, 4))


def test_images_that_cannot_be_read_are_named_once(copy: Path) -> None:
    (copy / "images" / "broken.png").write_bytes(b"no image")
    watcher = Silent()
    result = pipeline.make(Job(ModelSource(MODEL, CHECKPOINT), copy / "images", copy, seconds=0), watcher)
    assert len([note for note in result.notes if "broken.png" in note]) == 1, result.notes
    assert any(line.startswith("calibrate: ") and "1 unreadable ones skipped" in line for line in watcher.lines), watcher.lines


def test_a_backend_that_does_not_exist_is_found_before_anything_is_done(copy: Path) -> None:
    (copy / "mine.toml").write_text("backend = 'tensorrtx'\n")
    watcher = Silent()
    with pytest.raises(VitEdgeError, match="there is no backend 'tensorrtx'") as caught:
        pipeline.make(Job(ModelSource(MODEL, CHECKPOINT), copy / "images", copy, target="mine.toml"), watcher)
    assert caught.value.hint == "known: openvino, onnxruntime, tensorrt, tensorrt-rtx" and watcher.lines == []
    with pytest.raises(VitEdgeError, match="there is no backend 'tensorrtx'"):
        pipeline.build_step(next((copy / "engines").rglob("int8-*.onnx")), Target(backend="tensorrtx"), copy / "new", watcher)
    assert not (copy / "new").exists() and watcher.lines == []


@pytest.mark.parametrize("wrong", ["recipe", "target", "images", "judge"])
def test_what_is_missing_is_found_before_anything_is_done(copy: Path, wrong: str) -> None:
    changes = {
        "recipe": {"recipes": ("int8", "int9")},
        "target": {"target": "none"},
        "images": {"images": copy / "none"},
        "judge": {"judge": copy / "none"},
    }
    watcher = Silent()
    job = Job(ModelSource(MODEL, CHECKPOINT), copy / "images", copy)
    with pytest.raises(VitEdgeError, match=r"none|int9"):
        pipeline.make(dataclasses.replace(job, **changes[wrong]), watcher)  # type: ignore[arg-type]
    assert watcher.lines == []


def test_a_scale_table_is_fresh_while_model_recipe_and_pictures_are_the_same(copy: Path, made: Made) -> None:
    model, recipe = next((copy / "engines" / "fashion-vit").glob("fp32-*.onnx")), Recipe(float_type="fp32")

    def is_fresh(recipe: Recipe = recipe, model: Path = model) -> bool:
        watcher = Silent()
        pipeline.calibrate_step(model, list_images(copy / "images"), recipe, copy / "scales.json", watcher)
        return fresh(watcher) == [("calibrate", True)]

    assert not is_fresh()
    assert is_fresh()
    assert not is_fresh(dataclasses.replace(recipe, method="percentile"))
    assert not is_fresh()  # the table is now the other recipe's
    assert is_fresh()
    shutil.copytree(copy / "images", copy / "moved")
    shutil.rmtree(copy / "images")
    (copy / "moved").rename(copy / "images")
    assert is_fresh()  # the same pictures, whatever their dates
    first, second = [file.path for file in list_images(copy / "images")][:2]
    shutil.copyfile(second, first)
    assert not is_fresh()
    assert is_fresh()


def test_a_damaged_engine_is_not_fresh_but_built_again(copy: Path) -> None:
    graph = next((copy / "engines" / "fashion-vit").glob("int8-*.onnx"))
    folder = pipeline.build_step(graph, Target(), copy / "engines", watcher := Silent())
    assert fresh(watcher) == [("build", True)]
    (folder / "model.bin").write_bytes(b"")
    assert pipeline.build_step(graph, Target(), copy / "engines", watcher := Silent()) == folder
    assert fresh(watcher) == [("build", False)] and "floats in fp32" in watcher.lines[0]
    open_engine(folder).close()


def test_the_export_key_changes_with_whatever_the_model_is_made_from(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FASHION, tmp_path / "model", ignore=shutil.ignore_patterns(".cache", "data")))
    preprocess = tmp_path / "preprocess.toml"
    preprocess.write_text("size = [28, 28]\n")
    source = ModelSource(f"{folder}/model.py:vit", folder / "vit.safetensors", preprocess)
    keys = [pipeline._source_key(source)]
    assert pipeline._source_key(source) == keys[0]
    changes: list[Callable[[], object]] = [
        lambda: (folder / "model.py").write_text((folder / "model.py").read_text() + "\n"),
        lambda: (folder / "dataset.py").write_text("LABELS = ()\n"),  # which model.py imports
        lambda: (folder / "new.py").write_text(""),
        lambda: preprocess.write_text("size = [32, 32]\n"),
        lambda: source.checkpoint.write_bytes(b"other weights"),  # type: ignore[union-attr]
    ]
    for change in changes:
        change()
        keys.append(pipeline._source_key(source))
    keys.append(pipeline._source_key(dataclasses.replace(source, checkpoint=None)))
    keys.append(pipeline._source_key(dataclasses.replace(source, name=f"{folder}/model.py:other")))
    assert len(set(keys)) == len(keys)


def test_a_folder_of_save_pretrained_is_another_model_when_its_weights_change(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"first epoch")
    source = ModelSource(f"hf:{tmp_path}")
    before = pipeline._source_key(source)
    assert pipeline._source_key(source) == before
    (tmp_path / "model.safetensors").write_bytes(b"second epoch")
    assert pipeline._source_key(source) != before
    assert pipeline._source_key(ModelSource("hf:google/vit-base-patch16-224")) != before  # a name in the hub is no folder


def row(variant: str, top1: float | None, agreement: float | None = None) -> BenchRow:
    return BenchRow("m", variant, "openvino", 1, 1.0, 1.0, 1.0, 1000.0, 1.0, 100, top1, None, agreement)


@pytest.mark.parametrize(
    ("rows", "max_drop", "says"),
    [
        ([row("fp32", 80.0), row("int8", 79.5, 90.0)], 0.4, "int8 loses 0.50 points of top-1, more than the 0.4"),
        ([row("fp32", 80.0), row("int8", 79.5, 90.0)], 0.5, None),
        ([row("fp32", 80.0), row("int8", 81.0, 90.0)], 0.0, None),
        ([row("fp32", 80.0), row("a", 80.0), row("b", 70.0)], 1.0, "b loses 10.00 points"),
        ([row("fp32", None), row("int8", None, 99.0)], 0.5, "int8 loses 1.00 points of agreement with FP32"),
        ([row("fp32", None), row("int8", None, 99.0)], 1.0, None),
        ([row("fp32", None), row("int8", None)], 100.0, "no accuracy to hold against --max-drop"),
        ([row("fp32", 80.0)], 0.0, None),
    ],
)
def test_a_loss_is_held_against_the_bound(rows: list[BenchRow], max_drop: float, says: str | None) -> None:
    if says is None:
        check_bound(rows, Bound(max_drop))
        return
    with pytest.raises(VitEdgeError, match=says) as caught:
        check_bound(rows, Bound(max_drop))
    assert caught.value.hint


@pytest.mark.parametrize("package", ["torch", "onnxscript", "safetensors"])
def test_a_missing_package_of_the_compiler_is_named_with_its_extra(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from vitedge.errors import MissingPackageError
from vitedge.pipeline import require_compiler
try:
    require_compiler()
except MissingPackageError as error:
    print(error, error.hint)
"""
    missing = MissingPackageError(package, "compile")
    assert run_python(code).stdout == f"{missing} {missing.hint}\n"


BAD = "head"
SPOILT = '''
from examples.fashion_mnist.model import vit as original

def vit():
    """The same function, with one channel behind a LayerNorm 3000 times as large, and its Linear making up for it."""
    module, card = original()
    load = module.load_state_dict
    def load_state_dict(*arguments, **options):
        result = load(*arguments, **options)
        module.norm.weight.data[5] *= 3000
        module.norm.bias.data[5] *= 3000
        module.head.weight.data[:, 5] /= 3000
        return result
    module.load_state_dict = load_state_dict
    return module, card
'''


@pytest.fixture
def spoilt(copy: Path) -> Job:
    """A job for a model that one Linear makes useless in INT8 by a recipe that smooths nothing."""
    (copy / "model.py").write_text(SPOILT)
    (copy / "bare.toml").write_text("smoothing = 'none'\nrounding = 'nearest'\nbias_correction = false\nfloat_type = 'fp32'\n")
    source = ModelSource(f"{copy}/model.py:vit", CHECKPOINT)
    return Job(source, copy / "images", copy, recipes=("bare.toml",), seconds=0)


def test_a_bound_on_the_drop_frees_the_layer_that_breaks_it(spoilt: Job) -> None:
    broken = pipeline.make(spoilt, Silent())
    with pytest.raises(VitEdgeError, match="bare loses"):
        check_bound(broken.rows, Bound(3))
    job = dataclasses.replace(spoilt, bound=Bound(max_drop=3))
    mended = pipeline.make(job, watcher := Silent())
    check_bound(mended.rows, job.bound)
    recipe = read_manifest(mended.engines[1]).recipe
    assert recipe is not None and recipe.name == "bare" and BAD in recipe.skip and len(recipe.skip) < 6
    assert mended.engines[0] == broken.engines[0] and mended.engines[1] != broken.engines[1]
    (line,) = [line for line in watcher.lines if line.startswith("bound: ")]
    assert BAD in line and "modelled" in line
    again = pipeline.make(job, watcher := Silent())
    assert again.engines == mended.engines
    assert [is_fresh for _, is_fresh in fresh(watcher)] == [True] * (len(watcher.lines) - 1) + [False]


def test_a_bound_that_nothing_meets_is_a_note_and_then_an_error(spoilt: Job) -> None:
    job = dataclasses.replace(spoilt, bound=Bound(max_drop=-101))
    result = pipeline.make(job, watcher := Silent())
    assert [note for note in result.notes if "missed even with all 18 Linears" in note]
    assert "bound: no choice of Linears meets it" in watcher.lines
    with pytest.raises(VitEdgeError, match=r"bare loses .* more than the -101"):
        check_bound(result.rows, job.bound)


def test_a_model_of_numbers_is_held_by_its_sqnr() -> None:
    rows = [row("fp32", None), dataclasses.replace(row("int8", None), sqnr_db=20.0)]
    check_bound(rows, Bound(min_sqnr_db=20))
    check_bound(rows, Bound())
    with pytest.raises(VitEdgeError, match=r"int8 has an SQNR of 20.0 dB, less than the 21 that --min-sqnr asks for"):
        check_bound(rows, Bound(min_sqnr_db=21))
    with pytest.raises(VitEdgeError, match="no accuracy to hold against --max-drop"):
        check_bound(rows, Bound(1, 10))


def test_the_bound_of_a_recipe_leaves_its_scales_fresh(copy: Path) -> None:
    model, files = next((copy / "engines" / "fashion-vit").glob("fp32-*.onnx")), list_images(copy / "images")
    mixed = Recipe(name="mixed", rounding="nearest", smoothing="fixed", min_sqnr_db=30.0)
    pipeline.quantize_step(model, files, mixed, copy, Silent())
    analysis = pipeline.sensitivity_step(model, files, mixed, copy, 4, watcher := Silent())
    assert fresh(watcher)[0] == ("calibrate", True) and analysis.images == 4 and len(analysis.costs) == 18
    assert analysis.measured[18] > 100 > analysis.measured[0]
    pipeline.quantize_step(model, files, mixed, copy, watcher := Silent())
    assert fresh(watcher) == [("calibrate", True), ("quantize", True)]


def test_the_scales_tell_of_the_recipes_bound_whoever_wrote_them(copy: Path) -> None:
    model, files = next(copy.glob("engines/*/fp32-*.onnx")), list_images(copy / "images")
    mixed, path = Recipe(name="mixed", min_sqnr_db=1.0, min_images=4), copy / "calibration" / "scales" / "fashion-vit.mixed.json"
    pipeline.sensitivity_step(model, files, mixed, copy, 2, Silent())
    assert '"min_sqnr_db": 1.0' in path.read_text()
    pipeline.calibrate_step(model, files, dataclasses.replace(mixed, min_sqnr_db=2.0), path, watcher := Silent())
    assert watcher.lines[-1].endswith("is fresh")
    assert '"min_sqnr_db": 2.0' in path.read_text()


def test_nodes_that_stay_in_fp32_are_told_with_the_reason_and_at_most_five() -> None:
    assert pipeline._told_kept({}) == ""
    kept = {"fc1": "too large for fp16", "up": "fp16 is not defined for Resize"}
    assert pipeline._told_kept(kept) == "; in fp32 stay fc1 (too large for fp16), up (fp16 is not defined for Resize)"
    many = pipeline._told_kept({f"fc{number}": "too large for fp16" for number in range(9)})
    assert many.count("too large") == 5 and many.endswith(" and 4 more")
