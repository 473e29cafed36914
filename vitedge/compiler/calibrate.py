"""Activations in, ranges out.

    images -> float model   ->  Smoothing per tensor (choose.py)  ->  smoothed model
    images -> smoothed model -> {tensor name: array}  ->  AbsMax or AbsHistogram per tensor  ->  ScaleTable

Statistics are streamed: memory does not grow with the number of images. The collectors know nothing of torch, ONNX or
any backend: whoever can name its activations can be calibrated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from vitedge.compiler.activations import Activations, images_sha256, read_inputs
from vitedge.compiler.choose import Candidate, choose_smoothing, joined_weights, output_errors
from vitedge.compiler.graph import load
from vitedge.compiler.quantize import prepare
from vitedge.compiler.select import chosen_linears, quantized_activations
from vitedge.compiler.smooth import prove
from vitedge.compiler.survey import Spread, conduct
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, sample
from vitedge.specs import Method, Recipe, ScaleTable, Smoothing, from_dict, to_dict
from vitedge.workspace import read_json, sha256, write_json

BINS = 4096
LEVELS = 128  # of |x|: 0 to 127
FLOOR = 1e-12  # of a range to judge, so that nothing divided by its step overflows
PROVED = 4  # images that must come out of the smoothed model as out of the original
AUTO: tuple[Method, ...] = ("max", "percentile", "mse", "entropy")  # what the method "auto" chooses from
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class AbsMax:
    """The largest |x| seen."""

    def __init__(self) -> None:
        self.maximum = 0.0

    def add(self, x: Float32) -> None:
        """Take in the values of `x`."""
        self.maximum = max(self.maximum, float(x.max()), -float(x.min()))

    def merge(self, other: AbsMax) -> None:
        """Take in what another one of the same kind has seen."""
        self.maximum = max(self.maximum, other.maximum)

    def amax(self, method: str = "max", percentile: float = 100.0) -> float:
        """The range; there is but one."""
        return self.maximum


class AbsHistogram(AbsMax):
    """Counts of |x| in one pass over the data, whatever range it turns out to have."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 2.0**-24  # always a power of two, so doubling merges bins exactly

    def add(self, x: Float32) -> None:
        """Count the values of `x`, which must be finite, doubling the range until they fit."""
        super().add(x)
        magnitudes = np.abs(x).ravel()
        self._widen()
        bins = (magnitudes * (BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)

    def merge(self, other: AbsMax) -> None:
        """Take in the counts of another histogram, exactly: a bin's width is a power of two."""
        assert isinstance(other, AbsHistogram)
        super().merge(other)
        self._widen()
        ratio = int(min(self.limit / other.limit, BINS))  # of more, all lies in the first bin as well
        self.counts[: BINS // ratio] += other.counts.reshape(-1, ratio).sum(axis=1)

    def amax(self, method: str = "max", percentile: float = 100.0) -> float:
        """The range by a method of Recipe: exact, to a bin's width by percentile (in 0..100), else the best of `_edges`."""
        if method == "max":
            return self.maximum
        edges = {"percentile": lambda: self._percentile(percentile), "mse": self._mse, "entropy": self._entropy}
        return min(edges[method]() * self.limit / BINS, self.maximum)

    def _widen(self) -> None:
        """Double the range until the largest value lies in it."""
        while self.maximum >= self.limit:  # not >, or a value on the limit would lie one bin lower than later on
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(axis=1), (0, BINS // 2))
            self.limit *= 2

    def _percentile(self, percentile: float) -> int:
        """The first bin edge that at least `percentile` percent of the values do not exceed."""
        needed = percentile / 100 * self.counts.sum()
        return min(int(np.searchsorted(np.cumsum(self.counts), needed - 1e-9)) + 1, BINS)

    def _mse(self) -> int:
        """The bin edge at which rounding and clipping together change the values least, squared."""
        middles, edges = np.arange(0.5, BINS), self._edges()
        errors = [self._squared_error(middles, edge / (LEVELS - 1)) for edge in edges]
        return int(edges[int(np.argmin(errors))])

    def _squared_error(self, middles: Float64, step: float) -> float:
        levels = np.minimum(np.rint(middles / step), LEVELS - 1)
        return float((np.square(middles - levels * step) * self.counts).sum())

    def _entropy(self) -> int:
        """The bin edge at which the quantized distribution diverges least from the true one (Migacz, GTC 2017)."""
        edges = self._edges()
        return int(edges[int(np.argmin([self._divergence(edge) for edge in edges]))])

    def _divergence(self, edge: int) -> float:
        """Kullback-Leibler, of the counts clipped at a bin edge from the same spread evenly over each level's filled bins."""
        inside = self.counts[:edge].astype(np.float64)
        clipped = inside.copy()
        clipped[-1] += self.counts[edge:].sum()
        level = np.arange(edge) * LEVELS // edge
        filled = np.bincount(level, inside > 0, LEVELS)
        spread = np.where(inside > 0, (np.bincount(level, inside, LEVELS) / np.maximum(filled, 1))[level], 0)
        p, q = clipped / max(clipped.sum(), 1), np.maximum(spread / max(spread.sum(), 1), 1e-12)
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())

    def _edges(self) -> NDArray[np.int64]:
        """The bin edges worth trying, up to the last filled bin."""
        last = int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 1
        return np.unique(np.linspace(min(LEVELS, last), last, 97).astype(np.int64))


def collector(recipe: Recipe) -> AbsMax:
    """What the recipe's method finds the range of one activation by."""
    return AbsMax() if recipe.method == "max" else AbsHistogram()


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """A ScaleTable, and the images that could not be read on the way to it."""

    table: ScaleTable
    skipped: tuple[str, ...]


def calibrate(
    model_path: Path,
    files: Sequence[ImageFile],
    recipe: Recipe,
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
    spread: Spread | None = None,
) -> Calibration:
    """Run up to `recipe.images` of `files` through the float model and find the range of every activation to quantize.

    progress: called with (images done, images in all). spread: who looks at the images, by default this process (see survey.py);
    the table is the same to the last bit. Too few readable images is a VitEdgeError.
    """
    if recipe.method == "none":
        hint = f"`vitedge make --recipe {recipe.name}` builds it without a calibration"
        raise VitEdgeError(f"the recipe {recipe.name!r} quantizes nothing, so there is nothing to calibrate", hint=hint)
    chosen = sample(files, recipe.images, recipe.seed)
    steps, total = itertools.count(1), len(chosen) * _passes(recipe)

    def step() -> None:
        progress(min(next(steps), total), total)

    original = load(model_path)
    smoothing = dict[str, Smoothing]()
    model = prepare(original, recipe, smoothing)
    if recipe.smoothing != "none":
        smoothing = choose_smoothing(model, chosen, recipe, step, spread)
        model = prepare(original, recipe, smoothing)
        prove(original, model, read_inputs(model, chosen, PROVED))
    survey = RangeSurvey(quantized_activations(model, recipe), recipe)
    ranges, skipped = conduct(model, survey, chosen, step, spread)
    _require_enough(len(chosen) - len(skipped), recipe)
    methods: dict[str, Method] = dict.fromkeys(survey.tensors, recipe.method)
    if recipe.method == "auto":
        methods |= _methods(model, chosen, recipe, ranges, step, spread)
    amax = {name: _round(found.amax(methods[name], recipe.percentile)) for name, found in ranges.whole.items()}
    done = len(chosen) - len(skipped)
    return Calibration(ScaleTable(recipe, sha256(model_path), images_sha256(chosen), done, amax, smoothing), tuple(skipped))


def _passes(recipe: Recipe) -> int:
    """How often every image is run through the model: channels, exponents (choose.py), ranges, methods."""
    return 1 + {"none": 0, "fixed": 1, "auto": 2}[recipe.smoothing] + (recipe.method == "auto")


def _require_enough(images: int, recipe: Recipe) -> None:
    if images < recipe.min_images:
        raise VitEdgeError(
            f"only {images} images can be read, but the recipe {recipe.name!r} calibrates on at least {recipe.min_images}",
            hint="give more images of the kind the model will see, or lower min_images in the recipe",
        )


class Ranges:
    """The collectors of every tensor: of all images and, where the method is chosen, of each half of them."""

    def __init__(self, tensors: Sequence[str], recipe: Recipe) -> None:
        self.whole = {name: collector(recipe) for name in tensors}
        halves = 2 if recipe.method == "auto" else 0
        self.halves = [{name: collector(recipe) for name in tensors} for _ in range(halves)]


@dataclasses.dataclass(frozen=True, slots=True)
class RangeSurvey:
    """Asks for the Ranges of tensors."""

    tensors: Sequence[str]
    recipe: Recipe

    def fresh(self) -> Ranges:
        """Those of no image."""
        return Ranges(self.tensors, self.recipe)

    def add(self, statistics: Ranges, number: int, activations: Activations) -> None:
        """Take in image number `number`."""
        for collectors in [statistics.whole, *statistics.halves[number % 2 :][:1]]:
            for name, array in activations.items():
                collectors[name].add(array)

    def merge(self, statistics: Ranges, others: Ranges) -> None:
        """Take in other images."""
        for collectors, more in zip([statistics.whole, *statistics.halves], [others.whole, *others.halves], strict=True):
            for name, found in more.items():
                collectors[name].merge(found)


def _methods(
    model: ModelProto,
    files: Sequence[ImageFile],
    recipe: Recipe,
    ranges: Ranges,
    step: Callable[[], object],
    spread: Spread | None,
) -> dict[str, Method]:
    """For each tensor the method that changes the outputs of its Linears least, judged on the other half of the images."""
    readers = defaultdict[str, list[str]](list)
    for linear in chosen_linears(model, recipe):
        readers[linear.input].append(linear.name)
    weights = {name: joined_weights(model, readers[name]) for name in ranges.whole if name in readers}
    candidates = [
        {name: [_clipped(half[name].amax(method, recipe.percentile)) for method in AUTO] for name in weights}
        for half in reversed(ranges.halves)
    ]
    errors = output_errors(model, weights, candidates, files, step, spread)
    # what no Linear reads, an operand of attention, has no error to go by
    return {name: AUTO[int(np.argmin(errors[name]))] if name in errors else "max" for name in ranges.whole}


def _clipped(amax: float) -> Candidate:
    """A range as a Candidate that smooths nothing."""
    return Candidate(np.ones(1), np.zeros(1), max(amax, FLOOR))


def save_table(table: ScaleTable, path: Path) -> None:
    """Write a scale table as JSON, one tensor a line, so that two of them can be compared with diff."""
    write_json(path, to_dict(table))


def load_table(path: Path) -> ScaleTable:
    """Read a scale table back."""
    content = read_json(path)
    table = from_dict(ScaleTable, content)
    # a default would not be what the table was made with
    if "smoothing" not in content or len(content["recipe"]) != len(to_dict(table.recipe)):
        raise VitEdgeError(f"{path} was written by an older version of vitedge", hint="calibrate again")
    return table


def _round(amax: float) -> float:
    """Six significant digits: far below the step of INT8, and readable in a diff."""
    return float(f"{amax:.6g}")
