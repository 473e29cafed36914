"""Which batch sizes an engine is quick at, from what its runs take.

Engines are quick at the sizes that they were tuned for, and a few rows of those may be left to chance. Knows nothing of
requests or queues.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitedge.runtime.predictor import elapsed_ms

NEARLY = 0.9  # of the best rate


class Runnable(Protocol):
    """What is asked of an engine here."""

    def run(self, count: int) -> NDArray[np.float32]:
        """Run the first `count` rows."""


class Pace:
    """What each batch size takes here, learned while it runs; and with that, the quickest size that holds a number of rows."""

    def __init__(self) -> None:
        self._least_ms: dict[int, float] = {}

    def size(self, rows: int) -> int:
        """How many rows to run, so that `rows` of them are done soonest."""
        least = self._least_ms
        if least.get(rows, math.inf) == math.inf:
            return rows  # which is how its time gets known
        return min((size for size in tuple(least) if size >= rows), key=lambda size: (least[size], size))

    def note(self, size: int, ms: float) -> None:
        """A run of so many rows took so long. The first of a size does not count: it allocates. Noise only ever adds."""
        self._least_ms[size] = min(self._least_ms[size], ms) if size in self._least_ms else math.inf


def quick_size(engine: Runnable, most: int) -> int:
    """The smallest batch with nearly the rate of the best one: in a larger one, frames would wait for each other in vain."""
    sizes, rates = sorted({*(1 << power for power in range(most.bit_length())), most}), list[float]()
    for size in sizes:
        engine.run(size)  # the first run of a size allocates
        start = time.perf_counter_ns()
        engine.run(size)
        rates.append(size / max(elapsed_ms(start), 1e-6))
    return next(size for size, rate in zip(sizes, rates, strict=True) if rate >= NEARLY * max(rates))
