"""A camera, or what acts like one, in; its newest frame out, whenever it is asked for.

    connect() -> Feed -> reader thread, which stamps and counts -> the newest Frame -> next()
                   ▲────── lost? wait 0.5 s, 1 s, 2 s ... 10 s ──────┘

The thread does nothing but read, so that no driver or server queues up old pictures behind a slow engine. Code of others may
hang in there: then it is left to itself, and never waited for without end. Knows nothing of OpenCV, URLs or devices.
"""

from __future__ import annotations

import atexit
import functools
import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError, first_line
from vitedge.runtime.source import CameraOptions, Source
from vitedge.specs import Frame

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0  # before a lost source is opened again
CLOSING_S = 2.0  # that a reader gets to come back from a read, before it is left behind
MAX_HUNG = 3  # readers that hang in the code of others; so many are replaced and no more
WHY_SILENT = "is it connected, and does it send? What is wrong with a pipeline gst-launch-1.0 tells"


class Feed(Protocol):
    """An open camera, stream or file.

    fps: frames a second, None where unknown. total: how many, where there is an end. pace: the rate to hold it back to, where
    it would give its frames faster than that. damaged: pictures passed over since somebody last set it to 0.
    """

    fps: float | None
    total: int | None
    pace: float | None
    damaged: int

    def read(self) -> tuple[NDArray[np.uint8], str] | None:
        """Wait for the next picture, RGB, and its name; None where there are no more. A VitEdgeError says why."""

    def close(self) -> None:
        """Give the device back. Only the thread that reads calls it."""


class LiveSource(Source):
    """The newest frame of a feed, which is read in a thread of its own; `Frame.index` counts also those that were dropped.

    Opening waits for the first frame, so that a source without any raises VitEdgeError there. camera: whether it has no end of
    its own, so that the end of a feed is a loss, after which it is connected again where the options say so.
    """

    live = True

    def __init__(
        self, name: str, connect: Callable[[], Feed], options: CameraOptions, *, camera: bool, skipped: list[str] | None = None
    ) -> None:
        super().__init__(name)
        self.skipped = [] if skipped is None else skipped
        self._connect, self._timeout_s = connect, options.timeout_s
        self._camera, self._retry = camera, camera and options.retry
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._over = False  # no frame comes any more
        self._error: Exception | None = None  # why, which is raised once
        self._trouble = ""
        self._next_try_ns = self._lost_since_ns = 0
        self._losses = self._lost_ns = self._damaged = 0
        self._seen_ns = time.perf_counter_ns()  # when the last frame came
        self._hung: list[_Reader] = []
        self._reader = _Reader(self)
        _open_sources().add(self)
        self._reader.start()
        try:
            self._await_first()
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> str:
        """How the source is, as of `Source`; of a reader that hangs it tells before it is replaced."""
        with self._changed:
            now = time.perf_counter_ns()
            if self._trouble and not self._over:
                seconds = math.ceil((self._next_try_ns - now) / 1e9)
                return f"{self._trouble}, " + (f"the next try is in {seconds} s" if seconds > 0 else "and is being tried again")
            silent_s = (now - self._seen_ns) / 1e9
            if silent_s > self._timeout_s + 1 / (self.fps or math.inf) and not self._over:
                return f"{self.called} has given no frame for {silent_s:.0f} s"
            return self._trouble

    def __next__(self) -> Frame:
        with self._changed:
            while self._newest is None and not self._over:
                self._changed.wait(self._patience_s())
                if self._patience_s() == 0.0 and self._camera:
                    self._replace_reader()
            if self._newest is None:
                self._raise_once()
                raise StopIteration
            frame, self._newest = self._newest, None
            self.given += 1
            return frame

    def close(self) -> None:
        """End the stream, also for a thread that waits in `next`, and wait for the reader no longer than CLOSING_S."""
        with self._changed:
            self._error = None
            if not self._over:
                self._end("")
            if self._newest is not None:
                self._newest = None
                self.dropped += 1
            reader = self._reader
        reader.stop.set()
        if reader is not threading.current_thread():
            reader.join(CLOSING_S)

    def _await_first(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.captured or self._over, 2 * self._timeout_s + 1):  # opening and reading
                self._error = VitEdgeError(f"{self.called} gave no frame within {self._timeout_s:g} s", hint=WHY_SILENT)
                self._over = True
            if not self.captured:
                self._raise_once()
                raise VitEdgeError(f"{self.called} gives no frame", hint=WHY_SILENT)

    def _raise_once(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _patience_s(self) -> float:
        """How long the reader may still take before it must be thought to hang: to open and to read have a time-out each."""
        return max(0.0, 2 * self._timeout_s + 1 - (time.perf_counter_ns() - self._reader.alive_ns) / 1e9)

    def _replace_reader(self) -> None:
        """Leave a reader to itself that hangs, as pipelines do, and begin anew."""
        self._hung = [reader for reader in self._hung if reader.is_alive()]
        if len(self._hung) == MAX_HUNG:
            self._reader.alive_ns = time.perf_counter_ns()  # to look again later
            return
        self._reader.stop.set()
        self._hung.append(self._reader)
        self._lose(f"{self.called} hangs", 0.0)
        self._reader = _Reader(self)
        self._reader.start()

    def _read(self, reader: _Reader) -> None:
        """What a reader does: connect, read until the feed is lost, and that again."""
        wait_s = FIRST_WAIT_S
        while not reader.stop.is_set():
            before = self.captured
            error = self._read_feed(reader)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S) if self.captured == before else FIRST_WAIT_S
            with self._changed:
                if reader is not self._reader or self._over:
                    return
                if not (self._retry and self.captured):
                    self._error = error
                    stopped = self._camera and self.captured and not error
                    self._end(f"{self.called} stopped after {self.captured} frames" if stopped else "")
                    return
                self._lose(first_line(error) if error else f"{self.called} is lost", wait_s)
            reader.rests(wait_s)

    def _read_feed(self, reader: _Reader) -> Exception | None:
        """Connect and read to the end; why it ended, where that is known."""
        try:
            with closing(self._connect()) as feed:
                reader.alive_ns = time.perf_counter_ns()
                pacer = Pacer(feed.pace) if feed.pace else None
                while (picture := feed.read()) is not None:
                    if pacer and not reader.rests(pacer.seconds_left()):
                        break
                    if not self._take_in(reader, feed, *picture):
                        break
                return None
        except Exception as error:  # noqa: BLE001  whatever it is, who waits for frames must hear of it
            return error

    def _take_in(self, reader: _Reader, feed: Feed, image: NDArray[np.uint8], name: str) -> bool:
        """Stamp a picture, and put it in the place of the one before; False where nobody wants any more."""
        now = time.perf_counter_ns()
        with self._changed:
            if reader is not self._reader or self._over:
                return False
            if self._trouble:
                self._lost_ns += now - self._lost_since_ns
            self.fps, self.total, self._trouble = feed.fps, feed.total, ""
            self._damaged, feed.damaged = self._damaged + feed.damaged, 0
            self._seen_ns = reader.alive_ns = now
            if self._newest is not None:
                self.dropped += 1
            self._newest = Frame(image, self.captured, now, name, source=self.name)
            self.captured += 1
            self._changed.notify_all()
            return True

    def _lose(self, trouble: str, wait_s: float) -> None:
        now = time.perf_counter_ns()
        if not self._trouble:
            self._losses += 1
            self._lost_since_ns = now
        self._trouble, self._next_try_ns = trouble, now + int(wait_s * 1e9)

    def _end(self, trouble: str) -> None:
        """No frame comes any more; say what there was to say."""
        now = time.perf_counter_ns()
        if self._trouble:
            self._lost_ns += now - self._lost_since_ns
        if self._losses:
            times = "once" if self._losses == 1 else f"{self._losses} times"
            self.skipped.append(f"{self.called} was lost {times}, for {self._lost_ns / 1e9:.1f} s in all")
        if self._damaged:
            self.skipped.append(f"{self._damaged} damaged frames of {self.called} were passed over")
        if trouble:
            self.skipped.append(trouble)
        self._trouble, self._over = trouble, True
        self._changed.notify_all()


class _Reader(threading.Thread):
    """A thread that reads for a source, as long as it is that source's reader."""

    def __init__(self, source: LiveSource) -> None:
        super().__init__(name=f"reader of {source.name}", daemon=True)
        self.stop = threading.Event()
        self.alive_ns = time.perf_counter_ns()  # when it last came back from the code of others
        self._source = source

    def rests(self, seconds: float) -> bool:
        """Wait for so long, in which it does not hang; False where it is to stop."""
        self.alive_ns = time.perf_counter_ns() + int(seconds * 1e9)
        return not self.stop.wait(seconds)

    def run(self) -> None:
        self._source._read(self)


class Pacer:
    """When each of many things is due that have a rate. Who comes too late by more than one of them goes on from there."""

    def __init__(self, rate: float) -> None:
        self._period_ns = 1e9 / rate
        self._due_ns = -math.inf

    def seconds_left(self) -> float:
        """Until the next one is due; the one after it is due a period later."""
        now = time.perf_counter_ns()
        late = now - self._due_ns > self._period_ns
        due = now if late else self._due_ns
        self._due_ns = due + self._period_ns
        return max(0.0, (due - now) / 1e9)


@functools.cache
def _open_sources() -> weakref.WeakSet[LiveSource]:
    """The live sources of this process. At its end a thread that is inside OpenCV would crash it, so they are ended before."""
    sources: weakref.WeakSet[LiveSource] = weakref.WeakSet()

    def end() -> None:
        for source in tuple(sources):
            source.close()

    atexit.register(end)
    return sources
