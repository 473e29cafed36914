"""What quantizing costs by Linear in, something to read out: terminal tables and one self-contained HTML page.

    Analysis  ->  cost_table, frontier_table  ->  rich.table.Table
              ->  write_page                  ->  costs.html: a bar a Linear, and SQNR against modelled latency

Knows nothing of graphs: it prints what was measured and measures nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from vitedge.bench.page import page
from vitedge.bench.plot import FRAME, HEIGHT, WIDTH, Axis, axis
from vitedge.errors import VitEdgeError
from vitedge.workspace import write_file

if TYPE_CHECKING:
    from vitedge.compiler.sensitivity import Cost, Point

SHOWN = 24  # bars of the costliest Linears
ROW = 24  # units from bar to bar
NAMES = 230  # units for their names
EXACT_DB = 90.0  # where the axis ends: from here on it is float32 rounding
MODELLED = "Latency is modelled: a MAC in float counts as two in INT8. It is that of the Linears alone, against all in INT8."


@dataclass(frozen=True, slots=True)
class Analysis:
    """What quantizing costs by Linear. measured: SQNR in dB with the first k Linears of `points` freed, for some k."""

    model: str
    variant: str
    images: int
    costs: tuple[Cost, ...]
    points: tuple[Point, ...]
    measured: dict[int, float]


def cost_table(analysis: Analysis) -> Table:
    """The Linears by what quantizing each alone costs, the costliest first."""
    table = Table("Linear", box=None, pad_edge=False, header_style="dim")
    for head in ("SQNR alone dB", "noise %", "MACs %"):
        table.add_column(head, justify="right")
    noise, macs = _totals(analysis)
    for cost in _by_noise(analysis):
        table.add_row(cost.name, f"{cost.sqnr_db:.1f}", f"{100 * cost.noise / noise:.1f}", f"{100 * cost.macs / macs:.1f}")
    return table


def frontier_table(analysis: Analysis) -> Table:
    """What freeing the first Linears gives, where it was measured."""
    table = Table(box=None, pad_edge=False, header_style="dim", caption=MODELLED, caption_justify="left")
    for head in ("freed", "predicted dB", "measured dB", "modelled latency"):
        table.add_column(head, justify="right")
    table.add_column("the last of them")
    for k, measured in analysis.measured.items():
        point = analysis.points[k]
        table.add_row(str(k), _db(point.predicted_db), _db(measured), f"{point.latency:.2f}", point.name)
    return table


def require_html(path: Path) -> None:
    """Refuse a file that a page cannot be written to, before anything is measured."""
    if path.suffix != ".html":
        raise VitEdgeError(f"cannot draw {path}: a plot is an HTML page", hint=f"give {path.with_suffix('.html').name}")


def write_page(path: Path, analysis: Analysis) -> None:
    """Write both pictures as one HTML file without outside assets. Raises VitEdgeError where it cannot be written."""
    title = f"vitedge: what INT8 costs in {analysis.model}"
    head = f'<p class="eyebrow">{escape(analysis.model)}</p><h1>{escape(_headline(analysis))}</h1>'
    figures = "".join(f'<figure class="card plot">{svg}</figure>' for svg in (_bars(analysis), _curve(analysis)))
    about = f"{analysis.variant}, {analysis.images} images"
    body = f'<section>{head}<div class="tiles">{figures}</div></section>'
    write_file(path, page(title, about, body))


def _headline(analysis: Analysis) -> str:
    worst = _by_noise(analysis)[0]
    noise, macs = _totals(analysis)
    share = 100 * worst.noise / noise
    return f"{worst.name} makes {share:.0f}% of the noise in {100 * worst.macs / macs:.1f}% of the MACs"


def _bars(analysis: Analysis) -> str:
    """Two bars for each of the costliest Linears: its part of the noise above its part of the MACs."""
    noise, macs = _totals(analysis)
    shown = _by_noise(analysis)[:SHOWN]
    shares = [(cost.name, 100 * cost.noise / noise, 100 * cost.macs / macs) for cost in shown]
    x = axis(0, max(max(a, b) for _, a, b in shares) * 1.05 + 1e-9, NAMES, WIDTH - 12)
    bottom = 8 + ROW * len(shares)
    grid = "".join(f'<path d="M{at:.1f} 4V{bottom}"/>' for at, _ in x.ticks())
    ticks = "".join(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>' for at, text in x.ticks())
    bars = "".join(_bar(8 + ROW * i, x, *share) for i, share in enumerate(shares))
    return (
        "<figcaption><b>Part of the noise and of the MACs, %</b><span>blue: noise · grey: MACs</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {bottom + 26}" role="img" aria-label="noise by Linear">'
        f'<g class="grid">{grid}</g><g class="ticks">{ticks}</g>{bars}</svg>'
    )


def _bar(top: float, x: Axis, name: str, noise: float, macs: float) -> str:
    short = name if len(name) <= 32 else f"…{name[-31:]}"
    return (
        f'<text x="{NAMES - 8}" y="{top + 9}" dy=".35em" text-anchor="end">{escape(short)}</text>'
        f'<g class="c1"><rect class="point" x="{NAMES}" y="{top}" width="{x.at(noise) - NAMES:.1f}" height="11"/></g>'
        f'<g class="c0"><rect class="point" x="{NAMES}" y="{top + 10}" width="{x.at(macs) - NAMES:.1f}" height="8"/>'
        f"<title>{escape(name)}: {noise:.2f}% of the noise, {macs:.2f}% of the MACs</title></g>"
    )


def _curve(analysis: Analysis) -> str:
    """SQNR against modelled latency: what is predicted as a line, what was measured as points."""
    points = [(point.latency, min(point.predicted_db, EXACT_DB)) for point in analysis.points]
    dots = [(analysis.points[k], min(db, EXACT_DB)) for k, db in analysis.measured.items()]
    heights = [db for _, db in points] + [db for _, db in dots]
    x = axis(1, max(points[-1][0], 1.01), FRAME.left, FRAME.right)
    y = axis(min(heights) - 2, max(heights) + 2, FRAME.bottom, FRAME.top)
    grid = "".join(f'<path d="M{at:.1f} {FRAME.top}V{FRAME.bottom}"/>' for at, _ in x.ticks())
    grid += "".join(f'<path d="M{FRAME.left} {at:.1f}H{FRAME.right}"/>' for at, _ in y.ticks())
    ticks = "".join(f'<text x="{at:.1f}" y="{FRAME.bottom + 20}" text-anchor="middle">{t}</text>' for at, t in x.ticks())
    ticks += "".join(f'<text x="{FRAME.left - 9}" y="{at:.1f}" dy=".35em" text-anchor="end">{t}</text>' for at, t in y.ticks())
    line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    marks = "".join(
        f'<circle class="point" cx="{x.at(point.latency):.1f}" cy="{y.at(db):.1f}" r="6">'
        f"<title>{point.freed} freed: {_db(db)} dB</title></circle>"
        for point, db in dots
    )
    return (
        "<figcaption><b>SQNR of the outputs, dB</b><span>line: predicted · points: measured</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="SQNR against modelled latency">'
        f'<g class="grid">{grid}</g><g class="ticks">{ticks}</g>'
        f'<g class="c1"><polyline class="spread" fill="none" points="{line}"/>{marks}</g></svg>'
        f'<p class="axis">{MODELLED}</p>'
    )


def _by_noise(analysis: Analysis) -> list[Cost]:
    return sorted(analysis.costs, key=lambda cost: -cost.noise)


def _totals(analysis: Analysis) -> tuple[float, int]:
    """The noise and the MACs of all Linears; a model whose quantizing costs nothing has noise to divide by all the same."""
    return sum(cost.noise for cost in analysis.costs) or math.inf, sum(cost.macs for cost in analysis.costs)


def _db(value: float) -> str:
    return f"{value:.1f}" if value < EXACT_DB else f"over {EXACT_DB:.0f}"
