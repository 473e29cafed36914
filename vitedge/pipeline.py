"""A model and a folder of images in, engines and a report out: all verbs in order.

    export -> calibrate -> quantize -> build -> bench

Each step writes one artifact under a name that holds the hash of all it was made from, so a step whose artifact is there
is fresh and skipped, and a run that was interrupted goes on where it stopped. Knows nothing of terminals: what happens
is told to a Watcher.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from vitedge import __version__
from vitedge.backends.build import build_engine, engine_folder, is_whole, read_source
from vitedge.bench.accuracy import bench_rows
from vitedge.bench.report import environment, write_report
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, list_images, sample, stream
from vitedge.runtime.engine import open_engine, read_manifest
from vitedge.specs import BenchRow, Recipe, ScaleTable, Target, from_dict, to_dict
from vitedge.workspace import content_key, load_recipe, load_target, read_json, sha256, short_path

COMPARED = 4  # real images on which the export is compared with torch, besides random ones


class Watcher(Protocol):
    """Is told what the pipeline does."""

    def begin(self, step: str) -> None:
        """A step begins."""

    def progress(self, fraction: float) -> None:
        """So much of the current step is done, 0 to 1."""

    def end(self, step: str, result: str) -> None:
        """A step has ended, or was fresh; `result` is one line for people."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: its name (see `load_model`), and files in place of what the name brings along.

    tolerance: how far ONNX may lie from torch, as a part of the output's range.
    """

    name: str
    checkpoint: Path | None = None
    preprocess: Path | None = None
    tolerance: float = 1e-4


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What `make` is asked for.

    images: calibration images. judge: labelled or other images to measure accuracy on; the calibration images if None.
    recipes: one INT8 (or other) engine each, beside the FP32 one. max_drop: points of top-1 (of agreement with FP32 where
    there are no labels) that an engine may lose. seconds: how long each engine is timed.
    """

    model: ModelSource
    images: Path
    root: Path
    judge: Path | None = None
    recipes: tuple[str, ...] = ("int8",)
    target: str = "cpu"
    max_drop: float | None = None
    seconds: float = 3.0


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The engines (FP32 first), their bench rows, the report, and what was noticed on the way."""

    engines: tuple[Path, ...]
    rows: tuple[BenchRow, ...]
    report: Path
    notes: tuple[str, ...]


def make(job: Job, watcher: Watcher) -> Result:
    """Run every step that is not fresh, then measure all engines side by side."""
    recipes = [load_recipe(name) for name in job.recipes]
    target = load_target(job.target)
    files = list_images(job.images)
    judged = list_images(job.judge) if job.judge else files
    engines = job.root / "engines"

    model = export_step(job.model, files, engines, watcher)
    graphs = [model, *(quantize_step(model, files, recipe, job.root, watcher) for recipe in recipes)]
    folders = [build_step(graph, target, engines, watcher) for graph in graphs]
    notes: list[str] = []
    rows = bench_step(folders, judged, (target.batch[0],), job.seconds, notes=notes, watcher=watcher)
    report = model.parent / "report.html"
    folder = (job.judge or job.images).resolve().name
    write_report(report, rows, {**environment(), "Images": f"{folder}, {rows[0].images} images"})
    return Result(tuple(folders), tuple(rows), report, tuple(notes))


def export_step(source: ModelSource, files: Sequence[ImageFile], engines: Path, watcher: Watcher) -> Path:
    """The float ONNX file of a model, compared with torch when it is made."""
    key = _source_key(source)
    for existing in engines.glob(f"*/fp32-{key}.onnx"):
        watcher.end("export", f"{short_path(existing)} is fresh")
        return existing
    require_compiler()
    from vitedge.compiler.export import export
    from vitedge.compiler.models import load_model

    watcher.begin("export")
    module, card = load_model(source.name, source.checkpoint, source.preprocess)
    path = engines / card.name / f"fp32-{key}.onnx"
    images = (image for _, image in itertools.islice(stream(files, []), COMPARED))
    difference = export(module, card, path, images=images if files else (), tolerance=source.tolerance)
    real = f", real images {difference.real:.0e}" if difference.real is not None else ""
    watcher.end("export", f"{short_path(path)}: torch and ONNX differ by {difference.random:.0e} of the output's range{real}")
    return path


def quantize_step(model: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, watcher: Watcher) -> Path:
    """The ONNX file of `model` under `recipe`, with the scales in calibration/scales/ for people to read and compare."""
    require_compiler()
    from vitedge.compiler.quantize import leave_float, quantize

    table = None if recipe.method == "none" else calibrate_step(model, files, recipe, root, watcher)
    key = content_key(__version__, sha256(model), to_dict(table or recipe))
    path = model.with_name(f"{recipe.name}-{key}.onnx")
    if path.is_file():
        watcher.end("quantize", f"{short_path(path)} is fresh")
    elif table is None:
        leave_float(model, recipe, path)
        watcher.end("quantize", f"{short_path(path)}: nothing is INT8, floats are {recipe.float_type}")
    else:
        watcher.begin("quantize")
        count = quantize(model, table, path)
        watcher.end("quantize", f"{short_path(path)}: {count} Linears in INT8")
    return path


def calibrate_step(model: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, watcher: Watcher) -> ScaleTable:
    """The scale table of `model` under `recipe`, from a seeded sample of `files`."""
    from vitedge.compiler.calibrate import calibrate, images_sha256, save_table

    name = read_source(model).card.name
    path = root / "calibration" / "scales" / f"{name}.{recipe.name}.json"
    if path.is_file():
        table = from_dict(ScaleTable, read_json(path))
        current = (recipe, sha256(model), images_sha256(sample(files, recipe.images, recipe.seed)))
        if (table.recipe, table.model_sha256, table.images_sha256) == current:
            watcher.end("calibrate", f"{short_path(path)} is fresh")
            return table
    watcher.begin("calibrate")
    result = calibrate(model, files, recipe, progress=lambda done, total: watcher.progress(done / total))
    save_table(result.table, path)
    skipped = f", {len(result.skipped)} unreadable ones skipped" if result.skipped else ""
    watcher.end("calibrate", f"{short_path(path)}: {len(result.table.amax)} ranges from {result.table.images} images{skipped}")
    return result.table


def build_step(graph: Path, target: Target, engines: Path, watcher: Watcher) -> Path:
    """The engine directory of an ONNX file for `target`."""
    folder = engine_folder(graph, target, engines)
    if is_whole(folder):
        watcher.end("build", f"{short_path(folder)} is fresh")
        return folder
    watcher.begin("build")
    build_engine(graph, target, engines)
    watcher.end("build", f"{short_path(folder)}: floats in {read_manifest(folder).float_type}")
    return folder


def bench_step(
    folders: Sequence[Path],
    files: Sequence[ImageFile],
    batches: Sequence[int],
    seconds: float,
    *,
    notes: list[str],
    watcher: Watcher,
) -> list[BenchRow]:
    """Measure engines side by side; the first is the reference of the others."""
    watcher.begin("bench")
    with ExitStack() as stack:
        engines = [stack.enter_context(open_engine(folder)) for folder in folders]
        rows = bench_rows(engines, files, batches, seconds, notes=notes, progress=lambda _, fraction: watcher.progress(fraction))
    watcher.end("bench", f"{rows[0].images} images, {seconds:g} s an engine, in turns")
    return rows


def check_drop(rows: Sequence[BenchRow], max_drop: float) -> None:
    """Raise a VitEdgeError if an engine loses more than `max_drop` points against the first."""
    for row in rows[1:]:
        if row.top1 is not None and rows[0].top1 is not None:
            drop, what = rows[0].top1 - row.top1, "top-1"
        elif row.agreement is not None:
            drop, what = 100 - row.agreement, "agreement with FP32"
        else:
            raise VitEdgeError("there is no accuracy to hold against --max-drop", hint="it needs a classifier")
        if not drop <= max_drop:  # a limit that is NaN allows nothing
            raise VitEdgeError(
                f"{row.variant} loses {drop:.2f} points of {what}, more than the {max_drop:g} that --max-drop allows",
                hint="name the layers to leave in floating point under `skip` in a recipe",
            )


def _source_key(source: ModelSource) -> str:
    """Changes with the model's name, its files and the packages that export it."""
    files = [path for path in (source.checkpoint, source.preprocess) if path]
    kind, _, folder = source.name.partition(":")
    if kind == "hf" and Path(folder).is_dir():  # written by save_pretrained, perhaps once more since the last time
        files += sorted(path for path in Path(folder).iterdir() if path.is_file())
    if ".py:" in source.name:  # a factory may import its neighbours
        files += sorted(Path(source.name.rpartition(":")[0]).resolve().parent.glob("*.py"))
    packages = ("torch", "onnxscript", "transformers", "timm", "torchvision")
    return content_key(
        __version__, source.name, source.tolerance, [sha256(path) for path in files], [_version(name) for name in packages]
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_compiler() -> None:
    """Raise a MissingPackageError for the first package of the extra `compile` that is not installed."""
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "compile")
