"""Frames in, frames with their predictions out in the same order: decoding, preprocessing, inference and answers overlap.

What makes the frames works in the caller's thread, the rest in those of a batcher. For files and folders, where the time of
all of them counts and not that of one. Knows nothing of where frames come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future

from vitedge.runtime.batcher import Batcher, ForkableEngine
from vitedge.specs import Frame, Prediction

MOST = 8  # frames a batch: more hardly make an engine quicker, and all of them are in memory at once
MEMORY = 2**28  # bytes of frames that are on their way, at most


def open_batcher(engine: ForkableEngine, top_k: int = 5) -> Batcher:
    """A batcher for `predict_all`, on an engine that is best opened with as many streams as its backend finds best."""
    return Batcher(engine, min(MOST, engine.max_batch), top_k=top_k)


def predict_all(batcher: Batcher, frames: Iterable[Frame]) -> Generator[tuple[Frame, Prediction]]:
    """Every frame with its prediction, in order. Raises what a frame, its picture or the engine raises, in its turn."""
    pending: deque[tuple[Frame, Future[Prediction]]] = deque()
    ended: list[Exception] = []
    try:
        for frame in _until_error(frames, ended):
            pending.append((frame, batcher.submit(frame)))
            while pending and (pending[0][1].done() or len(pending) > _most_pending(batcher, frame)):
                yield _answered(pending)
        while pending:
            yield _answered(pending)
        if ended:
            raise ended[0]
    finally:
        for _, future in pending:  # of a caller that stops half-way
            future.cancel()


def _until_error(frames: Iterable[Frame], ended: list[Exception]) -> Iterator[Frame]:
    """The frames up to the first error of who makes them, which is put into `ended`."""
    try:
        yield from frames
    except Exception as error:  # noqa: BLE001  raised again once the frames before it are answered
        ended.append(error)


def _most_pending(batcher: Batcher, frame: Frame) -> int:
    """How many frames keep the engine busy, or as many as the memory for them holds."""
    return max(1, min(batcher.capacity, MEMORY // max(frame.image.nbytes, 1)))


def _answered(pending: deque[tuple[Frame, Future[Prediction]]]) -> tuple[Frame, Prediction]:
    frame, future = pending.popleft()
    return frame, future.result()
