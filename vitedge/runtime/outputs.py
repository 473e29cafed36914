"""Answers of a running stream in, files and the lines of other programs out.

    (Frame, Prediction)  ->  record: a dict for JSON
                         ->  Recordings: an annotated video or folder for each source
                         ->  ResultCommand: a program that reads a line a frame, and never slows the camera

Knows nothing of engines, terminals or pages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from vitedge.errors import VitEdgeError
from vitedge.runtime.live import Counts
from vitedge.runtime.opencv import load_cv2
from vitedge.runtime.overlay import Picture, Recorder, draw, names_folder, open_recorder
from vitedge.runtime.source import Source
from vitedge.specs import Frame, ModelCard, Prediction, to_dict

DEFAULT_FPS = 25.0  # of a recording whose source has no rate of its own
MAX_FPS = 30.0  # of a recording of a camera, whose pictures are encoded beside inference
LONGEST_STILL_S = 2.0  # a camera's picture stands in a recording; a longer gap is left out
RESERVE = 16 * 2**20  # bytes on disk that are left: the index of a video is written at its end
SPACE_EVERY_S = 1.0
LINES = 64  # that wait for a program
LAST_LINES_S = 5.0  # for a program to read them and end

Say = Callable[[str], None]


def record(frame: Frame, prediction: Prediction, counts: Counts, latency_ms: float) -> dict[str, Any]:
    """One answer for a machine; of an array only its shape and range, since a map has 50,000 values.

    captured_ns is of `time.perf_counter_ns`, captured_at of the clock on the wall. captured and dropped: of its source so far.
    """
    array = prediction.array
    result: dict[str, Any] = {
        "source": frame.source,
        "index": frame.index,
        "name": frame.name,
        "captured_ns": frame.captured_ns,
        "captured_at": _wall_clock(frame.captured_ns),
        "latency_ms": latency_ms,
        "timing": to_dict(prediction.timing),
        "captured": counts.captured,
        "dropped": counts.dropped,
    }
    if prediction.top:
        return result | {"top": [{"label": label, "probability": p} for label, p in prediction.top]}
    return result | {"shape": list(array.shape), "min": float(array.min()), "max": float(array.max())}


def _wall_clock(captured_ns: int) -> str:
    """A time of `perf_counter_ns` in ISO 8601, UTC; asked for anew each time, since the clock on the wall is set now and then."""
    at_ns = time.time_ns() - (time.perf_counter_ns() - captured_ns)
    return datetime.fromtimestamp(at_ns / 1e9, timezone.utc).isoformat(timespec="microseconds")


def recording_paths(save: Path, count: int) -> list[Path]:
    """Where each of `count` sources is recorded: out.mp4, or of several out-1.mp4, out-2.mp4; or the folders save/1, save/2."""
    if count == 1:
        return [save]
    numbers = range(1, count + 1)
    return [save / str(number) if names_folder(save) else save.with_stem(f"{save.stem}-{number}") for number in numbers]


def check_apart(sources: Sequence[str], save: Path) -> None:
    """Refuse a recording that would overwrite a source, whatever it is called there, or be found in it as pictures."""
    for path in recording_paths(save, len(sources)):
        for source in map(Path, sources):
            _check_apart(source, path)


class Recordings:
    """An annotated recording for each source. What was recorded is kept even where the block of `with` fails.

    A camera's recording runs as time does: a picture stands until the next, and of several within 1 / fps the first is
    taken. Raises VitEdgeError, with the recordings still to be finished, where the disk is nearly full.
    """

    def __init__(self, save: Path, sources: Sequence[Source], card: ModelCard) -> None:
        self.paths = recording_paths(save, len(sources))
        self._card, self._checked_ns, self._written = card, 0, False
        self._check_space()
        load_cv2()  # which draws; where it is missing, that is said before the first frame
        with ExitStack() as opening:
            self._recorders = [
                opening.enter_context(_recorder(path, source)) for path, source in zip(self.paths, sources, strict=True)
            ]
            self._opened = opening.pop_all()

    def write(self, number: int, frame: Frame, prediction: Prediction) -> None:
        """Append a frame of source `number`, drawn on."""
        self._check_space()
        recorder = self._recorders[number]
        if not isinstance(recorder, _Paced) or recorder.wants(frame):
            recorder.write(draw(frame, prediction, self._card), frame.name)
            self._written = True

    def close(self) -> None:
        """Finish the recordings; calling it twice is safe."""
        self._opened.close()

    def __enter__(self) -> Recordings:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, trace)

    def _check_space(self) -> None:
        """End before the disk is full, while a video can still be finished: OpenCV's writers do not say that it is."""
        now = time.perf_counter_ns()
        if now - self._checked_ns < SPACE_EVERY_S * 1e9:
            return
        self._checked_ns = now
        folder = self.paths[0] if self.paths[0].is_dir() else self.paths[0].parent
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < RESERVE:
                hint = "free some space, or save elsewhere" + ("; what was recorded so far is kept" if self._written else "")
                raise VitEdgeError(
                    f"less than {RESERVE >> 20} MiB are free in {folder}, too little to go on recording", hint=hint
                )


class _Paced(Recorder):
    """A recording whose time is that of the pictures, which come when they come."""

    def __init__(self, recorder: Recorder, fps: float) -> None:
        self._recorder, self._fps = recorder, fps
        self._first_ns = self._written = self._due = 0
        self._last: Picture | None = None

    def wants(self, frame: Frame) -> bool:
        """Whether a picture is due by the time that a frame was captured; to be asked once before each is written."""
        self._first_ns = self._first_ns or frame.captured_ns
        self._due = 1 + int((frame.captured_ns - self._first_ns) * self._fps / 1e9) - self._written
        if self._due > LONGEST_STILL_S * self._fps:
            self._first_ns += int((self._due - 1) / self._fps * 1e9)
            self._due = 1
        return self._due > 0

    def write(self, picture: Picture, name: str = "") -> None:
        still = picture if self._last is None else self._last
        for shown in (*[still] * (self._due - 1), picture):
            self._recorder.write(shown, name)
        self._written, self._last = self._written + max(1, self._due), picture

    def close(self) -> None:
        self._recorder.close()


class ResultCommand:
    """A shell command that reads a line for each answer on its stdin, and stays open. Nothing it does slows who sends.

    Up to LINES wait for it, then the oldest gives way. lost: lines that it did not get. say: is told once that it ended, and
    once that it does not keep up. It gets no Ctrl-C of its own: its input ends when the stream does.
    """

    def __init__(self, command: str, say: Say) -> None:
        self.lost = 0
        self._say, self._command = say, command
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = self._killed = self._told = False
        try:
            self._process = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise VitEdgeError(f"cannot start {command!r}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._feed, name="vitedge-on-result", daemon=True)
        self._thread.start()

    def send(self, line: str) -> None:
        """Have a line written, without waiting for that."""
        with self._changed:
            if self._ended:
                self.lost += 1
                return
            if full := len(self._lines) >= LINES:
                self._lines.popleft()
                self.lost += 1
            self._lines.append(line)
            self._changed.notify()
        if full and not self._told:
            self._told = True
            self._say(f"{self._command!r} does not keep up: the oldest of {LINES} waiting results give way to new ones")

    def close(self) -> None:
        """Give it the lines that wait, and a few seconds to end; calling it twice is safe."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(LAST_LINES_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._thread.is_alive() else LAST_LINES_S)
        if self._process.poll() is None or self._thread.is_alive():
            self._killed = True
            self._kill()
            self._say(f"{self._command!r} did not end with its input and was killed")
            self._thread.join(LAST_LINES_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_LINES_S)

    def _feed(self) -> None:
        """Write lines until there are no more, or nobody reads them."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._next()) is not None:
                pipe.write(f"{line}\n".encode())
                pipe.flush()
            pipe.close()
        except OSError:
            self._give_up()
            with contextlib.suppress(OSError):
                pipe.close()

    def _next(self) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            return self._lines.popleft() if self._lines else None

    def _give_up(self) -> None:
        with self._changed:
            self._ended = True
            self.lost += 1 + len(self._lines)  # and the one that could not be written
            self._lines.clear()
        if not self._killed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            code = self._process.poll()
            how = "closed its input" if code is None else f"ended with status {code}"
            self._say(f"{self._command!r} {how}, so it gets no more results")

    def _kill(self) -> None:
        """End it and what it started, whose pipe may be what a line waits for."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()


def _recorder(path: Path, source: Source) -> Recorder:
    if not source.live or names_folder(path):
        return open_recorder(path, source.fps or DEFAULT_FPS)
    fps = min(source.fps or DEFAULT_FPS, MAX_FPS)
    return _Paced(open_recorder(path, fps), fps)


def _check_apart(source: Path, save: Path) -> None:
    real = Path(os.path.realpath(save))
    if _same(source, real):
        raise VitEdgeError(f"{save} is the source, which the recording would overwrite", hint="save to another place")
    if names_folder(save) and any(_same(source, parent) for parent in real.parents):
        message = f"{save} lies in the source folder {source}, whose images the recorded ones would join"
        raise VitEdgeError(message, hint="save to a folder outside of it")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one is not there yet, or cannot be looked at: opening it says why
        return False
