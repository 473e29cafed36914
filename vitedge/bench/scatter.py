"""The points of a frontier in, accuracy against latency out: SVG with its caption, as HTML without outside assets.

    [Point, ...]  ->  groups, axes  ->  lines, bars, points  ->  labels where they hide least  ->  scatter

Points of a machine have its colour and shape, or of a runtime where there is one machine. Knows nothing of the page around it,
which gives the classes used here (`grid`, `point`, `c0` ...) their looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vitedge.bench.document import Candidate, Document, Interval
from vitedge.bench.frontier import Choice, Measure, Point, machine_names
from vitedge.bench.plot import FRAME, HEIGHT, WIDTH, Axis, Box, axis, log_axis, places

LABELLED = 12  # points that all get a label; of more, those on the frontier do
WIDE = 6.0  # times the fastest latency, from which on the axis is logarithmic
COLOURS = 5
TITLES: dict[Measure, tuple[str, str]] = {
    "top1": ("Top-1 accuracy", "%"),
    "agreement": ("Agreement with the reference", "%"),
    "sqnr_db": ("SQNR against the reference", "dB"),
    "none": ("Latency", "ms"),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A point where it is drawn: its units, and where its bars end, its place among the groups, and what is written beside it."""

    point: Point
    name: str
    group: int
    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float]
    chosen: bool

    @property
    def figures(self) -> str:
        """Latency and accuracy."""
        return f"{self.point.timed.p50_ms:.3g} ms · {accuracy_text(self.point)}"


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


def scatter(points: Sequence[Point], names: Mapping[str, str], choice: Choice | None = None) -> str:
    """Median latency to the right, accuracy upwards; the frontier of each machine is joined.

    names: what to call each candidate. choice: is ringed, and its limits are drawn.
    """
    x, y, marks = _drawn(points, names, choice)
    measure = points[0].measure
    title, unit = TITLES[measure]
    ends = (0.0, 100.0) if unit == "%" else (-math.inf, math.inf)
    upwards = [] if measure == "none" else y.ticks(*ends)
    grid = [f'<path d="M{at:.1f} {FRAME.top}V{FRAME.bottom}"/>' for at, _ in x.ticks()]
    grid += [f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right}"/>' for at, _ in upwards]
    ticks = [f'<text x="{at:.1f}" y="{FRAME.bottom + 20}" text-anchor="middle">{text}</text>' for at, text in x.ticks()]
    ticks += [f'<text x="{FRAME.left - 9}" y="{at:.1f}" dy=".35em" text-anchor="end">{text}</text>' for at, text in upwards]
    return (
        f"<figcaption><b>{title}, {unit}</b><span>up and to the left is better</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} against latency, {len(points)} points">'
        f'<g class="grid">{"".join(grid)}</g><g class="ticks">{"".join(ticks)}</g>'
        f"{_limits(choice, points, x, y)}{_fronts(marks)}{_marks(marks)}</svg>"
        f"{_legend(points)}"
    )


def _drawn(points: Sequence[Point], names: Mapping[str, str], choice: Choice | None) -> tuple[Axis, Axis, list[Mark]]:
    values, spreads = heights_of(points)
    x, y = _latency_axis(points, choice), _accuracy_axis(values, spreads)
    marks = [
        Mark(
            point, names[point.candidate.name], group_of(point, points), x.at(point.timed.p50_ms), y.at(value),
            (x.at(point.timed.p50.low), x.at(point.timed.p50.high)), (y.at(spread.low), y.at(spread.high)),
            choice is not None and point.timed is choice.timed and point.candidate.name == choice.candidate.name,
        )
        for point, value, spread in zip(points, values, spreads, strict=True)
    ]  # fmt: skip
    return x, y, marks


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


def _limits(choice: Choice | None, points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The budget and the largest drop as lines, where they lie in the frame."""
    parts = []
    if choice and choice.budget_ms is not None:
        at = x.at(choice.budget_ms)
        parts.append(f'<path d="M{at:.1f} {FRAME.top}V{FRAME.bottom}"/>')
        side, gap = ("end", -6) if at > WIDTH / 2 else ("start", 6)
        text = f"budget {choice.budget_ms:g} ms"
        parts.append(f'<text x="{at + gap:.1f}" y="{FRAME.top + 4:.1f}" text-anchor="{side}">{text}</text>')
    reference = next((point for point in points if point.is_reference), None)
    one_machine = len({id(point.document) for point in points}) == 1
    if choice and choice.max_drop is not None and reference and one_machine and reference.measure in ("top1", "agreement"):
        at = y.at(reference.accuracy - choice.max_drop)
        if FRAME.top <= at <= FRAME.bottom:
            text = f"{choice.max_drop:g} points lost"
            parts.append(f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right}"/>')
            parts.append(f'<text x="{FRAME.right}" y="{at + 15:.1f}" text-anchor="end">{text}</text>')
    return f'<g class="limit">{"".join(parts)}</g>' if parts else ""


def _fronts(marks: Sequence[Mark]) -> str:
    """The frontier of each machine: what accuracy is to be had at each latency, as steps."""
    fronts = []
    for document in {id(mark.point.document): mark.point.document for mark in marks}.values():
        row = [mark for mark in marks if mark.point.document is document and mark.point.frontier]
        row.sort(key=lambda mark: mark.x)
        if len(row) < 2:
            continue
        path = f"M{row[0].x:.1f} {row[0].y:.1f}" + "".join(f"H{mark.x:.1f}V{mark.y:.1f}" for mark in row[1:])
        several = len({id(mark.point.document) for mark in marks}) > 1
        fronts.append(f'<path class="front{f" c{row[0].group % COLOURS + 1}" if several else ""}" d="{path}"/>')
    return "".join(fronts)


def _marks(marks: Sequence[Mark]) -> str:
    """Bars below, then points, then labels, those that matter most first."""
    taken = [Box(mark.x - 9, mark.y - 9, mark.x + 9, mark.y + 9) for mark in marks]
    labels = {}
    for mark in sorted(marks, key=lambda one: (not one.chosen, not one.point.is_reference, not one.point.frontier)):
        if len(marks) <= LABELLED or mark.chosen or mark.point.is_reference or mark.point.frontier:
            labels[id(mark)] = _label(mark, taken, len(marks) <= LABELLED)
    return "".join(_drawing(mark, labels.get(id(mark), "")) for mark in sorted(marks, key=lambda one: one.point.frontier))


def _drawing(mark: Mark, label: str) -> str:
    point, (low, high), (bottom, top) = mark.point, mark.across, mark.along
    bars = f'<path class="bar" d="M{low:.1f} {mark.y:.1f}H{high:.1f}M{mark.x:.1f} {bottom:.1f}V{top:.1f}"/>'
    state = ("on" if point.frontier else "off") if point.certain else "maybe"
    ring = f'<circle class="ring" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="14"/>' if mark.chosen else ""
    where = machine_names([point.document])[0]
    key = escape(key_of(point.document, point.candidate))
    told = escape(f"{point.candidate.name} on {point.candidate.runtime}, {where}, batch {point.timed.batch}: {mark.figures}")
    return (
        f'<g class="mark {state} c{mark.group % COLOURS + 1}" data-key="{key}">{bars}{ring}'
        f'<path class="point" d="{shape(mark.group, mark.x, mark.y)}"><title>{told}</title></path>{label}</g>'
    )


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


def _label(mark: Mark, taken: list[Box], figures: bool) -> str:
    """What is written beside a point; the room that it takes is added to `taken`."""
    name = mark.name if len(mark.name) <= 24 else mark.name[:23] + "…"
    texts = (name, mark.figures) if figures or mark.chosen or mark.point.is_reference else (name,)
    box, anchor = min(places(mark.x, mark.y, texts), key=lambda place: _cost(place[0], taken))
    taken.append(box)
    at = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}[anchor]
    step = (box.bottom - box.top) / len(texts)
    drawn = []
    for row, text in enumerate(texts):
        style = (' class="name chosen"' if mark.chosen else ' class="name"') if row == 0 else ""
        y = box.top + (row + 0.5) * step
        drawn.append(f'<text{style} x="{at:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}">{escape(text)}</text>')
    return "".join(drawn)


def _cost(box: Box, taken: Sequence[Box]) -> float:
    """The area hidden by a label, or lost outside of the frame."""
    return sum(map(box.overlap, taken)) + 2 * (box.area - box.overlap(FRAME))


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
