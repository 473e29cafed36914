"""What was measured of several candidates in, small charts out: SVG as HTML without outside assets.

    [Line, ...]            ->  distributions: a ridge a candidate
                           ->  throughput: images/s over the batch
    [LayerTime, ...]       ->  layer_grid: parts by blocks, the type that each computes in and its share of the time
    Judged, labels         ->  confusion_grid: which class was taken for which

Knows nothing of the page around them, which gives the classes used here their looks.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from vitedge.bench.document import Confused, LayerTime
from vitedge.bench.explain import PARTS
from vitedge.bench.lines import Line
from vitedge.bench.plot import FRAME, GLYPH, HEIGHT, WIDE, WIDTH, Axis, axis, log_axis, three

NAMES, VALUES = 158, 92  # units for what stands left of a ridge, and right of it
ROW, RIDGE = 36, 27  # units from ridge to ridge, and the height of one
BINS = 120
CURVES = 6
CELL = 21  # units, the height of a row of layers
TYPES = {"int4": 4, "int8": 1, "fp8": 3, "fp16": 2, "bf16": 2, "fp32": 0, "tf32": 0}  # -> the colour


def distributions(shown: Sequence[Line]) -> str:
    """How long calls take: a ridge a line, with a tick at the median and at the 99th percentile."""
    x = _latency_axis(shown)
    height = 12 + ROW * len(shown)
    grid = "".join(f'<path d="M{at:.1f} 4V{height}"/>' for at, _ in x.ticks())
    ticks = "".join(f'<text x="{at:.1f}" y="{height + 19}" text-anchor="middle">{text}</text>' for at, text in x.ticks())
    ridges = "".join(_ridge(line, x, 8 + ROW * (place + 1)) for place, line in enumerate(shown))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height + 28}" role="img" aria-label="Distributions of the latency">'
        f'<g class="grid">{grid}</g><g class="ticks">{ticks}</g>{ridges}</svg>'
    )


def throughput(shown: Sequence[Line]) -> str:
    """Images a second over the batch, a curve a candidate; at most six of them."""
    curves: dict[tuple[tuple[int, str], int | None, int], list[Line]] = defaultdict(list)
    for line in shown:
        curves[line.owner, line.timed.threads, line.timed.streams].append(line)
    kept = list(curves.values())[:CURVES]
    batches = sorted({line.timed.batch for curve in kept for line in curve})
    x = log_axis(batches[0] / 1.2, batches[-1] * 1.2, FRAME.left, FRAME.right - 110)
    y = axis(0, 1.1 * max(line.timed.images_per_s for curve in kept for line in curve), FRAME.bottom, FRAME.top)
    grid = "".join(f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right - 110}"/>' for at, _ in y.ticks())
    ticks = "".join(
        f'<text x="{FRAME.left - 9}" y="{at:.1f}" dy=".35em" text-anchor="end">{text}</text>' for at, text in y.ticks()
    )
    ticks += "".join(f'<text x="{x.at(b):.1f}" y="{FRAME.bottom + 20}" text-anchor="middle">{b}</text>' for b in batches)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Images a second over the batch">'
        f'<g class="grid">{grid}</g><g class="ticks">{ticks}</g>{_curves(kept, x, y)}</svg>'
    )


def layer_grid(layers: Sequence[LayerTime]) -> str:
    """The parts of the model downwards, its blocks to the right: the colour is the type, the strength the time."""
    cells: dict[tuple[str, str], list[LayerTime]] = defaultdict(list)
    for layer in layers:
        cells[layer.part, layer.block].append(layer)
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    known = {part: place for place, part in enumerate(PARTS)}
    parts = sorted({layer.part for layer in layers}, key=lambda part: (known.get(part, len(known)), part))
    most = max(sum(layer.ms for layer in cell) for cell in cells.values()) or 1.0
    step = (WIDTH - NAMES - VALUES) / len(blocks)
    drawn = [_cell(cells[part, block], most, NAMES + col * step, 20 + CELL * row, step) for row, part in enumerate(parts)
             for col, block in enumerate(blocks) if (part, block) in cells]  # fmt: skip
    every = max(1, math.ceil(max(map(len, map(_block_name, blocks))) * GLYPH / step))
    heads = [
        f'<text x="{NAMES + (col + 0.5) * step:.1f}" y="12" text-anchor="middle">{escape(_block_name(block))}</text>'
        for col, block in enumerate(blocks)
        if col % every == 0
    ]
    sides = []
    for row, part in enumerate(parts):
        y = 20 + CELL * (row + 0.5)
        total = sum(layer.ms for block in blocks for layer in cells.get((part, block), ()))
        sides.append(f'<text x="{NAMES - 10}" y="{y:.1f}" dy=".35em" text-anchor="end">{escape(_cut(part, 16))}</text>')
        sides.append(f'<text x="{WIDTH - VALUES + 10}" y="{y:.1f}" dy=".35em">{three(total)} ms</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {24 + CELL * len(parts)}" role="img" aria-label="Time of each part in each block">'
        f'<g class="ticks">{"".join(heads + sides)}</g>{"".join(drawn)}</svg>'
    )


def type_bar(layers: Sequence[LayerTime]) -> str:
    """What share of the time is spent in each type, as a bar and in words."""
    totals: dict[str, float] = defaultdict(float)
    for layer in layers:
        totals[layer.precision or "other"] += layer.ms
    whole = sum(totals.values()) or 1.0
    start, bars, words = 0.0, [], []
    for name, ms in sorted(totals.items(), key=lambda item: -item[1]):
        width = WIDTH * ms / whole
        bars.append(
            f'<rect class="c{_colour(name)}" x="{start:.1f}" y="0" width="{max(0.0, width - 1.5):.1f}" height="12" rx="3"/>'
        )
        words.append(f'<span class="c{_colour(name)}"><i></i>{escape(name)} {_percent(ms / whole)}</span>')
        start += width
    return (
        f'<svg class="types" viewBox="0 0 {WIDTH} 12" preserveAspectRatio="none" aria-hidden="true">{"".join(bars)}</svg>'
        f'<p class="legend">{"".join(words)}</p>'
    )


def confusion_grid(confused: Sequence[Confused], labels: Sequence[str]) -> str:
    """Truth downwards, answers to the right: how many images of each class were taken for each other."""
    counts = {(entry.truth, entry.answer): entry.images for entry in confused}
    most = max(counts.values(), default=1)
    left, top = 120, 86
    step = min(34.0, (WIDTH - left - 36) / len(labels))
    drawn = []
    for truth, label in enumerate(labels):
        y = top + truth * step
        name = escape(_cut(label, 12))
        drawn.append(f'<text x="{left - 8}" y="{y + step / 2:.1f}" dy=".35em" text-anchor="end">{name}</text>')
        at = left + (truth + 0.5) * step
        drawn.append(f'<text transform="translate({at:.1f} {top - 8}) rotate(-60)" dy=".35em">{escape(_cut(label, 10))}</text>')
        for answer, other in enumerate(labels):
            images = counts.get((truth, answer), 0)
            place = f'x="{left + answer * step:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{step - 2:.1f}" rx="3"'
            if truth == answer or not images:
                drawn.append(f'<rect class="{"self" if truth == answer else "none"}" {place}/>')
                continue
            told = f"{escape(label)} taken for {escape(other)}: {images}"
            drawn.append(
                f'<rect class="c5" fill-opacity="{0.15 + 0.85 * images / most:.2f}" {place}><title>{told}</title></rect>'
            )
            if step >= 20:
                style = ' class="on"' if images > most / 2 else ""
                middle = f'x="{left + (answer + 0.5) * step - 1:.1f}" y="{y + step / 2 - 1:.1f}"'
                drawn.append(f'<text{style} {middle} dy=".35em" text-anchor="middle">{images}</text>')
    size = top + step * len(labels) + 4
    width = left + step * len(labels) + 36
    return f'<svg class="confusion" viewBox="0 0 {width:.0f} {size:.0f}" role="img" aria-label="Confusion">{"".join(drawn)}</svg>'


def _latency_axis(shown: Sequence[Line]) -> Axis:
    """From a little below the fastest call to a little above the slowest 99th percentile."""
    low = min(line.timed.centiles_ms[1] for line in shown)
    high = max(line.timed.p99_ms for line in shown) or 1.0
    if high > WIDE * low > 0:
        return log_axis(low / 1.1, high * 1.1, NAMES, WIDTH - VALUES)
    room = max(high - low, 0.02 * high)
    return axis(max(0.0, low - 0.08 * room), high + 0.06 * room, NAMES, WIDTH - VALUES)


def _ridge(line: Line, x: Axis, base: float) -> str:
    """The density of the calls of a line, on a baseline; its own highest place is RIDGE high."""
    centiles = line.timed.centiles_ms
    shares = [_share(centiles, _value(x, edge)) for edge in range(BINS + 1)]
    rough = [shares[place + 1] - shares[place] for place in range(BINS)]
    padded = [0.0, *rough, 0.0]
    density = [(padded[i] + 2 * padded[i + 1] + padded[i + 2]) / 4 for i in range(BINS)]
    most = max(density) or 1.0
    step = (x.end - x.start) / BINS
    inside = [place for place in range(BINS) if density[place] > 0]
    outline = "".join(f"L{x.start + (place + 0.5) * step:.1f} {base - RIDGE * density[place] / most:.1f}" for place in inside)
    first, last = (x.start + (inside[0]) * step, x.start + (inside[-1] + 1) * step) if inside else (x.start, x.start)
    marks = [f'<path class="median" d="M{_clamped(x, line.timed.p50_ms):.1f} {base + 3:.1f}v-{RIDGE + 3}"/>']
    marks.append(f'<path class="tail" d="M{_clamped(x, line.timed.p99_ms):.1f} {base:.1f}v-9"/>')
    told = escape(
        f"{line.title}: p50 {three(line.timed.p50_ms)} ms, p99 {three(line.timed.p99_ms)} ms, max {three(line.timed.max_ms)} ms"
    )
    name = f"{line.mark} {_squeezed(line.title, 14)}" if line.chosen else _squeezed(line.title, 15)
    style = ' class="name"' if line.chosen else ""
    return (
        f'<g class="ridge {"c1" if line.chosen else "c0"}"><title>{told}</title>'
        f'<path class="hill" d="M{first:.1f} {base:.1f}{outline}L{last:.1f} {base:.1f}Z"/>'
        f'<path class="base" d="M{x.start} {base:.1f}H{x.end}"/>{"".join(marks)}'
        f'<text{style} x="{NAMES - 10}" y="{base - 8:.1f}" text-anchor="end">{escape(name)}</text>'
        f'<text x="{WIDTH - VALUES + 8}" y="{base - 8:.1f}">{three(line.timed.p50_ms)} ms</text></g>'
    )


def _value(x: Axis, edge: int) -> float:
    """The value at an edge of a bin."""
    part = edge / BINS
    return x.low + part * (x.high - x.low) if x.step else x.low * (x.high / x.low) ** part


def _share(centiles: Sequence[float], value: float) -> float:
    """The part of the calls that took no longer than `value`, between centiles in proportion."""
    above = bisect.bisect_right(centiles, value)
    if above in (0, len(centiles)):
        return above / len(centiles) if above else 0.0
    low, high = centiles[above - 1], centiles[above]
    return (above - 1 + (value - low) / (high - low)) / (len(centiles) - 1)


def _clamped(x: Axis, value: float) -> float:
    return min(max(x.at(value), x.start), x.end)


def _curves(kept: Sequence[Sequence[Line]], x: Axis, y: Axis) -> str:
    """The curves, with their names at their right ends, kept apart."""
    drawn, lowest = [], -math.inf
    ends = sorted(enumerate(kept), key=lambda item: y.at(item[1][-1].timed.images_per_s))
    for place, curve in ends:
        points = [(x.at(line.timed.batch), y.at(line.timed.images_per_s)) for line in curve]
        at = max(points[-1][1], lowest + 17)
        lowest = at
        dots = "".join(
            f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{escape(line.title)}, batch {line.timed.batch}: '
            f"{three(line.timed.images_per_s)} images/s</title></circle>"
            for (px, py), line in zip(points, curve, strict=True)
        )
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        name = escape(_squeezed(curve[0].title, 13))
        label = f'<text class="name" x="{points[-1][0] + 10:.1f}" y="{at:.1f}" dy=".35em">{name}</text>'
        drawn.append(f'<g class="c{place % CURVES}"><path class="curve" d="{path}"/>{dots}{label}</g>')
    return "".join(drawn)


def _cell(layers: Sequence[LayerTime], most: float, left: float, top: float, width: float) -> str:
    ms = sum(layer.ms for layer in layers)
    precision = max(layers, key=lambda layer: layer.ms).precision
    types = ", ".join(dict.fromkeys(layer.precision for layer in layers if layer.precision))
    told = escape(f"{layers[0].block} {layers[0].part}: {three(ms)} ms, {types}".strip())
    return (
        f'<rect class="c{_colour(precision)}" fill-opacity="{0.12 + 0.88 * ms / most:.2f}" x="{left:.1f}" y="{top:.1f}" '
        f'width="{max(1.0, width - 1.5):.1f}" height="{CELL - 2}" rx="2"><title>{told}</title></rect>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def _colour(precision: str) -> int:
    return TYPES.get(precision.lower(), 5)


def _block_name(block: str) -> str:
    """The number of a block alone, as they stand in a row; of what lies before and behind them the part says enough."""
    tail = block.rpartition(".")[2]
    return tail if tail.isdigit() else ""


def _squeezed(name: str, most: int) -> str:
    """A name with its end, in which those of one model differ."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - 1 - most // 2) :]}"


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
