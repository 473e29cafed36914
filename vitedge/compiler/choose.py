"""A float model and images in, the smoothing or the range with the smallest error at the layers' outputs out.

    pass 1: activations -> Channels (range, mean, variance of each channel)  ->  candidates: one Smoothing per exponent
    pass 2: activations -> |(Q(x) - x) W|^2 of every candidate               ->  the best

Candidates are judged on images that they were not made from: each half of the images judges what the other half gave. A range
that just fits the images it was taken from promises a step that is too fine, and what clipping the next image's outliers
costs would not show. So does the exponent: the smaller it is, the more room is left in a channel that rarely speaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from vitedge.compiler.activations import Activations
from vitedge.compiler.graph import linear_weight, linears
from vitedge.compiler.qdq import QMAX
from vitedge.compiler.smooth import Site, sites
from vitedge.compiler.survey import Spread, conduct
from vitedge.exact import ExactSum
from vitedge.images import ImageFile
from vitedge.specs import Recipe, Smoothing

EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9)
FLOOR = 1e-3  # of the widest channel: one that never spoke in calibration may speak later
GPTQ_LEAVES = 0.35  # of the error that rounding weights to nearest makes; measured on ViT-S
STRIDE = 2  # every second token judges candidates
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Progress = Callable[[], object]


class Channels:
    """Smallest and largest value, mean and variance of every channel of a tensor, [..., channels]."""

    def __init__(self) -> None:
        self.count = 0
        self.low = self.high = np.zeros(0, np.float32)
        self.total, self.squares = ExactSum(), ExactSum()

    def add(self, x: Float32) -> None:
        """Take in the tokens of one image."""
        rows = x.reshape(-1, x.shape[-1])
        self._reach(rows.min(axis=0), rows.max(axis=0))
        self.total.add(rows.sum(axis=0, dtype=np.float64))
        self.squares.add(np.square(rows, dtype=np.float64).sum(axis=0))
        self.count += len(rows)

    def merge(self, other: Channels) -> None:
        """Take in the statistics of other images."""
        if other.count:
            self._reach(other.low, other.high)
            self.total.merge(other.total)
            self.squares.merge(other.squares)
            self.count += other.count

    @property
    def mean(self) -> Float64:
        """Of each channel."""
        mean: Float64 = self.total.value / self.count
        return mean

    @property
    def variance(self) -> Float64:
        """Of each channel."""
        variance: Float64 = np.maximum(self.squares.value / self.count - self.mean**2, 0)
        return variance

    def _reach(self, low: Float32, high: Float32) -> None:
        self.low = np.minimum(self.low, low) if self.count else low
        self.high = np.maximum(self.high, high) if self.count else high


def merged(a: Channels, b: Channels) -> Channels:
    """The statistics of two disjoint sets of images as of one."""
    both = Channels()
    both.merge(a)
    both.merge(b)
    return both


Halves = tuple[dict[str, Channels], dict[str, Channels]]


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelSurvey:
    """Asks for the Channels of tensors, of the images of even number and of those of odd number."""

    tensors: Sequence[str]

    def fresh(self) -> Halves:
        """Those of no image."""
        return {name: Channels() for name in self.tensors}, {name: Channels() for name in self.tensors}

    def add(self, statistics: Halves, number: int, activations: Activations) -> None:
        """Take in image number `number`."""
        for name, array in activations.items():
            statistics[number % 2][name].add(array)

    def merge(self, statistics: Halves, others: Halves) -> None:
        """Take in other images."""
        for half, other in zip(statistics, others, strict=True):
            for name, channels in other.items():
                half[name].merge(channels)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One way to quantize a tensor: (x - shift) / scale in 127 steps of amax / 127 to either side."""

    scale: Float64
    shift: Float64
    amax: float

    def error(self, rows: Float32) -> Float32:
        """What quantizing adds to `rows`, in their own units."""
        step = (self.scale * self.amax / QMAX).astype(np.float32)
        shift = self.shift.astype(np.float32)
        centered = rows - shift
        levels = np.clip(np.rint(centered / step), -QMAX, QMAX)
        error: Float32 = levels * step - centered
        return error


class Errors:
    """The summed squared errors of some candidates, and of how many tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squared = ExactSum()

    def add(self, squared: Sequence[float], tokens: int) -> None:
        """Take in one image."""
        self.squared.add(np.array(squared))
        self.tokens += tokens

    def merge(self, other: Errors) -> None:
        """Take in other images."""
        self.squared.merge(other.squared)
        self.tokens += other.tokens


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorSurvey:
    """Asks what candidates for each tensor add to its Linears' outputs; see `output_errors`."""

    weights: Mapping[str, Float32]
    candidates: Sequence[Mapping[str, Sequence[Candidate]]]

    @property
    def tensors(self) -> Sequence[str]:
        """Those with weights."""
        return list(self.weights)

    def fresh(self) -> dict[str, Errors]:
        """Those of no image."""
        return {name: Errors() for name in self.weights}

    def add(self, statistics: dict[str, Errors], number: int, activations: Activations) -> None:
        """Take in image number `number`."""
        turn, judges = divmod(number, len(self.candidates))
        for tensor, array in activations.items():
            rows = array.reshape(-1, array.shape[-1])[turn % STRIDE :: STRIDE]
            errors = (candidate.error(rows) @ self.weights[tensor] for candidate in self.candidates[judges][tensor])
            statistics[tensor].add([np.square(error).sum(dtype=np.float64) for error in errors], len(rows))

    def merge(self, statistics: dict[str, Errors], others: dict[str, Errors]) -> None:
        """Take in other images."""
        for tensor, errors in others.items():
            statistics[tensor].merge(errors)


def choose_smoothing(
    model: ModelProto, files: Sequence[ImageFile], recipe: Recipe, progress: Progress, spread: Spread | None = None
) -> dict[str, Smoothing]:
    """A Smoothing for every site of the model; `progress` is called once an image and pass. spread: see survey.py."""
    found = {site.tensor: site for site in sites(model)}
    weights = {tensor: joined_weights(model, site.linears) for tensor, site in found.items()}
    halves, _ = conduct(model, ChannelSurvey(list(found)), files, progress, spread)
    whole = {tensor: merged(halves[0][tensor], halves[1][tensor]) for tensor in found}
    exponents = dict.fromkeys(found, recipe.exponent)
    if found and recipe.smoothing == "auto":
        exponents = _best_exponents(model, files, recipe, weights, halves, progress, spread)
    return {tensor: _smoothing(whole[tensor], weights[tensor], exponents[tensor], recipe, found[tensor]) for tensor in found}


def output_errors(
    model: ModelProto,
    weights: Mapping[str, Float32],
    candidates: Sequence[Mapping[str, Sequence[Candidate]]],
    files: Sequence[ImageFile],
    progress: Progress,
    spread: Spread | None = None,
) -> dict[str, Float64]:
    """For each tensor of `weights`, the mean squared error a token of each of its candidates at the Linears' outputs.

    weights: float32[channels, outputs]. candidates: image number i is judged by those of the index i % len(candidates).
    """
    errors, _ = conduct(model, ErrorSurvey(weights, candidates), files, progress, spread)
    return {
        tensor: found.squared.value / found.tokens if found.tokens else np.zeros(len(candidates[0][tensor]))
        for tensor, found in errors.items()
    }


def joined_weights(model: ModelProto, names: Sequence[str]) -> Float32:
    """The weights of the Linears `names`, which read one tensor, side by side: float32[channels, outputs]."""
    return np.concatenate([linear_weight(model, linear) for linear in linears(model) if linear.name in names], axis=1)


def _best_exponents(
    model: ModelProto,
    files: Sequence[ImageFile],
    recipe: Recipe,
    weights: Mapping[str, Float32],
    halves: Sequence[Mapping[str, Channels]],
    progress: Progress,
    spread: Spread | None,
) -> dict[str, float]:
    """For each tensor the exponent with the smallest error of activations and weights together."""
    others = reversed(halves) if next(iter(halves[1].values())).count else halves[:1]  # even images judge what odd ones gave
    candidates = [
        {tensor: [_candidate(half[tensor], weights[tensor], a, recipe.shift) for a in EXPONENTS] for tensor in weights}
        for half in others
    ]
    errors = output_errors(model, weights, candidates, files, progress, spread)
    left = GPTQ_LEAVES if recipe.rounding == "gptq" else 1.0
    best = {}
    for tensor, weight in weights.items():
        both = merged(halves[0][tensor], halves[1][tensor])
        rounding = [_rounding_error(both, weight, _candidate(both, weight, a, recipe.shift).scale) for a in EXPONENTS]
        best[tensor] = EXPONENTS[int(np.argmin(errors[tensor] + left * np.array(rounding)))]
    return best


def _candidate(channels: Channels, weight: Float32, exponent: float, shifted: bool) -> Candidate:
    """What an exponent gives: scale = reach^exponent / strength^(1 - exponent), its geometric mean 1."""
    low, high = channels.low.astype(np.float64), channels.high.astype(np.float64)
    shift = (low + high) / 2 if shifted else np.zeros_like(low)
    reach = np.maximum(high - shift, shift - low)
    reach = np.maximum(reach, max(float(reach.max()), 1e-12) * FLOOR)
    strength = np.linalg.norm(weight.astype(np.float64), axis=1)
    strength = np.maximum(strength, max(float(strength.max()), 1e-12) * FLOOR)
    scale = reach**exponent / strength ** (1 - exponent)
    scale /= np.exp(np.log(scale).mean())
    return Candidate(scale, shift, float((reach / scale).max()))


def _rounding_error(channels: Channels, weight: Float32, scale: Float64) -> float:
    """The expected squared error a token of rounding scale * weight to nearest, a scale for each output channel."""
    steps = np.abs(weight * scale[:, None]).max(axis=0) / QMAX
    return float(np.square(steps).sum() / 12 * (channels.variance / scale**2).sum())


def _smoothing(channels: Channels, weight: Float32, exponent: float, recipe: Recipe, site: Site) -> Smoothing:
    """The Smoothing of all images together, rounded so that the table stays short; ranges are taken after it."""
    candidate = _candidate(channels, weight, exponent, recipe.shift)
    # INT8 softmax rows do not quite sum to 1; around the mean, what is missing is missing from nothing
    centered = recipe.shift and recipe.attention and site.how == "values"
    shift = channels.mean if centered else candidate.shift
    return Smoothing(tuple(_digits(x, 3) for x in candidate.scale), tuple(_digits(x, 5) for x in shift))


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")
