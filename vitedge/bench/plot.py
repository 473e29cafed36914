"""The geometry of a plot: axes with ticks at round values, where the labels of its points may stand, and numbers in short.

Knows nothing of what is plotted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 380  # of the plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 22, 44
GLYPH, LINE = 9.2, 21.0  # a label's character and line in those units, as large as a phone shows them
WIDE = 6.0  # times the least value, from which on an axis is better logarithmic


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
class Box:
    """A rectangle, in units from the upper left."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that two share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Its area, in units squared."""
        return (self.right - self.left) * (self.bottom - self.top)


FRAME = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis with about six ticks, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return Axis(low, high, start, end, next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999))


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """A logarithmic axis from `low` above 0 to `high`."""
    return Axis(low, high, start, end, 0.0)


def places(x: float, y: float, texts: Sequence[str]) -> list[tuple[Box, str]]:
    """Where the lines of a label of a point may stand, best first: beside it, above, below, in the corners, further off."""
    width, height = max(map(len, texts)) * GLYPH, len(texts) * LINE
    spots = [
        (x + 14, y - height / 2, "start"),
        (x - 14 - width, y - height / 2, "end"),
        (x - width / 2, y - 11 - height, "middle"),
        (x - width / 2, y + 11, "middle"),
        (x + 7, y - 9 - height, "start"),
        (x + 7, y + 9, "start"),
        (x - 7 - width, y - 9 - height, "end"),
        (x - 7 - width, y + 9, "end"),
    ]
    for far in (24, 46, 68, 90):
        spots += [(x - width / 2, y - far - height, "middle"), (x - width / 2, y + far, "middle")]
        spots += [(x + 4, y - far - height, "start"), (x + 4, y + far, "start")]
        spots += [(x - 4 - width, y - far - height, "end"), (x - 4 - width, y + far, "end")]
    return [(Box(left, top, left + width, top + height), anchor) for left, top, anchor in spots]


def three(value: float) -> str:
    """A number with three digits that count, all those before the point, and no exponent."""
    if not math.isfinite(value):
        return f"{value}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 9)}f}"
