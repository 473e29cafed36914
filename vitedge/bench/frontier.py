"""Documents in, the candidates that nothing beats out, and the one to ship.

    [Document, ...]  ->  locate  ->  [Point, ...]: latency, accuracy, on the frontier or not, and how sure that is
                     ->  choose  ->  Choice: candidate, timing, and a sentence that says why

Latency is the median of a call. Accuracy is the first that all documents know of: top-1, agreement with the reference, SQNR.
The reference of images without labels counts as perfect; where nothing is known, latency alone counts. Knows nothing of
how anything was measured or is shown.
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
WANTED = {"top1": 0.5, "agreement": 2.0}  # points that may be lost where nobody says how many
WANTED_DB = 20.0  # an error of 1 % of the signal's power, likewise
UNITS = {"top1": "top-1", "agreement": "agreement"}


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


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate to ship, as it was timed, of the document that has it, why, and the limits that it was chosen by."""

    candidate: Candidate
    timed: Timed
    why: str
    document: Document
    budget_ms: float | None = None
    max_drop: float | None = None


def is_choice(choice: Choice, candidate: Candidate, timed: Timed) -> bool:
    """Whether it is this timing that was chosen, also where the document got another note since."""
    return timed is choice.timed and candidate.name == choice.candidate.name


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


def choose(
    documents: Sequence[Document], *, budget_ms: float | None = None, max_drop: float | None = None, batch: int | None = None
) -> Choice:
    """The candidate to ship.

    budget_ms: the most accurate of those whose median is within it. max_drop: the fastest of those that lose at most so many
    points of top-1 (of agreement, where there are no labels) against their reference. Both: the most accurate that keeps both,
    as a budget that is kept gains nothing by more speed. Neither: the fastest that loses at most 0.5 points of top-1, or 2 of
    agreement, or is 20 dB above its noise. Raises VitEdgeError with the nearest if none fits.
    """
    points = locate(documents, batch)
    if not points:
        raise VitEdgeError("no candidate was timed to its end, so there is none to choose", hint="see the failures above")
    _check_limits(budget_ms, max_drop, points)
    within = [point for point in points if budget_ms is None or point.timed.p50_ms <= budget_ms]
    fitting = [point for point in within if _keeps(point, max_drop, budget_ms)]
    if not fitting:
        raise _none_fits(points, within, budget_ms, max_drop)
    best = _fastest(fitting) if budget_ms is None else _most_accurate(fitting)
    why = _why(best, documents, budget_ms, max_drop, points)
    return Choice(best.candidate, best.timed, why, best.document, budget_ms, max_drop)


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


def setting(timed: Timed, documents: Sequence[Document]) -> str:
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
        certain = any(_surely_faster(other, point) or _surely_righter(other, point) for other in better)
    else:
        certain = not any(_may_dominate(other, point) for other in here)
    return replace(point, frontier=not better, overall=not any(_dominates(other, point) for other in points), certain=certain)


def _dominates(a: Point, b: Point) -> bool:
    """Whether `a` is no worse in both, and better in one."""
    ours, theirs = (-a.timed.p50_ms, a.accuracy), (-b.timed.p50_ms, b.accuracy)
    return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]


def _may_dominate(a: Point, b: Point) -> bool:
    """Whether `b` is surely better than `a` in nothing."""
    return not _surely_faster(b, a) and not _surely_righter(b, a)


def _surely_faster(a: Point, b: Point) -> bool:
    """Whether the intervals of two timings lie apart: of the speed-ups where both have one, as drift cancels in them."""
    if a.document is b.document and (a.timed.threads, a.timed.streams) == (b.timed.threads, b.timed.streams):
        ours, theirs = _speedup(a), _speedup(b)
        if ours and theirs:
            return ours.low > theirs.high
    return a.timed.p50.high < b.timed.p50.low


def _speedup(point: Point) -> Interval | None:
    return Interval(1.0, 1.0) if point.is_reference else point.timed.speedup_interval


def _surely_righter(a: Point, b: Point) -> bool:
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


def _check_limits(budget_ms: float | None, max_drop: float | None, points: Sequence[Point]) -> None:
    if budget_ms is not None and not 0 < budget_ms < math.inf:
        raise VitEdgeError(f"a budget is some milliseconds, not {budget_ms:g}", hint="give --budget-ms a number above 0")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise VitEdgeError(f"a drop is 0 to 100 points, not {max_drop:g}", hint="give --max-drop the points that may be lost")
    if max_drop is not None and all(point.drop is None for point in points):
        raise VitEdgeError(
            "neither top-1 nor agreement is known, so a largest drop chooses nothing",
            hint="benchmark a classifier on images, or give --budget-ms alone",
        )


def _keeps(point: Point, max_drop: float | None, budget_ms: float | None) -> bool:
    """Whether a point loses no more than it may: `max_drop`, or what is usual where there are no limits at all."""
    if max_drop is not None:
        return point.drop is not None and point.drop <= max_drop + 1e-9
    if budget_ms is not None or point.measure == "none" or point.is_reference:
        return True
    if point.measure == "sqnr_db":
        return point.accuracy >= WANTED_DB
    return point.drop is not None and point.drop <= WANTED[point.measure]


def _fastest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: (point.timed.p50_ms, -point.accuracy))


def _most_accurate(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: (-point.accuracy, point.timed.p50_ms))


def _none_fits(points: Sequence[Point], within: Sequence[Point], budget_ms: float | None, max_drop: float | None) -> VitEdgeError:
    """What comes nearest: the fastest if none is within the budget, else that which loses least."""
    if not within:
        nearest, limit = _fastest(points), f"is within {budget_ms:g} ms"
    else:
        nearest = min(within, key=lambda point: math.inf if point.drop is None else point.drop)
        limit = "loses so little" if max_drop is None else f"loses at most {_lost(max_drop, nearest)}"
        limit += "" if budget_ms is None else f" within {budget_ms:g} ms"
    return VitEdgeError(
        f"no candidate {limit}; the nearest is {nearest.candidate.name}: {_figures(nearest)}",
        hint="give more room, or add candidates: smaller sizes, merged tokens, other recipes",
    )


def _why(
    best: Point, documents: Sequence[Document], budget_ms: float | None, max_drop: float | None, points: Sequence[Point]
) -> str:
    """One sentence: what the best is the best of, and its figures; a second if another may be just as good."""
    names = dict(zip(map(id, documents), machine_names(documents), strict=True))
    where = [f"on {names[id(best.document)]}" if len(documents) > 1 else "", _with(setting(best.timed, documents))]
    what = " ".join(filter(None, (best.candidate.name, *where)))
    if len(points) == 1:
        return f"{what} is the only candidate: {_figures(best)}."
    return f"{what} is {_kind(best, budget_ms, max_drop)}: {_figures(best)}.{_rival(best, points, budget_ms)}"


def _with(text: str) -> str:
    return f"with {text}" if text else ""


def _kind(best: Point, budget_ms: float | None, max_drop: float | None) -> str:
    if best.measure == "none":
        return "the fastest" + ("" if budget_ms is None else f", and within {budget_ms:g} ms")
    drop = "" if max_drop is None else f"at most {_lost(max_drop, best)}"
    if budget_ms is not None:
        return f"the most accurate within {budget_ms:g} ms" + (f" and loses {drop}" if drop else "")
    if best.measure == "sqnr_db":
        return f"the fastest with {WANTED_DB:g} dB or more against the reference"
    return f"the fastest that loses {drop or f'at most {_lost(WANTED[best.measure], best)}'}"


def _rival(best: Point, points: Sequence[Point], budget_ms: float | None) -> str:
    """Which faster candidate of the same machine may be just as accurate, where accuracy decided."""
    if budget_ms is None:
        return ""
    rivals = [point for point in points if _surely_faster(point, best) and not _surely_righter(best, point)]
    rivals = [point for point in rivals if point.document is best.document]
    if not rivals:
        return ""
    rival = _fastest(rivals)
    return f" {rival.candidate.name} takes {rival.timed.p50_ms:.2f} ms, and these images do not tell its accuracy apart."


def _lost(points: float, at: Point) -> str:
    kind = UNITS["agreement" if at.measure == "agreement" else "top1"]
    return f"{points:g} point{'' if points == 1 else 's'} of {kind}"


def _figures(point: Point) -> str:
    """Latency and accuracy of a point with what they are sure to."""
    p50, name = point.timed.p50, point.document.reference
    spread = f" ({p50.low:.2f} to {p50.high:.2f})" if p50.low < p50.high else ""
    batch = "" if point.timed.batch == 1 else f" for a batch of {point.timed.batch}"
    parts = [f"{point.timed.p50_ms:.2f} ms{spread}{batch}"]
    if point.measure == "top1":
        parts.append(f"top-1 {point.accuracy:.2f}%")
    if point.is_reference:
        parts.append("the reference")
    elif point.measure == "agreement":
        parts.append(f"agrees with {name} on {point.accuracy:.2f}%")
    elif point.measure == "sqnr_db":
        parts.append(f"{point.accuracy:.1f} dB against {name}")
    elif point.drop is not None and point.measure == "top1":
        parts.append(f"{abs(point.drop):.2f} points {'above' if point.drop < 0 else 'below'} {name}")
    return ", ".join(parts)
