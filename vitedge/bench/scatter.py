"""A frontier's layout in, the plot out: SVG with its caption, as HTML without outside assets.

    [Point, ...]  ->  layout.py  ->  Layout  ->  scatter

Each group of points has a colour and a shape. Knows nothing of the page around it, which gives the classes used here (`grid`,
`point`, `c0` ...) their looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from vitedge.bench.choice import Choice
from vitedge.bench.document import Candidate, Document
from vitedge.bench.frontier import Point, machine_names
from vitedge.bench.layout import ALL, TITLES, Layout, Limit, Mark, batch_text, groups_of, lay_out, limit_text
from vitedge.bench.plot import FRAME, HEIGHT, WIDTH

COLOURS = 5


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
    said = (
        f"Median latency of {batch_text(points[0].timed.batch)}, ms. Filled: on the frontier, none is as fast and as accurate. "
        "Pale: on it or off it, within the noise. Bars hold 95 %."
    )
    return (f'<p class="legend">{"".join(entries)}</p>' if len(groups) > 1 else "") + f'<p class="axis">{said}</p>'
