"""Engines in, latencies out: the candidates take turns, so that a machine that drifts drifts for all of them alike.

    [engine, ...]  ->  rounds of short turns, A B, B A, A B ...  ->  one Latency an engine

A turn during which other processes had the processor is taken again, which looks at their time and never at the turn's.
Times `Engine.run` on whatever lies in the input buffers; knows nothing of images, labels or what an engine computes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitedge.errors import VitEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vitedge.runtime.engine import Engine

TURN_S = 0.05  # long enough to run from warm caches, short beside the seconds over which a machine heats up
TURN_CALLS = 4  # timed calls in a turn, at least; a slow engine would otherwise spend half its calls on warming up
MIN_SAMPLES = 20  # fewer make no percentile
SETTLE_S = 0.02  # before a turn: the threads of the engine before it spin for a while, looking for work
DISTURBED = 0.05  # of all cores: a turn in which others had more is disturbed
TICK_S = 0.02  # /proc/stat counts in hundredths of a second
STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True, eq=False)
class Latency:
    """Every timed call of one engine at one batch size.

    samples_ms: float64[calls], in the order they were made, in `turns` turns. disturbed: how many of those turns other
    processes had a share of; 0 where the system does not tell (no /proc/stat).
    """

    batch: int
    samples_ms: NDArray[np.float64]
    turns: int
    disturbed: int

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
    Disturbed turns are taken again for up to `seconds` more an engine, then kept and counted (`Latency.disturbed`).
    progress: called after each round with the finished part of the work, 0 to 1.
    Raises VitEdgeError where an engine does not take the batch.
    """
    require_batch(engines, batch)
    for engine in engines:
        for _ in range(warmup):
            engine.run(batch)
    candidates = [_Timed(partial(engine.run, batch), seconds) for engine in engines]
    order = list(candidates)
    while min((candidate.finished for candidate in candidates), default=1.0) < 1:
        for candidate in order:
            candidate.take_turn()
        order.reverse()  # A B, B A: a steady drift then costs both the same
        if progress:
            progress(min(candidate.finished for candidate in candidates))
    return [Latency(batch, np.array(c.samples_ms), c.turns, c.disturbed) for c in candidates]


def require_batch(engines: Sequence[Engine], batch: int) -> None:
    """Raise VitEdgeError unless every engine takes `batch` images at once."""
    for engine in engines:
        if not 1 <= batch <= engine.max_batch:
            hint = "measure a batch within that, or build the engine for a larger one (`batch` of the target)"
            raise VitEdgeError(f"{engine.path} takes 1 to {engine.max_batch} images at once, not {batch}", hint=hint)


def timed_turn(run: Callable[[], object], seconds: float = 0.0) -> tuple[list[float], bool]:
    """Milliseconds of TURN_CALLS calls, or of as many as `seconds` hold, and whether others disturbed them.

    One call before them is not counted: whoever ran before had the caches.
    """
    time.sleep(SETTLE_S)
    run()
    taken: list[float] = []
    others, start = _others_s(), time.perf_counter_ns()
    end = start + int(seconds * 1e9)
    while len(taken) < TURN_CALLS or time.perf_counter_ns() < end:
        taken.append(_timed_ms(run))
    allowed = DISTURBED * (os.cpu_count() or 1) * (time.perf_counter_ns() - start) / 1e9
    return taken, _others_s() - others > allowed + TICK_S


class _Timed:
    """The calls of one engine so far, and the time left to it for taking disturbed turns again."""

    def __init__(self, run: Callable[[], object], seconds: float) -> None:
        self.samples_ms: list[float] = []
        self.turns = self.disturbed = 0
        self._run = run
        self._seconds = self._patience_s = seconds

    def take_turn(self) -> None:
        taken, disturbed = timed_turn(self._run, TURN_S)
        while disturbed and self._patience_s > 0:
            start = time.perf_counter()
            taken, disturbed = timed_turn(self._run, TURN_S)
            self._patience_s -= time.perf_counter() - start
        self.samples_ms += taken
        self.turns += 1
        self.disturbed += disturbed

    @property
    def finished(self) -> float:
        """Which part of its calls and its time the engine has had, 0 to 1."""
        timed_s = sum(self.samples_ms) / 1000
        return min(1.0, len(self.samples_ms) / MIN_SAMPLES, timed_s / self._seconds if self._seconds > 0 else 1.0)


def _timed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _others_s() -> float:
    """Processor time, in seconds since the start, of everything but this process: other processes, the kernel, the host."""
    if not STAT.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text("ascii").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
