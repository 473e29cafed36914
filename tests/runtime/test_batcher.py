"""Requests of many callers: each is answered with its own answer, fails alone, and none is forgotten."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import Made, run_python
from vitedge.errors import DeadlineError, EngineError, QueueFullError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.runtime.batcher import Batcher
from vitedge.runtime.engine import open_engine
from vitedge.runtime.pace import Pace
from vitedge.runtime.predictor import Predictor
from vitedge.runtime.requests import Counts
from vitedge.specs import Frame, Manifest, ModelCard, PixelFormat, Prediction, Preprocess, Target

SECONDS = 20.0  # after which something that should have happened did not
BROKEN = 255  # of a picture that makes the engine fail, wherever it is in the batch
CARD = ModelCard("echo", "embed", Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3), 8)


class Gate:
    """Lets runs through one at a time, or all of them."""

    def __init__(self) -> None:
        self.permits, self.started = threading.Semaphore(0), threading.Semaphore(0)

    def open(self, count: int = 10**6) -> None:
        self.permits.release(count)


class Echo:
    """An engine that answers with the first pixel of each row; its runs wait at a gate, and tell how many rows they had."""

    def __init__(self, gate: Gate, runs: list[int], max_batch: int = 4, streams: int = 1) -> None:
        self.manifest = Manifest(CARD, "fp32", None, Target(), "fp32", *[""] * 6)
        self.gate, self.runs, self.max_batch, self.streams = gate, runs, max_batch, streams
        self.input = np.zeros((max_batch, 192), np.uint8)
        self.closed = 0

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        if picture.dtype != np.uint8:
            raise VitEdgeError("this is no picture")
        self.input[row] = picture.flat[0]

    def run(self, count: int) -> NDArray[np.float32]:
        self.gate.started.release()
        assert self.gate.permits.acquire(timeout=SECONDS)
        self.runs.append(count)
        if BROKEN in self.input[:count, 0]:
            raise EngineError("a broken picture")
        return np.where(self.input[:count, :1] == 254, np.nan, self.input[:count, :1]).astype(np.float32)

    def fork(self) -> Echo:
        return Echo(self.gate, self.runs, self.max_batch, self.streams)

    def close(self) -> None:
        self.closed += 1


def frame(value: int) -> Frame:
    return Frame(np.full((8, 8, 3), value, np.uint8), value, time.perf_counter_ns())


def answer(future: Future[Prediction]) -> float:
    return float(future.result(SECONDS).array[0])


class Rig:
    """A batcher on an Echo whose warm-up is over. occupy: a request that is being run until the gate opens."""

    def __init__(self, batcher: Batcher, gate: Gate, runs: list[int]) -> None:
        self.batcher, self.gate, self.runs = batcher, gate, runs

    def occupy(self) -> Future[Prediction]:
        first = self.batcher.submit(frame(99))
        assert self.gate.started.acquire(timeout=SECONDS)
        return first

    def settled(self, queued: int) -> None:
        """Wait until all but so many requests lie in a lane."""
        end = time.monotonic() + SECONDS
        while self.batcher._queued != queued or any(lane.taken for lane in self.batcher._lanes):
            assert time.monotonic() < end
            time.sleep(0.001)


@contextmanager
def rig(max_batch: int = 4, max_delay_ms: float = 0.0, streams: int = 1, **options: Any) -> Iterator[Rig]:
    gate, runs = Gate(), list[int]()
    engine = Echo(gate, runs, max_batch, streams)
    gate.open((streams + 1) * len({1, min(2, max_batch), max_batch}) + 2 * len({1, min(2, max_batch), max_batch}))
    with Batcher(engine, max_delay_ms=max_delay_ms, **options) as batcher:
        assert not gate.permits.acquire(blocking=False), "the warm-up took other runs than these"
        batcher._quick = max_batch  # an Echo takes no time, of which nothing can be told
        runs.clear()
        while gate.started.acquire(blocking=False):
            pass
        try:
            yield Rig(batcher, gate, runs)
        finally:
            gate.open()
    assert batcher.counts().waiting == 0
    assert engine.closed == 0 and all(lane.engine.closed == 1 for lane in batcher._lanes)  # type: ignore[attr-defined]


def test_a_frame_alone_waits_for_nobody_and_batches_form_while_the_engine_is_busy() -> None:
    with rig() as r:
        first = r.occupy()
        others = [r.batcher.submit(frame(value)) for value in range(6)]
        r.settled(queued=2)
        r.gate.open(1)
        assert answer(first) == 99
        r.settled(queued=0)
        r.gate.open()
        assert [answer(other) for other in others] == list(range(6))
        assert r.runs == [1, 4, 2]
        assert r.batcher.counts() == Counts(submitted=7, answered=7, batches=3, rows=7)


def test_a_frame_is_held_back_for_company_as_long_as_it_may() -> None:
    with rig(max_delay_ms=80.0) as r:
        r.gate.open()
        start = time.perf_counter()
        pair = [r.batcher.submit(frame(1)), r.batcher.submit(frame(2))]
        assert [answer(one) for one in pair] == [1, 2]
        assert time.perf_counter() - start >= 0.08 and r.runs == [2]


def test_a_frame_is_not_held_back_past_its_deadline() -> None:
    with rig(max_delay_ms=1000 * SECONDS) as r:
        r.gate.open()
        assert answer(r.batcher.submit(frame(3), deadline_ms=300)) == 3


def test_a_full_batch_is_not_held_back() -> None:
    with rig(max_delay_ms=1000 * SECONDS) as r:
        r.gate.open()
        assert [answer(one) for one in [r.batcher.submit(frame(value)) for value in range(4)]] == [0, 1, 2, 3]
        assert r.runs == [4]


def test_what_is_held_back_is_answered_on_closing() -> None:
    with rig(max_delay_ms=1000 * SECONDS) as r:
        r.gate.open()
        future = r.batcher.submit(frame(5))
    assert answer(future) == 5


def test_pictures_are_preprocessed_while_the_engine_runs() -> None:
    with rig() as r:
        r.occupy()
        following = r.batcher.submit(frame(7))
        r.settled(queued=0)
        assert following.running() and not following.done()


def test_as_many_batches_run_at_once_as_there_are_streams() -> None:
    with rig(streams=2) as r:
        r.occupy()
        r.occupy()
        third = r.batcher.submit(frame(3))
        r.settled(queued=0)
        assert not r.gate.started.acquire(timeout=0.05)
        r.gate.open()
        assert answer(third) == 3


def test_streams_take_turns() -> None:
    with rig(max_batch=1) as r:
        first, order = r.occupy(), list[int]()
        futures = [r.batcher.submit(frame(value), stream="greedy") for value in range(5)]
        futures += [r.batcher.submit(frame(value), stream="modest") for value in (10, 11)]
        for future in futures:
            future.add_done_callback(lambda done: order.append(int(done.result().array[0])))
        r.gate.open()
        wait([first, *futures], SECONDS)
    assert order == [0, 10, 1, 11, 2, 3, 4] or order == [0, 1, 10, 2, 11, 3, 4]  # which of them were in the lane already


def test_a_caller_waits_for_room() -> None:
    with rig(max_batch=1, queue=1) as r:
        futures = [r.occupy(), r.batcher.submit(frame(1))]
        r.settled(queued=0)
        futures.append(r.batcher.submit(frame(2)))
        blocked = threading.Thread(target=lambda: futures.append(r.batcher.submit(frame(3))))
        blocked.start()
        blocked.join(0.05)
        assert blocked.is_alive()
        r.gate.open()
        blocked.join(SECONDS)
        assert [answer(future) for future in futures] == [99, 1, 2, 3]


def test_a_caller_waits_for_room_no_longer_than_its_deadline() -> None:
    with rig(max_batch=1, queue=1) as r:
        r.occupy()
        r.batcher.submit(frame(1))
        r.settled(queued=0)
        r.batcher.submit(frame(2))
        with pytest.raises(DeadlineError, match="no room"):
            r.batcher.submit(frame(3), deadline_ms=20)
        assert r.batcher.counts().rejected == 1


def test_a_caller_that_waits_for_room_is_told_of_the_end() -> None:
    raised = list[Exception]()

    def submit(r: Rig) -> None:
        try:
            r.batcher.submit(frame(3))
        except EngineError as error:
            raised.append(error)

    with rig(max_batch=1, queue=1) as r:
        r.occupy()
        r.batcher.submit(frame(1))
        r.settled(queued=0)
        r.batcher.submit(frame(2))
        blocked = threading.Thread(target=submit, args=(r,))
        blocked.start()
        blocked.join(0.05)
        closing = threading.Thread(target=r.batcher.close)
        closing.start()
        blocked.join(SECONDS)
        assert str(raised[0]) == "the batcher is closed"
        r.gate.open()
        closing.join(SECONDS)


def test_the_oldest_of_the_longest_stream_gives_way() -> None:
    with rig(max_batch=1, queue=3, policy="drop-oldest") as r:
        futures = [r.occupy(), r.batcher.submit(frame(1))]
        r.settled(queued=0)
        long = [r.batcher.submit(frame(value), stream="long") for value in (2, 3)]
        short = r.batcher.submit(frame(4), stream="short")
        newest = r.batcher.submit(frame(5), stream="short")
        with pytest.raises(QueueFullError, match="a newer request took the place"):
            long[0].result(SECONDS)
        r.gate.open()
        assert [answer(one) for one in (*futures, long[1], short, newest)] == [99, 1, 3, 4, 5]
        assert r.batcher.counts().dropped == 1


def test_one_too_many_is_rejected() -> None:
    with rig(max_batch=1, queue=1, policy="reject") as r:
        futures = [r.occupy(), r.batcher.submit(frame(1))]
        r.settled(queued=0)
        futures.append(r.batcher.submit(frame(2)))
        with pytest.raises(QueueFullError, match="1 requests are waiting already"):
            r.batcher.submit(frame(3))
        r.gate.open()
        assert [answer(future) for future in futures] == [99, 1, 2]
        assert r.batcher.counts() == Counts(submitted=3, answered=3, rejected=1, batches=3, rows=3)


def test_a_request_that_is_late_is_told_so_and_not_run() -> None:
    with rig(max_batch=1) as r:
        r.occupy()
        in_lane, in_queue = (r.batcher.submit(frame(value), deadline_ms=30) for value in (1, 2))
        in_time = r.batcher.submit(frame(3), deadline_ms=1000 * SECONDS)
        time.sleep(0.04)
        r.gate.open()
        for late in (in_lane, in_queue):
            with pytest.raises(DeadlineError, match="the deadline passed"):
                late.result(SECONDS)
        assert answer(in_time) == 3 and r.runs == [1, 1]


def test_a_request_that_is_cancelled_is_not_run() -> None:
    with rig(max_batch=1) as r:
        r.occupy()
        in_lane = r.batcher.submit(frame(1))
        r.settled(queued=0)
        in_queue = r.batcher.submit(frame(2))
        assert in_queue.cancel() and not in_lane.cancel()
        r.gate.open()
        assert answer(in_lane) == 1
    with pytest.raises(CancelledError):
        in_queue.result(0)
    assert r.runs == [1, 1] and r.batcher.counts().cancelled == 1


def test_a_request_that_was_cancelled_can_give_way() -> None:
    with rig(max_batch=1, queue=1, policy="drop-oldest") as r:
        r.occupy()
        r.batcher.submit(frame(1))
        r.settled(queued=0)
        r.batcher.submit(frame(2)).cancel()
        last = r.batcher.submit(frame(3))
        r.gate.open()
        assert answer(last) == 3
        assert (r.batcher.counts().cancelled, r.batcher.counts().dropped) == (1, 0)


def test_what_is_wrong_with_one_picture_is_told_to_its_sender_alone() -> None:
    with rig() as r:
        first = r.occupy()
        good, broken = [r.batcher.submit(frame(value)) for value in (1, 2)], r.batcher.submit(frame(BROKEN))
        r.settled(queued=0)
        wrong = r.batcher.submit(replace(frame(3), image=np.zeros((8, 8, 3))))  # type: ignore[arg-type]
        infinite = r.batcher.submit(frame(254))
        r.gate.open()
        assert [answer(one) for one in (first, *good)] == [99, 1, 2]
        for failed, why in ((broken, "a broken picture"), (wrong, "this is no picture"), (infinite, "output holds nan")):
            with pytest.raises(VitEdgeError, match=why):
                failed.result(SECONDS)
        assert r.batcher.counts().failed == 3


def test_a_request_runs_alone_though_a_larger_size_were_quicker() -> None:
    with rig() as r:
        first = r.occupy()
        good, broken = r.batcher.submit(frame(1)), r.batcher.submit(frame(BROKEN))
        r.settled(queued=0)
        for size, ms in {1: 9.0, 2: 1.0}.items():
            r.batcher._pace.note(size, ms)
            r.batcher._pace.note(size, ms)
        r.gate.open()
        assert [answer(one) for one in (first, good)] == [99, 1]
        with pytest.raises(EngineError, match="a broken picture"):
            broken.result(SECONDS)


def test_closing_answers_what_was_submitted_and_may_be_done_twice_or_by_a_callback() -> None:
    with rig(max_batch=1) as r:
        first = r.occupy()
        others = [r.batcher.submit(frame(value)) for value in range(5)]
        first.add_done_callback(lambda done: r.batcher.close())
        r.gate.open()
        assert [answer(other) for other in others] == list(range(5))
        r.batcher.close()
        with pytest.raises(EngineError, match="closed"):
            r.batcher.submit(frame(1))


def test_the_stages_of_a_request_add_up_to_the_time_from_capture_to_answer() -> None:
    with rig() as r:
        r.occupy()
        taken, done, told = frame(1), list[int](), threading.Event()
        future = r.batcher.submit(taken)
        future.add_done_callback(lambda _: (done.append(time.perf_counter_ns()), told.set()))
        time.sleep(0.03)
        r.gate.open()
        timing = future.result(SECONDS).timing
        assert told.wait(SECONDS)
    assert timing.queue_ms > 25
    assert 0 <= (done[0] - taken.captured_ns) / 1e6 - timing.total_ms < 50


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_batch": 5}, "max_batch must be 1 to 4"),
        ({"max_batch": 0}, "max_batch must be 1 to 4"),
        ({"max_delay_ms": -1.0}, "max_delay_ms must be 0 to 60000"),
        ({"max_delay_ms": 1e14}, "max_delay_ms must be 0 to 60000"),
        ({"max_delay_ms": float("nan")}, "max_delay_ms must be 0 to 60000"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"policy": "wait"}, "policy must be one of block, drop-oldest, reject"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], what: str) -> None:
    gate = Gate()
    gate.open()
    with pytest.raises(VitEdgeError, match=what):
        Batcher(Echo(gate, []), **options)


def test_an_engine_that_fails_at_once_leaves_nothing_behind() -> None:
    class Failing(Echo):
        forks: list[Echo] = []  # noqa: RUF012

        def fork(self) -> Echo:
            self.forks.append(Failing(self.gate, self.runs))
            return self.forks[-1]

        def run(self, count: int) -> NDArray[np.float32]:
            raise EngineError("no memory")

    threads = threading.active_count()
    with pytest.raises(EngineError, match="no memory"):
        Batcher(Failing(Gate(), []))
    assert [fork.closed for fork in Failing.forks] == [1, 1] and threading.active_count() == threads


class Slow(Echo):
    """Takes `each` milliseconds for each frame, and `once` for a batch."""

    once, each = 0.0, 0.0

    def run(self, count: int) -> NDArray[np.float32]:
        time.sleep((self.once + self.each * count) / 1000)
        self.runs.append(count)
        return self.input[:count, :1].astype(np.float32)

    def fork(self) -> Slow:
        return type(self)(self.gate, self.runs, self.max_batch)


@pytest.mark.parametrize(("once", "each", "quick"), [(0.0, 4.0, 1), (20.0, 0.0, 16), (16.0, 2.0, 16)])
def test_a_batch_is_no_larger_than_pays(once: float, each: float, quick: int) -> None:
    kind = type("Kind", (Slow,), {"once": once, "each": each})
    with Batcher(kind(Gate(), runs := [], 16), queue=64) as batcher:
        assert batcher._quick == quick
        runs.clear()
        few = [batcher.submit(frame(value)) for value in range(8)]
        wait(few, SECONDS)
        assert max(runs) <= quick
        many = [batcher.submit(frame(value)) for value in range(60)]
        wait(many, SECONDS)
        assert max(runs) == 16, "so many wait that throughput is all that counts"
    assert [answer(one) for one in many] == list(range(60))


def test_a_size_is_run_as_it_is_until_it_is_known_and_then_the_quickest_that_holds_it() -> None:
    pace = Pace()
    assert pace.size(5) == 5
    for size, times in {5: (90, 9, 10), 6: (50, 7), 8: (40, 8), 4: (30, 3)}.items():
        for ms in times:
            pace.note(size, ms)
    assert [pace.size(rows) for rows in (4, 5, 6, 7, 8)] == [4, 6, 6, 7, 8]
    pace.note(7, 1.0)
    assert pace.size(7) == 7, "the first run of a size allocates, and says nothing"


def test_what_cannot_be_a_request_is_refused_and_takes_nobody_s_place() -> None:
    with rig(max_batch=1, queue=1, policy="drop-oldest") as r:
        futures = [r.occupy(), r.batcher.submit(frame(1))]
        r.settled(queued=0)
        futures.append(r.batcher.submit(frame(2)))
        for given, options, what in (
            (frame(3).image, {}, "a Frame with a capture time is submitted, not ndarray"),
            (Frame(frame(3).image, 0, None), {}, "a Frame with a capture time"),  # type: ignore[arg-type]
            (frame(3), {"stream": [1]}, "stream must be hashable"),
            (frame(3), {"deadline_ms": float("nan")}, "deadline_ms must be a number"),
        ):
            with pytest.raises(VitEdgeError, match=what):
                r.batcher.submit(given, **options)  # type: ignore[arg-type]
        r.gate.open()
        assert [answer(future) for future in futures] == [99, 1, 2]
        assert answer(r.batcher.submit(frame(3), deadline_ms=float("inf"))) == 3
        assert answer(r.batcher.submit(frame(4), deadline_ms=1e15)) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_callbacks_do_ends_no_thread() -> None:
    def leave(done: Future[Prediction]) -> None:
        raise SystemExit(3)

    with rig() as r:
        first = r.occupy()
        first.add_done_callback(leave)
        settled, broken = r.batcher.submit(frame(1)), r.batcher.submit(frame(BROKEN))
        broken.add_done_callback(leave)
        r.settled(queued=0)
        settled.set_result("by the caller")  # type: ignore[arg-type]
        r.gate.open()
        assert answer(first) == 99
        assert [answer(r.batcher.submit(frame(value))) for value in range(5)] == list(range(5))


def test_a_callback_may_submit_but_does_not_wait_for_room() -> None:
    outcomes: list[object] = []

    with rig(max_batch=1, queue=1) as r:

        def again(done: Future[Prediction]) -> None:
            try:
                outcomes.append(r.batcher.submit(frame(7)))
            except QueueFullError as error:
                outcomes.append(error)

        first = r.occupy()
        in_lane = r.batcher.submit(frame(1))
        r.settled(queued=0)
        in_queue = r.batcher.submit(frame(2))
        first.add_done_callback(again)
        r.gate.open(1)
        answer(first)
        in_queue.add_done_callback(again)
        r.gate.open()
        wait([in_lane, in_queue], SECONDS)
    refused, taken = outcomes
    assert isinstance(refused, QueueFullError) and answer(taken) == 7  # type: ignore[arg-type]


def test_a_bug_in_a_thread_is_told_to_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with rig(max_batch=1) as r:
        futures = [r.occupy(), *(r.batcher.submit(frame(value)) for value in range(3))]
        monkeypatch.setattr(r.batcher._pace, "note", lambda size, ms: 1 / 0)
        r.gate.open()
        for future in futures:
            with pytest.raises(EngineError, match="a thread of the batcher failed: division by zero"):
                future.result(SECONDS)
        with pytest.raises(EngineError, match="closed"):
            r.batcher.submit(frame(1))


BUSY = """if True:
    import sys, time
    import numpy as np
    from vitedge import Batcher, Frame, open_engine
    batcher = Batcher(open_engine(sys.argv[1], streams=2))
    frame = Frame(np.zeros((1080, 1920, 3), np.uint8), 0, time.perf_counter_ns())
    futures = [batcher.submit(frame) for _ in range(60)]
    futures[0].result()
"""


def test_a_process_may_end_while_its_batcher_is_busy(made: Made) -> None:
    for _ in range(3):
        assert run_python(BUSY, made.engines["openvino", "int8"]).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_forked_process_the_batcher_says_whose_it_is(made: Made) -> None:
    code = f"""{BUSY}
    import os
    child = os.fork()
    if not child:
        try:
            batcher.submit(frame)
        except Exception as error:
            batcher.close()
            os._exit(5 if "belongs to the process" in str(error) else 6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    batcher.close()
    """
    run_python(code, made.engines["openvino", "int8"])


@pytest.mark.parametrize("streams", [1, 2])
def test_a_real_engine_answers_every_thread_as_it_answers_one(made: Made, streams: int) -> None:
    images = [decode(file.path) for file in list_images(made.images)[:16]]
    with open_engine(made.engines["openvino", "int8"], streams=streams) as engine, Batcher(engine) as batcher:
        predictor = Predictor(engine)
        wanted = [predictor(Frame(image, 0, 0)).array for image in images]
        futures: list[list[Future[Prediction]]] = [[] for _ in range(4)]

        def ask(thread: int) -> None:
            random = np.random.default_rng(thread)
            for index in random.integers(0, len(images), 100):
                futures[thread].append(batcher.submit(Frame(images[index], int(index), time.perf_counter_ns()), stream=thread))

        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        orders = [np.random.default_rng(thread).integers(0, len(images), 100) for thread in range(4)]
        for order, of_thread in zip(orders, futures, strict=True):
            for index, future in zip(order, of_thread, strict=True):
                array = future.result(SECONDS).array
                distances = [float(np.abs(array - other).max()) for other in wanted]
                assert np.argmin(distances) == index and distances[index] < 0.2
        assert batcher.counts().answered == 400
