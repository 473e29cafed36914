"""A live run of `synthetic` in a process of its own, whose every frame is looked at: `python -m tests.soak.camera ENGINE`.

Prints figures as JSON: who asserts what of them is tests/soak/test_camera.py, for hours, and tests/runtime/test_live.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge import CameraOptions, Stream, open_engine, stream
from vitedge.runtime.camera import burnt_in_number
from vitedge.runtime.engine import Engine
from vitedge.specs import Manifest, PixelFormat

STATM = Path("/proc/self/statm")
WARM_UP = 0.1  # of the time, in which allocators take what they take
RSS_EVERY_S = 1.0


class Slowed:
    """An engine whose frame takes at least `least_s` from its picture on; newest: what had been captured when it began."""

    def __init__(self, engine: Engine, least_s: float) -> None:
        self._engine, self._least_s = engine, least_s
        self.manifest: Manifest = engine.manifest
        self.max_batch, self.streams = engine.max_batch, engine.streams
        self.live: Stream | None = None
        self.begun = time.perf_counter()
        self.newest = 0

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        self.begun = time.perf_counter()
        self.newest = self.live.sources[0].captured - 1 if self.live else 0
        self._engine.write(row, picture, pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        outputs = self._engine.run(count)
        time.sleep(max(0.0, self._least_s - (time.perf_counter() - self.begun)))
        return outputs


def resident_mib() -> float:
    """What the process holds in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(engine_path: str, seconds: float, frames: int | None, fps: float, least_ms: float) -> dict[str, Any]:
    """Go through a run; what each figure means is said where it is put in."""
    rows = np.full((int(seconds * fps) + 100, 4), -1.0)  # made and touched now, so that the figures themselves do not grow
    taken, resident = 0, list[float]()
    with open_engine(engine_path) as opened:
        engine = Slowed(opened, least_ms / 1e3)
        live = stream("synthetic", engine, options=CameraOptions(fps=fps), limit=frames)  # type: ignore[arg-type]
        engine.live = live
        began_ns = time.perf_counter_ns()
        for number, captured_ns, latency_ms in numbered(live):
            elapsed = (time.perf_counter_ns() - began_ns) / 1e9
            apart = latency_ms * fps / 1e3 - (live.sources[0].captured - 1 - number)
            rows[taken] = number, captured_ns - began_ns, engine.newest - number, apart
            taken += 1
            if elapsed > WARM_UP * seconds and (len(resident) + 1) * RSS_EVERY_S + WARM_UP * seconds < elapsed:
                resident.append(round(resident_mib(), 1))
            if elapsed > seconds:
                break
        live.close()
    counts, source = live.counts(0), live.sources[0]
    numbers, stamps_ns, behind, apart = rows[:taken].T
    periods = np.diff(stamps_ns) / 1e9 / np.diff(numbers)
    return {
        "seconds": float(stamps_ns[-1] - stamps_ns[0]) / 1e9,
        "captured": counts.captured,
        "processed": counts.processed,
        "answers": taken,
        "dropped": counts.dropped,
        "dropped_by_source": source.dropped,  # the same, unless the end came between a frame and its answer
        "gaps": int((np.diff(numbers) - 1).sum() + numbers[0] + source.captured - 1 - numbers[-1]),  # numbers that did not come
        "ascending": bool((np.diff(numbers) > 0).all()),
        "behind_most": int(behind.max()),  # of the newest, when the engine began
        "behind": np.bincount(np.maximum(behind, 0).astype(int)).tolist(),
        "latency_apart": np.quantile(np.abs(apart), (0.5, 0.9, 0.99, 1)).round(2).tolist(),  # from the burnt-in one, in frames
        "drift": float(np.median(periods) * fps - 1),  # of the stamps against the pace
        "held_up": float((stamps_ns[-1] - stamps_ns[0]) / 1e9 * fps / (numbers[-1] - numbers[0]) - 1),  # by others on the machine
        "resident_mib": resident,  # every second, once allocators have taken what they take
    }


def numbered(live: Stream) -> Iterator[tuple[int, int, float]]:
    """Of each answer the burnt-in number, the capture time, and the ms from there until now."""
    for frame, _ in live:
        latency_ms = (time.perf_counter_ns() - frame.captured_ns) / 1e6
        yield burnt_in_number(frame.image), frame.captured_ns, latency_ms
        if frame.index % 1000 == 0:
            gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--fps", type=float, default=60.0)
    parser.add_argument("--least-ms", type=float, default=0.0)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.engine, asked.seconds, asked.frames, asked.fps, asked.least_ms)))
