"""What every command says things with: two consoles, notes, a bar that moves, and how an engine is named.

Results go to `out`, which is stdout, progress and remarks to `err`, which is stderr.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vitedge.workspace import find_engines, known_engines, short_path

if TYPE_CHECKING:
    from vitedge.images import ImageFile

PIPE_WIDTH = 160  # columns of a table that goes to a file or another program
ENGINE = "An engine directory, or MODEL/VARIANT for the one below engines/ that was made last, of those that open here"

out = Console(highlight=False, emoji=False, width=None if sys.stdout and sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False)


def complete_engine(typed: str) -> list[str]:
    """For the shell: MODEL/VARIANT of the engines in the workspace."""
    return sorted({name for name in known_engines().values() if name.startswith(typed)})


Engine = Annotated[Path, typer.Argument(help=f"{ENGINE}.", show_default=False, autocompletion=complete_engine)]


class Terminal:
    """Tells a person at a terminal, on stderr, what the pipeline does: a bar while a step runs, a line when it ends."""

    def __init__(self) -> None:
        phase = TextColumn("[dim]{task.fields[phase]}[/]")
        columns = (SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(32), TimeElapsedColumn(), phase)
        self._bar = Progress(*columns, console=err, transient=True)
        self._task: TaskID | None = None
        self._began = 0.0

    def begin(self, step: str) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        if err.is_terminal:
            self._bar.start()
        self._task = self._bar.add_task(step, total=None, phase="")

    def progress(self, fraction: float, phase: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, total=1.0, completed=fraction, phase=phase)

    def end(self, step: str, result: str) -> None:
        """Replace the bar by the line that stays."""
        took = ""
        if self._task is not None:
            self._bar.remove_task(self._task)
            took, self._task = f"  [dim]{time.perf_counter() - self._began:.1f} s[/]", None
        self.close()
        err.print(f"[bold]{step:<10}[/] {escape(result)}{took}", soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if err.is_terminal:
            self._bar.stop()


def chosen_engine(name: Path) -> Path:
    """The directory of the engine `name`; which one that is, and whether a newer one was passed over, is said."""
    from vitedge.runtime.engine import find_engine

    folder, newest = find_engine(name), find_engines(name)[0]
    err.print(f"[dim]engine: {escape(short_path(folder))}[/]", soft_wrap=True)
    if folder != newest:
        print_notes([f"{short_path(newest)} is newer, but is for another machine"])
    return folder


def read_dataset(images: Path | None, labels: Path | None = None) -> list[ImageFile]:
    """The images of a data set, [] of none; what is odd about it is said."""
    from vitedge.datasets import list_dataset

    notes: list[str] = []
    files = list_dataset(images, labels, notes) if images else []
    print_notes(notes)
    return files


def print_notes(notes: Sequence[str], most: int = 5) -> None:
    """Remarks on stderr, of many of a kind the first few."""
    for note in notes[:most]:
        err.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if len(notes) > most:
        err.print(f"[yellow]note:[/] and {len(notes) - most} more of the kind")


def print_written(paths: Sequence[Path], report: Path | None) -> None:
    """Which files a benchmark left; of these, `report` is the page."""
    for path in paths:
        out.print(f"{'report' if path == report else 'wrote'}: {path}", markup=False, soft_wrap=True)


def print_next_run(engine: Path, images: Path) -> None:
    """How to see an engine at work: on `images`, or with a camera where they are an archive, which is no source."""
    from vitedge.images import is_image

    source = images if images.is_dir() or is_image(images.name) else 0
    command = f"vitedge run {shlex.quote(short_path(engine))} --source {shlex.quote(str(source))}"
    err.print(f"[dim]next:   {escape(command)}[/]", soft_wrap=True)
