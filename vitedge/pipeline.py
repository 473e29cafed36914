"""A model and a folder of images in, engines and a report out: all verbs in order.

    export -> calibrate -> quantize -> build -> bench
                                    -> pack            for a machine that is not this one

Each step writes one artifact under a name that holds the hash of all it was made from, so a step whose artifact is there
is fresh and skipped, and a run that was interrupted goes on where it stopped. Knows nothing of terminals: what happens
is told to a Watcher.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from vitedge import __version__
from vitedge.backends import load_backend
from vitedge.backends.build import (
    is_fresh,
    is_readable,
    prepare_build,
    read_source,
    run_build,
    update_target,
    wanted_float_type,
)
from vitedge.bench.contenders import MAX_BATCH, Contender, open_contenders
from vitedge.bench.costs import Analysis
from vitedge.bench.document import Document, rows_of
from vitedge.bench.environment import environment
from vitedge.bench.gate import Gate
from vitedge.bench.plan import Plan
from vitedge.bench.report import write_outputs
from vitedge.bench.run import benchmark
from vitedge.bench.throughput import measure_throughput
from vitedge.bench.timing import conditions_of
from vitedge.bound import (
    Bound,
    BoundSearch,
    bound_key,
    bound_or_note,
    bounded_before,
    calibration_rows,
    missing,
    pair,
    scales_path,
)
from vitedge.cluster import judging, on_one_core
from vitedge.datasets import list_dataset
from vitedge.errors import AbsentDeviceError, MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, images_key, sample, stream
from vitedge.pack import ARCHIVE, pack
from vitedge.specs import FLOAT, TOLERANCE, BenchRow, Recipe, Reduction, ScaleTable, Target, Work, reduction_of, to_dict
from vitedge.workspace import content_key, load_recipe, load_target, sha256, short_path

CODE_AND_WEIGHTS = (".py", ".pth", ".pt", ".bin", ".safetensors", ".npz")
KEPT_NAMED = 5  # nodes that stay in FP32
FLATTERED = "accuracy was measured on the calibration images, which flatters it: give others with --judge"
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

    tolerance: how far ONNX may lie from torch, as a part of the output's range. merge_tokens, size: see Reduction;
    a size is that of a square.
    """

    name: str
    checkpoint: Path | None = None
    preprocess: Path | None = None
    tolerance: float = TOLERANCE
    merge_tokens: tuple[int, ...] | int = 0
    size: int | None = None

    @property
    def reduction(self) -> Reduction:
        """What is changed of the model so that it computes less."""
        return Reduction(None if self.size is None else (self.size, self.size), self.merge_tokens)

    @property
    def whole(self) -> ModelSource:
        """The same model as it is."""
        return dataclasses.replace(self, merge_tokens=0, size=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What `make` is asked for.

    images: calibration images. judge: labelled or other images to measure accuracy on; the calibration images if None.
    recipes: one INT8 (or other) engine each, beside the FP32 one. seconds: how long each engine is timed.
    bound: where an INT8 engine misses it, its costliest Linears stay in float; whether it holds at last, `check_bound` says.
    backend: in place of the target's own. labels: a table of the labels of what is judged (see datasets.py).
    """

    model: ModelSource
    images: Path
    root: Path
    judge: Path | None = None
    recipes: tuple[str, ...] = ("int8",)
    target: str = "cpu"
    seconds: float = 3.0
    bound: Bound = dataclasses.field(default_factory=Bound)
    backend: str | None = None
    labels: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The engines (FP32 first), what was measured as rows and in full, the report, and what was noticed on the way.

    For a machine that is not this one there are no rows and no report; where it builds for itself, a bundle and no engines.
    """

    engines: tuple[Path, ...]
    rows: tuple[BenchRow, ...]
    report: Path | None
    notes: tuple[str, ...]
    bundle: Path | None = None
    document: Document | None = None


def make(job: Job, watcher: Watcher) -> Result:
    """Run every step that is not fresh, then measure all engines side by side."""
    recipes = [load_recipe(name) for name in job.recipes]
    target = load_target(job.target, job.backend)
    elsewhere = absent(target)  # unknown or not installed: said before any work is done
    if elsewhere and job.bound:
        hint = "set min_sqnr_db in the recipe, which needs no engine; or find out with --target cpu what the bound takes"
        raise VitEdgeError(f"--max-drop and --min-sqnr are held against engines, and {elsewhere}", hint=hint)
    notes: list[str] = []
    files = list_dataset(job.images, None if job.judge else job.labels, notes)
    judged = list_dataset(job.judge, job.labels, notes) if job.judge else files
    engines = job.root / "engines"

    whole = export_step(job.model.whole, files, engines, watcher)
    model = export_step(job.model, files, engines, watcher) if job.model.reduction else whole
    quantized = [whole, *(quantize_step(model, files, recipe, job.root, watcher, notes) for recipe in recipes)]
    if elsewhere:
        notes.append(f"nothing was measured: {elsewhere}")
        return _deliver(
            [precision_step(graph, target, files, watcher) for graph in quantized], target, job.root, judged, notes, watcher
        )
    key = bound_key(judged, job.bound)
    graphs = [bounded_before(graph, key, watcher) for graph in quantized]
    folders = [build_step(graph, target, engines, watcher, files) for graph in graphs]
    dataset = (job.judge or job.images).resolve().name
    plan = Plan(tuple(sorted({target.batch[0], target.batch[1]})), seconds=job.seconds, dataset=dataset)
    document = bench_step(list(map(str, folders)), judged, plan, watcher)
    rows = rows_of(document)
    search = BoundSearch(model, folders[0], files, judged, job.bound, key, job.root)
    changed = dict[int, Path]()
    for index in missing(rows[: len(graphs)], job.bound):
        if graphs[index] == quantized[index]:
            changed |= bound_or_note(search, index, quantized[index], watcher, notes)
    if changed:
        folders = [build_step(changed[i], target, engines, watcher, files) if i in changed else f for i, f in enumerate(folders)]
        document = bench_step(list(map(str, folders)), judged, plan, watcher)
    if judged is files:
        notes.append(FLATTERED)
    document = dataclasses.replace(document, notes=tuple(dict.fromkeys([*notes, *document.notes])))  # steps read the same images
    report, rows = model.parent / "report.html", rows_of(document)
    write_outputs([document], report=report)
    return Result(tuple(folders), tuple(rows), report, document.notes, document=document)


def absent(target: Target) -> str:
    """Why an engine for `target` cannot be measured here, as the rest of a sentence; "" where it can."""
    backend = load_backend(target.backend)
    try:
        resolved = backend.resolve(target)
    except AbsentDeviceError as error:
        return str(error)
    backend.version()
    return "" if backend.runs_here(resolved) else f"here is no GPU that runs an engine for {backend.device(resolved)}"


def _deliver(
    graphs: Sequence[Path], target: Target, root: Path, judged: Sequence[ImageFile], notes: list[str], watcher: Watcher
) -> Result:
    """Engines for a GPU that is not here; where only that machine can build them, a bundle."""
    try:
        folders = [build_step(graph, target, root / "engines", watcher) for graph in graphs]
        return Result(tuple(folders), (), None, tuple(dict.fromkeys(notes)))
    except AbsentDeviceError:
        bundle = pack_step(graphs, target, bundle_path(root, graphs[0], target), watcher, judged)
        return Result((), (), None, tuple(dict.fromkeys(notes)), bundle)


def bundle_path(root: Path, graph: Path, target: Target) -> Path:
    """Where the bundle of a graph is written if nobody says where: bundles/MODEL-TARGET.tar.gz."""
    return root / "bundles" / f"{read_source(graph).card.name}-{target.name}{ARCHIVE}"


def pack_step(graphs: Sequence[Path], target: Target, output: Path, watcher: Watcher, files: Sequence[ImageFile] = ()) -> Path:
    """The bundle of graphs whose float type is right (see `precision_step`), with some of the images in `files`."""
    watcher.begin("pack")
    bundle = pack(graphs, target, output, files)
    watcher.end("pack", f"{short_path(output)}: {len(bundle.graphs)} graphs, {bundle.images} images, for {target.name}")
    return output


def export_step(source: ModelSource, files: Sequence[ImageFile], engines: Path, watcher: Watcher) -> Path:
    """The float ONNX file of a model, compared with torch when it is made."""
    key = _source_key(source)
    for existing in filter(is_readable, engines.glob(f"*/{FLOAT}{source.reduction.suffix}-{key}.onnx")):
        watcher.end("export", f"{short_path(existing)} is fresh")
        return existing
    require_compiler()
    from vitedge.compiler.export import export
    from vitedge.compiler.models import load_model

    watcher.begin("export")
    module, card = load_model(source.name, source.checkpoint, source.preprocess)
    path = engines / card.name / f"{FLOAT}{source.reduction.suffix}-{key}.onnx"
    images = (image for _, image in itertools.islice(stream(files, []), COMPARED))
    difference = export(
        module, card, path, images=images if files else (), tolerance=source.tolerance, reduction=source.reduction
    )
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

    scales = scales_path(model, recipe, root)
    table = None if recipe.method == "none" else calibrate_step(model, files, recipe, scales, watcher, notes)
    if table and not bounded:
        recipe = dataclasses.replace(recipe, min_sqnr_db=0.0)
        table = dataclasses.replace(table, recipe=recipe)
    key = content_key(__version__, sha256(model), to_dict(table or recipe))
    path = model.with_name(f"{recipe.name}{reduction_of(read_source(model).variant)}-{key}.onnx")
    if is_readable(path):
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
    if is_fresh(build):
        update_target(build)
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
    if is_readable(path):
        watcher.end("precision", f"{short_path(path)} is fresh")
        return path
    watcher.begin("precision")
    kept = convert(graph, wanted, path, drawn, progress=lambda done, total: watcher.progress(done / total))
    watcher.end("precision", f"{short_path(path)}: floats in {wanted}{_told_kept(kept)}")
    return path


def _told_kept(kept: Mapping[str, str]) -> str:
    """Some of the nodes that stay in FP32, each with the reason, as the rest of a sentence."""
    some = ", ".join(f"{node} ({reason})" for node, reason in itertools.islice(kept.items(), KEPT_NAMED))
    more = f" and {len(kept) - KEPT_NAMED} more" if len(kept) > KEPT_NAMED else ""
    return f"; in fp32 stay {some}{more}" if kept else ""


def work_of(graph: Path) -> Work:
    """What an ONNX file asks of a device: as it says itself, or counted where an older vitedge wrote it."""
    if (work := read_source(graph).work) is not None:
        return work
    require_compiler()
    from vitedge.compiler.graph import load
    from vitedge.compiler.work import count_work, total

    return total(count_work(load(graph)))


def bench_step(
    names: Sequence[str],
    files: Sequence[ImageFile],
    plan: Plan,
    watcher: Watcher,
    checkpoint: Path | None = None,
    preprocess: Path | None = None,
    *,
    throughput: bool = False,
    gate: Gate | None = None,
    ray: str | None = None,
) -> Document:
    """Measure engines, ONNX files and torch models side by side; the first is the reference of the others.

    checkpoint, preprocess: of the torch models. gate: what it will be held against, so that timings go on until that is decided.
    ray: the workers that judge the images, see `open_cluster`; times are taken here in any case.
    """
    notes, most = list[str](), max(MAX_BATCH, *plan.batches)
    watcher.begin("bench")
    spread = judging(ray, partial(on_one_core, names, checkpoint, preprocess, most)) if ray else None
    with open_contenders(names, checkpoint, preprocess, max_batch=most) as contenders:
        if gate:
            found = [contender.name for contender in contenders]
            notes += gate.require_comparable(found, conditions_of(contenders, plan), environment(), images_key(files))
        document = benchmark(
            contenders,
            files,
            plan,
            notes=notes,
            progress=lambda stage, part: watcher.progress(part, stage),
            undecided=gate.undecided if gate else lambda timed: False,
            spread=spread,
        )
        judged = document.finished[0].judged
        images = f"{judged.images} images" if judged else "no images"
        watcher.end("bench", f"{images}, {plan.seconds:g} s each, in turns")
        return throughput_step(contenders, files, document, plan.seconds, watcher) if throughput else document


def throughput_step(
    contenders: Sequence[Contender], files: Sequence[ImageFile], document: Document, seconds: float, watcher: Watcher
) -> Document:
    """Add to a document how many files a second each engine that did not fail can answer."""
    watcher.begin("throughput")
    whole = {one.name for one in document.finished}
    folders = {one.name: one.folder for one in contenders if one.folder and one.name in whole}
    try:
        rates = measure_throughput(list(folders.values()), files, seconds, watcher.progress)
    except VitEdgeError as error:  # what else was measured is worth seeing
        watcher.end("throughput", "not measured")
        return dataclasses.replace(document, notes=(*document.notes, f"throughput was not measured: {error}"))
    found = dict(zip(folders, rates, strict=True))
    ways = ", ".join(f"{one.streams} stream{'' if one.streams == 1 else 's'} of {one.batch:.1f}" for one in rates)
    watcher.end("throughput", f"decoding to answers overlapped, {ways} images a batch")
    candidates = tuple(
        dataclasses.replace(one, sustained_per_s=found[one.name].images_per_s) if one.name in found else one
        for one in document.candidates
    )
    return dataclasses.replace(document, candidates=candidates)


def sensitivity_step(
    model: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, limit: int, watcher: Watcher
) -> Analysis:
    """Calibrate and quantize where that is not fresh, then measure what each quantized Linear costs on `limit` images."""
    require_compiler()
    from vitedge.compiler import sensitivity as compiler

    if recipe.method == "none":
        raise VitEdgeError(f"the recipe {recipe.name!r} quantizes nothing, so no Linear costs anything")
    graph = quantize_step(model, files, recipe, root, watcher, bounded=False)
    int8, prepared = pair(model, graph, recipe, root)
    rows = calibration_rows(prepared, files, recipe, limit)
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
        __version__, source.name, source.tolerance, [sha256(path) for path in files], [_version(name) for name in packages],
        *([to_dict(source.reduction)] if source.reduction else []),
    )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_compiler() -> None:
    """Raise a MissingPackageError for the first package of the extra `compile` that is not installed."""
    if importlib.util.find_spec("vitedge.compiler.export") is None:
        raise VitEdgeError("this vitedge came in a bundle, without its compiler", hint="do this on the machine that packed it")
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "compile")
