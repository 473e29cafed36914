"""Activations in, ranges out.

    {tensor name: array}  ->  AbsMax or AbsHistogram per tensor  ->  ScaleTable

Statistics are streamed: memory does not grow with the number of images. The collectors know nothing of torch, ONNX or
any backend: whoever can name its activations can be calibrated.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitedge.compiler.activations import stream_activations
from vitedge.compiler.graph import load
from vitedge.compiler.quantize import quantized_activations
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, sample
from vitedge.specs import Recipe, ScaleTable, from_dict, to_dict
from vitedge.workspace import read_json, sha256, write_json

BINS = 4096
Float32 = NDArray[np.float32]


class AbsMax:
    """The largest |x| seen."""

    def __init__(self) -> None:
        self.amax = 0.0

    def add(self, x: Float32) -> None:
        """Take in the values of `x`."""
        self.amax = max(self.amax, float(x.max()), -float(x.min()))


class AbsHistogram:
    """Counts of |x| in one pass over the data, whatever range it turns out to have."""

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 2.0**-24  # always a power of two, so doubling merges bins exactly

    def add(self, x: Float32) -> None:
        """Count the values of `x`, which must be finite, doubling the range until they fit."""
        magnitudes = np.abs(x).ravel()
        while float(magnitudes.max()) >= self.limit:  # not >, or a value on the limit would lie one bin lower than later on
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(axis=1), (0, BINS // 2))
            self.limit *= 2
        bins = (magnitudes * (BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)

    @property
    def amax(self) -> float:
        """The smallest bin edge that at least `percentile` percent of the values do not exceed."""
        needed = self.percentile / 100 * self.counts.sum()
        edge = int(np.searchsorted(np.cumsum(self.counts), needed - 1e-9)) + 1
        return min(edge, BINS) * self.limit / BINS


def collector(recipe: Recipe) -> AbsMax | AbsHistogram:
    """What finds the range of one activation by the recipe's method."""
    return AbsMax() if recipe.method == "max" else AbsHistogram(recipe.percentile)


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
) -> Calibration:
    """Run up to `recipe.images` of `files` through the float model and find the range of every activation to quantize.

    progress: called with (images done, images in all). Too few readable images is a VitEdgeError.
    """
    if recipe.method == "none":
        hint = f"`vitedge make --recipe {recipe.name}` builds it without a calibration"
        raise VitEdgeError(f"the recipe {recipe.name!r} quantizes nothing, so there is nothing to calibrate", hint=hint)
    model = load(model_path)
    chosen = sample(files, recipe.images, recipe.seed)
    tensors = quantized_activations(model, recipe)
    collectors = {name: collector(recipe) for name in tensors}
    skipped: list[str] = []
    done = 0
    for batch, activations in stream_activations(model, tensors, chosen, skipped):
        for name, array in activations.items():
            collectors[name].add(array)
        done += len(batch)
        progress(done, len(chosen))
    if done < recipe.min_images:
        raise VitEdgeError(
            f"only {done} images can be read for calibration, but the recipe {recipe.name!r} wants at least {recipe.min_images}",
            hint="give more images of the kind the model will see, or lower min_images in the recipe",
        )
    amax = {name: _round(found.amax) for name, found in collectors.items()}
    return Calibration(ScaleTable(recipe, sha256(model_path), images_sha256(chosen), done, amax), tuple(skipped))


def images_sha256(files: Sequence[ImageFile]) -> str:
    """One hash over the bytes of all files, in order."""
    state = hashlib.sha256()
    for file in files:
        state.update((sha256(file.path) if file.path.is_file() else "unreadable").encode())
    return state.hexdigest()


def save_table(table: ScaleTable, path: Path) -> None:
    """Write a scale table as JSON, one tensor a line, so that two of them can be compared with diff."""
    write_json(path, to_dict(table))


def load_table(path: Path) -> ScaleTable:
    """Read a scale table back."""
    return from_dict(ScaleTable, read_json(path))


def _round(amax: float) -> float:
    """Six significant digits: far below the step of INT8, and readable in a diff."""
    return float(f"{amax:.6g}")
