"""The points of a frontier in, accuracy against latency out as a PNG, for where HTML is not shown. Needs Matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitedge.bench.document import Document
from vitedge.bench.frontier import Choice, locate
from vitedge.bench.scatter import LABELLED, TITLES, WIDE, group_of, groups_of, heights_of
from vitedge.bench.tables import display_names
from vitedge.errors import VitEdgeError, import_package
from vitedge.workspace import write_file

COLOURS = ("#2563eb", "#d9690a", "#0a8a5f", "#9333ea", "#db2777")
SHAPES = "os^D"


def write_png(path: Path, documents: Sequence[Document], choice: Choice | None = None) -> None:
    """Write the frontier as a picture of 1600 x 1000 pixels. Raises MissingPackageError without Matplotlib."""
    figures = import_package("matplotlib.figure", "report", "matplotlib")
    points = locate(documents)
    if not points:
        raise VitEdgeError("nothing was timed to its end, so there is no frontier to draw", hint="see why the candidates failed")
    figure = figures.Figure(figsize=(8, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, documents, choice)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": "vitedge"})
    write_file(path, data.getvalue())


def _draw(axes: Any, documents: Sequence[Document], choice: Choice | None) -> None:
    points, names = locate(documents), display_names(documents)
    values, spreads = heights_of(points)
    for document in documents:
        row = [(p.timed.p50_ms, v) for p, v in zip(points, values, strict=True) if p.document is document and p.frontier]
        axes.step(*zip(*sorted(row), strict=True), where="post", color="#94a3b8", linewidth=1, zorder=1)
    for point, value, spread in zip(points, values, spreads, strict=True):
        group = group_of(point, points)
        colour, p50 = COLOURS[group % len(COLOURS)], point.timed.p50
        x = point.timed.p50_ms
        axes.hlines(value, p50.low, p50.high, color=colour, alpha=0.35, linewidth=2)
        axes.vlines(x, spread.low, spread.high, color=colour, alpha=0.35, linewidth=2)
        face = colour if point.frontier else "white"
        chosen = choice is not None and point.timed is choice.timed and point.candidate.name == choice.candidate.name
        axes.scatter([x], [value], s=90 if chosen else 45, marker=SHAPES[group % 4], color=face, edgecolors=colour, zorder=3)
        if len(points) <= LABELLED or point.frontier or chosen:
            label = names[point.candidate.name].replace("$", r"\$")
            weight = "bold" if chosen else "normal"
            axes.annotate(label, (x, value), (7, 5), textcoords="offset points", fontsize=8, color=colour, weight=weight)
    _frame(axes, documents, choice)


def _frame(axes: Any, documents: Sequence[Document], choice: Choice | None) -> None:
    """Axes, limits, legend."""
    points = locate(documents)
    title, unit = TITLES[points[0].measure]
    batch = "one image" if points[0].timed.batch == 1 else f"a batch of {points[0].timed.batch}"
    axes.set_xlabel(f"median latency of {batch}, ms")
    axes.set_ylabel(f"{title}, {unit}")
    if points[-1].timed.p50_ms > WIDE * points[0].timed.p50_ms > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.12, y=0.12)
    if choice and choice.budget_ms is not None:
        axes.axvline(choice.budget_ms, color="#c02626", linestyle="--", linewidth=1)
    groups = groups_of(points)
    for place, name in enumerate(groups if len(groups) > 1 else []):
        label = name.replace("$", r"\$")
        axes.scatter([], [], marker=SHAPES[place % 4], color=COLOURS[place % len(COLOURS)], label=label)
    if len(groups) > 1:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.grid(color="#e7eaef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
