"""Sources and an engine in, frames with their predictions out: the newest of each camera, every one of files and folders.

    one camera          its newest frame ─▶ Predictor, in the thread that asks: nothing is quicker
    one file or folder  all its frames ─▶ Batcher, many at a time, in order
    several             a thread each: the newest frame ─▶ Batcher ─▶ its answer, as they come

Of each of several sources one frame is on its way at a time, and one answer waits until it is taken, so a consumer that is
slow makes frames be dropped and memory never grow. Knows nothing of terminals, recordings or pages.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from vitedge.errors import VitEdgeError
from vitedge.runtime.batcher import Batcher
from vitedge.runtime.camera import SOURCES, CameraOptions, Source, is_live, open_source
from vitedge.runtime.engine import Engine, find_engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.runtime.throughput import open_batcher, predict_all
from vitedge.specs import Frame, Prediction

Answer = tuple[Frame, Prediction]
OnResult = Callable[[Frame, Prediction], None]
ENDING_S = 10.0  # for the threads of several sources to end


def stream(
    sources: str | Path | int | Sequence[str | Path | int],
    engine: str | Path | Engine,
    *,
    options: CameraOptions | None = None,
    top_k: int = 5,
    limit: int | None = None,
    on_result: OnResult | None = None,
) -> Stream:
    """Open sources, and an engine where a path or MODEL/VARIANT is given, and return an iterator of (Frame, Prediction).

    sources: as `vitedge.runtime.camera.open_source` takes them; of several `Frame.source` says which one. engine: an open one
    stays open. limit: stop after so many answers of all sources together. on_result: called with each answer before it is
    given out, in the thread that iterates. Raises VitEdgeError where one of them does not open.
    """
    given = (sources,) if isinstance(sources, (str, Path, int)) else tuple(sources)
    names = tuple(map(str, given))
    if not all(name.strip() for name in names) or not names:
        raise VitEdgeError("no source was given", hint=f"is a variable not set? Else {SOURCES}")
    if limit is not None and not (isinstance(limit, int) and limit >= 0):
        raise VitEdgeError(f"limit must be a whole number from 0 on, not {limit}")
    options = options or CameraOptions()
    live = any(is_live(name, options) for name in names)  # so one frame's time counts, and not that of all
    with ExitStack() as opening:
        if isinstance(engine, (str, Path)):
            engine = opening.enter_context(open_engine(find_engine(Path(engine)), None if live else 0))
        if live:
            _warm_up(engine)
        if len(names) > 1:
            shared = opening.enter_context(Batcher(engine, min(len(names), engine.max_batch), queue=len(names), top_k=top_k))
            opened = _open_sources(names, options, opening)
            answers: Iterator[Answer] = opening.enter_context(_Merged(shared, opened))
        else:
            batcher = None if live else opening.enter_context(open_batcher(engine, top_k))
            opened = [opening.enter_context(open_source(names[0], options))]
            answers = predict_all(batcher, opened[0]) if batcher else _newest(opened[0], Predictor(engine, top_k))
            opening.callback(answers.close)
        return Stream(opened, engine, answers, opening.pop_all(), limit, on_result)


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What became of the frames of a source: captured = processed + dropped, once the stream is closed.

    While it runs, a frame or two are neither yet. dropped: a newer one took their place, or the stream ended before their turn.
    """

    captured: int
    processed: int
    dropped: int


class Stream:
    """(Frame, Prediction) after another. It closes what it opened when it ends, fails or is forgotten, and on `close`.

    sources: the open sources, in the order given. names: of each, as `Frame.source` has it, made distinct. engine: the open
    engine. A source that fails for good does not end the others: what it raised is raised when they have ended, and is among
    the `notes` until then. An error of the engine is raised after the answers before it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        engine: Engine,
        answers: Iterator[Answer],
        opened: ExitStack,
        limit: int | None,
        on_result: OnResult | None,
    ) -> None:
        self.sources, self.engine = tuple(sources), engine
        self.names = distinct([source.name for source in sources])
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._processed = [0] * len(self.sources)
        self._answers, self._left, self._on_result = answers, limit, on_result
        self._failures = answers.failures if isinstance(answers, _Merged) else []
        self._turn, self._stopped = threading.RLock(), threading.Event()
        self._opened = opened
        self._forgotten = weakref.finalize(self, _close, self.sources, self._turn, self._stopped, opened)

    def __iter__(self) -> Iterator[Answer]:
        return self

    def __next__(self) -> Answer:
        """The next answer; of cameras that of the newest frame, which is waited for."""
        with self._turn:  # `close` in another thread waits until this one is out of the engine
            try:
                return self._take()
            except BaseException:
                self.close()
                raise

    def number(self, frame: Frame) -> int:
        """Which of the sources a frame is of, counted from 0."""
        return self._numbers[frame.source]

    def counts(self, number: int) -> Counts:
        """What became of the frames of a source so far."""
        source, processed = self.sources[number], self._processed[number]
        return Counts(source.captured, processed, source.captured - processed if self._stopped.is_set() else source.dropped)

    @property
    def notes(self) -> list[str]:
        """A sentence for each picture that was lost and each source that failed while others went on."""
        return [*(note for source in self.sources for note in source.skipped), *map(str, self._failures)]

    def close(self) -> None:
        """End the stream, from whatever thread, and close what it opened; calling it twice is safe."""
        _close(self.sources, self._turn, self._stopped, self._opened)
        self._forgotten.detach()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _take(self) -> Answer:
        if self._stopped.is_set() or self._left == 0:
            raise StopIteration
        frame, prediction = next(self._answers)
        if self._left is not None:
            self._left -= 1
        number = self._answers.latest if isinstance(self._answers, _Merged) else 0
        if frame.source != self.names[number]:
            frame = dataclasses.replace(frame, source=self.names[number])
        self._processed[number] += 1
        if self._on_result:
            self._on_result(frame, prediction)
        return frame, prediction


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, numbered where one is there several times: a, a #2, a #3."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return tuple(result)


def _close(sources: Sequence[Source], turn: threading.RLock, stopped: threading.Event, opened: ExitStack) -> None:
    """End the wait for a camera's frame, which may be that of another thread; then close all, when that is out of the engine."""
    stopped.set()
    for source in sources:
        if source.live:
            source.close()
    with turn:
        opened.close()


def _warm_up(engine: Engine) -> None:
    """Answer a picture before any is captured: the first one pays for what is compiled or loaded late."""
    engine.write(0, np.zeros((480, 640, 3), np.uint8), "rgb")
    engine.run(1)


def _open_sources(names: Sequence[str], options: CameraOptions, opening: ExitStack) -> list[Source]:
    """Open them at the same time, so that the first does not wait for the last; if one fails, those that opened are closed."""
    with ThreadPoolExecutor(len(names), "vitedge-open") as pool:
        futures = [pool.submit(open_source, name, options) for name in names]
    opened = [opening.enter_context(future.result()) for future in futures if not future.exception()]
    for future in futures:
        future.result()  # raises the first error
    return opened


def _newest(source: Source, predictor: Predictor) -> Generator[Answer]:
    for frame in source:
        yield frame, predictor(frame)


class _Merged:
    """The answers of several sources as they come. failures: of sources; latest: the number of that of the last answer."""

    def __init__(self, batcher: Batcher, sources: Sequence[Source]) -> None:
        self.failures: list[Exception] = []
        self.latest = 0
        self._batcher, self._sources = batcher, sources
        self._ready: deque[tuple[int, Answer]] = deque()  # at most one of each source
        self._error: Exception | None = None  # of the engine
        self._running, self._closed = len(sources), False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._follow, args=(number,), name="vitedge-source", daemon=True)
            for number in range(len(sources))
        ]

    def __iter__(self) -> Iterator[Answer]:
        return self

    def __next__(self) -> Answer:
        for thread in self._threads:
            if thread.ident is None:  # with the first frame that is asked for, not before
                thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._running or self._error or self._closed)
            if self._ready:
                self.latest, answer = self._ready.popleft()
                self._changed.notify_all()
                return answer
        if self._error:
            raise self._error
        if self.failures and not self._closed:
            raise self.failures.pop(0)
        raise StopIteration

    def __enter__(self) -> _Merged:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident not in (None, threading.get_ident()):
                thread.join(ENDING_S)

    def _follow(self, number: int) -> None:
        """Answer the frames of a source, one at a time, until it ends, fails or nobody wants more."""
        try:
            while not self._closed and (frame := self._next_frame(number)) is not None:
                self._give(number, (frame, self._batcher.submit(frame, stream=number).result()))
        except CancelledError:
            pass  # the batcher was closed
        except Exception as error:  # noqa: BLE001  raised again in the thread that iterates
            self._error = self._error or error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _next_frame(self, number: int) -> Frame | None:
        try:
            return next(self._sources[number], None)
        except Exception as error:  # noqa: BLE001  a source that fails does not end the others
            self.failures.append(error)
            return None

    def _give(self, number: int, answer: Answer) -> None:
        """Hand an answer over, and wait until it is taken."""
        with self._changed:
            self._ready.append((number, answer))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or all(given != number for given, _ in self._ready))
