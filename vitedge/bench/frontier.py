"""Documents in, the candidates that nothing beats out.

    [Document, ...]  ->  locate  ->  [Point, ...]: latency, accuracy, on the frontier or not, and how sure that is

Latency is the median of a call. Accuracy is the first that all documents know of: top-1, agreement with the reference, SQNR.
The reference of images without labels counts as perfect; where nothing is known, latency alone counts. Knows nothing of
how anything was measured or is shown, or of what is shipped: that is choice.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed
from vitedge.bench.proportions import Z, proportion
from vitedge.errors import VitEdgeError

Measure = Literal["top1", "agreement", "sqnr_db", "none"]
MEASURES: tuple[Measure, ...] = ("top1", "agreement", "sqnr_db")


@dataclass(frozen=True, slots=True)
class Point:
    """One timing of a candidate among all that were timed at the same batch.

    accuracy: of `measure`, percent or dB; 0 where that is "none". frontier: nothing on this machine is at least as fast and
    as accurate and better in one of them. overall: nothing on any machine is. certain: whether its place on the machine's
    frontier, or off it, holds within the intervals of 95 %.
    """

    document: Document
    candidate: Candidate
    timed: Timed
    measure: Measure
    accuracy: float
    frontier: bool = False
    overall: bool = False
    certain: bool = True

    @property
    def is_reference(self) -> bool:
        """Whether the others of its document are compared with it."""
        return self.candidate.name == self.document.reference

    @property
    def drop(self) -> float | None:
        """Points of top-1, or of agreement if that is the measure, lost against the reference; None where neither is known."""
        return 100 - self.accuracy if self.measure == "agreement" else drop_of(self.document, self.candidate)

    @property
    def spread(self) -> Interval:
        """Where the accuracy lies with 95 % confidence."""
        judged = self.candidate.judged
        if judged is None or self.measure in ("sqnr_db", "none") or (self.is_reference and self.measure == "agreement"):
            return Interval(self.accuracy, self.accuracy)
        if self.measure == "top1":
            return judged.top1_interval or _share(self.accuracy, judged.labelled)
        return _share(self.accuracy, judged.images)


def locate(documents: Sequence[Document], batch: int | None = None) -> list[Point]:
    """Every timing at `batch` (the smallest that all documents have by default) of a judged candidate, the fastest first.

    Each thread count and number of streams is a point of its own. Ties share the frontier.
    """
    if not any(one.timings for document in documents for one in document.finished):
        return []
    measure = measure_of(documents)
    batch = common_batch(documents) if batch is None else batch
    found = [point for document in documents for point in _points(document, batch, measure)]
    found.sort(key=lambda point: (point.timed.p50_ms, -point.accuracy))
    return [_placed(point, found) for point in found]


def measure_of(documents: Sequence[Document]) -> Measure:
    """The best measure of accuracy that each document has of some candidate."""
    whole = [document.finished for document in documents if document.finished]
    known = [{name for name in MEASURES for one in finished if _value(one, name) is not None} for finished in whole]
    return next((name for name in MEASURES if known and all(name in names for names in known)), "none")


def batches_of(documents: Sequence[Document]) -> list[int]:
    """The batch sizes that were timed in every document, in order."""
    sets = [{timed.batch for one in document.finished for timed in one.timings} for document in documents]
    return sorted(set.intersection(*sets)) if sets else []


def common_batch(documents: Sequence[Document]) -> int:
    """The smallest batch that every document has; a VitEdgeError where none is."""
    batches = batches_of([document for document in documents if any(one.timings for one in document.finished)])
    if not batches:
        raise VitEdgeError("no batch size was timed in all of these benchmarks", hint="run them with the same --batch")
    return batches[0]


def machine_names(documents: Sequence[Document]) -> list[str]:
    """What to call the machine of each document: its own name, with the date where two are alike, then a number."""
    names = [document.environment.get("machine", "") or "machine" for document in documents]
    dates = [document.environment.get("date", "") for document in documents]
    for extras in (dates, [str(place) for place in range(1, len(names) + 1)]):
        alike = Counter(names)
        names = [f"{name}, {extra}" if alike[name] > 1 and extra else name for name, extra in zip(names, extras, strict=True)]
    return names


def setting_text(timed: Timed, documents: Sequence[Document]) -> str:
    """The threads of a timing in words, where there are several, and its streams, if more than one."""
    all_timed = [one for document in documents for candidate in document.finished for one in candidate.timings]
    threads = "all threads" if timed.threads is None else f"{timed.threads} thread{'' if timed.threads == 1 else 's'}"
    streams = f"{timed.streams} stream{'' if timed.streams == 1 else 's'}"
    several = (len({one.threads for one in all_timed}) > 1, timed.streams > 1)
    return ", ".join(text for text, shown in zip((threads, streams), several, strict=True) if shown)


def drop_of(document: Document, candidate: Candidate) -> float | None:
    """Points of top-1, else of agreement, that a candidate loses against the reference; None where neither is known."""
    if candidate.name == document.reference:
        known = candidate.judged and (candidate.judged.top1 is not None or measure_of([document]) == "agreement")
        return 0.0 if known else None
    judged = candidate.judged or Judged(0)
    if judged.drop is not None:
        return judged.drop
    reference = next((one.judged for one in document.finished if one.name == document.reference), None)
    if judged.top1 is not None and reference and reference.top1 is not None:
        return reference.top1 - judged.top1
    return None if judged.agreement is None else 100 - judged.agreement


def _points(document: Document, batch: int, measure: Measure) -> Iterator[Point]:
    for candidate in document.finished:
        accuracy = _accuracy(document, candidate, measure)
        if accuracy is not None:
            yield from (
                Point(document, candidate, timed, measure, accuracy) for timed in candidate.timings if timed.batch == batch
            )


def _accuracy(document: Document, candidate: Candidate, measure: Measure) -> float | None:
    if measure == "none":
        return 0.0
    perfect = {"agreement": 100.0, "sqnr_db": math.inf}
    return perfect[measure] if measure in perfect and candidate.name == document.reference else _value(candidate, measure)


def _value(candidate: Candidate, measure: Measure) -> float | None:
    value: float | None = getattr(candidate.judged, measure, None)
    return value


def _placed(point: Point, points: Sequence[Point]) -> Point:
    """The point with what can be said of its place among all."""
    here = [other for other in points if other.document is point.document and other is not point]
    better = [other for other in here if _dominates(other, point)]
    if better:
        certain = any(surely_faster(other, point) or surely_righter(other, point) for other in better)
    else:
        certain = not any(_may_dominate(other, point) for other in here)
    return replace(point, frontier=not better, overall=not any(_dominates(other, point) for other in points), certain=certain)


def _dominates(a: Point, b: Point) -> bool:
    """Whether `a` is no worse in both, and better in one."""
    ours, theirs = (-a.timed.p50_ms, a.accuracy), (-b.timed.p50_ms, b.accuracy)
    return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]


def _may_dominate(a: Point, b: Point) -> bool:
    """Whether `b` is surely better than `a` in nothing."""
    return not surely_faster(b, a) and not surely_righter(b, a)


def surely_faster(a: Point, b: Point) -> bool:
    """Whether the intervals of two timings lie apart: of the speed-ups where both have one, as drift cancels in them."""
    if a.document is b.document and (a.timed.threads, a.timed.streams) == (b.timed.threads, b.timed.streams):
        ours, theirs = _speedup(a), _speedup(b)
        if ours and theirs:
            return ours.low > theirs.high
    return a.timed.p50.high < b.timed.p50.low


def _speedup(point: Point) -> Interval | None:
    return Interval(1.0, 1.0) if point.is_reference else point.timed.speedup_interval


def surely_righter(a: Point, b: Point) -> bool:
    """Whether `a` is more accurate: image by image where both say which ones are right (McNemar's test), else by intervals."""
    ours, theirs = (point.candidate.judged or Judged(0) for point in (a, b))
    same = a.document.images_key == b.document.images_key and len(ours.right) == len(theirs.right)
    if a.measure == "top1" and ours.right and same:
        won, lost = (ours.right_bits & ~theirs.right_bits).bit_count(), (theirs.right_bits & ~ours.right_bits).bit_count()
        return won - lost - 1 > Z * math.sqrt(won + lost)
    lost_a, lost_b = _lost_interval(a), _lost_interval(b)
    if a.document is b.document and lost_a and lost_b:
        return lost_a.high < lost_b.low
    return a.spread.low > b.spread.high


def _lost_interval(point: Point) -> Interval | None:
    """The points lost against the reference, paired by image, if the accuracy is of that kind."""
    if point.measure in ("sqnr_db", "none") or point.candidate.judged is None:
        return None
    return Interval(0.0, 0.0) if point.is_reference else point.candidate.judged.drop_interval


def _share(percent: float, images: int) -> Interval:
    """Where a share lies that was found on `images`, in percent; the share itself where there are none."""
    return proportion(round(percent * images / 100), images) or Interval(percent, percent)
