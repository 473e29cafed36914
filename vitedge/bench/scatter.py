"""The points of a frontier in, accuracy against latency out: SVG with its caption, as HTML without outside assets.

    [Point, ...]  ->  lay_out  ->  Layout: axes, marks, labels where they hide least, in units  ->  scatter

Points of a machine have its colour and shape, or of a runtime where there is one machine. Knows nothing of the page around it,
which gives the classes used here (`grid`, `point`, `c0` ...) their looks; picture.py draws the same layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from vitedge.bench.document import Candidate, Document, Interval
from vitedge.bench.frontier import Choice, Measure, Point, is_choice, machine_names, setting
from vitedge.bench.plot import FRAME, GLYPH, HEIGHT, LINE, WIDTH, Axis, Box, axis, log_axis, places, three

LABELLED = 14  # points that all get a label if there is room; of more, those on the frontier do
FEW = 4  # points that get their figures, too, and always a label
LONGEST = 26  # letters of a label
HIDDEN = 0.5  # part of a label's area that it may hide
WIDE = 6.0  # times the fastest latency, from which on the axis is logarithmic
COLOURS = 5
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


def accuracy_text(point: Point) -> str:
    """The accuracy with its unit."""
    if point.measure == "none" or math.isinf(point.accuracy):
        return "reference" if point.is_reference else "not judged"
    return f"{point.accuracy:.1f} dB" if point.measure == "sqnr_db" else f"{point.accuracy:.2f}%"


def groups_of(points: Sequence[Point]) -> list[str]:
    """What tells points apart: the machines of several documents, the runtimes of one."""
    documents = list({id(point.document): point.document for point in points}.values())
    if len(documents) > 1:
        return machine_names(documents)
    return list(dict.fromkeys(point.candidate.runtime for point in points))


def group_of(point: Point, points: Sequence[Point]) -> int:
    """The place of a point's group among `groups_of`."""
    documents = list({id(one.document): one.document for one in points}.values())
    if len(documents) > 1:
        return next(place for place, one in enumerate(documents) if one is point.document)
    return groups_of(points).index(point.candidate.runtime)


def heights_of(points: Sequence[Point]) -> tuple[list[float], list[Interval]]:
    """Where points stand upwards, and their intervals: an infinite SQNR a little above the highest finite one."""
    highest = max((point.accuracy for point in points if math.isfinite(point.accuracy)), default=0.0)
    values = [point.accuracy if math.isfinite(point.accuracy) else highest + 6 for point in points]
    return values, [_against_reference(point, value) for point, value in zip(points, values, strict=True)]


def lay_out(points: Sequence[Point], names: Mapping[str, str], choice: Choice | None = None) -> Layout:
    """Where everything stands: median latency to the right, accuracy upwards. names: what to call each candidate."""
    values, spreads = heights_of(points)
    x, y = _latency_axis(points, choice), _accuracy_axis(values, spreads)
    marks = [
        Mark(
            point, _name(point, points, names), group_of(point, points), x.at(point.timed.p50_ms), y.at(value),
            (x.at(point.timed.p50.low), x.at(point.timed.p50.high)), (y.at(spread.low), y.at(spread.high)),
            choice is not None and is_choice(choice, point.candidate, point.timed),
        )
        for point, value, spread in zip(points, values, spreads, strict=True)
    ]  # fmt: skip
    measure = points[0].measure
    ends = (0.0, 100.0) if TITLES[measure][1] == "%" else (-math.inf, math.inf)
    upwards = [] if measure == "none" else y.ticks(*ends)
    fronts, limits = _fronts(marks), _limits(choice, points, x, y)
    return Layout(x.ticks(), upwards, _labelled(marks, fronts, limits), fronts, limits)


def scatter(points: Sequence[Point], names: Mapping[str, str], choice: Choice | None = None) -> str:
    """The plot and its caption; the frontier of each machine is joined, the choice is ringed, its limits are drawn."""
    found = lay_out(points, names, choice)
    title, unit = TITLES[points[0].measure]
    grid = [f'<path d="M{at:.1f} {FRAME.top}V{FRAME.bottom}"/>' for at, _ in found.x_ticks]
    grid += [f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right}"/>' for at, _ in found.y_ticks]
    ticks = [f'<text x="{at:.1f}" y="{FRAME.bottom + 20}" text-anchor="middle">{text}</text>' for at, text in found.x_ticks]
    ticks += [f'<text x="{FRAME.left - 9}" y="{at:.1f}" dy=".35em" text-anchor="end">{text}</text>' for at, text in found.y_ticks]
    marks = "".join(map(_drawing, sorted(found.marks, key=lambda mark: (mark.chosen, mark.point.frontier))))
    labels = "".join(_label_drawing(mark) for mark in found.marks)
    return (
        f"<figcaption><b>{title}, {unit}</b><span>up and to the left is better</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} against latency, {len(points)} points">'
        f'<g class="grid">{"".join(grid)}</g><g class="ticks">{"".join(ticks)}</g>'
        f"{_front_drawing(found)}{_limit_drawing(found.limits)}{marks}{labels}</svg>{_legend(points)}"
    )


def _name(point: Point, points: Sequence[Point], names: Mapping[str, str]) -> str:
    """A candidate's name, with threads and streams where they were swept."""
    documents = list({id(one.document): one.document for one in points}.values())
    return ", ".join(filter(None, (names[point.candidate.name], setting(point.timed, documents))))


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
    one_machine = len({id(point.document) for point in points}) == 1
    if choice and choice.max_drop is not None and reference and one_machine and reference.measure in ("top1", "agreement"):
        at = y.at(reference.accuracy - choice.max_drop)
        if FRAME.top <= at <= FRAME.bottom:
            found.append(Limit(at, False, f"{choice.max_drop:g} point{'' if choice.max_drop == 1 else 's'} lost"))
    return found


def _fronts(marks: Sequence[Mark]) -> list[tuple[list[tuple[float, float]], int]]:
    """The corners of the frontier of each machine, and of all: what accuracy is to be had at each latency, as steps."""
    documents = {id(mark.point.document): mark.point.document for mark in marks}.values()
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


def _front_drawing(found: Layout) -> str:
    several = len({id(mark.point.document) for mark in found.marks}) > 1
    drawn = []
    for corners, group in found.fronts:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
        style = " all" if group == ALL else f" c{group % COLOURS + 1}" if several else ""
        drawn.append(f'<path class="front{style}" d="{path}"/>')
    return "".join(reversed(drawn))


def _limit_drawing(limits: Sequence[Limit]) -> str:
    parts = []
    for limit in limits:
        line = f"M{limit.at:.1f} {FRAME.top}V{FRAME.bottom}" if limit.upright else f"M{FRAME.left} {limit.at:.1f}H{FRAME.right}"
        x, y, anchor = limit_text(limit)
        parts.append(f'<path d="{line}"/><text x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}">{limit.text}</text>')
    return f'<g class="limit">{"".join(parts)}</g>' if parts else ""


def _drawing(mark: Mark) -> str:
    point, (low, high), (bottom, top) = mark.point, mark.across, mark.along
    bars = f'<path class="bar" d="M{low:.1f} {mark.y:.1f}H{high:.1f}M{mark.x:.1f} {bottom:.1f}V{top:.1f}"/>'
    ring = f'<circle class="ring" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="13"/>' if mark.chosen else ""
    where = machine_names([point.document])[0]
    key = escape(key_of(point.document, point.candidate))
    told = escape(f"{point.candidate.name} on {point.candidate.runtime}, {where}, batch {point.timed.batch}: {mark.figures}")
    return (
        f'<g class="mark {mark.state} c{mark.group % COLOURS + 1}" data-key="{key}">{bars}{ring}'
        f'<path class="point" d="{shape(mark.group, mark.x, mark.y)}"><title>{told}</title></path></g>'
    )


def _label_drawing(mark: Mark) -> str:
    label = mark.label
    if label is None:
        return ""
    drawn = []
    if label.leader:
        x, y = label.leader
        drawn.append(f'<path class="leader" d="M{mark.x:.1f} {mark.y + (8 if y > mark.y else -8):.1f}L{x:.1f} {y:.1f}"/>')
    for row, text in enumerate(label.texts):
        style = (' class="name chosen"' if mark.chosen else ' class="name"') if row == 0 else ""
        at = f'x="{label.x:.1f}" y="{label.y + row * label.step:.1f}" dy=".35em" text-anchor="{label.anchor}"'
        drawn.append(f"<text{style} {at}>{escape(text)}</text>")
    return f'<g class="{mark.state} c{mark.group % COLOURS + 1}">{"".join(drawn)}</g>'


def key_of(document: Document, candidate: Candidate) -> str:
    """What ties a point to its line of the table in one page."""
    return "|".join((document.environment.get("machine", ""), document.environment.get("date", ""), candidate.name))


def shape(group: int, x: float, y: float) -> str:
    """The path of a point: a circle, a square, a triangle or a diamond."""
    corners = {
        1: ((-6, -6), (6, -6), (6, 6), (-6, 6)),
        2: ((0, -8), (7.5, 5.5), (-7.5, 5.5)),
        3: ((0, -8.5), (8.5, 0), (0, 8.5), (-8.5, 0)),
    }.get(group % 4)
    if corners is None:
        return f"M{x - 7:.1f} {y:.1f}a7 7 0 1 0 14 0a7 7 0 1 0 -14 0Z"
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "Z"


def _legend(points: Sequence[Point]) -> str:
    """What colours and shapes mean, where there are several, and what the axes and bars are."""
    groups = groups_of(points)
    entries = [
        f'<span class="c{place % COLOURS + 1}"><svg viewBox="-9 -9 18 18" aria-hidden="true">'
        f'<path class="point" d="{shape(place, 0, 0)}"/></svg>{escape(name)}</span>'
        for place, name in enumerate(groups)
    ]
    batch = "one image" if points[0].timed.batch == 1 else f"a batch of {points[0].timed.batch}"
    said = (
        f"Median latency of {batch}, ms. Filled: on the frontier, nothing is as fast and as accurate. Pale: on it or off it, "
        "within the noise. Bars hold 95 %."
    )
    return (f'<p class="legend">{"".join(entries)}</p>' if len(groups) > 1 else "") + f'<p class="axis">{said}</p>'
