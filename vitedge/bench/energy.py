"""A machine's own sensors in, joules of a stretch of time out, where it has any that may be read.

    RAPL (x86), INA3221 and other rails (Jetson), NVML (GPUs)  ->  Meter  ->  joules since it was last asked

Of a rail that feeds all others (VDD_IN of a Jetson, psys of a laptop) that one alone is counted, else all are added up. RAPL
counts, so what it says is exact; of a rail or a GPU, power is read at the beginning and the end. Knows nothing of engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vitedge.runtime.vitals import SYS, WHOLE, Reading, Vitals

FIRST_S = 0.01  # until a counter has something to tell; RAPL's moves every millisecond


class Meter:
    """Tells the energy that this machine has used. root: in place of /sys. gpus: whether to ask NVML too."""

    def __init__(self, root: Path = SYS, *, gpus: bool = True, clock: Callable[[], float] = time.perf_counter) -> None:
        self._vitals, self._clock = Vitals(root, gpus=gpus), clock
        time.sleep(FIRST_S)
        self._last = clock(), self._read()

    @property
    def sensors(self) -> tuple[str, ...]:
        """What it adds up."""
        return tuple(self._last[1])

    def used_j(self) -> float | None:
        """Joules since it was last asked, or made; None where no sensor tells, or not both then and now."""
        (then, before), now, readings = self._last, self._clock(), self._read()
        self._last = now, readings
        watts = [_mean_w(before.get(name), reading) for name, reading in readings.items()]
        known = [one for one in watts if one is not None]
        return sum(known) * (now - then) if known and len(known) == len(watts) and now > then else None

    def close(self) -> None:
        """Let go of the sensors; a second call does nothing."""
        self._vitals.close()

    def _read(self) -> dict[str, Reading]:
        powers = {reading.sensor: reading for reading in self._vitals.read() if reading.kind == "power"}
        whole = next((name for name in WHOLE if name in powers), None)
        return powers if whole is None else {whole: powers[whole]}


def _mean_w(before: Reading | None, now: Reading) -> float | None:
    """Watts between two readings of a sensor."""
    if now.since_last:
        return now.value
    return None if before is None else (before.value + now.value) / 2
