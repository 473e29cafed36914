"""The size of a frame and a Preprocess in, the weights of every pixel of the result out: Pillow's resampling as numbers.

    (height, width) + Preprocess  ->  Resampling(across, down): which pixels of the frame make up each column, then each row

Whatever resamples with these integers equals Pillow bit for bit: across first, rounded to 8 bits, then down. So it is one
arithmetic for every implementation, on the CPU and on a GPU. After `precompute_coeffs` and `normalize_coeffs_8bpc` in
Pillow's Resample.c. Knows nothing of pixels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitedge.specs import Preprocess

PRECISION_BITS = 22  # of a weight: 8 bits of a pixel and 2 of overshoot are what is left of 32
RADIUS = {"bicubic": 2, "bilinear": 1}  # in pixels of the source, or of the result where that is coarser


@dataclass(frozen=True, slots=True, eq=False)
class Taps:
    """What each pixel of one axis of the result is made from.

    first: int32[out], the first source pixel. weights: int32[out, taps], times 2**-22; a pixel out of reach has a zero, and
    none lies outside the frame. A result is (sum of pixel * weight + 2**21) >> 22, clipped to 0..255.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Resampling:
    """How a frame of one size becomes the picture that a model sees: its columns by `across`, then its rows by `down`."""

    across: Taps
    down: Taps


@functools.lru_cache(maxsize=64)
def resampling(height: int, width: int, spec: Preprocess) -> Resampling:
    """How a frame of `height` x `width` is resized and center-cropped to `spec.size`."""
    (top, bottom), (left, right) = seen_region(height, width, spec)
    if scaled_size((height, width), spec) == (height, width):
        return Resampling(_copied(int(left), int(right)), _copied(int(top), int(bottom)))
    first, last = rows_read(height, (top, bottom), spec)
    down = _taps(last - first, (top - first, bottom - first), spec.size[0], spec.interpolation)
    across = _taps(width, (left, right), spec.size[1], spec.interpolation)
    return Resampling(across, Taps(down.first + np.int32(first), down.weights))


def seen_region(height: int, width: int, spec: Preprocess) -> tuple[tuple[float, float], tuple[float, float]]:
    """The (first, last) rows and columns, in its own pixels, that a model sees of an image of `height` x `width`."""
    source, scaled = (height, width), scaled_size((height, width), spec)
    # round() takes a half to the even neighbour; so does torchvision's center_crop
    top, left = (round((whole - kept) / 2) for whole, kept in zip(scaled, spec.size, strict=True))
    rows = _span(top, spec.size[0], source[0] / scaled[0], source[0])
    columns = _span(left, spec.size[1], source[1] / scaled[1], source[1])
    return rows, columns


def rows_read(height: int, rows: tuple[float, float], spec: Preprocess) -> tuple[int, int]:
    """The (first, last) rows of the source that the filter reads, and one more, to see the given `rows`."""
    reach = math.ceil(RADIUS[spec.interpolation] * max(1, (rows[1] - rows[0]) / spec.size[0])) + 1
    return max(0, math.floor(rows[0]) - reach), min(height, math.ceil(rows[1]) + reach)


def scaled_size(source: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
    """The (height, width) of the whole image once resized, of which the center is cut to `spec.size`."""
    # the 1e-6 makes 256 of 224 / (224 / 256), whatever the last bit of a crop_pct that was itself a quotient
    target_height, target_width = (math.floor(side / spec.crop_pct + 1e-6) for side in spec.size)
    if spec.resize == "squash":
        return target_height, target_width
    height, width = source
    # torchvision's Resize truncates the longer side; timm's ResizeKeepRatio, for a size that is not square, rounds it
    whole = math.floor if target_height == target_width else round
    if height * target_width <= width * target_height:
        return target_height, whole(width * target_height / height)
    return whole(height * target_width / width), target_width


def _span(start: int, length: int, step: float, limit: int) -> tuple[float, float]:
    """The source coordinates of `length` resized pixels from `start` on, each `step` source pixels wide."""
    return start * step, min((start + length) * step, limit)


def _taps(size: int, box: tuple[float, float], out: int, interpolation: str) -> Taps:
    """The weights that take `box` of an axis of `size` pixels to `out` pixels."""
    low, high = np.float32(box[0]), np.float32(box[1])  # as Pillow keeps them
    scale = float(high - low) / out
    stretch = max(scale, 1.0)
    support = RADIUS[interpolation] * stretch
    centers = float(low) + (np.arange(out) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), size)
    taps = int((last - first).max())
    start = np.minimum(first, size - taps)
    pixels = start[:, None] + np.arange(taps)
    weights = _FILTERS[interpolation]((pixels - centers[:, None] + 0.5) * (1.0 / stretch))
    weights[(pixels < first[:, None]) | (pixels >= last[:, None])] = 0.0
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # in the order of a loop, to the last bit
    rounded = weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)
    return Taps(start.astype(np.int32), rounded.astype(np.int32))


def _copied(first: int, last: int) -> Taps:
    """The weights that take over the pixels from `first` to `last` as they are."""
    return Taps(np.arange(first, last, dtype=np.int32), np.full((last - first, 1), 1 << PRECISION_BITS, np.int32))


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981), in Pillow's order of operations."""
    x, a = np.abs(x), -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}
