"""The command `vitedge run`: sources, an engine, and where the answers go.

A line an answer on stdout, or for cameras at a terminal one line for each that is kept up to date; what happened, as a table
on stderr, at the end.
"""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from vitedge.errors import VitEdgeError
from vitedge.specs import Frame, Prediction
from vitedge.terminal import Engine, chosen_engine, err, out, print_notes

if TYPE_CHECKING:
    from vitedge.runtime.camera import CameraOptions
    from vitedge.runtime.live import Stream
    from vitedge.runtime.mqtt import MqttTopic
    from vitedge.runtime.outputs import Recordings, ResultCommand
    from vitedge.runtime.tally import Tally
    from vitedge.runtime.web import WebView

    Reader = ResultCommand | MqttTopic

SHORT, SHORTER = 24, 14  # letters of a source's name in a table, and of many
WIDE = 110  # columns of a terminal that has room for the stages
UPDATES = 4  # a second, of the line at a terminal
STAGE_NAMES = {"postprocess": "answer", "latency": "all to result"}
SOURCES, OUTPUT = "Sources", "Output"  # headings of --help


class Transport(str, Enum):
    """How a stream of rtsp:// comes."""

    TCP = "tcp"
    UDP = "udp"


def complete_source(typed: str) -> list[str]:
    """For the shell: the test pattern, cameras that are there, and files."""
    known = ["synthetic", *sorted(map(str, Path("/dev").glob("video*"))), "csi://0", "rtsp://", "http://", "gst://"]
    head, slash, _ = typed.rpartition("/")
    folder = Path(head or "/") if slash else Path()
    files = [f"{head}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in sorted(folder.glob("[!.]*"))]
    return [name for name in [*known, *files] if name.startswith(typed)]


def run(
    context: typer.Context,
    engine: Engine,
    source: Annotated[
        list[str],
        typer.Option(
            help="A camera (0, /dev/video0, csi://0, rtsp://..., http://..., gst://PIPELINE), a video file, an image, a folder, "
            "or synthetic. May be repeated: all share the engine.",
            show_default=False,
            rich_help_panel=SOURCES,
            autocompletion=complete_source,
        ),
    ],
    realtime: Annotated[
        bool,
        typer.Option("--realtime", help="Files and folders: at their own pace, the newest frame only.", rich_help_panel=SOURCES),
    ] = False,
    loop: Annotated[
        bool, typer.Option("--loop", help="Files and folders: begin again at the end.", rich_help_panel=SOURCES)
    ] = False,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="The size to ask a camera for, e.g. 1280x720.", rich_help_panel=SOURCES)
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="The rate to ask a camera for; the pace of synthetic and of folders in real time.", rich_help_panel=SOURCES
        ),
    ] = None,
    pixel_format: Annotated[
        str | None,
        typer.Option(metavar="FOURCC", help="The pixel format to ask a camera for: MJPG, YUYV, ...", rich_help_panel=SOURCES),
    ] = None,
    transport: Annotated[Transport, typer.Option(help="How rtsp:// comes.", rich_help_panel=SOURCES)] = Transport.TCP,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Record annotated frames: a video (.mp4, .avi) or a folder of pictures. Of several sources out.mp4 becomes "
            "out-1.mp4, out-2.mp4, ... in the order given, a folder gets the folders 1, 2, ... %Y, %m, %d, %H, %M, %S are the "
            "time at which it begins.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="One JSON object a frame on stdout.", rich_help_panel=OUTPUT)
    ] = False,
    on_result: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="A shell command that is started once and gets each JSON object as a line on its stdin.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    mqtt: Annotated[
        str | None,
        typer.Option(
            metavar="mqtt://HOST/TOPIC", help="Publish each JSON object to a topic of an MQTT broker.", rich_help_panel=OUTPUT
        ),
    ] = None,
    web: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT", help="Show it live on a web page; port 0 is any that is free.", rich_help_panel=OUTPUT
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="VITEDGE_TOKEN",
            help="What the page asks for; needed where others than this machine reach it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to give.")] = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames of all sources together.")] = None,
    watchdog: Annotated[float | None, typer.Option(metavar="SECONDS", help="Exit 3 when no frame was seen for so long.")] = None,
) -> None:
    """Run an engine over cameras, streams, videos or images: the newest frames of what is live, every frame of files.

    Ctrl-C or SIGTERM ends it cleanly. Exit status: 0 at the end of all sources, and where a camera, which has no end, was
    stopped; 130 or 143 where something with an end was interrupted; 1 an error; 3 the watchdog.
    """
    from vitedge.runtime.camera import CameraOptions

    options = CameraOptions(
        size=_size(size), fps=fps, pixel_format=pixel_format, transport=transport.value, realtime=realtime, loop=loop
    )
    if watchdog is not None and not 0 < watchdog < math.inf:
        raise VitEdgeError(f"the watchdog waits for some seconds, not for {watchdog:g}", hint="give a number above 0")
    given = context.get_parameter_source("token")  # the variable may be there for other runs
    if token and not web and given is not None and given.name == "COMMANDLINE":
        raise VitEdgeError("--token is for the page of --web", hint="give --web 8080, or leave --token out")
    for name, value in (("--on-result", on_result), ("--mqtt", mqtt), ("--web", web)):
        if value is not None and not value.strip():
            raise VitEdgeError(f"{name} is empty", hint="is a variable not set? Else leave it out")
    wanted = Wanted(_recording(save), json_lines, on_result, mqtt, web, token, watchdog)
    raise typer.Exit(_run(chosen_engine(engine), source, options, top, limit, wanted))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where the answers go, as the options of the same names say, and what ends the run."""

    save: Path | None
    json_lines: bool
    on_result: str | None
    mqtt: str | None
    web: str | None
    token: str | None
    watchdog: float | None


def _run(folder: Path, names: Sequence[str], options: CameraOptions, top: int, limit: int | None, wanted: Wanted) -> int:
    """Open all that was asked for, hand the answers on, say what came of it; the exit status."""
    from vitedge.runtime.guard import STARVED, Guard, ended_at_once
    from vitedge.runtime.live import stream
    from vitedge.runtime.outputs import check_apart

    if wanted.save:
        check_apart(names, wanted.save)
    print_notes(_idle(names, options))
    with ExitStack() as opened:
        page = opened.enter_context(closing(_page(folder, names, wanted.web, wanted.token))) if wanted.web else None
        with ended_at_once():  # nothing is recorded yet, and what opens may hang
            live = opened.enter_context(stream(names, folder, options=options, top_k=top, limit=limit))
        screen = Screen(live, wanted.json_lines)
        guard = Guard(live, wanted.watchdog, say=screen.say, tell=page.tell if page else lambda *_: None)
        try:
            with Outputs(live, screen, page, wanted) as outputs, screen, guard:
                for frame, prediction in live:
                    guard.seen()
                    outputs.give(frame, prediction)
        except VitEdgeError:
            screen.end([], failed=True)
            raise
        screen.end(outputs.lost(), outputs.recorded, guard.signal)
    if guard.starved:
        return STARVED
    endless = limit is None and (options.loop or any(source.live and source.total is None for source in live.sources))
    return 0 if guard.signal is None or endless else 128 + guard.signal


def _idle(names: Sequence[str], options: CameraOptions) -> list[str]:
    """A sentence for each option that does nothing for any of the sources."""
    from vitedge.runtime.camera import is_live

    cameras = [name for name in names if is_live(name)]
    said = {
        "--loop": options.loop and len(cameras) == len(names),
        "--realtime": options.realtime and len(cameras) == len(names),
        "--size": options.size is not None and not cameras,
        "--pixel-format": options.pixel_format is not None and not any(name != "synthetic" for name in cameras),
        "--transport udp": options.transport == "udp" and not any(name.lower().startswith("rtsp") for name in names),
    }
    return [f"{option} does nothing for a source like this" for option, idle in said.items() if idle]


class Outputs:
    """All that wants the answers: screen, recordings, programs that read them as JSON, the page. recorded: the recordings."""

    def __init__(self, live: Stream, screen: Screen, page: WebView | None, wanted: Wanted) -> None:
        from vitedge.runtime.mqtt import MqttTopic
        from vitedge.runtime.outputs import Recordings, ResultCommand, record

        self._live, self._screen, self._page, self._record = live, screen, page, record
        self._saved: Recordings | None = None
        self._readers: dict[str, Reader] = {}
        self.recorded: list[Path] = []
        with ExitStack() as opening:
            if wanted.save:
                self._saved = opening.enter_context(Recordings(wanted.save, live.sources, live.engine.manifest.card))
                self.recorded = self._saved.paths
            if wanted.mqtt:
                self._readers["the topic"] = opening.enter_context(closing(MqttTopic(wanted.mqtt, screen.say)))
            if wanted.on_result:
                command = opening.enter_context(closing(ResultCommand(wanted.on_result, screen.say)))
                self._readers[repr(wanted.on_result)] = command
            self._opened = opening.pop_all()

    def give(self, frame: Frame, prediction: Prediction) -> None:
        """Give one answer to all of them."""
        number = self._live.number(frame)
        counts, latency_ms = self._live.counts(number), self._screen.count(number, frame, prediction)
        wanted = self._readers or self._screen.json_lines
        line = json.dumps(self._record(frame, prediction, counts, latency_ms)) if wanted else ""
        self._screen.show(frame, prediction, line)
        for reader in self._readers.values():
            reader.send(line)
        if self._page:
            self._page.publish(frame, prediction, camera=number, captured=counts.captured, dropped=counts.dropped)
        if self._saved:
            self._saved.write(number, frame, prediction)

    def lost(self) -> list[str]:
        """A sentence for each program that did not get all."""
        return [f"{reader.lost} results did not reach {name}" for name, reader in self._readers.items() if reader.lost]

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, trace)


def _page(folder: Path, names: Sequence[str], address: str, token: str | None) -> WebView:
    """The page, opened before the engine is, since a port may be taken."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise VitEdgeError(f"--web takes a port or HOST:PORT, not {address!r}", hint="such as --web 8080 or --web 0.0.0.0:8080")
    from vitedge.backends.build import read_manifest
    from vitedge.runtime.camera import without_secrets
    from vitedge.runtime.live import distinct
    from vitedge.runtime.web import WebView

    manifest = read_manifest(folder)
    cameras = distinct([without_secrets(name) for name in names])
    title = f"{manifest.card.name} {manifest.variant}"
    page = WebView(cameras, manifest.card, title=title, host=host.strip("[]") or "127.0.0.1", port=int(port), token=token)
    err.print(f"web: {page.url}", markup=False, soft_wrap=True)
    return page


class Screen:
    """What a person sees: a line an answer, or one for each camera that is kept up to date at a terminal; at the end a table."""

    def __init__(self, live: Stream, json_lines: bool) -> None:
        from vitedge.runtime.tally import Tally

        self.json_lines = json_lines
        self._live, self._tallies = live, [Tally() for _ in live.sources]
        self._begun = self._last = 0.0
        self._any_live = any(source.live for source in live.sources)
        updated = self._any_live and out.is_terminal and not json_lines
        self._status = Live(self, console=out, refresh_per_second=UPDATES, transient=True) if updated else None

    def __enter__(self) -> Screen:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def say(self, sentence: str) -> None:
        """A remark, now, from whatever thread."""
        console = out if self._status else err
        console.print(f"[yellow]note:[/] {escape(sentence)}", soft_wrap=True)

    def count(self, number: int, frame: Frame, prediction: Prediction) -> float:
        """Count an answer of source `number`; the milliseconds since its frame was captured."""
        self._last = time.perf_counter()
        self._begun = self._begun or self._last  # from the first answer on: opening the engine is not what a frame costs
        return self._tallies[number].add(frame, prediction)

    def show(self, frame: Frame, prediction: Prediction, line: str) -> None:
        """Print an answer, where it is to be printed; `line` is its JSON."""
        if self.json_lines:
            print(line, flush=True)  # at once: who reads a camera's lines wants the newest
        elif not self._status:
            name = f"{_short(frame.source)}  " if len(self._tallies) > 1 else ""
            out.print(f"{escape(name)}{_as_text(frame, prediction)}", soft_wrap=True)

    def __rich__(self) -> Table:
        """What does not fit goes in this order: the end of the answer, the stages, the end of the source's name."""
        wide = out.width >= WIDE
        columns = [
            Column(no_wrap=True, max_width=SHORT if wide else SHORTER),
            *(Column(no_wrap=True, min_width=6) for _ in range(3)),
        ]
        grid = Table.grid(*columns, Column(no_wrap=True, ratio=1), padding=(0, 2), expand=True)
        for name, source, tally in zip(self._live.names, self._live.sources, self._tallies, strict=True):
            took = tally.lately()
            shown = ("latency", "preprocess", "infer") if wide else ("latency",)
            stages = "  ".join(f"{stage} {took[stage]:.1f}" for stage in shown if stage in took)
            latest = _answer(tally.latest, 1) if tally.latest else "waits for the first frame"
            said = f"[yellow]{escape(source.state)}[/]" if source.state else f"[bold]{latest}[/]"
            grid.add_row(
                escape(_short(name, SHORT if wide else SHORTER)),
                f"{tally.rate_now:.1f} fps",
                f"[dim]{stages} ms[/]" if took else "",
                f"dropped {source.dropped}",
                said,
            )
        return grid

    def end(
        self, notes: Sequence[str], saved: Sequence[Path] = (), signal_number: int | None = None, *, failed: bool = False
    ) -> None:
        """Say what was lost, what each source came to, and where it was recorded."""
        print_notes([*self._live.notes, *notes])
        count = sum(tally.processed for tally in self._tallies)
        if count and (self._any_live or len(self._tallies) > 1 or signal_number is not None):
            err.print(_table(self._live, self._tallies))
        rate = f", {(count - 1) / (self._last - self._begun):.1f} a second" if self._last > self._begun else ""
        wrote = f"; wrote {', '.join(map(str, saved))}" if saved and count else ""
        ended = f"; ended by {signal.Signals(signal_number).name}" if signal_number is not None else ""
        if count or not failed:
            err.print(f"{count} frame{'' if count == 1 else 's'}{rate}{wrote}{ended}", markup=False, soft_wrap=True)


def _table(live: Stream, tallies: Sequence[Tally]) -> Table:
    """A column a source, so that some fit side by side: counts, rate, and the milliseconds of each stage."""
    most = SHORT if len(tallies) < 3 else SHORTER
    table = Table("ms: p50 / p99", *(escape(_short(name, most)) for name in live.names), box=None, pad_edge=False)
    counts = [live.counts(number) for number in range(len(tallies))]
    table.add_row("captured", *(str(count.captured) for count in counts))
    table.add_row("processed", *(str(count.processed) for count in counts))
    table.add_row("dropped", *(str(count.dropped) for count in counts))
    table.add_row("frames / s", *(f"{tally.rate:.1f}" for tally in tallies))
    for stage in tallies[0].stages:
        spreads = [tally.stages[stage] for tally in tallies]
        cells = (f"{spread.quantile(0.5):.1f} / {spread.quantile(0.99):.1f}" for spread in spreads)
        table.add_row(STAGE_NAMES.get(stage, stage), *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _as_text(frame: Frame, prediction: Prediction) -> str:
    """One line for a person: name or number, answer, milliseconds."""
    timing = prediction.timing
    name = escape(frame.name) or f"{frame.index:5}"
    return f"{name}  {_answer(prediction)}  [dim]preprocess {timing.preprocess_ms:.1f}  infer {timing.infer_ms:.1f} ms[/]"


def _answer(prediction: Prediction, most: int | None = None) -> str:
    """The labels, or of an array its shape and range."""
    array = prediction.array
    answer = "  ".join(f"{escape(label)} {probability:.1%}" for label, probability in prediction.top[:most])
    return answer or escape(f"{list(array.shape)} from {array.min():.3f} to {array.max():.3f}")


def _short(name: str, most: int = SHORT) -> str:
    """The end of a source's name, which tells it from others."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _recording(save: Path | None) -> Path | None:
    """Where to record, with the time of now in place of %H and the like, so that one recording does not replace another."""
    if save is None:
        return None
    if save == Path():  # also "", of a variable of the shell that is not set
        raise VitEdgeError("--save takes a video file or a folder of its own", hint="such as --save out.mp4 or --save frames")
    return Path(time.strftime(str(save)))


def _size(text: str | None) -> tuple[int, int] | None:
    """A size as it is typed: 1280x720."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})[xX*](\d{1,5})", text)
    if not found:
        raise VitEdgeError(f"a size is typed as WIDTHxHEIGHT, not {text!r}", hint="such as --size 1280x720")
    return int(found[1]), int(found[2])
