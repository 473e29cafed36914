"""An INT8 graph that loses too much in, the graph that leaves its costliest Linears in floating point out.

    rows that miss a Bound -> BoundSearch -> candidates, judged on ONNX Runtime -> the fewest Linears in float that meet it

What a Linear costs is compiler/sensitivity.py's to say; here it is held against labels, answers and dB.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vitedge import __version__
from vitedge.backends.build import build_engine, is_readable, read_source
from vitedge.bench.accuracy import Recording, judge
from vitedge.bench.document import Judged
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, sample
from vitedge.runtime.engine import open_engine
from vitedge.specs import BenchRow, FloatType, Recipe, Target, reduction_of
from vitedge.workspace import content_key, sha256, short_path

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from onnx import ModelProto

    from vitedge.compiler.sensitivity import Point
    from vitedge.pipeline import Watcher

SEARCH_IMAGES = 2000  # that candidates are judged on at most, where labels or answers are counted
LOOK_IMAGES = 4  # that costs are measured on where nothing is promised
SQNR_IMAGES = 64  # and where the outputs are compared, which tells more per image
REFERENCE = Target(name="reference", backend="onnxruntime")  # what candidates run on
MISSED = 'loosen it; or, where floats are bf16, set float_type = "fp32" in the recipe: the search measures with floats in FP32'


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
class BoundSearch:
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


def check_bound(rows: Sequence[BenchRow], bound: Bound) -> None:
    """Raise a VitEdgeError if an engine loses more than `bound` allows against the first."""
    for row in rows[1:]:
        if miss := _miss(rows[0], row, bound):
            raise VitEdgeError(f"{row.variant} {miss}", hint=MISSED)


def missing(rows: Sequence[BenchRow], bound: Bound) -> list[int]:
    """Which rows miss the bound; none where there is nothing to hold against it, which `check_bound` says later."""
    with suppress(VitEdgeError):
        return [index for index, row in enumerate(rows) if index and _miss(rows[0], row, bound)]
    return []


def bound_key(judged: Sequence[ImageFile], bound: Bound) -> str:
    """Changes with the bound and with the images that it is held on; "" without a bound."""
    if not bound:
        return ""
    from vitedge.compiler.activations import images_sha256

    return content_key(dataclasses.astuple(bound), images_sha256(_search_images(judged, bound)))


def bounded_before(graph: Path, key: str, watcher: Watcher) -> Path:
    """The file that an earlier search made of `graph`, or else `graph`."""
    if key and is_readable(path := _bounded_path(graph, key)):
        watcher.end("bound", f"{short_path(path)} is fresh")
        return path
    return graph


def bound_or_note(search: BoundSearch, index: int, graph: Path, watcher: Watcher, notes: list[str]) -> dict[int, Path]:
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


def bound_step(search: BoundSearch, graph: Path, watcher: Watcher) -> Path:
    """The INT8 file `graph` with the fewest of its costliest Linears in float under which the bound was measured to hold.

    Candidates run on ONNX Runtime, over at most SEARCH_IMAGES images. A VitEdgeError where no choice of Linears holds.
    """
    from vitedge.compiler import sensitivity as compiler
    from vitedge.compiler.work import save_counted

    recipe = read_source(graph).recipe or Recipe()
    int8, prepared = pair(search.model, graph, recipe, search.root)
    every = frozenset(linear.name for linear in compiler.quantized(int8, prepared))
    watcher.begin("bound")
    with _candidates(search, int8, prepared) as judged:

        def holds(names: frozenset[str]) -> bool:
            return not _miss(*judged(names), search.bound)

        if not holds(every):  # said before minutes are spent on the costs
            raise compiler.impossible(len(every))
        rows, path = calibration_rows(prepared, search.files, recipe, compiler.COST_IMAGES), compiler.costs_path(graph)
        costs = compiler.sensitivity(int8, prepared, rows, path, lambda done, total: watcher.progress(done / total))
        points = compiler.frontier(costs)
        wanted_db = points[0].predicted_db + _more_db(*judged(frozenset()), search.bound)
        freed = compiler.meet(points, holds, wanted_db)
    result = _bounded_path(graph, search.key)
    save_counted(compiler.leave_out(int8, prepared, compiler.names_of(points, freed)), result)
    watcher.end("bound", f"{short_path(result)}: {_told(points[: freed + 1])}")
    return result


@contextmanager
def _candidates(
    search: BoundSearch, int8: ModelProto, prepared: ModelProto
) -> Iterator[Callable[[frozenset[str]], tuple[Judged, Judged]]]:
    """A function that judges the reference and the graph in which some Linears are free, each choice of them once."""
    from vitedge.compiler.graph import save
    from vitedge.compiler.sensitivity import leave_out

    files = _search_images(search.judged, search.bound)
    with tempfile.TemporaryDirectory() as folder, open_engine(search.reference) as engine:
        recording, path = Recording(engine), Path(folder) / "candidate.onnx"

        @functools.cache
        def judged(names: frozenset[str]) -> tuple[Judged, Judged]:
            save(leave_out(int8, prepared, names, fp32=True), path)
            recording.rewind()
            with open_engine(build_engine(path, REFERENCE, Path(folder))) as candidate:
                first, second = judge([recording, candidate], files)
            return first, second

        yield judged


def costs_step(model: Path, graph: Path, files: Sequence[ImageFile], recipe: Recipe, root: Path, watcher: Watcher) -> list[Point]:
    """What freeing the costliest Linears of the INT8 file `graph` should give, measured on few images: where to look."""
    from vitedge.compiler import sensitivity as compiler

    int8, prepared = pair(model, graph, recipe, root)
    rows, path = calibration_rows(prepared, files, recipe, LOOK_IMAGES), compiler.costs_path(graph)
    watcher.begin("costs")
    costs = compiler.sensitivity(int8, prepared, rows, path, lambda done, total: watcher.progress(done / total))
    watcher.end("costs", f"{short_path(path)}: {len(costs.costs)} Linears on {len(rows)} images")
    return compiler.frontier(costs)


def loosen_step(
    model: Path, graph: Path, names: Collection[str], floats: FloatType | None, root: Path, variant: str, watcher: Watcher
) -> Path:
    """The INT8 file `graph` with the Linears `names` in float, and all floats in the type `floats`, if one is given."""
    from vitedge.compiler import sensitivity as compiler
    from vitedge.compiler.graph import model_card, set_metadata
    from vitedge.compiler.work import save_counted

    path = graph.with_name(f"{variant}-{content_key(__version__, sha256(graph), sorted(names), floats)}.onnx")
    if is_readable(path):
        watcher.end("loosen", f"{short_path(path)} is fresh")
        return path
    watcher.begin("loosen")
    source = read_source(graph)
    int8, prepared = pair(model, graph, source.recipe or Recipe(), root)
    loosened = compiler.leave_out(int8, prepared, names)
    recipe = compiler.recipe_of(loosened)
    recipe = dataclasses.replace(recipe, float_type=floats or recipe.float_type)
    set_metadata(loosened, card=model_card(loosened), variant=variant, recipe=recipe)
    save_counted(loosened, path)
    watcher.end("loosen", f"{short_path(path)}: {len(names)} Linears in float")
    return path


def _told(points: Sequence[Point]) -> str:
    """Which Linears are free, and what that costs."""
    names = [point.name for point in points[1:]]
    some = ", ".join([*names[:6], *["..."][: len(names) > 6]])
    what = f"{len(names)} Linear{'' if len(names) == 1 else 's'} in float ({some})" if names else "no Linear in float"
    return f"{what}, a modelled {points[-1].latency:.2f} of the latency of all Linears in INT8"


def _miss(reference: BenchRow | Judged, row: BenchRow | Judged, bound: Bound) -> str:
    """How `row` misses the bound, as the rest of a sentence; "" where it holds."""
    if bound.max_drop is not None:
        drop, what = _drop(reference, row)
        if not drop <= bound.max_drop:  # a limit that is NaN allows nothing
            return f"loses {drop:.2f} points of {what}, more than the {bound.max_drop:g} that --max-drop allows"
    if bound.min_sqnr_db is not None and not (row.sqnr_db or 0.0) >= bound.min_sqnr_db:
        return f"has an SQNR of {row.sqnr_db or 0.0:.1f} dB, less than the {bound.min_sqnr_db:g} that --min-sqnr asks for"
    return ""


def _drop(reference: BenchRow | Judged, row: BenchRow | Judged) -> tuple[float, str]:
    """The points that `row` loses, and of what."""
    if row.top1 is not None and reference.top1 is not None:
        return reference.top1 - row.top1, "top-1"
    if row.agreement is None:
        raise VitEdgeError("there is no accuracy to hold against --max-drop", hint="it needs a classifier; --min-sqnr does not")
    return 100 - row.agreement, "agreement with FP32"


def _more_db(reference: Judged, int8: Judged, bound: Bound) -> float:
    """How much more SQNR than that of `int8` will do, as a guess: the answers that change are as many as noise is high."""
    wanted = [0.0]
    if bound.max_drop is not None:
        drop = max(_drop(reference, int8)[0], 0.0)
        wanted.append(20 * math.log10(drop / bound.max_drop) if bound.max_drop > 0 and drop else 0.0)
    if bound.min_sqnr_db is not None:
        wanted.append(bound.min_sqnr_db - (int8.sqnr_db or 0.0))
    return max(wanted)


def _search_images(files: Sequence[ImageFile], bound: Bound) -> list[ImageFile]:
    """The judge images that candidates are measured on."""
    return sample(files, SQNR_IMAGES if bound.max_drop is None else SEARCH_IMAGES, 0)


def _bounded_path(graph: Path, key: str) -> Path:
    return graph.with_name(f"{graph.stem.rpartition('-')[0]}-{content_key(__version__, sha256(graph), key)}.onnx")


def pair(model: Path, graph: Path, recipe: Recipe, root: Path) -> tuple[ModelProto, ModelProto]:
    """The INT8 graph, and the prepared float graph that it was made from."""
    from vitedge.compiler.calibrate import load_table
    from vitedge.compiler.graph import load
    from vitedge.compiler.quantize import prepare

    smoothing = load_table(scales_path(model, recipe, root)).smoothing
    return load(graph), prepare(load(model), recipe, smoothing)


def calibration_rows(prepared: ModelProto, files: Sequence[ImageFile], recipe: Recipe, limit: int) -> NDArray[Any]:
    """The first `limit` calibration images as the model takes them."""
    from vitedge.compiler.activations import read_inputs

    return read_inputs(prepared, sample(files, limit, recipe.seed), limit)


def scales_path(model: Path, recipe: Recipe, root: Path) -> Path:
    """Where the workspace keeps the table of scales of a model and a recipe."""
    source = read_source(model)
    return root / "calibration" / "scales" / f"{source.card.name}.{recipe.name}{reduction_of(source.variant)}.json"
