"""Explanations of engines in, something to read out: terminal tables and the sentences between them.

    [Explanation]               ->  by part, by layer, findings
    [Explanation, Explanation]  ->  side by side by part and by block, verdict, findings of the second

Every table of milliseconds adds up to a call of the engine. Knows nothing of engines: it prints what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from vitedge.backends.layers import Layer
from vitedge.bench.explain import BETWEEN, Difference, Explanation, by_part, compare, precisions, title, verdict

SHOWN = 20  # of the costliest layers
WIDTH = 34  # columns for the name of a layer


def tables(found: Sequence[Explanation], every: bool) -> Iterator[Table | str]:
    """What to print of one engine, or of two; `every`: all layers of the one, every block of the two."""
    if len(found) == 1:
        yield _heading(found[0])
        yield part_table(found[0])
        yield ""
        yield layer_table(found[0], len(found[0].layers) if every else SHOWN)
        yield ""
        yield from _sentences(found[0])
        return
    first, second = found
    yield from map(_heading, found)
    yield difference_table(first, second, compare(first, second, lambda entry: entry.part), "part")
    yield ""
    yield difference_table(first, second, compare(first, second, lambda entry: entry.block), "block")
    if every:
        yield ""
        both = compare(first, second, lambda entry: " ".join(dict.fromkeys((entry.block, entry.part))))
        yield difference_table(first, second, both, "part of a block")
    yield ""
    yield verdict(first, second)
    yield ""
    yield f"{second.variant}:"
    yield from _sentences(second)


def part_table(found: Explanation) -> Table:
    """What each part of the model takes, over all blocks."""
    table = _table(("part", "layers", "precision", "ms", "%"), ("part", "precision"))
    for part, layers in by_part(found).items():
        _add_row(table, part, str(len(layers)), precisions(layers), *_cost(found, sum(layer.ms for layer in layers)))
    _add_ends(table, found, 2)
    return table


def layer_table(found: Explanation, most: int) -> Table:
    """The `most` costliest layers, the costliest first, and all others in one row; `#` is the place in the order they run."""
    table = _table(("layer", "#", "part", "precision", "type", "ms", "%"), ("layer", "part", "precision", "type"))
    ranked = sorted(enumerate(found.layers, 1), key=lambda pair: -pair[1].layer.ms)
    for place, entry in ranked[:most]:
        layer = entry.layer
        about = (str(place), entry.part, layer.precision, layer.type)
        _add_row(table, _shortened(layer), *about, *_cost(found, layer.ms))
    rest = [entry.layer for _, entry in ranked[most:]]
    if rest:
        total = sum(layer.ms for layer in rest)
        _add_row(table, f"{len(rest)} more", "", "", precisions(rest), "", *_cost(found, total))
    _add_ends(table, found, 4)
    return table


def difference_table(first: Explanation, second: Explanation, rows: Iterable[Difference], head: str) -> Table:
    """Two engines side by side, what the second gains most first."""
    names = (first.variant, second.variant) if first.variant != second.variant else ("first", "second")
    heads = (head, f"{names[0]} ms", f"{names[1]} ms", "saved ms", "ratio", names[0], names[1])
    table = _table(heads, (head, *names))
    for row in rows:
        _add_row(table, row.part, *_compared(row), row.first_precision, row.second_precision)
    whole = Difference("a call", first.profiled_ms, second.profiled_ms, "", "")
    table.add_section()
    _add_row(table, whole.part, *_compared(whole), "", "", style="bold")
    return table


def _heading(found: Explanation) -> str:
    return (
        f"{found.name}, {found.backend} on {found.device}, floats in {found.float_type}, batch {found.batch}: "
        f"{found.profiled_ms:.3g} ms with a profiler watching {found.calls} calls, {found.plain_ms:.3g} ms without"
    )


def _sentences(found: Explanation) -> Iterator[str]:
    for sentence in found.findings:
        yield f"* {sentence}"


def _table(heads: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=head not in left)
    return table


def _add_row(table: Table, *cells: str, style: str = "") -> None:
    """A row whose names are cut where a terminal is narrow, and whose numbers are whole."""
    row = zip(table.columns, cells, strict=True)
    table.add_row(*(cell if c.no_wrap else Text(cell, no_wrap=True, overflow="ellipsis") for c, cell in row), style=style)


def _add_ends(table: Table, found: Explanation, blank: int) -> None:
    """The rows that make a table add up, with so many columns left blank: between the layers, and the whole call."""
    _add_row(table, BETWEEN, *[""] * blank, *_cost(found, found.between_ms))
    table.add_section()
    _add_row(table, "a call", *[""] * blank, *_cost(found, found.profiled_ms), style="bold")


def _cost(found: Explanation, ms: float) -> tuple[str, str]:
    return f"{ms:.3f}", f"{found.share(ms):.1f}"


def _compared(row: Difference) -> tuple[str, str, str, str]:
    ratio = "–" if row.ratio is None or row.first_ms <= 0 else f"{row.ratio:.2f}"
    return f"{row.first_ms:.3f}", f"{row.second_ms:.3f}", f"{row.saved_ms:+.3f}", ratio


def _shortened(layer: Layer) -> str:
    """The end of a long name tells layers apart, so that its beginning goes."""
    name = title(layer)
    return name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}"
