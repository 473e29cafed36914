"""The points of a frontier in, accuracy against latency out as a PNG, for where HTML is not shown. Needs Matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitedge.bench.choice import Choice
from vitedge.bench.document import Document
from vitedge.bench.frontier import Point, locate
from vitedge.bench.layout import ALL, TITLES, Layout, Mark, batch_text, groups_of, lay_out, limit_text
from vitedge.bench.lines import display_names
from vitedge.bench.plot import FRAME, HEIGHT, WIDTH
from vitedge.errors import VitEdgeError, import_package
from vitedge.workspace import write_file

COLOURS = ("#2563eb", "#d9690a", "#0a8a5f", "#9333ea", "#db2777")
SHAPES = "os^D"
SIDES = {"start": "left", "middle": "center", "end": "right"}
SOFT, GRID, LINE, BAD = "#5d687a", "#e7eaef", "#94a3b8", "#c02626"
INCH, DPI, SIZE = 70, 200, 7.5  # units and dots an inch, points of text
LEGEND = 26  # units below the plot


def write_png(path: Path, documents: Sequence[Document], choice: Choice | None = None) -> None:
    """Write the frontier as a picture of 1600 x 1000 pixels. Raises MissingPackageError without Matplotlib."""
    figures = import_package("matplotlib.figure", "report", "matplotlib")
    points = locate(documents)
    if not points:
        raise VitEdgeError("nothing was timed to its end, so there is no frontier to draw", hint="see why the candidates failed")
    figure = figures.Figure(figsize=(WIDTH / INCH, (HEIGHT + LEGEND) / INCH), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT + LEGEND, 0))
    axes.axis("off")
    found = lay_out(points, display_names(documents), choice)
    _draw_frame(axes, found, points)
    for mark in found.marks:
        _draw_mark(axes, mark)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": "vitedge"})
    write_file(path, data.getvalue())


def _draw_frame(axes: Any, found: Layout, points: Sequence[Point]) -> None:
    """Grid, ticks, titles, frontiers, limits, and the legend where there are several groups."""
    title, unit = TITLES[points[0].measure]
    for at, text in found.x_ticks:
        axes.plot([at, at], [FRAME.top, FRAME.bottom], color=GRID, linewidth=0.8, zorder=0)
        axes.text(at, FRAME.bottom + 14, text, color=SOFT, fontsize=SIZE, ha="center", va="center")
    for at, text in found.y_ticks:
        axes.plot([FRAME.left, FRAME.right], [at, at], color=GRID, linewidth=0.8, zorder=0)
        axes.text(FRAME.left - 9, at, text, color=SOFT, fontsize=SIZE, ha="right", va="center")
    axes.text(FRAME.left, 11, f"{title}, {unit}", fontsize=SIZE + 1, weight="bold", va="center")
    axes.text(
        FRAME.right,
        HEIGHT - 12,
        f"median latency of {batch_text(points[0].timed.batch)}, ms",
        color=SOFT,
        fontsize=SIZE,
        ha="right",
        va="center",
    )
    for corners, group in found.fronts:
        wide = {"color": GRID, "linewidth": 5, "zorder": 0} if group == ALL else {"color": LINE, "linewidth": 1, "zorder": 1}
        axes.plot(*zip(*corners, strict=True), **wide)
    for limit in found.limits:
        ends = ([limit.at] * 2, [FRAME.top, FRAME.bottom]) if limit.upright else ([FRAME.left, FRAME.right], [limit.at] * 2)
        axes.plot(*ends, color=BAD, linestyle="--", linewidth=1)
        x, y, anchor = limit_text(limit)
        axes.text(x, y, limit.text, color=BAD, fontsize=SIZE, ha=SIDES[anchor], va="center")
    groups = groups_of(points)
    step = (FRAME.right - FRAME.left) / len(groups)
    for place, name in enumerate(groups if len(groups) > 1 else []):
        x, y = FRAME.left + place * step, HEIGHT + LEGEND / 2 - 4
        axes.scatter([x + 6], [y], marker=SHAPES[place % 4], color=COLOURS[place % len(COLOURS)], s=28)
        axes.text(x + 16, y, _plain(name, int(step / 6)), fontsize=SIZE, va="center")


def _draw_mark(axes: Any, mark: Mark) -> None:
    """Bars, ring, point and label."""
    colour = COLOURS[mark.group % len(COLOURS)]
    axes.plot(mark.across, [mark.y] * 2, color=colour, alpha=0.3, linewidth=1.6)
    axes.plot([mark.x] * 2, mark.along, color=colour, alpha=0.3, linewidth=1.6)
    faces = {"on": colour, "off": "white", "maybe": _pale(colour)}
    if mark.chosen:
        axes.scatter([mark.x], [mark.y], s=190, facecolors="none", edgecolors=colour, linewidths=1.2, zorder=3)
    axes.scatter([mark.x], [mark.y], s=46, marker=SHAPES[mark.group % 4], color=faces[mark.state], edgecolors=colour, zorder=4)
    label = mark.label
    if label is None:
        return
    if label.leader:
        axes.plot([mark.x, label.leader[0]], [mark.y, label.leader[1]], color=LINE, linewidth=0.7, zorder=2)
    for row, text in enumerate(label.texts):
        weight = "bold" if row == 0 and (mark.chosen or mark.point.frontier) else "normal"
        axes.text(
            label.x, label.y + row * label.step * 0.8, _plain(text, 40), color=colour if row == 0 else "#12151c",
            fontsize=SIZE, weight=weight, ha=SIDES[label.anchor], va="center", zorder=5,
        )  # fmt: skip


def _plain(text: str, most: int) -> str:
    """Text that Matplotlib does not take for mathematics."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def _pale(colour: str) -> str:
    """Halfway from a colour to white."""
    return "#" + "".join(f"{(int(colour[at : at + 2], 16) + 255) // 2:02x}" for at in (1, 3, 5))
