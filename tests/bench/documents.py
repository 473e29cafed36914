"""Documents of known figures, for whatever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed

IMAGES = 1000


def timed(p50_ms: float, *, batch: int = 1, width: float = 0.02, speedup: float | None = None, **more: Any) -> Timed:
    """A timing whose calls take `p50_ms` in the middle, known to `width` of itself on either side."""
    centiles = np.concatenate([np.linspace(0.95, 1.0, 51), np.linspace(1.0, 1.3, 51)[1:]]) * p50_ms
    values: dict[str, Any] = {
        "batch": batch,
        "threads": None,
        "streams": 1,
        "calls": 500,
        "rounds_ms": (p50_ms * 0.99, p50_ms, p50_ms * 1.01),
        "disturbed": 0,
        "centiles_ms": tuple(map(float, centiles)),
        "jitter_ms": p50_ms / 50,
        "p50": Interval(p50_ms * (1 - width), p50_ms * (1 + width)),
        "images_per_s": batch * 1000 / p50_ms if p50_ms else 0.0,
        "speedup": speedup,
        "speedup_interval": None if speedup is None else Interval(speedup * (1 - width), speedup * (1 + width)),
    }
    return Timed(**{**values, **more})


def candidate(name: str, p50_ms: float, judged: Judged | None = None, *, batches: Sequence[int] = (1,), **more: Any) -> Candidate:
    """One that takes `p50_ms` for an image, and a little less for each of several."""
    timings = tuple(timed(p50_ms * batch**0.9, batch=batch) for batch in batches)
    values: dict[str, Any] = {"model": "vit", "variant": name, "runtime": "openvino", "size_mib": 6.3, "timings": timings}
    return Candidate(name, judged=judged, **{**values, **more})


def labelled(top1: float, drop: float | None = None, agreement: float | None = None, right: str = "") -> Judged:
    """An answer to images with labels."""
    spread = None if drop is None else Interval(drop - 0.4, drop + 0.4)
    interval = Interval(max(0.0, top1 - 1.8), min(100.0, top1 + 1.8))
    return Judged(IMAGES, IMAGES, top1, interval, 99.0, agreement, 30.0 if drop is not None else None, drop, spread, right=right)


def bits(wrong: Sequence[int], images: int = IMAGES) -> str:
    """Hexadecimal bits of which all are set but those of `wrong`, as Judged.right has them."""
    value = sum(1 << (images - 1 - place) for place in range(images) if place not in set(wrong))
    return f"{value:0{-(-images // 4)}x}"


def document(*candidates: Candidate, machine: str = "a CPU", date: str = "2026-11-27 17:00 UTC", **more: Any) -> Document:
    """What was found on `machine`; the first candidate is the reference."""
    values: dict[str, Any] = {
        "environment": {"machine": machine, "date": date, "command": "vitedge bench vit/fp32 vit/int8"},
        "reference": candidates[0].name,
        "dataset": "photos, 1,000 images",
        "images_key": "k",
        "labels": ("cat", "dog", "fish"),
    }
    return Document(candidates=candidates, **{**values, **more})
