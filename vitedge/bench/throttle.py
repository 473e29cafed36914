"""Whether this machine slowed down while it was measured: asked of the kernel, and seen in a short loop of our own.

    round after round  ->  Watch  ->  sentences

Knows nothing of what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

CPUS = Path("/sys/devices/system/cpu")
COUNTERS = "cpu[0-9]*/thermal_throttle/*_throttle_count"
LOOP = 5_000  # additions, in one of several tries
TRIES = 5  # the quickest of which was disturbed least
LEAST_ROUNDS = 12
SLOWER = 1.1  # times as long at the end as at the beginning


class Watch:
    """Looks at the processor from the time it is made. root: in place of /sys/devices/system/cpu."""

    def __init__(self, root: Path = CPUS, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._root, self._clock = root, clock
        self._count = self._throttled()
        self._loops_ns: list[int] = []

    def look(self) -> None:
        """A round has passed: take the time of a loop that is the same each time."""
        self._loops_ns.append(min(self._loop_ns() for _ in range(TRIES)))

    def findings(self) -> list[str]:
        """What there is to say of the time since it was made."""
        found = list[str]()
        if self._throttled() > self._count:
            found.append("the processor was too hot and throttled itself meanwhile: cool it, or measure shorter")
        third = len(self._loops_ns) // 3
        if len(self._loops_ns) >= LEAST_ROUNDS and (first := float(np.median(self._loops_ns[:third]))) > 0:
            ratio = float(np.median(self._loops_ns[-third:])) / first
            if ratio > SLOWER:
                found.append(f"at the end, this machine took {ratio:.2f} times as long for the same work as at the beginning")
        return found

    def _throttled(self) -> int:
        """How often the processors were, since the machine was started; 0 where it does not tell."""
        total = 0
        for path in self._root.glob(COUNTERS):
            with suppress(OSError, ValueError):
                total += int(path.read_bytes())
        return total

    def _loop_ns(self) -> int:
        start, total = self._clock(), 0
        for number in range(LOOP):
            total += number
        return self._clock() - start
