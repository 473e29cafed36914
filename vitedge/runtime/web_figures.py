"""What each camera did, as the live view tells it: counts, rates and times of the stages, for people and for machines.

    note(frame, prediction), tell(state)  ->  message: JSON for the page      latest: JSON for programs
                                              metrics: Prometheus' text       ailing: what is wrong, for /healthz

Safe in any thread; `note` holds a lock for microseconds. Knows nothing of pictures or of HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import vitedge
from vitedge.pixels import frame_size
from vitedge.runtime.vitals import Reading
from vitedge.specs import STAGES, Frame, ModelCard, Prediction

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # of the histograms
REMEMBERED = 600  # samples that a new viewer gets, so that its timeline is not empty
MOST_A_MESSAGE = 60  # samples of a camera: the page has no more pixels for a tenth of a second
RATE_OVER_S = 2.0
SILENT_S = 10.0  # without a frame a camera is ailing


@dataclass(frozen=True, slots=True)
class _Sample:
    """One answered frame. at: perf_counter in seconds. captured: frames of the camera up to then."""

    number: int
    at: float
    captured: int
    stages_ms: tuple[float, ...]


@dataclass(slots=True)
class Histogram:
    """Counts of values up to each of BOUNDS_S and beyond, and their sum, in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class _Camera:
    name: str
    since: float
    state: str = ""
    note: str = ""
    captured: int = 0
    processed: int = 0
    dropped: int = 0
    index: int = -1
    frame: str = ""
    size: tuple[int, int] = (0, 0)
    top: tuple[tuple[str, float], ...] = ()
    samples: deque[_Sample] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    stages: tuple[Histogram, ...] = field(default_factory=lambda: tuple(Histogram() for _ in STAGES))
    total: Histogram = field(default_factory=Histogram)

    def rates(self, now: float) -> tuple[float, float]:
        """Frames a second that were answered and captured, lately; they sink to 0 while none comes."""
        samples = list(self.samples)
        recent = [sample for sample in samples if now - sample.at < RATE_OVER_S]
        recent = recent if len(recent) > 1 else samples[-2:]
        if len(recent) < 2:
            return 0.0, 0.0
        first, last, intervals = recent[0], recent[-1], len(recent) - 1
        span = last.at - first.at
        if now - last.at > max(RATE_OVER_S, 3 * span / intervals):
            return 0.0, 0.0
        span = max(span, now - first.at - span / intervals, 1e-6)  # the next one is late
        return intervals / span, (last.captured - first.captured) / span

    def age_s(self, now: float) -> float:
        """Since the last answer, or since the beginning."""
        return now - (self.samples[-1].at if self.samples else self.since)

    def ailment(self, now: float) -> str:
        """What is wrong, "" where nothing is."""
        if self.state:
            return self.state
        age = self.age_s(now)
        return f"no frame for {age:.0f} s" if age >= SILENT_S else ""


class Figures:
    """What is known of the cameras of one run. cameras: their names. card: of the model that looks at all of them."""

    def __init__(self, cameras: Sequence[str], card: ModelCard, title: str) -> None:
        now = time.perf_counter()
        self._cameras = [_Camera(name, now) for name in cameras]
        self._about = {"title": title, "model": card.name, "task": card.task}
        self._started = time.time()
        self._vitals: list[Reading] = []
        self._lock = threading.Lock()

    def note(self, camera: int, frame: Frame, prediction: Prediction, captured: int, dropped: int) -> None:
        """A frame was answered. captured, dropped: of the camera so far."""
        stages, size = prediction.timing.stages_ms, frame_size(frame.image, frame.pixels)[::-1]
        with self._lock:
            found = self._cameras[camera]
            found.processed += 1
            found.captured, found.dropped = captured, dropped
            found.index, found.frame, found.top = frame.index, frame.name, prediction.top
            found.size = size
            found.samples.append(_Sample(found.processed, time.perf_counter(), captured, stages))
            for histogram, stage_ms in zip(found.stages, stages, strict=True):
                histogram.add(stage_ms / 1e3)
            found.total.add(sum(stages) / 1e3)

    def tell(self, camera: int, state: str) -> None:
        """How a camera is: "" where all is well, else a sentence."""
        with self._lock:
            self._cameras[camera].state = state

    def remark(self, camera: int, note: str) -> None:
        """Why its picture is not what it should be, "" where it is."""
        with self._lock:
            self._cameras[camera].note = note

    def measured(self, vitals: list[Reading]) -> None:
        """What the device's sensors say now."""
        with self._lock:
            self._vitals = vitals

    def ailing(self) -> list[str]:
        """A sentence for each camera that is lost, or that gave nothing for SILENT_S."""
        now = time.perf_counter()
        with self._lock:
            found = [(camera.name, camera.ailment(now)) for camera in self._cameras]
        return [f"{name}: {what}" for name, what in found if what]

    def message(self, since: Sequence[int] | None = None) -> tuple[bytes, list[int]]:
        """JSON for the page, with the samples after the numbers `since`, or all that are remembered; and the numbers now."""
        now = time.perf_counter()
        with self._lock:
            cameras = [self._described(camera, now) for camera in self._cameras]
            for number, (camera, told) in enumerate(zip(self._cameras, cameras, strict=True)):
                most = REMEMBERED if since is None else MOST_A_MESSAGE
                told["samples"] = _told_samples(camera.samples, -1 if since is None else since[number], most)
            numbers = [camera.processed for camera in self._cameras]
            vitals = self._told_vitals()
        document = {**self._about, "now": round(now, 3), "cameras": cameras, "vitals": vitals}
        return json.dumps(document, separators=(",", ":")).encode(), numbers

    def latest(self) -> dict[str, Any]:
        """The newest answer of each camera, what its stages took, and the counts."""
        now = time.perf_counter()
        with self._lock:
            cameras = []
            for number, camera in enumerate(self._cameras):
                last = camera.samples[-1].stages_ms if camera.samples else ()
                timing = {f"{stage}_ms": round(ms, 3) for stage, ms in zip(STAGES, last, strict=False)}
                total = {"total_ms": round(sum(last), 3)} if last else {}
                about = {"camera": number, "index": camera.index if last else None, "file": camera.frame or None}
                cameras.append({**about, **self._described(camera, now), "timing": {**timing, **total}})
            vitals = self._told_vitals()
        return {"version": vitedge.__version__, **self._about, "time": time.time(), "cameras": cameras, "vitals": vitals}

    def metrics(self, viewers: int) -> str:
        """All counts in the text format 0.0.4 of Prometheus, times in seconds."""
        now = time.perf_counter()
        with self._lock:
            lines = list(self._families(now, viewers))
        return "\n".join(lines) + "\n"

    def _described(self, camera: _Camera, now: float) -> dict[str, Any]:
        """What the page and programs both get of a camera."""
        answered, captured = camera.rates(now)
        return {
            "name": camera.name,
            "state": camera.ailment(now),
            "note": camera.note,
            "fps": round(answered, 2),
            "camera_fps": round(captured, 2),
            "captured": camera.captured,
            "processed": camera.processed,
            "dropped": camera.dropped,
            "age_s": round(camera.age_s(now), 3),
            "size": list(camera.size),
            "top": [{"label": label, "probability": round(share, 5)} for label, share in camera.top],
        }

    def _told_vitals(self) -> list[dict[str, Any]]:
        return [{"sensor": found.sensor, "kind": found.kind, "value": round(found.value, 2)} for found in self._vitals]

    def _families(self, now: float, viewers: int) -> Iterator[str]:
        labels = [_labels(camera=str(number), source=camera.name) for number, camera in enumerate(self._cameras)]
        about = _labels(version=vitedge.__version__, model=self._about["model"], task=self._about["task"])
        yield from _family("vitedge_info", "gauge", "What runs; always 1.", [(about, 1)])
        yield from _family("process_start_time_seconds", "gauge", "When the live view began, Unix time.", [("", self._started)])
        counts = {
            "captured": "Frames that came from the camera.",
            "processed": "Frames that were answered.",
            "dropped": "Frames that a newer one replaced before their turn.",
        }
        for name, meaning in counts.items():
            values = [(label, getattr(camera, name)) for label, camera in zip(labels, self._cameras, strict=True)]
            yield from _family(f"vitedge_frames_{name}_total", "counter", meaning, values)
        up = [(label, int(not camera.ailment(now))) for label, camera in zip(labels, self._cameras, strict=True)]
        yield from _family("vitedge_camera_up", "gauge", "1 where frames come, 0 where the camera is lost.", up)
        ages = [(label, camera.age_s(now)) for label, camera in zip(labels, self._cameras, strict=True)]
        yield from _family("vitedge_last_frame_age_seconds", "gauge", "Time since the last answer.", ages)
        totals = [(label, camera.total) for label, camera in zip(labels, self._cameras, strict=True)]
        yield from _histograms("vitedge_latency_seconds", "From capture to answer.", totals)
        stages = [
            (_labels(camera=str(number), source=camera.name, stage=stage), histogram)
            for number, camera in enumerate(self._cameras)
            for stage, histogram in zip(STAGES, camera.stages, strict=True)
        ]
        yield from _histograms("vitedge_stage_seconds", "Time of a frame in one stage.", stages)
        for kind, unit in (("temperature", "celsius"), ("power", "watts")):
            values = [(_labels(sensor=found.sensor), found.value) for found in self._vitals if found.kind == kind]
            if values:
                yield from _family(f"vitedge_{kind}_{unit}", "gauge", f"The device's {kind} where it tells.", values)
        yield from _family("vitedge_viewers", "gauge", "Who watches now.", [("", viewers)])


def _told_samples(samples: deque[_Sample], after: int, most: int) -> list[list[float]]:
    """[number, at in s, ms of each stage] of the last `most` samples after a number."""
    told: list[list[float]] = []
    for sample in reversed(samples):
        if sample.number <= after or len(told) == most:
            break
        told.append([sample.number, round(sample.at, 3), *(round(ms, 2) for ms in sample.stages_ms)])
    return told[::-1]


def _labels(**labels: str) -> str:
    """Labels as Prometheus writes them; control characters, which a name might bring along, are left out."""
    escaped = {
        name: "".join(c for c in value if c.isprintable()).replace("\\", r"\\").replace('"', r"\"")
        for name, value in labels.items()
    }
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def _family(name: str, kind: str, meaning: str, values: Sequence[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _histograms(name: str, meaning: str, histograms: Sequence[tuple[str, Histogram]]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} histogram"
    for labels, histogram in histograms:
        below = 0
        for bound, count in zip((*BOUNDS_S, "+Inf"), histogram.counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_sum{{{labels}}} {histogram.sum_s}"
        yield f"{name}_count{{{labels}}} {below}"
