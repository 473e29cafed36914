"""The points of a frontier in, where everything of their plot stands out: accuracy upwards, latency to the right.

    [Point, ...]  ->  lay_out  ->  Layout: axes, marks, frontiers, limits, labels where they hide least, in units

Points of a machine are a group, or of a runtime where there is one machine. Knows nothing of colours or files: scatter.py draws
a layout as SVG, picture.py as PNG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitedge.bench.choice import Choice, is_choice
from vitedge.bench.document import Document, Interval
from vitedge.bench.frontier import Measure, Point, machine_names, setting_text
from vitedge.bench.plot import FRAME, GLYPH, LINE, WIDE, WIDTH, Axis, Box, axis, log_axis, places, three

LABELLED = 14  # points that all get a label if there is room; of more, those on the frontier do
FEW = 4  # points that get their figures, too, and always a label
LONGEST = 26  # letters of a label
HIDDEN = 0.5  # part of a label's area that it may hide
ALL = -1  # the group of the frontier of all machines
TITLES: dict[Measure, tuple[str, str]] = {
    "top1": ("Top-1 accuracy", "%"),
    "agreement": ("Agreement with the reference", "%"),
    "sqnr_db": ("SQNR against the reference", "dB"),
    "none": ("Latency", "ms"),
}


@dataclass(frozen=True, slots=True)
class Label:
    """Lines of text beside a point. x, y: of the first line's middle. step: from line to line. anchor: as SVG has it.

    leader: from the point to the label, where that is not beside it.
    """

    texts: tuple[str, ...]
    x: float
    y: float
    step: float
    anchor: str
    leader: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Mark:
    """A point where it is drawn: its units, the ends of its bars, its place among the groups, and what is written beside it."""

    point: Point
    name: str
    group: int
    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float]
    chosen: bool
    label: Label | None = None

    @property
    def figures(self) -> str:
        """Latency and accuracy."""
        return f"{three(self.point.timed.p50_ms)} ms · {accuracy_text(self.point)}"

    @property
    def state(self) -> str:
        """Its place: "on" the frontier, "off" it, or "maybe"."""
        return ("on" if self.point.frontier else "off") if self.point.certain else "maybe"


@dataclass(frozen=True, slots=True)
class Limit:
    """A line that the choice was made by, upright or level, and what is written at it."""

    at: float
    upright: bool
    text: str


@dataclass(frozen=True, slots=True)
class Layout:
    """All that is drawn, in units from the upper left. ticks: position and text. fronts: corners and group, or ALL."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    fronts: list[tuple[list[tuple[float, float]], int]]
    limits: list[Limit]


def lay_out(points: Sequence[Point], names: Mapping[str, str], choice: Choice | None = None) -> Layout:
    """Where everything stands: median latency to the right, accuracy upwards. names: what to call each candidate."""
    values, spreads = _heights(points)
    x, y = _latency_axis(points, choice), _accuracy_axis(values, spreads)
    documents = _documents_of(points)
    marks = [
        Mark(
            point, ", ".join(filter(None, (names[point.candidate.name], setting_text(point.timed, documents)))), group,
            x.at(point.timed.p50_ms), y.at(value),
            (x.at(point.timed.p50.low), x.at(point.timed.p50.high)), (y.at(spread.low), y.at(spread.high)),
            choice is not None and is_choice(choice, point.candidate, point.timed),
        )
        for point, group, value, spread in zip(points, _groups(points), values, spreads, strict=True)
    ]  # fmt: skip
    measure = points[0].measure
    ends = (0.0, 100.0) if TITLES[measure][1] == "%" else (-math.inf, math.inf)
    upwards = [] if measure == "none" else y.ticks(*ends)
    fronts, limits = _fronts(marks), _limits(choice, points, x, y)
    return Layout(x.ticks(), upwards, _labelled(marks, fronts, limits), fronts, limits)


def accuracy_text(point: Point) -> str:
    """The accuracy with its unit."""
    if point.measure == "none" or math.isinf(point.accuracy):
        return "reference" if point.is_reference else "not judged"
    return f"{point.accuracy:.1f} dB" if point.measure == "sqnr_db" else f"{point.accuracy:.2f}%"


def batch_text(batch: int) -> str:
    """What a call answers."""
    return "one image" if batch == 1 else f"a batch of {batch}"


def groups_of(points: Sequence[Point]) -> list[str]:
    """What tells points apart: the machines of several documents, the runtimes of one."""
    documents = _documents_of(points)
    return machine_names(documents) if len(documents) > 1 else list(dict.fromkeys(point.candidate.runtime for point in points))


def _heights(points: Sequence[Point]) -> tuple[list[float], list[Interval]]:
    """Where points stand upwards, and their intervals: an infinite SQNR a little above the highest finite one."""
    highest = max((point.accuracy for point in points if math.isfinite(point.accuracy)), default=0.0)
    values = [point.accuracy if math.isfinite(point.accuracy) else highest + 6 for point in points]
    return values, [_against_reference(point, value) for point, value in zip(points, values, strict=True)]


def _documents_of(points: Sequence[Point]) -> list[Document]:
    return list({id(point.document): point.document for point in points}.values())


def _groups(points: Sequence[Point]) -> list[int]:
    """The place of each point's group among `groups_of`."""
    documents = _documents_of(points)
    keys = [id(point.document) if len(documents) > 1 else point.candidate.runtime for point in points]
    places_of = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [places_of[key] for key in keys]


def _against_reference(point: Point, value: float) -> Interval:
    """The interval of an accuracy as the points lost, image by image, tell it; else by itself."""
    judged = point.candidate.judged
    if point.measure == "top1" and judged and judged.drop is not None and judged.drop_interval and not point.is_reference:
        start = value + judged.drop
        return Interval(start - judged.drop_interval.high, start - judged.drop_interval.low)
    return Interval(value, value) if point.is_reference or not math.isfinite(point.accuracy) else point.spread


def _latency_axis(points: Sequence[Point], choice: Choice | None) -> Axis:
    """From 0 where latencies are alike, logarithmic where they are not."""
    budget = choice.budget_ms if choice and choice.budget_ms else points[0].timed.p50_ms
    low = min(budget, *(min(point.timed.p50.low, point.timed.p50_ms) for point in points), math.inf)
    high = max(budget, *(max(point.timed.p50.high, point.timed.p50_ms) for point in points), 0.0)
    if high > WIDE * low > 0:
        return log_axis(low / 1.25, high * 1.25, FRAME.left, FRAME.right)
    return axis(0, high * 1.12 or 1.0, FRAME.left, FRAME.right)


def _accuracy_axis(values: Sequence[float], spreads: Sequence[Interval]) -> Axis:
    """Room around the values; two points or dB at least, so that noise does not look like a difference."""
    low = min(*values, *(max(spread.low, value - 5) for spread, value in zip(spreads, values, strict=True)))
    high = max(*values, *(min(spread.high, value + 5) for spread, value in zip(spreads, values, strict=True)))
    middle, spread = (low + high) / 2, max(high - low, 2.0)
    return axis(middle - 0.68 * spread, middle + 0.68 * spread, FRAME.bottom, FRAME.top)


def _limits(choice: Choice | None, points: Sequence[Point], x: Axis, y: Axis) -> list[Limit]:
    """The budget and the largest drop, where they lie in the frame."""
    found = []
    if choice and choice.budget_ms is not None:
        found.append(Limit(x.at(choice.budget_ms), True, f"budget {choice.budget_ms:g} ms"))
    reference = next((point for point in points if point.is_reference), None)
    one_machine = len(_documents_of(points)) == 1
    if choice and choice.max_drop is not None and reference and one_machine and reference.measure in ("top1", "agreement"):
        at = y.at(reference.accuracy - choice.max_drop)
        if FRAME.top <= at <= FRAME.bottom:
            found.append(Limit(at, False, f"{choice.max_drop:g} point{'' if choice.max_drop == 1 else 's'} lost"))
    return found


def _fronts(marks: Sequence[Mark]) -> list[tuple[list[tuple[float, float]], int]]:
    """The corners of the frontier of each machine, and of all: what accuracy is to be had at each latency, as steps."""
    documents = _documents_of([mark.point for mark in marks])
    rows = [[mark for mark in marks if mark.point.document is one and mark.point.frontier] for one in documents]
    groups = [row[0].group for row in rows if row]
    if len(rows) > 1:
        rows, groups = [*rows, [mark for mark in marks if mark.point.overall]], [*groups, ALL]
    return [(_steps(row), group) for row, group in zip(filter(None, rows), groups, strict=True) if len(row) > 1]


def _steps(row: Sequence[Mark]) -> list[tuple[float, float]]:
    ordered = sorted(row, key=lambda mark: mark.x)
    corners = [corner for old, new in itertools.pairwise(ordered) for corner in ((new.x, old.y), (new.x, new.y))]
    return [(ordered[0].x, ordered[0].y), *corners]


def _labelled(
    marks: Sequence[Mark], fronts: Sequence[tuple[list[tuple[float, float]], int]], limits: Sequence[Limit]
) -> list[Mark]:
    """The marks with labels where they hide least, those that matter most first; one that matters little may have none."""
    taken = [(Box(m.x - 9, m.y - 9, m.x + 9, m.y + 9), 3.0) for m in marks]
    taken += [(Box(m.x - 3, m.along[1], m.x + 3, m.along[0]), 0.5) for m in marks]
    for corners, _ in fronts:
        taken += [(_segment(a, b), 1.5) for a, b in itertools.pairwise(corners)]
    for limit in limits:
        line = Box(limit.at - 2, FRAME.top, limit.at + 2, FRAME.bottom) if limit.upright else None
        taken.append((line or Box(FRAME.left, limit.at - 2, FRAME.right, limit.at + 2), 1.0))
        taken.append((_limit_box(limit), 3.0))
    labels: dict[int, Label | None] = {}
    for mark in sorted(marks, key=lambda one: (not one.chosen, not one.point.is_reference, not one.point.frontier)):
        needed = mark.chosen or mark.point.is_reference
        if needed or len(marks) <= LABELLED or mark.point.frontier:
            labels[id(mark)] = _label(mark, taken, len(marks) <= FEW, needed or len(marks) <= FEW)
    return [replace(mark, label=labels.get(id(mark))) for mark in marks]


def _segment(a: tuple[float, float], b: tuple[float, float]) -> Box:
    return Box(min(a[0], b[0]) - 2, min(a[1], b[1]) - 2, max(a[0], b[0]) + 2, max(a[1], b[1]) + 2)


def _label(mark: Mark, taken: list[tuple[Box, float]], figures: bool, needed: bool) -> Label | None:
    """What is written beside a point; the room that it takes is added to `taken`. None where it would hide too much."""
    name = mark.name if len(mark.name) <= LONGEST else mark.name[: LONGEST - 1] + "…"
    texts = (name, mark.figures) if figures or mark.chosen else (name,)
    options = places(mark.x, mark.y, texts)
    costs = [_cost(box, taken) + box.area * 0.01 * place for place, (box, _) in enumerate(options)]
    best = costs.index(min(costs))
    box, anchor = options[best]
    if not needed and costs[best] > HIDDEN * box.area:
        return None
    taken.append((box, 3.0))
    step = (box.bottom - box.top) / len(texts)
    x = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}[anchor]
    below = box.top > mark.y
    far = box.top - mark.y > 15 or mark.y - box.bottom > 15
    leader = (min(max(mark.x, box.left), box.right), box.top + 2 if below else box.bottom - 2) if far else None
    return Label(texts, x, box.top + step / 2, step, anchor, leader)


def _cost(box: Box, taken: Sequence[tuple[Box, float]]) -> float:
    """The area hidden by a label, by what is hidden, or lost outside of the frame."""
    return sum(weight * box.overlap(other) for other, weight in taken) + 4 * (box.area - box.overlap(FRAME))


def _limit_box(limit: Limit) -> Box:
    """The room that the text of a limit takes."""
    x, y, anchor = limit_text(limit)
    width = len(limit.text) * GLYPH
    left = x - width if anchor == "end" else x
    return Box(left, y - LINE / 2, left + width, y + LINE / 2)


def limit_text(limit: Limit) -> tuple[float, float, str]:
    """Where the text of a limit stands."""
    if not limit.upright:
        return FRAME.right, limit.at + 11, "end"
    return (limit.at - 6, FRAME.bottom - 10, "end") if limit.at > WIDTH / 2 else (limit.at + 6, FRAME.bottom - 10, "start")
