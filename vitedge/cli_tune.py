"""The command `vitedge tune`: a model and some minutes in, the engine to ship out, with all that it was held against."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from vitedge.errors import VitEdgeError
from vitedge.options import (
    Backend,
    Checkpoint,
    Images,
    Json,
    JudgeImages,
    Labels,
    Model,
    Preparation,
    TargetName,
    complete_recipe,
    require_other,
)
from vitedge.terminal import Terminal, out, print_next_run, print_notes
from vitedge.workspace import find_root, short_path


def tune(
    model: Model,
    images: Images,
    labels: Labels = None,
    judge: JudgeImages = None,
    minutes: Annotated[float, typer.Option(help="How long all of it may take; a second run goes on from there.")] = 10.0,
    budget_ms: Annotated[float | None, typer.Option(help="What a call may take: ship the most accurate within it.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 (or agreement) that may be lost: ship the fastest that keeps it.")
    ] = None,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A recipe to try; may be repeated. \\[default: all that suit]", autocompletion=complete_recipe),
    ] = None,
    target: TargetName = "cpu",
    backend: Backend = None,
    report: Annotated[Path | None, typer.Option(help="The HTML report. \\[default: engines/MODEL/tune.html]")] = None,
    json_file: Json = None,
) -> None:
    """Build a model in many ways, search the frontier of latency and accuracy, and choose the engine to ship."""
    from vitedge import tune as tuning
    from vitedge.bench.choice import check_limits, choose
    from vitedge.bench.document import save_document
    from vitedge.bench.report import write_outputs
    from vitedge.bench.tables import terminal as table
    from vitedge.pipeline import ModelSource

    tuning.check_minutes(minutes)
    check_limits(budget_ms, max_drop)
    require_other(report, json_file, of=[images, judge, labels, checkpoint, preprocess])
    source = ModelSource(model, checkpoint, preprocess)
    job = tuning.TuneJob(
        source,
        images,
        find_root(),
        judge,
        minutes,
        tuple(recipe or ()),
        target,
        backend,
        budget_ms=budget_ms,
        max_drop=max_drop,
        labels=labels,
    )
    with closing(Terminal()) as terminal:
        found = tuning.tune(job, terminal)
    documents = [found.document]
    try:
        choice, none_fits = choose(documents, budget_ms=budget_ms, max_drop=max_drop), None
    except VitEdgeError as error:  # said last: all that was measured is worth seeing
        choice, none_fits = None, error
    out.print(table(documents, choice, out.width))
    print_notes(found.document.notes)
    page = report or found.folder / "tune.html"
    try:
        write_outputs(documents, report=page, choice=choice)
    finally:  # what was measured is written to all that takes it
        if json_file:
            save_document(found.document, json_file)
    if none_fits:
        raise none_fits
    assert choice is not None
    engine = found.engines[choice.candidate.name]
    out.print(f"engine: {short_path(engine)}", markup=False, soft_wrap=True)
    out.print(f"report: {short_path(page)}", markup=False, soft_wrap=True)
    print_next_run(engine, judge or images)
