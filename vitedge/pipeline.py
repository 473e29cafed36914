"""A model and a folder of images in, engines and a report out: all verbs in order.

    export -> calibrate -> quantize -> build -> bench

Each step writes one artifact under a name that holds the hash of all it was made from, so a step whose artifact is there
is fresh and skipped, and a run that was interrupted goes on where it stopped. Knows nothing of terminals: what happens
is told to a Watcher.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vitedge import __version__
from vitedge.backends import load_backend
from vitedge.backends.build import build_engine, is_whole, prepare_build, read_source, run_build, wanted_float_type
from vitedge.bench.accuracy import Accuracy, Recording, bench_rows, judge
from vitedge.bench.costs import Analysis
from vitedge.bench.environment import environment
from vitedge.bench.report import write_report
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, list_images, sample, stream
from vitedge.runtime.engine import Engine, open_engine
from vitedge.specs import TOLERANCE, BenchRow, Recipe, ScaleTable, Target, to_dict
from vitedge.workspace import content_key, load_recipe, load_target, sha256, short_path

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from onnx import ModelProto

    from vitedge.compiler.sensitivity import Point

CODE_AND_WEIGHTS = (".py", ".pth", ".pt", ".bin", ".safetensors", ".npz")
SEARCH_IMAGES = 2000  # that candidates are judged on at most, where labels or answers are counted
SQNR_IMAGES = 64  # and where the outputs are compared, which tells more per image
REFERENCE = Target(name="reference", backend="onnxruntime")  # what candidates run on
MISSED = 'loosen it; or, where floats are bf16, set float_type = "fp32" in the recipe: the search measures with floats in FP32'
COMPARED = 4  # real images on which the export is compared with torch, besides random ones


class Watcher(Protocol):
    """Is told what the pipeline does."""

    def begin(self, step: str) -> None:
        """A step begins."""

    def progress(self, fraction: float, phase: str = "") -> None:
        """So much of the current step is done, 0 to 1; `phase` names what is being done, where a step has parts."""

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
class Bound:
    """What an engine may lose against FP32; None: anything.

    max_drop: points of top-1, or of agreement where there are no labels. min_sqnr_db: of the output.
    """

    max_drop: float | None = None
    min_sqnr_db: float | None = None

    def __bool__(self) -> bool:
        return self.max_drop is not None or self.min_sqnr_db is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What `make` is asked for.

    images: calibration images. judge: labelled or other images to measure accuracy on; the calibration images if None.
    recipes: one INT8 (or other) engine each, beside the FP32 one. seconds: how long each engine is timed.
    bound: where an INT8 engine misses it, its costliest Linears stay in float; whether it holds at last, `check_bound` says.
    """

    model: ModelSource
    images: Path
    root: Path
    judge: Path | None = None
    recipes: tuple[str, ...] = ("int8",)
    target: str = "cpu"
    seconds: float = 3.0
    bound: Bound = Bound()


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
    quantized = [model, *(quantize_step(model, files, recipe, job.root, watcher, notes) for recipe in recipes)]
    key = _bound_key(judged, job.bound)
    graphs = [_bounded_before(graph, key, watcher) for graph in quantized]
    folders = [build_step(graph, target, engines, watcher, files) for graph in graphs]
    batches = sorted({target.batch[0], target.batch[1]})
    rows = bench_step(folders, judged, batches, job.seconds, notes=notes, watcher=watcher)
    search = Search(model, folders[0], files, judged, job.bound, key, job.root)
    changed = dict[int, Path]()
    for index in _missing(rows[: len(graphs)], job.bound):
        if graphs[index] == quantized[index]:
            changed |= _bound_or_note(search, index, quantized[index], watcher, notes)
    if changed:
        folders = [build_step(changed[i], target, engines, watcher, files) if i in changed else f for i, f in enumerate(folders)]
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
    model: Path,
    files: Sequence[ImageFile],
    recipe: Recipe,
    root: Path,
    watcher: Watcher,
    notes: list[str] | None = None,
    *,
    bounded: bool = True,
) -> Path:
    """The ONNX file of `model` under `recipe`, with the scales in calibration/scales/ for people to read and compare.

    bounded: whether the recipe's `min_sqnr_db` is met; the scales tell of it in any case.
    """
    require_compiler()
    from vitedge.compiler.quantize import leave_float, quantize

    scales = _scales_path(model, recipe, root)
    table = None if recipe.method == "none" else calibrate_step(model, files, recipe, scales, watcher, notes)
    if table and not bounded:
        recipe = dataclasses.replace(recipe, min_sqnr_db=0.0)
        table = dataclasses.replace(table, recipe=recipe)
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
        freed = (read_source(path).recipe or recipe).skip[len(recipe.skip) :]
        kept = f", {', '.join(freed)} in float for {recipe.min_sqnr_db:g} dB" if freed else ""
        watcher.end("quantize", f"{short_path(path)}: {count} Linears in INT8{kept}")
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
        stored = table = load_table(path)
        if dataclasses.replace(table.recipe, min_sqnr_db=recipe.min_sqnr_db) == recipe:  # a bound changes no range
            table = dataclasses.replace(table, recipe=recipe)
        current = (recipe, sha256(model), images_sha256(sample(files, recipe.images, recipe.seed)))
        if (table.recipe, table.model_sha256, table.images_sha256) == current:
            if table != stored:  # `vitedge quantize` goes by the bound in the file
                with suppress(VitEdgeError):  # in a workspace that is not ours to write
                    save_table(table, path)
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


def build_step(graph: Path, target: Target, engines: Path, watcher: Watcher, files: Sequence[ImageFile] = ()) -> Path:
    """The engine directory of an ONNX file for `target`; files: real images, if the float type is to be converted for it."""
    if files:
        graph = precision_step(graph, target, files, watcher)
    build = prepare_build(graph, target, engines)
    if is_whole(build.folder):
        with suppress(OSError):  # of a workspace that is not ours to write
            (build.folder / "manifest.json").touch()  # MODEL/VARIANT means the engine that was asked for last
        watcher.end("build", f"{short_path(build.folder)} is fresh")
    else:
        watcher.begin("build")
        run_build(build, lambda phase, fraction: watcher.progress(fraction, phase))
        watcher.end("build", f"{short_path(build.folder)}: floats in {build.float_type}")
    return build.folder


def precision_step(graph: Path, target: Target, files: Sequence[ImageFile], watcher: Watcher) -> Path:
    """The graph itself, or its form in the float type that its recipe asks for on a target that goes by the graph's types."""
    source, backend = read_source(graph), load_backend(target.backend)
    wanted = wanted_float_type(source, backend.float_types(target))
    if not backend.TYPED or wanted == source.float_type:
        return graph
    require_compiler()
    from vitedge.compiler.activations import images_sha256
    from vitedge.compiler.precision import RANGE_IMAGES, convert

    drawn = sample(files, RANGE_IMAGES, 0)
    key = content_key(__version__, sha256(graph), wanted, images_sha256(drawn))
    path = graph.with_name(f"{source.variant}.{wanted}-{key}.onnx")
    if _is_readable(path):
        watcher.end("precision", f"{short_path(path)} is fresh")
        return path
    watcher.begin("precision")
    kept = convert(graph, wanted, path, drawn, progress=lambda done, total: watcher.progress(done / total))
    told = f"; too large for it and in fp32: {', '.join(kept)}" if kept else ""
    watcher.end("precision", f"{short_path(path)}: floats in {wanted}{told}")
    return path


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


def check_bound(rows: Sequence[BenchRow], bound: Bound) -> None:
    """Raise a VitEdgeError if an engine loses more than `bound` allows against the first."""
    for row in rows[1:]:
        if miss := _miss(rows[0], row, bound):
            raise VitEdgeError(f"{row.variant} {miss}", hint=MISSED)


def _miss(reference: BenchRow | Accuracy, row: BenchRow | Accuracy, bound: Bound) -> str:
    """How `row` misses the bound, as the rest of a sentence; "" where it holds."""
    if bound.max_drop is not None:
        drop, what = _drop(reference, row)
        if not drop <= bound.max_drop:  # a limit that is NaN allows nothing
            return f"loses {drop:.2f} points of {what}, more than the {bound.max_drop:g} that --max-drop allows"
    if bound.min_sqnr_db is not None and not (row.sqnr_db or 0.0) >= bound.min_sqnr_db:
        return f"has an SQNR of {row.sqnr_db or 0.0:.1f} dB, less than the {bound.min_sqnr_db:g} that --min-sqnr asks for"
    return ""


def _drop(reference: BenchRow | Accuracy, row: BenchRow | Accuracy) -> tuple[float, str]:
    """The points that `row` loses, and of what."""
    if row.top1 is not None and reference.top1 is not None:
        return reference.top1 - row.top1, "top-1"
    if row.agreement is None:
        raise VitEdgeError("there is no accuracy to hold against --max-drop", hint="it needs a classifier; --min-sqnr does not")
    return 100 - row.agreement, "agreement with FP32"


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """What candidates are made from and held against.

    model: the float graph. reference: its engine. files: calibration images. judged: the images that the bound is about.
    key: of bound and images, for the name of what is found.
    """

    model: Path
    reference: Path
    files: Sequence[ImageFile]
    judged: Sequence[ImageFile]
    bound: Bound
    key: str
    root: Path


def bound_step(search: Search, graph: Path, watcher: Watcher) -> Path:
    """The INT8 file `graph` with the fewest of its costliest Linears in float under which the bound was measured to hold.

    Candidates run on ONNX Runtime, over at most SEARCH_IMAGES images. A VitEdgeError where no choice of Linears holds.
    """
    from vitedge.compiler import sensitivity as compiler
    from vitedge.compiler.graph import save

    recipe = read_source(graph).recipe or Recipe()
    int8, prepared = _pair(search.model, graph, recipe, search.root)
    every = frozenset(linear.name for linear in compiler.quantized(int8, prepared))
    watcher.begin("bound")
    with _candidates(search, int8, prepared) as judged:

        def holds(names: frozenset[str]) -> bool:
            return not _miss(*judged(names), search.bound)

        if not holds(every):  # said before minutes are spent on the costs
            raise compiler.impossible(len(every))
        rows, path = _rows(prepared, search.files, recipe, compiler.COST_IMAGES), compiler.costs_path(graph)
        costs = compiler.sensitivity(int8, prepared, rows, path, lambda done, total: watcher.progress(done / total))
        points = compiler.frontier(costs)
        wanted_db = points[0].predicted_db + _more_db(*judged(frozenset()), search.bound)
        freed = compiler.meet(points, holds, wanted_db)
    result = _bounded_path(graph, search.key)
    save(compiler.leave_out(int8, prepared, compiler.names_of(points, freed)), result)
    watcher.end("bound", f"{short_path(result)}: {_told(points[: freed + 1])}")
    return result


@contextmanager
def _candidates(
    search: Search, int8: ModelProto, prepared: ModelProto
) -> Iterator[Callable[[frozenset[str]], tuple[Accuracy, Accuracy]]]:
    """A function that judges the reference and the graph in which some Linears are free, each choice of them once."""
    from vitedge.compiler.graph import save
    from vitedge.compiler.sensitivity import leave_out

    files = _search_images(search.judged, search.bound)
    with tempfile.TemporaryDirectory() as folder, open_engine(search.reference) as engine:
        recording, path = Recording(engine), Path(folder) / "candidate.onnx"
        reference = Engine(engine.path, engine.manifest, recording)

        @functools.cache
        def judged(names: frozenset[str]) -> tuple[Accuracy, Accuracy]:
            save(leave_out(int8, prepared, names, fp32=True), path)
            recording.rewind()
            with open_engine(build_engine(path, REFERENCE, Path(folder))) as candidate:
                first, second = judge([reference, candidate], files)
            return first, second

        yield judged


def _told(points: Sequence[Point]) -> str:
    """Which Linears are free, and what that costs."""
    names = [point.name for point in points[1:]]
    some = ", ".join([*names[:6], *["..."][: len(names) > 6]])
    what = f"{len(names)} Linear{'' if len(names) == 1 else 's'} in float ({some})" if names else "no Linear in float"
    return f"{what}, a modelled {points[-1].latency:.2f} of the latency of all Linears in INT8"


def _bound_or_note(search: Search, index: int, graph: Path, watcher: Watcher, notes: list[str]) -> dict[int, Path]:
    """{index: what `bound_step` gives}; where nothing meets the bound nothing and a note, since all else is worth seeing."""
    recipe = read_source(graph).recipe
    if recipe is None or recipe.method == "none":
        return {}
    try:
        return {index: bound_step(search, graph, watcher)}
    except VitEdgeError as error:
        watcher.end("bound", "no choice of Linears meets it")
        notes.append(f"{recipe.name}: {error}")
        return {}


def _missing(rows: Sequence[BenchRow], bound: Bound) -> list[int]:
    """Which rows miss the bound; none where there is nothing to hold against it, which `check_bound` says later."""
    with suppress(VitEdgeError):
        return [index for index, row in enumerate(rows) if index and _miss(rows[0], row, bound)]
    return []


def _bounded_before(graph: Path, key: str, watcher: Watcher) -> Path:
    """The file that an earlier search made of `graph`, or else `graph`."""
    if key and _is_readable(path := _bounded_path(graph, key)):
        watcher.end("bound", f"{short_path(path)} is fresh")
        return path
    return graph


def _bounded_path(graph: Path, key: str) -> Path:
    return graph.with_name(f"{graph.stem.rpartition('-')[0]}-{content_key(__version__, sha256(graph), key)}.onnx")


def _bound_key(judged: Sequence[ImageFile], bound: Bound) -> str:
    """Changes with the bound and with the images that it is held on; "" without a bound."""
    if not bound:
        return ""
    from vitedge.compiler.activations import images_sha256

    return content_key(dataclasses.astuple(bound), images_sha256(_search_images(judged, bound)))


def _pair(model: Path, graph: Path, recipe: Recipe, root: Path) -> tuple[ModelProto, ModelProto]:
    """The INT8 graph, and the prepared float graph that it was made from."""
    from vitedge.compiler.calibrate import load_table
    from vitedge.compiler.graph import load
    from vitedge.compiler.quantize import prepare

    smoothing = load_table(_scales_path(model, recipe, root)).smoothing
    return load(graph), prepare(load(model), recipe, smoothing)


def _rows(prepared: ModelProto, files: Sequence[ImageFile], recipe: Recipe, limit: int) -> NDArray[Any]:
    """The first `limit` calibration images as the model takes them."""
    from vitedge.compiler.activations import read_inputs

    return read_inputs(prepared, sample(files, limit, recipe.seed), limit)


def _scales_path(model: Path, recipe: Recipe, root: Path) -> Path:
    return root / "calibration" / "scales" / f"{read_source(model).card.name}.{recipe.name}.json"


def _search_images(files: Sequence[ImageFile], bound: Bound) -> list[ImageFile]:
    """The judge images that candidates are measured on."""
    return sample(files, SQNR_IMAGES if bound.max_drop is None else SEARCH_IMAGES, 0)


def _more_db(reference: Accuracy, int8: Accuracy, bound: Bound) -> float:
    """How much more SQNR than that of `int8` will do, as a guess: the answers that change are as many as noise is high."""
    wanted = [0.0]
    if bound.max_drop is not None:
        drop = max(_drop(reference, int8)[0], 0.0)
        wanted.append(20 * math.log10(drop / bound.max_drop) if bound.max_drop > 0 and drop else 0.0)
    if bound.min_sqnr_db is not None:
        wanted.append(bound.min_sqnr_db - (int8.sqnr_db or 0.0))
    return max(wanted)


def sensitivity_step(
    model: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, limit: int, watcher: Watcher
) -> Analysis:
    """Calibrate and quantize where that is not fresh, then measure what each quantized Linear costs on `limit` images."""
    require_compiler()
    from vitedge.compiler import sensitivity as compiler

    if recipe.method == "none":
        raise VitEdgeError(f"the recipe {recipe.name!r} quantizes nothing, so no Linear costs anything")
    graph = quantize_step(model, files, recipe, root, watcher, bounded=False)
    int8, prepared = _pair(model, graph, recipe, root)
    rows = _rows(prepared, files, recipe, limit)
    watcher.begin("costs")
    costs = compiler.sensitivity(
        int8, prepared, rows, compiler.costs_path(graph), lambda done, total: watcher.progress(done / total)
    )
    points, of = compiler.frontier(costs), compiler.Judge(prepared, rows)
    some = sorted({k for k in (0, 1, 2, 4, 8, 16, 32, 64, 128) if k < len(points)} | {len(points) - 1})
    measured = {k: of.sqnr_db(compiler.free(int8, prepared, compiler.names_of(points, k))) for k in some}
    watcher.end("costs", f"{short_path(compiler.costs_path(graph))}: {len(costs.costs)} Linears on {len(rows)} images")
    return Analysis(read_source(graph).card.name, recipe.name, len(rows), costs.costs, tuple(points), measured)


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
