"""A batcher under everything that can happen to requests at once, for a long time: `make test-soak`.

REQUESTS requests of several threads, on a real engine: cancelled, late, of broken pictures, of pictures that make the engine
fail, under each policy. Every future settles, every answer is that of its own picture, and memory stays where it was.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import Made
from vitedge.errors import DeadlineError, EngineError, QueueFullError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.runtime.batcher import Batcher, Policy
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Manifest, PixelFormat, Prediction

pytestmark = pytest.mark.soak
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "200000"))
ROUNDS = 6  # two of each policy
THREADS = 8
IN_FLIGHT = 64  # of a thread, before it looks at its answers
FAILS = 1000  # the index of a picture that makes the engine fail
STATM = Path("/proc/self/statm")


class Faulty:
    """An engine that fails on some pictures, whatever else is in the batch, and now and then for no reason."""

    def __init__(self, engine: Engine, random: np.random.Generator) -> None:
        self._engine, self._random = engine, random
        self.max_batch, self.streams = engine.max_batch, engine.streams
        self._marked = np.zeros(engine.max_batch, bool)

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        self._engine.write(row, picture, pixels)
        self._marked[row] = picture[0, 0, 0] == 255  # as `pictures` marks them

    def run(self, count: int) -> NDArray[np.float32]:
        if self._marked[:count].any() or self._random.random() < 0.001:
            raise EngineError("injected")
        return self._engine.run(count)

    def fork(self) -> Faulty:
        return Faulty(self._engine.fork(), np.random.default_rng(self._random.integers(2**31)))

    def close(self) -> None:
        self._engine.close()


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Engine]:
    with open_engine(made.engines["openvino", "int8"], streams=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(made: Made) -> list[NDArray[np.uint8]]:
    """Pictures without a mark in their first pixel."""
    found = [decode(file.path).copy() for file in list_images(made.images)[:32]]
    for picture in found:
        picture[0, 0] = 0
    return found


class Client(threading.Thread):
    """One caller: submits, cancels, and looks at what became of it."""

    def __init__(self, number: int, batcher: Batcher, pictures: list[NDArray[np.uint8]], answers: NDArray[np.float32]) -> None:
        super().__init__()
        self.random, self.batcher = np.random.default_rng(number), batcher
        self.pictures, self.answers, self.number = pictures, answers, number
        self.outcomes: Counter[str] = Counter()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            left = REQUESTS // ROUNDS // THREADS
            while left > 0:
                self.look(self.submit(min(left, IN_FLIGHT)))
                left -= IN_FLIGHT
        except Exception as error:  # noqa: BLE001  raised again by `soak`
            self.error = error

    def submit(self, count: int) -> list[tuple[int, Future[Prediction]]]:
        futures = []
        for _ in range(count):
            index, deadline, image = self.choose()
            try:
                frame = Frame(image, index, time.perf_counter_ns())
                futures.append((index, self.batcher.submit(frame, stream=self.number, deadline_ms=deadline)))
            except (QueueFullError, DeadlineError):
                self.outcomes["rejected"] += 1
            if futures and self.random.random() < 0.1:
                futures[self.random.integers(len(futures))][1].cancel()
        return futures

    def choose(self) -> tuple[int, float | None, NDArray[np.uint8]]:
        """The index of a picture, a deadline, and the picture: one in fifty is none, one in fifty makes the engine fail."""
        index, chance = int(self.random.integers(len(self.pictures))), self.random.random()
        deadline = float(self.random.exponential(20.0)) if self.random.random() < 0.2 else None
        if chance < 0.02:
            return index, deadline, np.zeros((3, 3), np.uint8)
        if chance < 0.04:
            marked = self.pictures[index].copy()
            marked[0, 0] = 255
            return FAILS, deadline, marked
        return index, deadline, self.pictures[index]

    def look(self, futures: list[tuple[int, Future[Prediction]]]) -> None:
        for index, future in futures:
            try:
                array = future.result(60).array
            except (CancelledError, VitEdgeError) as error:
                self.outcomes[type(error).__name__] += 1
                continue
            assert index != FAILS, "a picture that makes the engine fail was answered"
            distances = np.abs(self.answers - array).max(axis=1)
            assert distances.argmin() == index, "an answer of another picture"
            self.outcomes["answered"] += 1


def soak(batcher: Batcher, pictures: list[NDArray[np.uint8]], answers: NDArray[np.float32]) -> Counter[str]:
    """What the clients saw; the first error of one of them is raised."""
    clients = [Client(number, batcher, pictures, answers) for number in range(THREADS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for client in clients:
        if client.error:
            raise client.error
    return sum((client.outcomes for client in clients), Counter())


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("policy", ["block", "drop-oldest", "reject"])
def test_every_request_gets_its_end_and_memory_stays_where_it_was(
    engine: Engine, pictures: list[NDArray[np.uint8]], policy: Policy, record_property: Callable[[str, object], None]
) -> None:
    predictor = Predictor(engine)
    answers = np.stack([predictor(Frame(picture, 0, 0)).array for picture in pictures])
    threads = threading.active_count()
    with Batcher(Faulty(engine, np.random.default_rng(0)), 8, 1.0, queue=128, policy=policy) as batcher:
        outcomes = soak(batcher, pictures, answers)  # allocators have taken what they take
        settled, before = batcher.counts(), resident_bytes()
        outcomes += soak(batcher, pictures, answers)
        grown = resident_bytes() / before - 1
    counts = batcher.counts()  # a request that was cancelled is counted when its turn comes
    record_property("outcomes", dict(outcomes))
    record_property("grown", grown)
    assert threading.active_count() == threads
    assert counts.waiting == 0 < settled.answered < counts.answered
    assert sum(outcomes.values()) == counts.submitted + counts.rejected
    assert outcomes["answered"] == counts.answered > 0 and outcomes["CancelledError"] == counts.cancelled > 0
    assert outcomes["rejected"] == counts.rejected and outcomes["QueueFullError"] == counts.dropped
    assert (
        outcomes["DeadlineError"] == counts.late > 0 and outcomes["EngineError"] + outcomes["VitEdgeError"] == counts.failed > 0
    )
    assert grown < 0.02, f"memory grew by {grown:.1%}"
