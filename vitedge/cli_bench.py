"""The command `vitedge bench`: engines, ONNX files and torch models side by side, what they cost and what they bring."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitedge.errors import VitEdgeError
from vitedge.options import Checkpoint, Images, Json, Labels, Preparation, Ray, require_other, some_seconds
from vitedge.terminal import ENGINE, Terminal, chosen_engine, complete_engine, out, print_notes, print_written, read_dataset
from vitedge.workspace import find_graph

if TYPE_CHECKING:
    from vitedge.bench.choice import Choice
    from vitedge.bench.document import Document
    from vitedge.bench.gate import Gate

CONTENDER = (
    f"{ENGINE}; an ONNX file or MODEL/VARIANT.onnx, on ONNX Runtime or with @openvino, @tensorrt, ... behind it on another "
    "runtime; or a torch MODEL, with @torch.compile behind it compiled. The first is the reference"
)
Contenders = Annotated[
    list[str], typer.Argument(metavar="ENGINE...", help=f"{CONTENDER}.", show_default=False, autocompletion=complete_engine)
]


def _counts(given: list[str] | None) -> list[int]:
    """Whole numbers above 0, as --batch 1,8 or --batch 1 --batch 8."""
    parts = [part.strip() for text in given or [] for part in text.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong!r} is no number above 0")
    return list(dict.fromkeys(map(int, parts)))


def _require_counts(given: list[str] | None) -> list[str] | None:
    """For Typer: what is no count is said before anything else is done."""
    _counts(given)
    return given


def _require_percent(given: str | None) -> str | None:
    """For Typer: likewise of a percentage."""
    _percent(given)
    return given


def _percent(given: str | None) -> float | None:
    """A percentage, with or without the sign."""
    if given is None:
        return None
    try:
        return float(given.strip().removesuffix("%"))
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is no percentage, such as 2%") from error


def bench(
    contenders: Contenders,
    images: Images,
    labels: Labels = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Batch sizes to time, such as 1,8. \\[default: 1]", metavar="N,...", callback=_require_counts),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of threads to time with, such as 1,2. \\[default: all]", metavar="N,...", callback=_require_counts
        ),
    ] = None,
    streams: Annotated[
        list[str] | None,
        typer.Option(help="How many calls run at a time, such as 1,2. \\[default: 1]", metavar="N,...", callback=_require_counts),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long each one is timed in each of these settings.", callback=some_seconds)
    ] = 3.0,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also count the images a second from disk to answer, with all stages overlapped.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Also find the memory that each takes, in a process of its own.")] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also find what the time of each engine goes to, as --report does.")
    ] = False,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="Choose the most accurate of those whose median is within so many milliseconds.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of top-1, or agreement, that may be lost: choose the fastest that loses no more. With --baseline: fail "
            "where one has certainly lost more. \\[default: 0.2 with --baseline]"
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Fail where something has become worse: against a JSON file of an earlier run on this machine; or against an "
            "engine, ONNX file or model, which is then measured too, as the reference.",
            metavar="FILE|ENGINE",
        ),
    ] = None,
    max_slower: Annotated[
        str | None,
        typer.Option(
            help="With --baseline: fail where a median is certainly slower by more than so many percent. \\[default: 2%]",
            metavar="PERCENT",
            callback=_require_percent,
        ),
    ] = None,
    ray: Ray = None,
    report: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")] = None,
    markdown: Annotated[Path | None, typer.Option("--md", help="Also write the table in Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write a line of CSV for each timing.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the frontier of latency and accuracy.")] = None,
    json_file: Json = None,
) -> None:
    """Measure latency, throughput and accuracy of engines, ONNX files and torch models side by side, in turns."""
    from vitedge import pipeline
    from vitedge.bench.choice import check_limits
    from vitedge.bench.plan import Plan
    from vitedge.bench.report import write_outputs

    check_limits(budget_ms, max_drop)
    gate, first = _gate(baseline, _percent(max_slower), max_drop)
    names = [_chosen(name) for name in (*first, *contenders)]
    inputs = [*map(Path, names), images, labels, checkpoint, preprocess, Path(baseline) if baseline else None]
    require_other(report, markdown, csv, png, json_file, of=inputs)
    plan = Plan(
        batches=tuple(_counts(batch) or [1]),
        threads=tuple(_counts(threads)) or (None,),
        streams=tuple(_counts(streams) or [1]),
        seconds=seconds,
        memory=memory,
        layers=layers or report is not None,
        dataset=images.resolve().name,
    )
    with closing(Terminal()) as terminal:
        files = read_dataset(images, labels)
        document = pipeline.bench_step(
            names, files, plan, terminal, checkpoint, preprocess, throughput=throughput, gate=gate, ray=ray
        )
    choice, none_fits = _choice(document, budget_ms, None if gate else max_drop)
    try:
        print_document(document, json_file, choice)
    finally:  # what was measured is written to all that takes it
        written = write_outputs([document], report=report, markdown=markdown, csv=csv, png=png, choice=choice)
    print_written(written, report)
    if gate:
        _pass(gate, document)
    if none_fits:
        raise none_fits


def _choice(document: Document, budget_ms: float | None, max_drop: float | None) -> tuple[Choice | None, VitEdgeError | None]:
    """What to ship within the limits, if any are given; or the error that nothing fits, for when all is shown."""
    from vitedge.bench.choice import choose

    try:
        limited = budget_ms is not None or max_drop is not None
        return (choose([document], budget_ms=budget_ms, max_drop=max_drop) if limited else None), None
    except VitEdgeError as error:
        return None, error


def _gate(baseline: str | None, max_slower: float | None, max_drop: float | None) -> tuple[Gate | None, list[str]]:
    """What the run is held against, and what has to be measured for it besides."""
    from vitedge.bench.document import load_document
    from vitedge.bench.gate import MAX_DROP, MAX_SLOWER, Gate

    if baseline is None:
        if max_slower is not None:
            raise VitEdgeError("--max-slower needs --baseline", hint="slower than what? Give --baseline FILE|ENGINE")
        return None, []
    limits = MAX_SLOWER if max_slower is None else max_slower, MAX_DROP if max_drop is None else max_drop
    if Path(baseline).suffix == ".json":
        return Gate(load_document(Path(baseline)), baseline, *limits), []
    return Gate(None, baseline, *limits), [baseline]


def _pass(gate: Gate, document: Document) -> None:
    """Say what was compared; a VitEdgeError where something is worse than the baseline allows."""
    verdict = gate.verdict(document)
    for note in verdict.notes:
        out.print(f"gate: {note}", markup=False, soft_wrap=True)
    if verdict.worse:
        first, *others = verdict.worse
        for sentence in others:
            out.print(f"gate: {sentence}", markup=False, soft_wrap=True)
        raise VitEdgeError(first, hint="if that is meant, make the baseline again: vitedge bench ... --json FILE")


def print_document(document: Document, json_file: Path | None, choice: Choice | None = None) -> None:
    """What was found, as a table and a sentence, and what to know about it; also as JSON.

    choice: what was chosen within limits.
    """
    from vitedge.bench.choice import usual_choice
    from vitedge.bench.document import save_document
    from vitedge.bench.report import beaten, headline
    from vitedge.bench.tables import terminal

    usual = usual_choice([document])
    out.print(terminal([document], choice or usual, out.width))
    if choice:
        out.print(f"choice: {choice.candidate.name}: {choice.why}", markup=False, soft_wrap=True)
    elif usual:
        out.print(headline(document, usual), soft_wrap=True, markup=False)
    print_notes([*beaten(document), *document.notes])
    if json_file:
        save_document(document, json_file)


def _chosen(name: str) -> str:
    """The name with the engine or file that it means in place of MODEL/VARIANT; which engine that is, is said."""
    from vitedge.bench.contenders import split_runtime
    from vitedge.bench.sides import is_engine_name

    given, runtime = split_runtime(name)
    if is_engine_name(given):
        given = str(chosen_engine(Path(given)))
    elif given.endswith(".onnx"):
        given = str(find_graph(Path(given)))
    return f"{given}@{runtime}" if runtime else given
