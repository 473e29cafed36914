"""Documents in, files to read out: one self-contained HTML page, Markdown, CSV, a picture of the frontier.

    [Document, ...]  ->  write_outputs  ->  report.html, report.md, report.csv, frontier.png
    Document         ->  headline       ->  one sentence on what the choice won and lost

The page stays under 1 MB: of many candidates the layers and pictures of those that matter are kept (see sections.py). Knows
nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from vitedge.bench import sections, tables
from vitedge.bench.choice import Choice, choose, is_choice, usual_choice
from vitedge.bench.document import Candidate, Document, Judged, Timed
from vitedge.bench.frontier import Point, common_batch, drop_of, locate, machine_names
from vitedge.bench.layout import accuracy_text
from vitedge.bench.lines import display_names, lines
from vitedge.bench.page import page
from vitedge.bench.plot import three
from vitedge.bench.scatter import scatter
from vitedge.bench.tables import csv_text
from vitedge.errors import VitEdgeError
from vitedge.workspace import write_file


def write_outputs(
    documents: Sequence[Document],
    *,
    report: Path | None = None,
    markdown: Path | None = None,
    csv: Path | None = None,
    png: Path | None = None,
    choice: Choice | None = None,
) -> list[Path]:
    """Write what is asked for, and return the paths.

    choice: see `choose`; by default the one without limits. Raises VitEdgeError where a file cannot be written, or Matplotlib,
    which draws the PNG, is not installed: once all others are written.
    """
    choice = choice or usual_choice(documents)
    texts = ((report, html), (markdown, tables.markdown), (csv, csv_text))
    failed: list[VitEdgeError] = []
    for path, made in texts:
        if path:
            try:
                write_file(path, made(documents, choice))
            except VitEdgeError as error:
                failed.append(error)
    if png:
        from vitedge.bench.picture import write_png

        write_png(png, documents, choice)
    if failed:
        raise failed[0]
    return [path for path in (report, markdown, csv, png) if path]


def headline(document: Document, choice: Choice) -> str:
    """One sentence on what the choice won and lost against the reference."""
    return " ".join(filter(None, _clauses(document, choice)))


def beaten(document: Document) -> list[str]:
    """A note on each timing that is faster than its bound: no engine is, so the bound is wrong."""
    return [
        f"{one.name} at batch {timed.batch} is faster than its bound, so the peaks that the bound is made of are too low: they "
        "were measured on a busy machine, or the target gives them wrongly"
        for one in document.finished
        for timed in one.timings
        if timed.bound_ms and timed.p50_ms < timed.bound_ms
    ]


def mismatches(documents: Sequence[Document]) -> list[str]:
    """What makes several documents hard to compare, a sentence each."""
    found = []
    models = {one.model for document in documents for one in document.candidates}
    references = {document.reference for document in documents}
    if len(models) > 1:
        found.append(
            f"these benchmarks are of different models, {', '.join(sorted(models))}: their accuracies are of different tasks"
        )
    if len({document.images_key for document in documents}) > 1:
        named = sorted({document.dataset or "no images" for document in documents})
        found.append(f"they were not judged on the same images ({', '.join(named)}): small differences of accuracy mean nothing")
    if len(references) > 1:
        found.append(f"they have different references, {', '.join(sorted(references))}: drops and speed-ups are against these")
    return found if len(documents) > 1 else []


def html(documents: Sequence[Document], choice: Choice | None = None) -> str:
    """The page: headline, frontier, tables, distributions, layers, mistakes, notes, machines."""
    points = locate(documents)
    shown = lines(documents, choice)
    batch = common_batch(documents) if points else 0
    narrow = [line for line in shown if line.timed.batch == batch]
    notes = [*mismatches(documents), *(note for document in documents for note in beaten(document))]
    parts = [
        _hero(documents, points, choice),
        sections.measurements(shown, narrow, documents),
        sections.speeds(shown, narrow),
        sections.layers(shown),
        sections.mistakes(shown),
        sections.remarks(documents, notes),
        sections.machines(documents),
    ]
    first = documents[0].environment
    about = " · ".join(first[key] for key in ("machine", "date") if key in first)
    about = about if len(documents) == 1 else f"{len(documents)} benchmarks"
    return page(f"vitedge: {', '.join(_models(documents))}", about, "".join(parts))


def _models(documents: Sequence[Document]) -> list[str]:
    return list(dict.fromkeys(one.model for document in documents for one in document.candidates))


def _hero(documents: Sequence[Document], points: Sequence[Point], choice: Choice | None) -> str:
    """What to ship and what it costs, the frontier, and the figures of the choice, or of the choice of each machine."""
    about = [*_models(documents), *dict.fromkeys(document.dataset for document in documents if document.dataset)]
    eyebrow = f'<p class="eyebrow">{escape(" · ".join(about))}</p>'
    if choice is None or not points:
        return f"<section>{eyebrow}<h1>Nothing was timed to its end.</h1></section>"
    plot = f'<figure class="card plot">{scatter(points, display_names(documents), choice)}</figure>'
    why = f'<p class="why">{escape(choice.why)}</p>'
    if len(documents) == 1:
        speed, loss = map(escape, _clauses(documents[0], choice))
        head = f'<h1>{speed} <span class="soft">{loss}</span></h1>'
        tiles = f'<div class="tiles">{_tiles(documents[0], choice)}</div>'
        return f'<section>{eyebrow}{head}{why}<div class="columns">{plot}{tiles}</div></section>'
    chosen = [_choice_of(document, choice) for document in documents]
    head = f"<h1>{escape(_together(chosen, documents))}</h1>"
    cards = f'<div class="tiles ship">{_cards(documents, chosen)}</div>'
    return f'<section>{eyebrow}{head}{why}<div class="columns">{plot}{cards}</div></section>'


def _clauses(document: Document, choice: Choice) -> tuple[str, str]:
    """The headline's two halves: speed, then accuracy ("" where nothing is known)."""
    best, reference = choice.candidate, document.candidate(document.reference)
    names = display_names([document])
    if best.name == reference.name:
        return _alone(names[best.name], best, choice.timed, len(document.finished) == 1)
    speed = f"{names[best.name]} {_speed(choice.timed, reference)} {names[reference.name]}"
    loss = _loss(document, best)
    return (speed, f"and {loss}.") if loss else (speed + ".", "")


def _alone(name: str, best: Candidate, timed: Timed, only: bool) -> tuple[str, str]:
    """Of a reference that is the choice itself."""
    judged = best.judged or Judged(0)
    known = "" if judged.top1 is None else f"and gets {judged.top1:.2f}% of {judged.labelled or judged.images:,} images right."
    what = "an image" if timed.batch == 1 else f"a batch of {timed.batch}"
    verb = "takes" if only else "is the one to ship: it takes"
    return f"{name} {verb} {timed.p50_ms:.2f} ms for {what}{'' if known else '.'}", known


def _speed(timed: Timed, reference: Candidate) -> str:
    """How a candidate's speed compares, with a place left for the reference's name."""
    base = next((one for one in reference.timings if one.conditions == timed.conditions), None)
    base = base or next((one for one in reference.timings if one.batch == timed.batch), None)
    ratio = timed.speedup or (base.p50_ms / timed.p50_ms if base and timed.p50_ms else 1.0)
    between = timed.speedup_interval
    if abs(ratio - 1) < 0.005:
        return "is as fast as"
    if between and between.low <= 1 <= between.high:
        return "cannot be told apart in speed from"
    return f"is {ratio:.2f}× as fast as" if ratio > 1 else f"takes {1 / ratio:.2f}× as long as"


def _loss(document: Document, best: Candidate) -> str:
    judged = best.judged or Judged(0)
    drop = drop_of(document, best)
    if judged.top1 is not None and drop is not None:
        if abs(drop) < 0.005:
            return f"keeps its top-1 of {judged.top1:.2f}%"
        between = judged.drop_interval
        noise = f", within the noise of {judged.labelled:,} images" if between and between.low <= 0 <= between.high else ""
        return f"{'loses' if drop > 0 else 'gains'} {abs(drop):.2f} points of top-1{noise}"
    if judged.agreement is not None:
        return f"agrees with it on {judged.agreement:.2f}% of {judged.images:,} images"
    return "" if judged.sqnr_db is None else f"matches its output to {judged.sqnr_db:.1f} dB"


def _tiles(document: Document, choice: Choice) -> str:
    """The choice's figures, each with the reference's below."""
    best, reference, timed = choice.candidate, document.candidate(document.reference), choice.timed
    base = next((one for one in reference.timings if one.conditions == timed.conditions), None)
    point = next(p for p in locate([document], timed.batch) if is_choice(choice, p.candidate, p.timed))
    other = next((p for p in locate([document], timed.batch) if p.candidate.name == reference.name), None)
    figures: list[tuple[str, str, str, str]] = [
        ("Latency, median", f"{timed.p50_ms:.2f}", "ms", f"{base.p50_ms:.2f} ms" if base else ""),
        ("Throughput", three(timed.images_per_s), "images/s",
         three(base.images_per_s) if base else ""),
        ("Size on disk", f"{best.size_mib:.1f}", "MiB", f"{reference.size_mib:.1f} MiB" if reference.size_mib else ""),
    ]  # fmt: skip
    if point.measure != "none":
        value, _, unit = accuracy_text(point).replace("%", " %").partition(" ")
        titles = {"top1": "Top-1 accuracy", "agreement": "Agreement", "sqnr_db": "SQNR"}
        figures.append((titles[point.measure], value, unit, accuracy_text(other) if other else ""))
    if timed.energy_mj is not None:
        figures.append(
            ("Energy", three(timed.energy_mj), "mJ/image", f"{three(base.energy_mj)} mJ" if base and base.energy_mj else "")
        )
    below = display_names([document])[reference.name]
    return "".join(_tile(title, value, unit, f"{below}: {old}" if old and best is not reference else "")
                   for title, value, unit, old in figures)  # fmt: skip


def _tile(title: str, value: str, unit: str, below: str) -> str:
    return (
        f'<div class="card tile"><p>{escape(title)}</p><p class="big">{escape(value)}<small>{escape(unit)}</small></p>'
        f'<p class="soft">{escape(below)}</p></div>'
    )


def _choice_of(document: Document, choice: Choice) -> Choice | str:
    """The choice of one machine by the same limits, or why there is none."""
    try:
        return choose([document], budget_ms=choice.budget_ms, max_drop=choice.max_drop, batch=choice.timed.batch)
    except VitEdgeError as error:
        return str(error)


def _together(chosen: Sequence[Choice | str], documents: Sequence[Document]) -> str:
    names = display_names(documents)
    found = list(dict.fromkeys(names[one.candidate.name] for one in chosen if isinstance(one, Choice)))
    if len(found) == 1 and all(isinstance(one, Choice) for one in chosen):
        return f"{found[0]} is the one to ship on {'both' if len(chosen) == 2 else f'all {len(chosen)}'} machines."
    return "Which one to ship differs from machine to machine."


def _cards(documents: Sequence[Document], chosen: Sequence[Choice | str]) -> str:
    """What to ship on each machine."""
    names, cards = display_names(documents), []
    for document, machine, one in zip(documents, machine_names(documents), chosen, strict=True):
        if isinstance(one, str):
            cards.append(_tile(machine, "none", "", one))
            continue
        speedup = "" if one.timed.speedup is None else f", {one.timed.speedup:.2f}× {names[document.reference]}"
        top1 = one.candidate.judged and one.candidate.judged.top1
        right = "" if top1 is None else f", top-1 {top1:.2f}%"
        cards.append(_tile(machine, names[one.candidate.name], "", f"{one.timed.p50_ms:.2f} ms{speedup}{right}"))
    return "".join(cards)
