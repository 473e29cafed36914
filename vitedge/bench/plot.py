"""Bench rows of one model in, a latency-accuracy plot out: SVG with its caption, as HTML without outside assets.

    [BenchRow, ...]  ->  scale and axes  ->  points  ->  labels where they hide least  ->  plot

Knows nothing of the page around it, which gives the classes used here (`grid`, `point`, `c0` ...) their looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vitedge.specs import BenchRow

WIDTH, HEIGHT = 560, 380  # of the plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 22, 44
GLYPH, LINE = 9.2, 21.0  # a label's character and line in those units, as large as a phone shows them


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values from `low` to `high` to units from `start` to `end`; ticks at round values.

    step: from tick to tick; 0 for a logarithmic axis, whose ticks are 1, 2 and 5 times the powers of ten.
    """

    low: float
    high: float
    start: float
    end: float
    step: float

    def at(self, value: float) -> float:
        """The position of a value, in units."""
        low, high = (self.low, self.high) if self.step else (math.log(self.low), math.log(self.high))
        place = value if self.step else math.log(max(value, self.low / 10))
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self, least: float = 0, most: float = math.inf) -> list[tuple[float, str]]:
        """Position and text of each tick from `least` to `most`."""
        if not self.step:
            return [(self.at(value), f"{value:,.{max(0, -math.floor(math.log10(value)))}f}") for value in self._decades()]
        first = math.ceil(max(self.low, least) / self.step - 1e-9)
        last = math.floor(min(self.high, most) / self.step + 1e-9)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(self.at(i * self.step), f"{i * self.step:,.{digits}f}") for i in range(first, last + 1)]

    def _decades(self) -> list[float]:
        """1, 2 and 5 times the powers of ten; the powers alone where that would be too many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        return [value for power in powers for digit in digits if self.low <= (value := digit * 10.0**power) <= self.high]


@dataclass(frozen=True, slots=True)
class _Scale:
    """What the plot shows upwards: its title as HTML, unit, ends, and the value of each row that has one."""

    title: str
    unit: str
    ends: tuple[float, float]
    heights: Mapping[BenchRow, float]

    def text(self, row: BenchRow) -> str:
        if row.top1 is None and row.agreement is None and row.sqnr_db is None:
            return "reference"
        return f"{self.heights[row]:.2f}%" if self.unit == "%" else f"{self.heights[row]:.1f} dB"


@dataclass(frozen=True, slots=True)
class _Point:
    """A row's place in the plot."""

    row: BenchRow
    x: float
    y: float
    colour: int
    lines: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


FRAME = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def plot(rows: Sequence[BenchRow], names: Mapping[BenchRow, str]) -> str:
    """The rows of one model and batch as points: median latency to the right, the best known accuracy upwards.

    The first row is the reference. names: what to call each row; a long one is shortened.
    """
    scale = _scale(rows)
    rows = [row for row in rows if row in scale.heights]
    x = axis(0, max(row.p90_ms for row in rows) * 1.12, FRAME.left, FRAME.right)
    y = _vertical_axis(list(scale.heights.values()))
    variants = list(dict.fromkeys(row.variant for row in rows))
    points = [
        _Point(row, x.at(row.p50_ms), y.at(scale.heights[row]), variants.index(row.variant) % 6,
               (_short(names[row]), f"{row.p50_ms:.2f} ms · {scale.text(row)}"))
        for row in rows
    ]  # fmt: skip
    batch = "one image" if rows[0].batch == 1 else f"a batch of {rows[0].batch}"
    grid = [f'<path d="M{at:.1f} {FRAME.top}V{FRAME.bottom}"/>' for at, _ in x.ticks()]
    grid += [f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right}"/>' for at, _ in y.ticks(*scale.ends)]
    ticks = [f'<text x="{at:.1f}" y="{FRAME.bottom + 20}" text-anchor="middle">{text}</text>' for at, text in x.ticks()]
    ticks += [
        f'<text x="{FRAME.left - 9}" y="{at:.1f}" dy=".35em" text-anchor="end">{text}</text>' for at, text in y.ticks(*scale.ends)
    ]
    return (
        f"<figcaption><b>{scale.title}, {scale.unit}</b><span>up and to the left is better</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{scale.title} against latency">'
        f'<g class="grid">{"".join(grid)}</g><g class="ticks">{"".join(ticks)}</g>{_marks(points, x)}</svg>'
        f'<p class="axis">Latency of {batch}, ms: a point is the median, its line reaches the 90th percentile. '
        f"{_basis(rows[0])}</p>"
    )


def _basis(row: BenchRow) -> str:
    """How many images an accuracy rests on, and how sure that makes it."""
    if row.top1 is None or not row.images:
        return f"Compared on {row.images:,} images." if row.images else ""
    error = 100 * math.sqrt(row.top1 / 100 * (1 - row.top1 / 100) / row.images)
    return f"Top-1 of {row.images:,} images has a standard error of {error:.2f} points."


def _scale(rows: Sequence[BenchRow]) -> _Scale:
    """Top-1 if known, else agreement with the reference, else SQNR; the reference has the place of perfect agreement."""
    reference = rows[0]
    top1 = {row: row.top1 for row in rows if row.top1 is not None}
    if top1:
        return _Scale("Top-1 accuracy", "%", (0, 100), top1)
    agreement = {row: row.agreement for row in rows if row.agreement is not None}
    sqnr = {row: row.sqnr_db for row in rows if row.sqnr_db is not None}
    if agreement or not sqnr:
        return _Scale(f"Agreement with {escape(reference.variant)}", "%", (0, 100), {reference: 100, **agreement})
    highest = max(sqnr.values())
    return _Scale(f"SQNR against {escape(reference.variant)}", "dB", (-math.inf, highest + 2), {reference: highest + 6, **sqnr})


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis with about six ticks, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return Axis(low, high, start, end, next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999))


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """A logarithmic axis from `low` above 0 to `high`."""
    return Axis(low, high, start, end, 0.0)


def places(x: float, y: float, texts: Sequence[str]) -> list[tuple[Box, str]]:
    """Where the lines of a label of a point may stand, best first: beside it, above, below, in the corners."""
    width, height = max(map(len, texts)) * GLYPH, len(texts) * LINE
    spots = [
        (x + 14, y - height / 2, "start"),
        (x - 14 - width, y - height / 2, "end"),
        (x - width / 2, y - 12 - height, "middle"),
        (x - width / 2, y + 12, "middle"),
        (x + 6, y - 10 - height, "start"),
        (x + 6, y + 10, "start"),
        (x - 6 - width, y - 10 - height, "end"),
        (x - 6 - width, y + 10, "end"),
    ]
    return [(Box(left, top, left + width, top + height), anchor) for left, top, anchor in spots]


def _vertical_axis(values: list[float]) -> Axis:
    """Room around the values; two points or dB at least, so that noise does not look like a difference."""
    middle, spread = (min(values) + max(values)) / 2, max(max(values) - min(values), 2.0)
    return axis(middle - 0.75 * spread, middle + 0.75 * spread, FRAME.bottom, FRAME.top)


def _marks(points: Sequence[_Point], x: Axis) -> str:
    """Points, spreads and labels; a label goes where it hides nothing, or the least."""
    taken = [Box(p.x - 8, p.y - 8, max(p.x + 8, x.at(p.row.p90_ms)), p.y + 8) for p in points]
    marks = []
    for point in points:
        box, anchor = min(_places(point), key=lambda place: _cost(place[0], taken))
        taken.append(box)
        middle = f"{(box.top + box.bottom) / 2:.1f}"
        at = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}[anchor]
        name, value = map(escape, point.lines)
        full = escape(f"{point.row.variant} on {point.row.backend}, batch {point.row.batch}: {point.lines[1]}")
        marks.append(
            f'<g class="c{point.colour}"><path class="spread" d="M{point.x:.1f} {point.y:.1f}H{x.at(point.row.p90_ms):.1f}"/>'
            f'<circle class="point" cx="{point.x:.1f}" cy="{point.y:.1f}" r="7"><title>{full}</title></circle>'
            f'<text class="name" x="{at:.1f}" y="{middle}" dy="-.2em" text-anchor="{anchor}">{name}</text>'
            f'<text x="{at:.1f}" y="{middle}" dy="1.05em" text-anchor="{anchor}">{value}</text></g>'
        )
    return "".join(marks)


def _places(point: _Point) -> list[tuple[Box, str]]:
    """Where the label of a point may stand, best first: beside it, above, below, in the corners."""
    width, height = max(map(len, point.lines)) * GLYPH, 2 * LINE
    x, y = point.x, point.y
    spots = [
        (x + 14, y - height / 2, "start"),
        (x - 14 - width, y - height / 2, "end"),
        (x - width / 2, y - 12 - height, "middle"),
        (x - width / 2, y + 12, "middle"),
        (x + 6, y - 10 - height, "start"),
        (x + 6, y + 10, "start"),
        (x - 6 - width, y - 10 - height, "end"),
        (x - 6 - width, y + 10, "end"),
    ]
    return [(Box(left, top, left + width, top + height), anchor) for left, top, anchor in spots]


def _cost(box: Box, taken: Sequence[Box]) -> float:
    """The area hidden by a label, or lost outside of the frame."""
    return sum(map(box.overlap, taken)) + 2 * (box.area - box.overlap(FRAME))
