"""The command `vitedge bench`: engines, ONNX files and torch models side by side, what they cost and what they bring."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitedge.options import Checkpoint, Images, Json, Preparation, require_other, some_seconds
from vitedge.terminal import ENGINE, Terminal, chosen_engine, complete_engine, out, print_notes
from vitedge.workspace import find_graph

if TYPE_CHECKING:
    from vitedge.bench.document import Document

CONTENDER = (
    f"{ENGINE}; an ONNX file or MODEL/VARIANT.onnx, on ONNX Runtime or with @openvino, @tensorrt, ... behind it on another "
    "runtime; or a torch MODEL, with @torch.compile behind it compiled. The first is the reference"
)
Contenders = Annotated[
    list[str], typer.Argument(metavar="ENGINE...", help=f"{CONTENDER}.", show_default=False, autocompletion=complete_engine)
]


def bench(
    contenders: Contenders,
    images: Images,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A batch size to time; may be repeated. \\[default: 1]")] = None,
    seconds: Annotated[float, typer.Option(help="How long each one is timed at each batch size.", callback=some_seconds)] = 3.0,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also count the images a second from disk to answer, with all stages overlapped.")
    ] = False,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    report: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")] = None,
    json_file: Json = None,
) -> None:
    """Measure latency, throughput and accuracy of engines, ONNX files and torch models side by side, in turns."""
    from vitedge import pipeline
    from vitedge.bench.report import write_outputs
    from vitedge.bench.run import Plan
    from vitedge.images import list_images

    names = [_chosen(name) for name in contenders]
    require_other(report, json_file, of=[*map(Path, names), images, checkpoint, preprocess])
    plan = Plan(batches=tuple(batch or [1]), seconds=seconds, dataset=images.resolve().name)
    with closing(Terminal()) as terminal:
        files = list_images(images)
        document = pipeline.bench_step(names, files, plan, terminal, checkpoint, preprocess, throughput=throughput)
    print_document(document, json_file)
    for path in write_outputs([document], report=report):
        out.print(f"report: {path}", markup=False, soft_wrap=True)


def print_document(document: Document, json_file: Path | None) -> None:
    """What was found, as a table and a sentence, and what to know about it; also as JSON."""
    from vitedge.bench.document import save_document
    from vitedge.bench.report import beaten, headline, usual_choice
    from vitedge.bench.tables import terminal

    choice = usual_choice([document])
    out.print(terminal([document], None, out.width))
    if choice:
        out.print(headline(document, choice), soft_wrap=True, markup=False)
    print_notes([*beaten(document), *document.notes])
    if json_file:
        save_document(document, json_file)


def _chosen(name: str) -> str:
    """The name with the engine or file that it means in place of MODEL/VARIANT; which engine that is, is said."""
    from vitedge.bench.contenders import is_engine_name, split_runtime

    given, runtime = split_runtime(name)
    if is_engine_name(given):
        given = str(chosen_engine(Path(given)))
    elif given.endswith(".onnx"):
        given = str(find_graph(Path(given)))
    return f"{given}@{runtime}" if runtime else given
