"""Bench rows in, something to read out: a terminal table, a JSON document, one self-contained HTML page.

    [BenchRow, ...]  ->  table        ->  rich.table.Table
                     ->  rows_to_json ->  plain data
                     ->  write_report ->  report.html: headline, latency-accuracy plot, table, environment

The first row of a model is the reference that its other rows are compared with. Knows nothing of engines: it prints
what was measured and measures nothing.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from vitedge.specs import BenchRow, to_dict
from vitedge.workspace import write_file

PACKAGES = ("vitedge", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-bindings", "pycuda", "numpy")
INT8_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)  # what INT8 speed hangs on, x86 and Arm

WIDTH, HEIGHT = 560, 380  # of the plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 22, 44
GLYPH, LINE = 9.2, 21.0  # a label's character and line in those units, as large as a phone shows them


@dataclass(frozen=True, slots=True)
class _Column:
    """How one value of a row is shown; `best` is set in bold, among the rows of a model and, if `per_batch`, of a batch.

    digits: behind the point; None for as many as make three digits in all.
    """

    head: str
    value: Callable[[BenchRow], str | float | None]
    digits: int | None = 0
    best: Literal["low", "high"] | None = None
    per_batch: bool = False

    def text(self, row: BenchRow) -> str:
        value = self.value(row)
        if value is None or isinstance(value, str):
            return value or "–"
        digits = max(0, 2 - math.floor(math.log10(value or 1))) if self.digits is None else self.digits
        return f"{value:,.{digits}f}"

    def is_number(self, row: BenchRow) -> bool:
        return not isinstance(self.value(row), str)

    def is_best(self, row: BenchRow, rows: Sequence[BenchRow]) -> bool:
        """Whether the row shows the best of several values that do not all look the same."""
        rivals = [r for r in rows if r.model == row.model and (r.batch == row.batch or not self.per_batch)]
        values = [value for r in rivals if isinstance(value := self.value(r), (int, float))]
        if not self.best or len({self.text(r) for r in rivals if self.value(r) is not None}) < 2:
            return False
        return self.value(row) == (min(values) if self.best == "low" else max(values))


COLUMNS = (
    _Column("variant", lambda row: row.variant),
    _Column("backend", lambda row: row.backend),
    _Column("batch", lambda row: row.batch),
    _Column("p50 ms", lambda row: row.p50_ms, 2, "low", per_batch=True),
    _Column("p99 ms", lambda row: row.p99_ms, 2, "low", per_batch=True),
    _Column("images/s", lambda row: row.images_per_s, None, "high"),
    _Column("size MiB", lambda row: row.size_mib, 1, "low"),
    _Column("top-1 %", lambda row: row.top1, 2, "high"),
    _Column("agreement %", lambda row: row.agreement, 2, "high"),
    _Column("SQNR dB", lambda row: row.sqnr_db, 1, "high"),
)
ACCURACY = {"top-1 %": "Top-1 accuracy", "agreement %": "Agreement", "SQNR dB": "SQNR"}  # the first one known is shown


def table(rows: Sequence[BenchRow]) -> Table:
    """The rows for a terminal, the best values in bold; columns in which nothing was measured are left out."""
    columns = _columns(rows)
    result = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        result.add_column(column.head, justify="right" if any(map(column.is_number, rows)) else "left")
    for row in rows:
        result.add_row(*(Text(c.text(row), "bold" if c.is_best(row, rows) else "") for c in columns))
    return result


def rows_to_json(rows: Sequence[BenchRow], environment: Mapping[str, str]) -> dict[str, Any]:
    """The rows and where they were measured as plain data, ready for `json.dumps`."""
    return {"environment": dict(environment), "rows": [to_dict(row) for row in rows]}


def environment() -> dict[str, str]:
    """Where and with what this process measures: machine, cores, system, versions, date in UTC, command line."""
    flags = _cpu_info("flags", "Features").split()
    facts = {
        "machine": _device_tree_model() or _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": str(_usable_cores()),
        "int8": " ".join(flag for flag in INT8_FLAGS if flag in flags),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).encode(errors="replace").decode(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def headline(rows: Sequence[BenchRow]) -> str:
    """One sentence on one model's rows: what its fastest candidate won and lost against the reference."""
    return " ".join(filter(None, _clauses(rows)))


def write_report(path: Path, rows: Sequence[BenchRow], details: Mapping[str, str]) -> None:
    """Write one HTML file without outside assets: a section for each model, the table, and `details` (see `environment`).

    Raises VitEdgeError where the file cannot be written.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    sections = [_section([row for row in rows if row.model == model]) for model in models]
    body = "".join(sections) + _html_table(rows) + _html_details(details)
    about = " · ".join(details[key] for key in ("machine", "date") if key in details)
    title = "vitedge: " + ", ".join(models)
    write_file(path, PAGE.format(title=escape(title), style=STYLE, about=escape(about), body=body))


def _columns(rows: Sequence[BenchRow]) -> list[_Column]:
    shown = [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]
    several = len({row.model for row in rows}) > 1
    return [_Column("model", lambda row: row.model), *shown] if several else shown


def _cpu_info(*keys: str) -> str:
    """The first value of one of `keys` in /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def _device_tree_model() -> str:
    """The name of an Arm board ("NVIDIA Jetson Orin Nano ..."), whose /proc/cpuinfo has none."""
    path = Path("/proc/device-tree/model")
    return path.read_text("utf-8", "replace").strip("\0\n ") if path.is_file() else ""


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _smallest_batch(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """The rows that tell of latency; larger batches tell of throughput."""
    return [row for row in rows if row.batch == min(r.batch for r in rows)]


def _names(rows: Sequence[BenchRow]) -> dict[BenchRow, str]:
    """What to call each row: its variant, with the backend where there are several."""
    several = len({row.backend for row in rows}) > 1
    return {row: f"{row.variant} on {row.backend}" if several else row.variant for row in rows}


def _contenders(rows: Sequence[BenchRow]) -> tuple[BenchRow, BenchRow]:
    """The reference and the fastest other row; twice the reference where it is alone."""
    reference, *others = _smallest_batch(rows)
    return reference, min(others, key=lambda row: row.p50_ms, default=reference)


def _clauses(rows: Sequence[BenchRow]) -> tuple[str, str]:
    """The headline's two halves: speed, then accuracy ("" where nothing is known)."""
    reference, best = _contenders(rows)
    names = _names([reference, best])
    if best is reference:
        known = "" if best.top1 is None else f"and gets {best.top1:.2f}% of {best.images:,} images right."
        what = "an image" if best.batch == 1 else f"a batch of {best.batch}"
        return f"{names[best]} takes {best.p50_ms:.2f} ms for {what}{'' if known else '.'}", known
    loss = _loss(reference, best)
    speed = f"{names[best]} {_speed(reference.p50_ms / best.p50_ms)} {names[reference]}"
    return (speed, f"and {loss}.") if loss else (speed + ".", "")


def _speed(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "is as fast as"
    return f"is {ratio:.2f}× as fast as" if ratio > 1 else f"takes {1 / ratio:.2f}× as long as"


def _loss(reference: BenchRow, best: BenchRow) -> str:
    if best.top1 is not None and reference.top1 is not None:
        drop = reference.top1 - best.top1
        if abs(drop) < 0.005:
            return f"keeps its top-1 of {best.top1:.2f}%"
        return f"{'loses' if drop > 0 else 'gains'} {abs(drop):.2f} points of top-1"
    if best.agreement is not None:
        return f"agrees with it on {best.agreement:.2f}% of {best.images:,} images"
    return "" if best.sqnr_db is None else f"matches its output to {best.sqnr_db:.1f} dB"


def _section(rows: Sequence[BenchRow]) -> str:
    """Headline, figures and plot of one model."""
    speed, loss = map(escape, _clauses(rows))
    return (
        f'<section><p class="eyebrow">{escape(rows[0].model)}</p><h1>{speed} <span class="soft">{loss}</span></h1>'
        f'<div class="columns"><figure class="card plot">{_plot(_smallest_batch(rows))}</figure>'
        f'<div class="tiles">{_tiles(rows)}</div></div></section>'
    )


def _tiles(rows: Sequence[BenchRow]) -> str:
    """The candidate's figures, each with the reference's below."""
    reference, best = _contenders(rows)
    judged = next((head for head in ACCURACY if any(head == column.head for column in _columns([best]))), "")
    names = {"p50 ms": "Latency, median", "images/s": "Throughput", "size MiB": "Engine size", judged: ACCURACY.get(judged, "")}
    tiles = []
    for column in _columns([best]):
        if column.head not in names:
            continue
        old = "" if best is reference or column.value(reference) is None else f"{reference.variant}: {column.text(reference)}"
        below = f"against {reference.variant}" if best is not reference and not old else old
        tiles.append(
            f'<div class="card tile"><p>{names[column.head]}</p><p class="big">{escape(column.text(best))}'
            f'<small>{column.head.split()[-1]}</small></p><p class="soft">{escape(below)}</p></div>'
        )
    return "".join(tiles)


def _html_table(rows: Sequence[BenchRow]) -> str:
    columns = _columns(rows)
    side = {column.head: ' class="number"' if any(map(column.is_number, rows)) else "" for column in columns}
    head = "".join(f"<th{side[column.head]}>{escape(column.head)}</th>" for column in columns)
    lines = []
    for row in rows:
        texts = {c.head: f"<b>{escape(c.text(row))}</b>" if c.is_best(row, rows) else escape(c.text(row)) for c in columns}
        lines.append("<tr>" + "".join(f"<td{side[name]}>{text}</td>" for name, text in texts.items()) + "</tr>")
    return (
        f'<section><h2>All measurements</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _html_details(details: Mapping[str, str]) -> str:
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in details.items())
    return f'<section><h2>Environment</h2><dl class="card">{entries}</dl></section>'


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values from `low` to `high` to units from `start` to `end`; ticks at round values."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, least: float = 0, most: float = math.inf) -> list[tuple[float, str]]:
        """Position and text of each tick from `least` to `most`."""
        first = math.ceil(max(self.low, least) / self.step - 1e-9)
        last = math.floor(min(self.high, most) / self.step + 1e-9)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(self.at(i * self.step), f"{i * self.step:,.{digits}f}") for i in range(first, last + 1)]


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
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


FRAME = _Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def _plot(rows: Sequence[BenchRow]) -> str:
    """The rows of one model and batch as points: median latency to the right, the best known accuracy upwards."""
    scale = _scale(rows)
    rows = [row for row in rows if row in scale.heights]
    x = _axis(0, max(row.p90_ms for row in rows) * 1.12, FRAME.left, FRAME.right)
    y = _vertical_axis(list(scale.heights.values()))
    names = _names(rows)
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


def _axis(low: float, high: float, start: float, end: float) -> _Axis:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return _Axis(low, high, start, end, next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999))


def _vertical_axis(values: list[float]) -> _Axis:
    """Room around the values; two points or dB at least, so that noise does not look like a difference."""
    middle, spread = (min(values) + max(values)) / 2, max(max(values) - min(values), 2.0)
    return _axis(middle - 0.75 * spread, middle + 0.75 * spread, FRAME.bottom, FRAME.top)


def _marks(points: Sequence[_Point], x: _Axis) -> str:
    """Points, spreads and labels; a label goes where it hides nothing, or the least."""
    taken = [_Box(p.x - 8, p.y - 8, max(p.x + 8, x.at(p.row.p90_ms)), p.y + 8) for p in points]
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


def _places(point: _Point) -> list[tuple[_Box, str]]:
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
    return [(_Box(left, top, left + width, top + height), anchor) for left, top, anchor in spots]


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    """The area hidden by a label, or lost outside of the frame."""
    return sum(map(box.overlap, taken)) + 2 * (box.area - box.overlap(FRAME))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><b>vitedge</b><span>{about}</span></header>
<main>{body}</main>
</body>
</html>
"""

STYLE = """
:root { --page: #f5f6f8; --card: #fff; --ink: #12151c; --soft: #667085; --line: #e7eaef; --edge: #0f172a0d;
  --c0: #64748b; --c1: #2563eb; --c2: #e0700d; --c3: #0c9a6f; --c4: #9333ea; --c5: #db2777; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0b0d12; --card: #14181f; --ink: #eceff4; --soft: #98a2b3; --line: #262c37; --edge: #ffffff0d;
    --c0: #94a3b8; --c1: #6ea0ff; --c2: #ff9f45; --c3: #3ccf9b; --c4: #c084fc; --c5: #f472b6; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 2px 24px; padding-top: 28px; font-size: 14px;
  color: var(--soft); }
header b { color: var(--ink); letter-spacing: -.01em; }
section { margin: 56px 0; }
.eyebrow { color: var(--c1); font-weight: 600; font-size: 15px; overflow-wrap: anywhere; }
h1 { max-width: 22em; margin: 6px 0 32px; font-size: clamp(28px, 4.6vw, 46px); font-weight: 700; line-height: 1.12;
  letter-spacing: -.028em; text-wrap: balance; overflow-wrap: anywhere; }
h1 .soft { display: inline-block; }
h2 { margin: 0 0 16px; font-size: 20px; letter-spacing: -.015em; }
.soft { color: var(--soft); }
.card { background: var(--card); border-radius: 16px; box-shadow: 0 0 0 1px var(--edge), 0 8px 24px #0000000a; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) 260px; gap: 16px; }
.tiles { display: grid; gap: 16px; }
.tile { padding: 16px 22px; display: flex; flex-direction: column; justify-content: center; font-size: 14px; }
.tile .big { font-size: 30px; font-weight: 650; letter-spacing: -.03em; line-height: 1.3; }
.tile small { margin-left: 5px; font-size: 15px; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.plot { padding: 22px 24px 20px; }
.plot svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; }
figcaption { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 0 16px; font-size: 15px; }
figcaption span, .axis { color: var(--soft); font-size: 14px; }
.axis { text-align: center; text-wrap: balance; }
.plot text { font-size: 11.5px; fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.plot .name { font-weight: 650; fill: var(--colour); }
.plot .ticks text { fill: var(--soft); }
.grid path { stroke: var(--line); }
.point { fill: var(--colour); stroke: var(--card); stroke-width: 2; }
.spread { stroke: var(--colour); stroke-width: 3; stroke-linecap: round; opacity: .35; }
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); }
.c3 { --colour: var(--c3); } .c4 { --colour: var(--c4); } .c5 { --colour: var(--c5); }
.scroll { overflow-x: auto; padding: 6px 0; }
table { width: 100%; border-collapse: collapse; font-size: 15px; white-space: nowrap; }
th, td { padding: 11px 10px; text-align: left; max-width: 220px; overflow: hidden; text-overflow: ellipsis; }
th { color: var(--soft); font-weight: 500; font-size: 13.5px; }
td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 24px; }
th:last-child, td:last-child { padding-right: 24px; }
.number { text-align: right; }
b { font-weight: 700; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 18px 24px; padding: 22px 24px; }
dl div:last-child { grid-column: 1 / -1; }
dt, dd { font-size: 15px; overflow-wrap: anywhere; }
dt { color: var(--soft); font-size: 13.5px; }
@media (max-width: 760px) {
  header, main { padding-left: 16px; padding-right: 16px; }
  section { margin: 40px 0; }
  h1 { margin-bottom: 24px; }
  .columns { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: 1fr 1fr; gap: 12px; }
  .tile { padding: 14px 16px; }
  .tile .big { font-size: 25px; }
  .plot { padding: 18px 12px 16px; }
  .plot text { font-size: 17px; }
  figcaption, .axis { padding: 0 6px; }
  dl { grid-template-columns: 1fr 1fr; gap: 14px 16px; padding: 18px; }
}
@media print { .card { box-shadow: 0 0 0 1px var(--line); break-inside: avoid; } }
"""
