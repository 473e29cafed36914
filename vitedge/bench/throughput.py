"""Engines and image files in, images a second from disk to answer out.

    [engine, ...] + files  ->  turns: decode, preprocess, infer, answer, all overlapped  ->  one Sustained an engine

What a folder of images really takes, where latency.py times the engine alone. Each engine has as many streams as its backend
finds best. Knows nothing of labels.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, stream
from vitedge.runtime.engine import open_engine
from vitedge.runtime.throughput import open_batcher, predict_all
from vitedge.specs import Frame

TURN_S = 2.0  # long beside the filling and emptying of the pipeline
WARMUP = 8  # images before the first turn


@dataclass(frozen=True, slots=True)
class Sustained:
    """images_per_s: of all turns together. streams: how many batches ran at a time. batch: images in one, on average."""

    images_per_s: float
    streams: int
    batch: float


def measure_throughput(
    folders: Sequence[Path],
    files: Sequence[ImageFile],
    seconds: float = 3.0,
    progress: Callable[[float], object] = lambda done: None,
) -> list[Sustained]:
    """Answer the files over and over with each engine in turn, for `seconds` each.

    Raises what opening an engine, decoding or an engine raises, and VitEdgeError where `seconds` is not positive.
    """
    if not 0 < seconds < math.inf:
        raise VitEdgeError(f"throughput is measured for a positive number of seconds, not {seconds}")
    with ExitStack() as stack:
        entries = [stack.enter_context(closing(_Entry(folder, files))) for folder in folders]
        while any(entry.seconds < seconds for entry in entries):
            for entry in entries:
                entry.take_turn(min(TURN_S, seconds))
            progress(min(1.0, min(entry.seconds for entry in entries) / seconds))
        return [entry.result() for entry in entries]


class _Entry:
    """An open engine, and what it has done so far."""

    def __init__(self, folder: Path, files: Sequence[ImageFile]) -> None:
        self.images, self.seconds = 0, 0.0
        self._frames = _endless(files)
        with ExitStack() as opening:
            self._engine = opening.enter_context(open_engine(folder, streams=0))
            self._batcher = opening.enter_context(open_batcher(self._engine))
            self._answer(itertools.islice(self._frames, WARMUP))
            self._opened = opening.pop_all()

    def take_turn(self, seconds: float) -> None:
        """Take in images for so long, and answer them all: nothing is left to do while others have their turn."""
        start = time.perf_counter()
        end = start + seconds
        self.images += self._answer(itertools.takewhile(lambda frame: time.perf_counter() < end, self._frames))
        self.seconds += time.perf_counter() - start

    def result(self) -> Sustained:
        counts = self._batcher.counts()
        return Sustained(self.images / self.seconds, self._engine.streams, counts.rows / counts.batches)

    def close(self) -> None:
        self._opened.close()

    def _answer(self, frames: Iterator[Frame]) -> int:
        return sum(1 for _ in predict_all(self._batcher, frames))


def _endless(files: Sequence[ImageFile]) -> Iterator[Frame]:
    """The files over and over; those that cannot be decoded are left out, all of them are an error."""
    for number in itertools.count():
        for file, image in stream(files, []):
            yield Frame(image, number, time.perf_counter_ns(), file.path.name)
