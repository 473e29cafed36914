"""The command line: one subcommand a verb, each of which parses, calls, prints and exits.

Results go to stdout, progress and remarks to stderr. Exit status 0: done; 1: something the user can mend, said in an
`error:` and a `hint:` line; 2: the command was typed wrongly.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

import vitedge
from vitedge import cli_bench, cli_report, cli_run, cli_tune
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
    Ray,
    RecipeName,
    TargetName,
    complete_recipe,
    complete_target,
    require_other,
    some_seconds,
    some_tolerance,
)
from vitedge.specs import MAX_BATCH, to_dict
from vitedge.terminal import (
    Engine,
    Terminal,
    chosen_engine,
    complete_engine,
    err,
    out,
    print_next_run,
    print_notes,
    read_dataset,
)
from vitedge.workspace import (
    find_graph,
    find_root,
    init_workspace,
    load_recipe,
    load_target,
    short_path,
    write_json,
)

INTERRUPTED = 130  # the exit status that Typer makes of Ctrl-C
ENDS = {  # what it says of a command; "" of all that write nothing, or all at once at their end
    "": "interrupted; nothing was written",
    "run": "interrupted",
    "init": "interrupted",
    **dict.fromkeys(
        ("make", "sensitivity", "tune"), "interrupted; what was finished is kept, and the next run goes on from there"
    ),
}
UNREADABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
LONG = 200  # letters of a path, more of which are not shown

if TYPE_CHECKING:
    from vitedge.bench.verify import Verification
    from vitedge.pipeline import Result

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Trained PyTorch Vision Transformers as INT8 engines on edge devices, with the cost and the gain measured.",
    epilog="Start with [bold]vitedge doctor[/], then [bold]vitedge make MODEL --images DIR[/].",
)
SIDE = "A MODEL as `vitedge export` takes it, an ONNX file, MODEL/VARIANT.onnx, an engine directory or MODEL/VARIANT"
Tolerance = Annotated[
    float, typer.Option(help="How far ONNX may lie from torch, as a part of the output's range.", callback=some_tolerance)
]
MergeTokens = Annotated[
    str,
    typer.Option(metavar="R", help="Tokens that each block of a plain ViT merges, e.g. 8; 0,0,24 is 24 in every third block."),
]
Size = Annotated[int | None, typer.Option(help="Side of the square images of a plain ViT, in place of its own.", min=1)]


@app.command(
    epilog="Example: [bold]vitedge make timm:vit_small_patch16_224 --images photos --judge photos_by_class --max-drop 0.5[/]"
)
def make(
    model: Model,
    images: Images,
    labels: Labels = None,
    judge: JudgeImages = None,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A recipe to build; may be repeated. \\[default: int8]", autocompletion=complete_recipe),
    ] = None,
    target: TargetName = "cpu",
    backend: Backend = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of top-1 (or agreement) that INT8 may lose: the costliest Linears stay in float; else fail."),
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(help="The same for the output's SQNR in dB, of a model without classes.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each engine is timed.", callback=some_seconds)] = 3.0,
    tolerance: Tolerance = 1e-4,
    merge_tokens: MergeTokens = "0",
    size: Size = None,
    json_file: Json = None,
) -> None:
    """Do everything: export, calibrate, quantize, build, measure. What is fresh is skipped. For another machine: a bundle."""
    from vitedge import pipeline
    from vitedge.bound import Bound, check_bound

    require_other(json_file, of=[images, judge, checkpoint, preprocess])
    source = pipeline.ModelSource(model, checkpoint, preprocess, tolerance, _merge_counts(merge_tokens), size)
    bound = Bound(max_drop, min_sqnr)
    recipes = tuple(recipe or ["int8"])
    job = pipeline.Job(source, images, find_root(), judge, recipes, target, seconds, bound, backend, labels)
    with contextlib.closing(Terminal()) as terminal:
        result = pipeline.make(job, terminal)
    if result.report is None or result.document is None:
        _print_delivery(result, json_file)
        return
    cli_bench.print_document(result.document, json_file)
    for path in result.engines:
        out.print(f"engine: {short_path(path)}", markup=False, soft_wrap=True)
    out.print(f"report: {short_path(result.report)}", markup=False, soft_wrap=True)
    print_next_run(result.engines[-1], judge or images)
    check_bound(result.rows, bound)


@app.command(epilog="Example: [bold]vitedge export hf:facebook/dinov2-small --images photos[/]")
def export(
    model: Model,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    images: Annotated[Path | None, typer.Option(help="Real images to compare ONNX with torch on, besides random ones.")] = None,
    labels: Labels = None,
    tolerance: Tolerance = 1e-4,
    merge_tokens: MergeTokens = "0",
    size: Size = None,
) -> None:
    """Turn a PyTorch model into ONNX with int8 patches as input, and compare the two; then let it compute less, if asked to."""
    from vitedge import pipeline

    files = read_dataset(images, labels)
    with contextlib.closing(Terminal()) as terminal:
        source = pipeline.ModelSource(model, checkpoint, preprocess, tolerance, _merge_counts(merge_tokens), size)
        path = pipeline.export_step(source, files, find_root() / "engines", terminal)
    out.print(short_path(path), markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]vitedge calibrate engines/my-vit/fp32-0123456789ab.onnx --images photos -o scales.json[/]")
def calibrate(
    onnx: Annotated[Path, typer.Argument(help="A float ONNX file from `vitedge export`.", show_default=False)],
    images: Images,
    labels: Labels = None,
    recipe: RecipeName = "int8",
    ray: Ray = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the scales (JSON).")] = None,
) -> None:
    """Find the range of every activation on real images, and write it as a table of scales."""
    from vitedge import pipeline
    from vitedge.cluster import surveying

    pipeline.require_compiler()
    from vitedge.compiler import calibrate as compiler

    chosen = load_recipe(recipe)
    path = output or find_root() / "calibration" / "scales" / f"{onnx.stem}.{chosen.name}.json"
    require_other(path, of=[onnx, images])
    files = read_dataset(images, labels)
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(contextlib.closing(Terminal()))
        terminal.begin("calibrate")
        spread = stack.enter_context(surveying(ray)) if ray else None
        result = compiler.calibrate(
            onnx, files, chosen, progress=lambda done, total: terminal.progress(done / total), spread=spread
        )
        compiler.save_table(result.table, path)
        terminal.end("calibrate", f"{len(result.table.amax)} ranges from {result.table.images} images")
    print_notes(result.skipped)
    out.print(short_path(path), markup=False, soft_wrap=True)


@app.command(
    epilog="Example: [bold]vitedge quantize engines/my-vit/fp32-0123456789ab.onnx --scales scales.json --images photos[/]"
)
def quantize(
    onnx: Annotated[Path, typer.Argument(help="The float ONNX file that was calibrated.", show_default=False)],
    scales: Annotated[Path, typer.Option(help="The table of scales from `vitedge calibrate`.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="The calibration images, for a recipe that rounds weights by them, as int8 does.")
    ] = None,
    labels: Labels = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the INT8 ONNX file.")] = None,
) -> None:
    """Put explicit symmetric INT8 Q/DQ around every Linear, with the scales of a table."""
    from vitedge import pipeline

    pipeline.require_compiler()
    from vitedge.compiler.calibrate import load_table
    from vitedge.compiler.quantize import quantize as quantize_file

    table = load_table(scales)
    path = output or onnx.with_name(f"{onnx.stem}.{table.recipe.name}.onnx")
    require_other(path, of=[onnx, scales, images])
    files = read_dataset(images, labels)
    with contextlib.closing(Terminal()) as terminal:
        terminal.begin("quantize")
        count = quantize_file(onnx, table, path, files, progress=lambda done, total: terminal.progress(done / total))
        terminal.end("quantize", f"{count} Linears in INT8")
    out.print(short_path(path), markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]vitedge build int8.onnx --target cpu[/]")
def build(
    onnx: Annotated[
        Path, typer.Argument(help="A float or INT8 ONNX file made by vitedge, or MODEL/VARIANT.onnx.", show_default=False)
    ],
    target: TargetName = "cpu",
    backend: Backend = None,
    images: Annotated[
        Path | None, typer.Option(help="Real images, to convert the graph to the float type that a GPU is fastest in.")
    ] = None,
    labels: Labels = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder of engines. \\[default: engines/]")] = None,
) -> None:
    """Compile an ONNX file into an engine."""
    from vitedge import pipeline

    files = read_dataset(images, labels)
    with contextlib.closing(Terminal()) as terminal:
        folder = pipeline.build_step(
            find_graph(onnx), load_target(target, backend), output or find_root() / "engines", terminal, files
        )
    out.print(short_path(folder), markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]vitedge pack my-vit/fp32.onnx my-vit/int8.onnx --target orin-nano --images photos[/]")
def pack(
    graphs: Annotated[
        list[Path],
        typer.Argument(metavar="ONNX...", help="ONNX files made by vitedge, or MODEL/VARIANT.onnx.", show_default=False),
    ],
    target: TargetName,
    backend: Backend = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Real images: up to 64 go along to measure on, and the graphs' float type is converted with them."),
    ] = None,
    labels: Labels = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder or a .tar.gz. \\[default: bundles/MODEL-TARGET.tar.gz]")
    ] = None,
) -> None:
    """Bundle all that another machine needs to build and measure the engines with one command."""
    from vitedge import pipeline

    chosen, files = load_target(target, backend), read_dataset(images, labels)
    with contextlib.closing(Terminal()) as terminal:
        found = [find_graph(graph) for graph in graphs]
        if files:
            found = [pipeline.precision_step(graph, chosen, files, terminal) for graph in found]
        path = output or pipeline.bundle_path(find_root(), found[0], chosen)
        pipeline.pack_step(found, chosen, path, terminal, files)
    out.print(short_path(path), markup=False, soft_wrap=True)
    _print_next(path)


@app.command(epilog="Example: [bold]vitedge refit my-vit/int8 --onnx engines/my-vit/int8.fp16-0123456789ab.onnx[/]")
def refit(
    engine: Engine,
    onnx: Annotated[
        Path, typer.Option(help="The same graph with other weights: a file, or MODEL/VARIANT.onnx.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder of engines. \\[default: engines/]")] = None,
) -> None:
    """Replace the weights of a TensorRT engine, in seconds; its target must have said refit = true."""
    from vitedge.backends.build import refit_engine

    old = chosen_engine(engine)
    with contextlib.closing(Terminal()) as terminal:
        terminal.begin("refit")
        folder = refit_engine(old, find_graph(onnx), output or find_root() / "engines")
        terminal.end("refit", short_path(folder))
    out.print(short_path(folder), markup=False, soft_wrap=True)


app.command(
    epilog="Example: [bold]vitedge tune timm:vit_small_patch16_224 --images photos --judge photos_by_class --minutes 10[/]"
)(cli_tune.tune)
app.command(epilog="Example: [bold]vitedge run my-vit/int8 --source rtsp://camera/stream --web 8080[/]")(cli_run.run)


app.command(epilog="Example: [bold]vitedge bench my-vit/fp32 my-vit/int8 --images photos_by_class --batch 1 --batch 8[/]")(
    cli_bench.bench
)


app.command(epilog="Example: [bold]vitedge report laptop.json orin.json --budget-ms 5 --png frontier.png[/]")(cli_report.report)


@app.command(epilog="Example: [bold]vitedge estimate my-vit/int8.onnx --target orin-nano-super --target agx-orin[/]")
def estimate(
    onnx: Annotated[Path, typer.Argument(help="An ONNX file made by vitedge, or MODEL/VARIANT.onnx.", show_default=False)],
    target: Annotated[
        list[str], typer.Option(help="A target; may be repeated.", show_default=False, autocompletion=complete_target)
    ],
    backend: Backend = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="How many images at once.")] = 1,
    json_file: Json = None,
) -> None:
    """Say what no engine of a graph can beat on a device that need not be here, and what to expect of one."""
    from vitedge import pipeline
    from vitedge.backends.build import read_source
    from vitedge.bench import roofline

    path = find_graph(onnx)
    require_other(json_file, of=[path])
    source, work = read_source(path), pipeline.work_of(path)
    found = [roofline.estimate(source, work, load_target(name, backend), batch) for name in target]
    out.print(roofline.estimate_table(found))
    print_notes(list(dict.fromkeys(note for one in found for note in one.notes)), most=100)
    if json_file:
        write_json(json_file, {"onnx": str(onnx), "work": to_dict(work), "estimates": [to_dict(one) for one in found]})


@app.command(epilog="Example: [bold]vitedge sensitivity engines/my-vit/fp32-0123456789ab.onnx --images photos --plot x.html[/]")
def sensitivity(
    onnx: Annotated[Path, typer.Argument(help="A float ONNX file from `vitedge export`.", show_default=False)],
    images: Images,
    labels: Labels = None,
    recipe: RecipeName = "int8",
    limit: Annotated[int, typer.Option(min=1, help="How many calibration images to measure on.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a self-contained HTML file.")] = None,
    json_file: Json = None,
) -> None:
    """Find which Linears cost accuracy, and what leaving the costliest in floating point gives."""
    from vitedge import pipeline
    from vitedge.bench import costs

    require_other(plot, json_file, of=[onnx, images])
    if plot:
        costs.require_html(plot)
    files = read_dataset(images, labels)
    with contextlib.closing(Terminal()) as terminal:
        analysis = pipeline.sensitivity_step(onnx, files, load_recipe(recipe), find_root(), limit, terminal)
    out.print(costs.cost_table(analysis))
    out.print()
    out.print(costs.frontier_table(analysis))
    if json_file:
        write_json(json_file, to_dict(analysis))
    if plot:
        costs.write_page(plot, analysis)
        out.print(f"plot: {short_path(plot)}", markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]vitedge verify my-vit/int8.onnx --against my-vit/fp32.onnx --images photos[/]")
def verify(
    given: Annotated[str, typer.Argument(metavar="THIS", help=f"{SIDE}.", show_default=False, autocompletion=complete_engine)],
    against: Annotated[str, typer.Option(help="The reference: the same choice.", autocompletion=complete_engine)],
    images: Images,
    labels: Labels = None,
    limit: Annotated[int, typer.Option(min=1, help="How many images are compared, drawn evenly from the labels.")] = 32,
    checkpoint: Checkpoint = None,
    preprocess: Preparation = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Fail if the SQNR of the answers, in dB, is below this.")] = None,
    json_file: Json = None,
) -> None:
    """Compare two forms of a model, end to end and, between ONNX files, layer by layer."""
    from vitedge.bench.sides import open_sides
    from vitedge.bench.verify import check_sqnr
    from vitedge.bench.verify import verify as compare
    from vitedge.images import sample

    notes: list[str] = []
    sides = [Path(given), Path(against), find_graph(Path(given)) if given.endswith(".onnx") else None]
    require_other(json_file, of=[*sides, images, checkpoint, preprocess])
    files = sample(read_dataset(images, labels), limit, seed=0)
    with contextlib.closing(Terminal()) as terminal:
        terminal.begin("verify")
        with open_sides((given, against), checkpoint, preprocess) as (this, other):
            found = compare(this, other, files, notes=notes, progress=terminal.progress)
        terminal.end("verify", f"{found.given} against {found.reference}")
    _print_verification(found, notes, json_file)
    if min_sqnr is not None:
        check_sqnr(found, min_sqnr)


@app.command(epilog="Example: [bold]vitedge explain my-vit/fp32 my-vit/int8[/]")
def explain(
    engine: Engine,
    other: Annotated[
        Path | None,
        typer.Argument(
            help="An engine to set beside it, e.g. INT8 beside FP32.", show_default=False, autocompletion=complete_engine
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="The batch size to look at. \\[default: what it was built for]", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each engine is timed.", callback=some_seconds)] = 6.0,
    every: Annotated[bool, typer.Option("--all", help="Show every layer, or of two engines every block.")] = False,
    json_file: Json = None,
) -> None:
    """Show what an engine's time goes to, layer by layer, and what keeps INT8 from being faster."""
    from vitedge.bench import breakdown
    from vitedge.bench.environment import environment
    from vitedge.bench.explain import explain as examine

    folders = [chosen_engine(path) for path in (engine, other) if path]
    require_other(json_file, of=folders)
    with contextlib.closing(Terminal()) as terminal:
        terminal.begin("explain")
        found = examine(folders, batch, seconds, terminal.progress)
        terminal.end("explain", " and ".join(one.name for one in found))
    for shown in breakdown.tables(found, every):
        out.print(shown, soft_wrap=isinstance(shown, str), markup=False)
    if json_file:
        write_json(json_file, {"environment": environment(), "engines": [to_dict(one) for one in found]})


@app.command()
def doctor() -> None:
    """Build and run a small INT8 model with every backend, and say what to do where that fails."""
    from vitedge.bench.environment import environment
    from vitedge.doctor import examine

    for key, value in environment().items():
        out.print(f"[dim]{key:<16}[/] {escape(value)}", soft_wrap=True)
    findings = examine()
    words = {True: "[green]PASS[/]", False: "[red]FAIL[/]", None: "[yellow]none[/]"}
    for finding in findings:
        out.print(f"{words[finding.passed]}  [bold]{finding.backend:<12}[/] {escape(finding.text)}", soft_wrap=True)
        if finding.hint:
            out.print(f"      [dim]{escape(finding.hint)}[/]", soft_wrap=True)
    if not any(finding.passed for finding in findings):
        raise VitEdgeError("no backend works here", hint="pip install openvino")
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]vitedge init my-project[/]")
def init(folder: Annotated[Path, typer.Argument(help="Where to set up the workspace.")] = Path()) -> None:
    """Set up a workspace: calibration/ and engines/ with a recipe, a target and what they mean."""
    for path, written in init_workspace(folder).items():
        out.print(f"{'wrote' if written else 'kept '}  {path}", markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]vitedge models --filter deit[/]")
def models(pattern: Annotated[str, typer.Option("--filter", help="Show names that contain this.")] = "vit") -> None:
    """Show how models are named, and which names the installed packages know."""
    from vitedge.compiler.catalogue import FORMS, known_names

    table = Table("MODEL", "what it is", "needs", box=None, pad_edge=False)
    for form in FORMS:
        table.add_row(*map(escape, (form.example, form.text, form.needs)))
    out.print(table)
    for kind, names in known_names(pattern).items():
        out.print(f"\n[bold]{kind}:[/] {len(names)} names contain {pattern!r}")
        out.print(", ".join(names))


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """What comes before any command."""
    if version:
        out.print(f"vitedge {vitedge.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a VitEdgeError becomes two lines on stderr and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    try:
        app(prog_name="vitedge")
    except VitEdgeError as error:
        err.print(f"[red bold]error:[/] {escape(str(error))}", soft_wrap=True)
        if error.hint:
            err.print(f"[bold]hint:[/]  {escape(error.hint)}", soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        err.print(f"[red bold]error:[/] {escape(_sentence(error))}", soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            err.print(ENDS.get(sys.argv[1], ENDS[""]))
        raise


def _sentence(error: OSError) -> str:
    """What a file that cannot be read, or an output that takes no more, is to a user; any other error is raised again."""
    if error.errno in UNREADABLE and error.filename is not None:
        name = str(error.filename)
        return f"cannot read {name if len(name) <= LONG else f'{name[:LONG]}...'}: {error.strerror}"
    if error.errno in FULL and error.filename is None:
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:  # for what is still to be flushed
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return f"cannot write to standard output: {error.strerror}"
    raise error


def _merge_counts(given: str) -> int | tuple[int, ...]:
    """The tokens to merge: a number, or several with commas between them."""
    try:
        counts = [int(each) for each in given.split(",")]
    except ValueError as error:
        raise VitEdgeError(
            f"{given!r} is no number of tokens to merge", hint="--merge-tokens 8, or 0,0,24 for every third block"
        ) from error
    return counts[0] if len(counts) == 1 else tuple(counts)


def _print_delivery(result: Result, json_file: Path | None) -> None:
    """What was made for a machine that is not this one, where nothing could be measured."""
    unwritten = [f"so {json_file} was not written"] if json_file else []
    print_notes([*result.notes, *unwritten])
    for path in result.engines:
        out.print(f"engine: {short_path(path)}", markup=False, soft_wrap=True)
    if result.bundle:
        out.print(f"bundle: {short_path(result.bundle)}", markup=False, soft_wrap=True)
        _print_next(result.bundle)


def _print_next(bundle: Path) -> None:
    """What to do with a bundle."""
    archive = bundle.name.endswith(".tar.gz")
    name = bundle.name.removesuffix(".tar.gz")
    unpack = f"tar xzf {shlex.quote(bundle.name)} && " if archive else ""
    command = f"{unpack}sh {shlex.quote(f'{name}/build.sh')}"
    err.print(f"[dim]next:   copy it to the device, and there: {escape(command)}[/]", soft_wrap=True)


def _print_verification(found: Verification, notes: Sequence[str], json_file: Path | None, most: int = 20) -> None:
    from vitedge.bench.environment import environment
    from vitedge.bench.losses import end_to_end, layer_table

    if found.layers:
        out.print(layer_table(found.layers, most))
        more = f"; {len(found.layers) - most} more lose less" if len(found.layers) > most else ""
        err.print(f"[dim]own: of the layer alone, on the input that it gets; SQNR: of all up to it{more}[/]", soft_wrap=True)
    out.print(escape(end_to_end(found)), soft_wrap=True)
    if found.unmatched:
        count, names = len(found.unmatched), ", ".join(found.unmatched)
        have = f"of {count + len(found.layers)} Linears {'has' if count == 1 else 'have'}"
        notes = [f"{count} {have} no counterpart of the same name in both graphs: {names}", *notes]
    print_notes(notes)
    if json_file:
        write_json(json_file, {"environment": environment(), **to_dict(found)})
