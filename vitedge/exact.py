"""Sums of float64 arrays that come out the same to the last bit, in whatever order and from whatever parts.

    array, array, ...  ->  ExactSum  ->  the sum, rounded once

The running sum is kept as a few arrays that add up to it without any rounding error (J. R. Shewchuk, "Adaptive Precision
Floating-Point Arithmetic", 1997): `math.fsum` for whole arrays, which can also be merged. Knows nothing of what is summed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_PARTS = 5  # before they are squeezed; the numbers of one tensor need two or three


class ExactSum:
    """The exact sum of finite arrays of one shape."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []  # of rising magnitude; zeros may lie between

    def add(self, x: NDArray[Any] | float) -> None:
        """Add an array, or a number, without rounding."""
        rest, parts = np.asarray(x, np.float64), []
        for part in self._parts:
            rest, lost = _two_sum(rest, part)
            if lost.any():
                parts.append(lost)
        parts.append(rest)
        self._parts = parts if len(parts) <= MOST_PARTS else _squeezed(parts)

    def merge(self, other: ExactSum) -> None:
        """Add all that `other` has seen."""
        for part in other._parts:
            self.add(part)

    @property
    def value(self) -> NDArray[np.float64]:
        """The sum, each entry rounded to the nearest float64; 0 where nothing was added."""
        if not self._parts:
            return np.zeros(())
        columns = np.stack(self._parts).reshape(len(self._parts), -1)
        sums = np.array([math.fsum(column) for column in columns.T.tolist()])
        return sums.reshape(self._parts[0].shape)

    def __float__(self) -> float:
        return float(self.value)


def _two_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rounded sum, and what rounding lost of it, exactly (D. E. Knuth)."""
    total = np.asarray(a + b)
    of_b = total - a
    return total, np.asarray((a - (total - of_b)) + (b - of_b))


def _squeezed(parts: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The same sum in as few arrays as it takes: from the top down, each entry takes in what it can (Shewchuk's COMPRESS)."""
    rest, full = parts[-1], []
    for part in reversed(parts[:-1]):
        total, lost = _two_sum(rest, part)
        full.append(np.where(lost != 0, total, 0))
        rest = np.where(lost != 0, lost, total)
    stacked = np.stack([rest, *reversed(full)])
    order = np.argsort(stacked != 0, axis=0, kind="stable")  # zeros to the front
    return [part for part in np.take_along_axis(stacked, order, axis=0) if part.any()]
