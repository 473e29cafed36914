"""Answers in, what a person wants to know of a source out: how many, how often, how long each stage took.

Bounded memory however many there are, since a camera runs for weeks. Knows nothing of terminals.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque

from vitedge.specs import STAGES, Frame, Prediction

STEP = 1.01  # from one bucket of durations to the next: a quantile is right to half a percent
LEAST_MS = 1e-3
RECENT = 30  # answers, over which the rate of now is taken
MEASURED = (*STAGES, "latency")


class Spread:
    """Durations, of which quantiles are asked; counted by size, a bucket every percent."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._total = 0

    def add(self, ms: float) -> None:
        """Count one."""
        self._counts[round(math.log(max(ms, LEAST_MS), STEP))] += 1
        self._total += 1

    def quantile(self, part: float) -> float:
        """The duration in ms that `part` of all do not exceed; NaN where there are none."""
        left = max(1, math.ceil(part * self._total))
        for bucket in sorted(self._counts):
            left -= self._counts[bucket]
            if left <= 0:
                return STEP**bucket
        return math.nan


class Tally:
    """The answers of one source. latency: from the capture of a frame until its answer was given out."""

    def __init__(self) -> None:
        self.processed = 0
        self.stages = {stage: Spread() for stage in MEASURED}
        self.latest: Prediction | None = None
        self._recent: deque[tuple[int, tuple[float, ...]]] = deque(maxlen=RECENT)  # when, and what each stage took
        self._first_ns = self._last_ns = 0

    def add(self, frame: Frame, prediction: Prediction) -> float:
        """Count an answer of now; its latency in ms."""
        now = time.perf_counter_ns()
        latency_ms = (now - frame.captured_ns) / 1e6
        took = (*prediction.timing.stages_ms, latency_ms)
        for spread, ms in zip(self.stages.values(), took, strict=True):
            spread.add(ms)
        self._first_ns, self._last_ns = self._first_ns or now, now
        self.processed, self.latest = self.processed + 1, prediction
        self._recent.append((now, took))
        return latency_ms

    @property
    def rate(self) -> float:
        """Answers a second from the first to the last."""
        return _rate(self.processed - 1, self._last_ns - self._first_ns)

    @property
    def rate_now(self) -> float:
        """Answers a second lately: it falls while none come."""
        recent = tuple(self._recent)
        return _rate(len(recent) - 1, time.perf_counter_ns() - recent[0][0]) if recent else 0.0

    def lately(self) -> dict[str, float]:
        """What each stage took lately, on average, in ms; nothing before the first answer."""
        taken = [took for _, took in tuple(self._recent)]
        return {stage: sum(values) / len(taken) for stage, values in zip(MEASURED, zip(*taken, strict=True), strict=False)}


def _rate(count: int, elapsed_ns: int) -> float:
    return count / (elapsed_ns / 1e9) if count > 0 and elapsed_ns > 0 else 0.0
