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

from vitedge.compiler.activations import stream_activations
from vitedge.compiler.graph import linear_weight, linears
from vitedge.compiler.qdq import QMAX
from vitedge.compiler.smooth import Site, sites
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
        self.total = self.squares = np.zeros(0)

    def add(self, x: Float32) -> None:
        """Take in the tokens of one image."""
        rows = x.reshape(-1, x.shape[-1])
        low, high = rows.min(axis=0), rows.max(axis=0)
        total, squares = rows.sum(axis=0, dtype=np.float64), np.square(rows, dtype=np.float64).sum(axis=0)
        if self.count:
            low, high = np.minimum(self.low, low), np.maximum(self.high, high)
            total, squares = self.total + total, self.squares + squares
        self.low, self.high, self.total, self.squares, self.count = low, high, total, squares, self.count + len(rows)

    @property
    def mean(self) -> Float64:
        """Of each channel."""
        mean: Float64 = self.total / self.count
        return mean

    @property
    def variance(self) -> Float64:
        """Of each channel."""
        variance: Float64 = np.maximum(self.squares / self.count - self.mean**2, 0)
        return variance


def merged(a: Channels, b: Channels) -> Channels:
    """The statistics of two disjoint sets of images as of one; the first set is not empty."""
    if not b.count:
        return a
    both = Channels()
    both.low, both.high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    both.total, both.squares, both.count = a.total + b.total, a.squares + b.squares, a.count + b.count
    return both


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


def choose_smoothing(model: ModelProto, files: Sequence[ImageFile], recipe: Recipe, progress: Progress) -> dict[str, Smoothing]:
    """A Smoothing for every site of the model; `progress` is called once an image and pass."""
    found = {site.tensor: site for site in sites(model)}
    weights = {tensor: joined_weights(model, site.linears) for tensor, site in found.items()}
    halves = _measure(model, list(found), files, progress)
    whole = {tensor: merged(halves[0][tensor], halves[1][tensor]) for tensor in found}
    exponents = dict.fromkeys(found, recipe.exponent)
    if found and recipe.smoothing == "auto":
        exponents = _best_exponents(model, files, recipe, weights, halves, progress)
    return {tensor: _smoothing(whole[tensor], weights[tensor], exponents[tensor], recipe, found[tensor]) for tensor in found}


def output_errors(
    model: ModelProto,
    weights: Mapping[str, Float32],
    candidates: Sequence[Mapping[str, Sequence[Candidate]]],
    files: Sequence[ImageFile],
    progress: Progress,
) -> dict[str, Float64]:
    """For each tensor of `weights`, the mean squared error a token of each of its candidates at the Linears' outputs.

    weights: float32[channels, outputs]. candidates: image number i is judged by those of the index i % len(candidates).
    """
    sums = {tensor: np.zeros(len(candidates[0][tensor])) for tensor in weights}
    tokens = dict.fromkeys(weights, 0)
    for index, (_, activations) in enumerate(stream_activations(model, list(weights), files, [])):
        judged = candidates[index % len(candidates)]
        for tensor, array in activations.items():
            rows = array.reshape(-1, array.shape[-1])[(index // len(candidates)) % STRIDE :: STRIDE]
            tokens[tensor] += len(rows)
            for position, candidate in enumerate(judged[tensor]):
                sums[tensor][position] += np.square(candidate.error(rows) @ weights[tensor]).sum(dtype=np.float64)
        progress()
    return {tensor: sums[tensor] / max(tokens[tensor], 1) for tensor in weights}


def joined_weights(model: ModelProto, names: Sequence[str]) -> Float32:
    """The weights of the Linears `names`, which read one tensor, side by side: float32[channels, outputs]."""
    return np.concatenate([linear_weight(model, linear) for linear in linears(model) if linear.name in names], axis=1)


def _measure(
    model: ModelProto, tensors: list[str], files: Sequence[ImageFile], progress: Progress
) -> tuple[dict[str, Channels], dict[str, Channels]]:
    """The statistics of the images of even number and of those of odd number."""
    halves = {name: Channels() for name in tensors}, {name: Channels() for name in tensors}
    for index, (_, activations) in enumerate(stream_activations(model, tensors, files, [])):
        for name, array in activations.items():
            halves[index % 2][name].add(array)
        progress()
    return halves


def _best_exponents(
    model: ModelProto,
    files: Sequence[ImageFile],
    recipe: Recipe,
    weights: Mapping[str, Float32],
    halves: Sequence[Mapping[str, Channels]],
    progress: Progress,
) -> dict[str, float]:
    """For each tensor the exponent with the smallest error of activations and weights together."""
    others = reversed(halves) if next(iter(halves[1].values())).count else halves[:1]  # even images judge what odd ones gave
    candidates = [
        {tensor: [_candidate(half[tensor], weights[tensor], a, recipe.shift) for a in EXPONENTS] for tensor in weights}
        for half in others
    ]
    errors = output_errors(model, weights, candidates, files, progress)
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
