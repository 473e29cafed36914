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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from vitedge import __version__
from vitedge.backends import load_backend
from vitedge.backends.build import is_whole, prepare_build, read_source, run_build
from vitedge.bench.accuracy import bench_rows
from vitedge.bench.environment import environment
from vitedge.bench.report import write_report
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, list_images, sample, stream
from vitedge.runtime.engine import open_engine
from vitedge.specs import TOLERANCE, BenchRow, Recipe, ScaleTable, Target, to_dict
from vitedge.workspace import content_key, load_recipe, load_target, sha256, short_path

CODE_AND_WEIGHTS = (".py", ".pth", ".pt", ".bin", ".safetensors", ".npz")
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
    tolerance: float = TOLERANCE


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What `make` is asked for.

    images: calibration images. judge: labelled or other images to measure accuracy on; the calibration images if None.
    recipes: one INT8 (or other) engine each, beside the FP32 one. seconds: how long each engine is timed.
    """

    model: ModelSource
    images: Path
    root: Path
    judge: Path | None = None
    recipes: tuple[str, ...] = ("int8",)
    target: str = "cpu"
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
    load_backend(target.backend).version()  # unknown or not installed: said before any work is done
    files = list_images(job.images)
    judged = list_images(job.judge) if job.judge else files
    engines = job.root / "engines"

    model = export_step(job.model, files, engines, watcher)
    notes: list[str] = []
    graphs = [model, *(quantize_step(model, files, recipe, job.root, watcher, notes) for recipe in recipes)]
    folders = [build_step(graph, target, engines, watcher) for graph in graphs]
    batches = sorted({target.batch[0], target.batch[1]})
    rows = bench_step(folders, judged, batches, job.seconds, notes=notes, watcher=watcher)
    if judged is files:
        notes.append("accuracy was measured on the calibration images, which flatters it: give others with --judge")
    report = model.parent / "report.html"
    folder = (job.judge or job.images).resolve().name
    write_report(report, rows, {**environment(), "images": f"{folder}, {rows[0].images} images"})
    return Result(tuple(folders), tuple(rows), report, tuple(dict.fromkeys(notes)))  # each step reads the same images


def export_step(source: ModelSource, files: Sequence[ImageFile], engines: Path, watcher: Watcher) -> Path:
    """The float ONNX file of a model, compared with torch when it is made."""
    key = _source_key(source)
    for existing in filter(_is_readable, engines.glob(f"*/fp32-{key}.onnx")):
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


def quantize_step(
    model: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, watcher: Watcher, notes: list[str] | None = None
) -> Path:
    """The ONNX file of `model` under `recipe`, with the scales in calibration/scales/ for people to read and compare."""
    require_compiler()
    from vitedge.compiler.quantize import leave_float, quantize

    scales = root / "calibration" / "scales" / f"{read_source(model).card.name}.{recipe.name}.json"
    table = None if recipe.method == "none" else calibrate_step(model, files, recipe, scales, watcher, notes)
    key = content_key(__version__, sha256(model), to_dict(table or recipe))
    path = model.with_name(f"{recipe.name}-{key}.onnx")
    if _is_readable(path):
        watcher.end("quantize", f"{short_path(path)} is fresh")
    elif table is None:
        leave_float(model, recipe, path)
        watcher.end("quantize", f"{short_path(path)}: nothing is INT8, floats are {recipe.float_type}")
    else:
        watcher.begin("quantize")
        count = quantize(model, table, path, files, progress=lambda done, total: watcher.progress(done / total))
        watcher.end("quantize", f"{short_path(path)}: {count} Linears in INT8")
    return path


def calibrate_step(
    model: Path, files: Sequence[ImageFile], recipe: Recipe, path: Path, watcher: Watcher, notes: list[str] | None = None
) -> ScaleTable:
    """The scale table of `model` under `recipe`, from a seeded sample of `files`, in the file `path`.

    notes: receives a sentence on each image that could not be read.
    """
    from vitedge.compiler.activations import images_sha256
    from vitedge.compiler.calibrate import calibrate, load_table, save_table

    with suppress(VitEdgeError):  # a table that is missing or damaged is made again
        table = load_table(path)
        current = (recipe, sha256(model), images_sha256(sample(files, recipe.images, recipe.seed)))
        if (table.recipe, table.model_sha256, table.images_sha256) == current:
            watcher.end("calibrate", f"{short_path(path)} is fresh")
            return table
    watcher.begin("calibrate")
    result = calibrate(model, files, recipe, progress=lambda done, total: watcher.progress(done / total))
    save_table(result.table, path)
    if notes is not None:
        notes += result.skipped
    skipped = f", {len(result.skipped)} unreadable ones skipped" if result.skipped else ""
    watcher.end("calibrate", f"{short_path(path)}: {len(result.table.amax)} ranges from {result.table.images} images{skipped}")
    return result.table


def build_step(graph: Path, target: Target, engines: Path, watcher: Watcher) -> Path:
    """The engine directory of an ONNX file for `target`."""
    build = prepare_build(graph, target, engines)
    if is_whole(build.folder):
        with suppress(OSError):  # of a workspace that is not ours to write
            (build.folder / "manifest.json").touch()  # MODEL/VARIANT means the engine that was asked for last
        watcher.end("build", f"{short_path(build.folder)} is fresh")
    else:
        watcher.begin("build")
        run_build(build)
        watcher.end("build", f"{short_path(build.folder)}: floats in {build.float_type}")
    return build.folder


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
    """Raise a VitEdgeError if an engine loses more than `max_drop` points of top-1 against the first.

    Where there are no labels, it is points of agreement with the first.
    """
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
    if ".py:" in source.name:  # a factory may import its neighbours, or load weights that lie beside it
        factory = Path(source.name.rpartition(":")[0]).resolve()
        beside = factory.parent.iterdir() if factory.is_file() else iter(())
        files += sorted(p for p in beside if p.is_file() and p.suffix in CODE_AND_WEIGHTS and not p.name.startswith("."))
    packages = ("torch", "onnxscript", "transformers", "timm", "torchvision")
    return content_key(
        __version__, source.name, source.tolerance, [sha256(path) for path in files], [_version(name) for name in packages]
    )


def _is_readable(graph: Path) -> bool:
    """Whether an ONNX file is there and whole."""
    with suppress(VitEdgeError):
        read_source(graph)
        return True
    return False


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
