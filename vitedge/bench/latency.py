"""Engines in, latencies out: the candidates take turns, so that a machine that drifts drifts for all of them alike.

    [engine, ...]  ->  rounds of short turns, A B, B A, A B ...  ->  one Latency an engine

Times `Engine.run` on whatever lies in the input buffers; knows nothing of images, labels or what an engine computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from vitedge.errors import VitEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vitedge.runtime.engine import Engine

TURN_S = 0.05  # long enough to run from warm caches, short beside the seconds over which a machine heats up
TURN_CALLS = 4  # timed calls in a turn, at least; a slow engine would otherwise spend half its calls on warming up
MIN_SAMPLES = 20  # fewer make no percentile


@dataclass(frozen=True, slots=True, eq=False)
class Latency:
    """Every timed call of one engine at one batch size.

    samples_ms: float64[calls], in the order they were made. first_ms: the very first call, before any warming up.
    """

    batch: int
    samples_ms: NDArray[np.float64]
    first_ms: float

    @property
    def p50_ms(self) -> float:
        """Half of the calls took no longer than this, in milliseconds a batch."""
        return float(np.percentile(self.samples_ms, 50))

    @property
    def p90_ms(self) -> float:
        """Nine calls in ten took no longer than this, in milliseconds a batch."""
        return float(np.percentile(self.samples_ms, 90))

    @property
    def p99_ms(self) -> float:
        """All calls but one in a hundred took no longer than this, in milliseconds a batch."""
        return float(np.percentile(self.samples_ms, 99))

    @property
    def images_per_s(self) -> float:
        """Images finished, divided by the time spent in all timed calls, the slow ones included."""
        return self.samples_ms.size * self.batch * 1000 / float(self.samples_ms.sum())


def measure(
    engines: Sequence[Engine],
    batch: int,
    *,
    seconds: float = 3.0,
    warmup: int = 5,
    progress: Callable[[float], None] | None = None,
) -> list[Latency]:
    """Time `run(batch)` of every engine, in turns, for `seconds` of timed calls each and MIN_SAMPLES calls at least.

    The buffers are timed as they are: fill them with real images first where power depends on the data (GPUs).
    progress: called after each round with the finished part of the work, 0 to 1.
    Raises VitEdgeError where an engine does not take the batch.
    """
    require_batch(engines, batch)
    first_ms = [_timed_ms(engine, batch) for engine in engines]
    for engine in engines:
        for _ in range(warmup):
            engine.run(batch)
    samples: list[list[float]] = [[] for _ in engines]
    order = list(range(len(engines)))
    while min((_finished(taken, seconds) for taken in samples), default=1.0) < 1:
        for index in order:
            samples[index] += _turn(engines[index], batch)
        order.reverse()  # A B, B A: a steady drift then costs both the same
        if progress:
            progress(min(_finished(taken, seconds) for taken in samples))
    return [Latency(batch, np.array(taken), first) for taken, first in zip(samples, first_ms, strict=True)]


def require_batch(engines: Sequence[Engine], batch: int) -> None:
    """Raise VitEdgeError unless every engine takes `batch` images at once."""
    for engine in engines:
        if not 1 <= batch <= engine.max_batch:
            hint = "measure a batch within that, or build the engine for a larger one (`batch` of the target)"
            raise VitEdgeError(f"{engine.path} takes 1 to {engine.max_batch} images at once, not {batch}", hint=hint)


def _turn(engine: Engine, batch: int) -> list[float]:
    """Milliseconds of the calls of one turn, after one that is not counted: the engine before had the caches."""
    engine.run(batch)
    taken: list[float] = []
    end = perf_counter_ns() + int(TURN_S * 1e9)
    while len(taken) < TURN_CALLS or perf_counter_ns() < end:
        taken.append(_timed_ms(engine, batch))
    return taken


def _timed_ms(engine: Engine, batch: int) -> float:
    start = perf_counter_ns()
    engine.run(batch)
    return (perf_counter_ns() - start) / 1e6


def _finished(taken: list[float], seconds: float) -> float:
    """Which part of its calls and its time an engine has had, 0 to 1."""
    return min(1.0, len(taken) / MIN_SAMPLES, sum(taken) / 1000 / seconds if seconds > 0 else 1.0)
