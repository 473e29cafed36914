"""Bench rows in, something to read out: a terminal table, a JSON document, one self-contained HTML page.

    [BenchRow, ...]  ->  table        ->  rich.table.Table
                     ->  rows_to_json ->  plain data
                     ->  write_report ->  report.html: headline, latency-accuracy plot, table, environment
    Verification     ->  end_to_end, layer_table  ->  one line, and rich.table.Table

The first row of a model is the reference that its other rows are compared with. Knows nothing of engines: it prints
what was measured and measures nothing. "× bound" is p50 over the time that no engine of this graph can beat on this device
(see roofline.py); "files/s" is the rate from disk to answer (see throughput.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from vitedge.bench.plot import plot
from vitedge.bench.verify import LayerLoss, Verification
from vitedge.specs import BenchRow, to_dict
from vitedge.workspace import write_file


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
    _Column("files/s", lambda row: row.sustained_per_s, None, "high"),
    _Column("× bound", lambda row: row.p50_ms / row.bound_ms if row.bound_ms else None, 1),
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
        number = any(map(column.is_number, rows))
        result.add_column(column.head, justify="right" if number else "left", no_wrap=number)  # names give way where it is narrow
    for row in rows:
        result.add_row(
            *(Text(c.text(row), "bold" if c.is_best(row, rows) else "", no_wrap=True, overflow="ellipsis") for c in columns)
        )
    return result


def rows_to_json(rows: Sequence[BenchRow], details: Mapping[str, str]) -> dict[str, Any]:
    """The rows and `details` of where they were measured as plain data, ready for `json.dumps`."""
    return {"environment": dict(details), "rows": [to_dict(row) for row in rows]}


def headline(rows: Sequence[BenchRow]) -> str:
    """One sentence on one model's rows: what its fastest candidate won and lost against the reference."""
    return " ".join(filter(None, _clauses(rows)))


def beaten(rows: Sequence[BenchRow]) -> list[str]:
    """A note on each row that is faster than its bound: no engine is, so the bound is wrong."""
    return [
        f"{row.variant} at batch {row.batch} is faster than its bound, so the peaks that the bound is made of are too low: they "
        "were measured on a busy machine, or the target gives them wrongly"
        for row in rows
        if row.bound_ms and row.p50_ms < row.bound_ms
    ]


def write_report(path: Path, rows: Sequence[BenchRow], details: Mapping[str, str]) -> None:
    """Write one HTML file without outside assets: a section for each model, the table, and `details` (see environment.py).

    Raises VitEdgeError where the file cannot be written.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    sections = [_section([row for row in rows if row.model == model]) for model in models]
    body = "".join(sections) + _html_table(rows) + _html_details(details)
    about = " · ".join(details[key] for key in ("machine", "date") if key in details)
    title = "vitedge: " + ", ".join(models)
    write_file(path, PAGE.format(title=escape(title), style=STYLE, about=escape(about), body=body))


def end_to_end(found: Verification) -> str:
    """One line on how far two answers are apart."""
    worst = f" (worst: {found.worst_db:.1f} dB, {found.worst_image})" if found.worst_db is not None else ""
    parts = [
        f"SQNR {_decibels(found.sqnr_db)} dB{worst}",
        "" if found.cosine is None else f"cosine {found.cosine:.6f}",
        f"largest difference {found.largest:.3g}",
        "" if found.agreement is None else f"same top-1 for {found.agreement:.2f}%",
    ]
    return f"{found.images} image{'' if found.images == 1 else 's'}: {', '.join(filter(None, parts))}"


def layer_table(layers: Sequence[LayerLoss], most: int) -> Table:
    """The `most` layers that lose most by themselves, the worst first; `#` is their place in the flow."""
    result = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("#", "layer", "own dB", "SQNR dB"):
        result.add_column(head, justify="left" if head == "layer" else "right")
    ranked = sorted(enumerate(layers, 1), key=lambda entry: _rank(entry[1]))
    for place, layer in ranked[:most]:
        name = " + ".join((*layer.within, layer.name))
        result.add_row(str(place), Text(name), _decibels(layer.own_db), _decibels(layer.sqnr_db))
    return result


def _rank(layer: LayerLoss) -> tuple[float, float]:
    """Lower for a layer that loses more; what is not known goes last."""
    own, total = (math.inf if value is None else value for value in (layer.own_db, layer.sqnr_db))
    return own, total


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _columns(rows: Sequence[BenchRow]) -> list[_Column]:
    shown = [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]
    several = len({row.model for row in rows}) > 1
    return [_Column("model", lambda row: row.model), *shown] if several else shown


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
        noise = f", within the noise of {best.images:,} images" if abs(drop) < _noise(best) else ""
        return f"{'loses' if drop > 0 else 'gains'} {abs(drop):.2f} points of top-1{noise}"
    if best.agreement is not None:
        return f"agrees with it on {best.agreement:.2f}% of {best.images:,} images"
    return "" if best.sqnr_db is None else f"matches its output to {best.sqnr_db:.1f} dB"


def _noise(row: BenchRow) -> float:
    """Two standard errors of the difference in top-1, in points: only images with another answer than before can add to it."""
    differing = row.images if row.agreement is None else row.images * (1 - row.agreement / 100)
    return 200 * math.sqrt(differing) / max(row.images, 1)


def _section(rows: Sequence[BenchRow]) -> str:
    """Headline, figures and plot of one model."""
    speed, loss = map(escape, _clauses(rows))
    shown = _smallest_batch(rows)
    return (
        f'<section><p class="eyebrow">{escape(rows[0].model)}</p><h1>{speed} <span class="soft">{loss}</span></h1>'
        f'<div class="columns"><figure class="card plot">{plot(shown, _names(shown))}</figure>'
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
