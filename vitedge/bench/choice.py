"""The points of a frontier and limits in, the candidate to ship out.

    [Document, ...], milliseconds, points  ->  choose  ->  Choice: candidate, timing, and a sentence that says why

What a limit is held against are the figures as measured, not the ends of their intervals. Knows nothing of how anything was
measured or is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitedge.bench.document import Candidate, Document, Timed
from vitedge.bench.frontier import Point, locate, machine_names, setting_text, surely_faster, surely_righter
from vitedge.errors import VitEdgeError

WANTED = {"top1": 0.5, "agreement": 2.0}  # points that may be lost where nobody says how many
WANTED_DB = 20.0  # an error of 1 % of the signal's power, likewise
UNITS = {"top1": "top-1", "agreement": "agreement"}


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate to ship, as it was timed, of the document that has it, why, and the limits that it was chosen by."""

    candidate: Candidate
    timed: Timed
    why: str
    document: Document
    budget_ms: float | None = None
    max_drop: float | None = None


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
    check_limits(budget_ms, max_drop)
    if max_drop is not None and all(point.drop is None for point in points):
        raise VitEdgeError(
            "neither top-1 nor agreement is known, so a largest drop chooses nothing",
            hint="benchmark a classifier on images, or give --budget-ms alone",
        )
    within = [point for point in points if budget_ms is None or point.timed.p50_ms <= budget_ms]
    fitting = [point for point in within if _keeps(point, max_drop, budget_ms)]
    if not fitting:
        raise _none_fits(points, within, budget_ms, max_drop)
    best = _fastest(fitting) if budget_ms is None else _most_accurate(fitting)
    why = _why(best, documents, budget_ms, max_drop, points)
    return Choice(best.candidate, best.timed, why, best.document, budget_ms, max_drop)


def usual_choice(documents: Sequence[Document]) -> Choice | None:
    """The choice without limits; None where nothing was timed."""
    try:
        return choose(documents)
    except VitEdgeError:
        return None


def is_choice(choice: Choice, candidate: Candidate, timed: Timed) -> bool:
    """Whether it is this timing that was chosen, also where the document got another note since."""
    return timed is choice.timed and candidate.name == choice.candidate.name


def check_limits(budget_ms: float | None, max_drop: float | None) -> None:
    """Raise VitEdgeError unless these can be limits: worth knowing before anything is measured."""
    if budget_ms is not None and not 0 < budget_ms < math.inf:
        raise VitEdgeError(f"a budget is some milliseconds, not {budget_ms:g}", hint="give --budget-ms a number above 0")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise VitEdgeError(f"a drop is 0 to 100 points, not {max_drop:g}", hint="give --max-drop the points that may be lost")


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
    where = [f"on {names[id(best.document)]}" if len(documents) > 1 else "", _with(setting_text(best.timed, documents))]
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
    rivals = [point for point in points if surely_faster(point, best) and not surely_righter(best, point)]
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
