"""Documents in, tables out: for a terminal of any width, for Markdown, for a spreadsheet.

    [Document, ...]  ->  terminal  ->  what rich prints, as wide as there is room
                     ->  markdown  ->  a table and the choice
                     ->  csv_text  ->  every figure of every timing

What a line and a column are is lines.py's to say. Knows nothing of how anything was measured.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vitedge.bench.choice import Choice
from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed
from vitedge.bench.frontier import machine_names
from vitedge.bench.lines import LEGEND, MAYBE, ON, Column, Line, columns, failures, lines, timing_key

NAME = 28  # letters of a candidate in a terminal that is narrow


def terminal(documents: Sequence[Document], choice: Choice | None = None, width: int = 160) -> RenderableType:
    """The table for a terminal of `width` columns, what failed below it, and the choice in a sentence."""
    shown = lines(documents, choice)
    parts: list[RenderableType] = [_fitted(shown, width)] if shown else []
    if any(line.mark in (ON, MAYBE) for line in shown):
        parts.append(Text(LEGEND, "dim"))
    parts += [Text.assemble((name, "bold"), " failed: ", (reason, "red")) for name, reason in failures(documents)]
    return Group(*parts, *([Text(choice.why)] if choice else []))


def markdown(documents: Sequence[Document], choice: Choice | None = None) -> str:
    """The choice, the table, what failed, the notes and the machines, as Markdown."""
    shown = lines(documents, choice)
    heads = columns(shown)
    rows = [[column.text(line) for column in heads] for line in shown]
    parts = [_plain(choice.why)] if choice else []
    if shown:
        rule = ["---:" if column.is_number(shown) else "---" for column in heads]
        parts.append("\n".join(_markdown_row(row) for row in ([column.head for column in heads], rule, *rows)))
        parts.append(LEGEND)
    failed = [f"* {_plain(name)} failed: {_plain(reason)}" for name, reason in failures(documents)]
    notes = [f"* {_plain(note)}" for note in dict.fromkeys(note for document in documents for note in document.notes)]
    about = [f"* {_plain(_about(document))}" for document in documents]
    return "\n\n".join([*parts, *("\n".join(block) for block in (failed, notes, about) if block)]) + "\n"


def csv_text(documents: Sequence[Document], choice: Choice | None = None) -> str:
    """A line for each timing, and one for each candidate that has none, with every figure; the first line names them."""
    shown = {timing_key(line.document, line.candidate, line.timed): line for line in lines(documents, choice)}
    names = ["machine", "date", "dataset", "reference", *_flat_names(Candidate), *_flat_names(Judged), *_flat_names(Timed)]
    names += ["p50_ms", "p90_ms", "p99_ms", "max_ms", "frontier", "certain", "chosen"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(names)), lineterminator="\n")
    writer.writeheader()
    for document, machine in zip(documents, machine_names(documents), strict=True):
        start = {"machine": machine, "date": document.environment.get("date", ""), "dataset": document.dataset}
        for one in document.candidates:
            about = {**start, "reference": document.reference, **dict(_flat(one)), **dict(_flat(one.judged))}
            for timed in one.timings or (None,):
                row = {
                    **about,
                    **dict(_flat(timed)),
                    **(_ends(timed, shown.get(timing_key(document, one, timed))) if timed else {}),
                }
                writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _fitted(shown: Sequence[Line], width: int) -> Table:
    """The table with as many columns and intervals as there is room for."""
    kept = columns(shown)
    wide = {column.head for column in kept}  # those that show their interval
    for _ in range(2 * len(kept)):
        if _width(kept, wide, shown) <= width:
            break
        droppable = [(column.last, column, True) for column in kept if column.last]
        droppable += [(column.plain, column, False) for column in kept if column.plain and column.head in wide]
        if not droppable:
            break
        _, column, whole = max(droppable, key=lambda entry: entry[0])
        wide.discard(column.head)
        kept = [one for one in kept if one is not column] if whole else kept
    return _table(kept, wide, shown)


def _width(kept: Sequence[Column], wide: set[str], shown: Sequence[Line]) -> int:
    longest = [max(len(column.head), *(len(column.text(line, column.head in wide)) for line in shown)) for column in kept]
    limits = [
        min(size, NAME) if column.head in ("candidate", "machine") else size for size, column in zip(longest, kept, strict=True)
    ]
    return sum(limits) + 2 * (len(kept) - 1)


def _table(kept: Sequence[Column], wide: set[str], shown: Sequence[Line]) -> Table:
    result = Table(box=None, pad_edge=False, header_style="dim")
    for column in kept:
        number = column.is_number(shown)
        result.add_column(column.head, justify="right" if number else "left", no_wrap=number or not column.head)
    for line in shown:
        cells = []
        for column in kept:
            text = column.text(line, column.head in wide) if column.head else line.mark
            style = "bold" if column.is_best(line, shown) or (line.chosen and column.head == "candidate") else ""
            cells.append(Text(text, style, no_wrap=True, overflow="ellipsis"))
        result.add_row(*cells)
    return result


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split())) if re.search(r"[^-:]", text) else text


def _about(document: Document) -> str:
    """Where, when, on what and how a document was made, in a line."""
    known = (document.environment.get(key, "") for key in ("machine", "date", "command"))
    return ", ".join(filter(None, (*known, document.dataset)))


def _flat_names(kind: type[Any]) -> list[str]:
    """The columns that the figures of a dataclass take in a CSV: its scalars, and both ends of its intervals."""
    names = []
    for field in dataclasses.fields(kind):
        if "Interval" in str(field.type):
            names += [f"{field.name}_low", f"{field.name}_high"]
        elif not str(field.type).startswith("tuple") and field.name not in ("judged", "right"):
            names.append(field.name)
    return names


def _flat(spec: Any) -> Iterator[tuple[str, Any]]:
    if spec is None:
        return
    wanted = set(_flat_names(type(spec)))
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Interval):
            yield f"{field.name}_low", value.low
            yield f"{field.name}_high", value.high
        elif field.name in wanted:
            yield field.name, value


def _ends(timed: Timed, line: Line | None) -> dict[str, Any]:
    """What is not a field, but read off the fields."""
    point = line.point if line else None
    return {
        "p50_ms": timed.p50_ms,
        "p90_ms": timed.p90_ms,
        "p99_ms": timed.p99_ms,
        "max_ms": timed.max_ms,
        "frontier": point.frontier if point else None,
        "certain": point.certain if point else None,
        "chosen": line.chosen if line else None,
    }


def _cell(value: Any) -> Any:
    """A value for a spreadsheet; a text that it would take for a formula is quoted."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
