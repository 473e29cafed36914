"""The command `vitedge report`: benchmarks of one machine or several, from their JSON, as one page and one frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitedge.options import require_other
from vitedge.terminal import out, print_notes, print_written

Documents = Annotated[
    list[Path],
    typer.Argument(
        metavar="JSON...", help="What `vitedge bench --json` or `vitedge tune` wrote, one a machine.", show_default=False
    ),
]


def report(
    files: Documents,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option("--md", help="Also write the table and the choice as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write every figure, a line a timing.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Also draw the frontier as a picture, with Matplotlib.")] = None,
    budget_ms: Annotated[
        float | None, typer.Option("--budget-ms", help="Ship the most accurate one whose median is within so many milliseconds.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Ship the fastest one that loses at most so many points of accuracy.")
    ] = None,
) -> None:
    """Merge benchmarks of one machine or several into one frontier, and write it as a self-contained page."""
    from vitedge.bench.choice import choose, usual_choice
    from vitedge.bench.document import load_document
    from vitedge.bench.report import mismatches, write_outputs
    from vitedge.bench.tables import terminal

    require_other(output, markdown, csv, png, of=files)
    documents = [load_document(path) for path in files]
    limits = budget_ms is not None or max_drop is not None
    choice = choose(documents, budget_ms=budget_ms, max_drop=max_drop) if limits else usual_choice(documents)
    written = write_outputs(documents, report=output, markdown=markdown, csv=csv, png=png, choice=choice)
    out.print(terminal(documents, choice, out.width))
    print_notes(mismatches(documents))
    print_written(written, output)
