"""The command `vitedge tune`: a model and some minutes in, the engine to ship out, with all that it was held against."""

from __future__ import annotations

import shlex
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vitedge.errors import VitEdgeError
from vitedge.options import Checkpoint, Images, Json, Labels, Model, Preparation, require_other
from vitedge.terminal import Terminal, err, out, print_notes
from vitedge.workspace import find_root, known_recipes, known_targets, short_path


def complete_recipe(typed: str) -> list[str]:
    """For the shell: the recipes of the workspace."""
    return [name for name in known_recipes() if name.startswith(typed)]


def complete_target(typed: str) -> list[str]:
    """For the shell: the targets of the workspace."""
    return [name for name in known_targets() if name.startswith(typed)]


def tune(
    model: Model,
    images: Images,
    labels: Labels = None,
    judge: Annotated[
        Path | None, typer.Option(help="Images to measure accuracy on, if not those of --images; --labels is then of these.")
    ] = None,
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
    target: Annotated[
        str, typer.Option(help="A target: cpu, engines/targets/NAME.toml, or a .toml file.", autocompletion=complete_target)
    ] = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="A backend in place of the target's own: openvino, onnxruntime, tensorrt, tensorrt-rtx.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="The HTML report. \\[default: engines/MODEL/tune.html]")] = None,
    json_file: Json = None,
) -> None:
    """Build a model in many ways, search the frontier of latency and accuracy, and choose the engine to ship."""
    from vitedge.bench.document import save_document
    from vitedge.bench.frontier import choose
    from vitedge.bench.report import write_outputs
    from vitedge.bench.tables import terminal as table
    from vitedge.pipeline import ModelSource
    from vitedge.tune import TuneJob, check_minutes
    from vitedge.tune import tune as search

    check_minutes(minutes)
    require_other(report, json_file, of=[images, judge, checkpoint, preprocess])
    source = ModelSource(model, checkpoint, preprocess)
    job = TuneJob(
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
        found = search(job, terminal)
    documents = [found.document]
    try:
        choice, none_fits = choose(documents, budget_ms=budget_ms, max_drop=max_drop), None
    except VitEdgeError as error:  # said last: all that was measured is worth seeing
        choice, none_fits = None, error
    out.print(table(documents, choice, out.width))
    print_notes(found.document.notes)
    page = report or found.folder / "tune.html"
    write_outputs(documents, report=page, choice=choice)
    if json_file:
        save_document(found.document, json_file)
    if none_fits:
        raise none_fits
    assert choice is not None
    engine = short_path(found.engines[choice.candidate.name])
    out.print(f"engine: {engine}", markup=False, soft_wrap=True)
    out.print(f"report: {short_path(page)}", markup=False, soft_wrap=True)
    err.print(f"[dim]next:   vitedge run {escape(shlex.quote(engine))} --source {escape(shlex.quote(str(judge or images)))}[/]")
