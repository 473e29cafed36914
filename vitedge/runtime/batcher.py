"""Frames from many threads in, a future for each, the engine run in micro-batches.

    submit(frame) ─▶ queue, fair between streams ─▶ a row of the lane that is being filled ─▶ one run a batch ─▶ futures settle

A lane is a thread with a fork of the engine, whose input it fills, runs and answers; there is one more of them than runs at
a time. One lane fills while others run, so that preprocessing overlaps inference; and it goes on to fill until the engine is
free for it, so a batch holds whatever has come by then. Under light load that is one frame, which waits for nobody and goes
through one thread. Knows nothing of cameras or files.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Protocol, get_args

import numpy as np

from vitedge.errors import DeadlineError, EngineError, QueueFullError, VitEdgeError, first_line
from vitedge.runtime.pace import Pace, quick_size
from vitedge.runtime.predictor import InferenceEngine, Predictor, elapsed_ms
from vitedge.runtime.requests import Counts, Request, Run, new_request
from vitedge.specs import Frame, Prediction

Policy = Literal["block", "drop-oldest", "reject"]
POLICIES = get_args(Policy)
Outcome = Literal["answered", "failed", "late", "dropped"]
WARM_UP = (67, 71, 3)  # a picture of no model's size, which would be copied, and too small to start threads for
FEWER = "submit fewer, or later"
MAX_DELAY_MS = 60_000.0
AT_ONCE_NS = 250_000  # of preprocessing, for which requests are taken in one go: tiny pictures take less than a turn of the lock
HELD = 0.75  # of the time to its deadline for which a request is held back at most: on a busy machine threads wake late


class ForkableEngine(InferenceEngine, Protocol):
    """What the batcher needs of an engine."""

    @property
    def streams(self) -> int: ...

    def fork(self) -> ForkableEngine:
        """The same plan with an input of its own."""

    def close(self) -> None:
        """Free what a fork holds."""


class Batcher:
    """Many callers share one engine.

    engine: it is forked and stays open when the batcher is closed. max_batch: frames in one run at most; by default what the
    engine was built for. Fewer make a batch where more gain nothing, which is measured on opening. max_delay_ms: how long a
    frame may be held back for company while the engine is free; 0 runs it at once, and batches form by themselves while the
    engine is busy. queue: how many requests may wait. policy: what happens to one more: its caller waits ("block"), the oldest
    of the longest stream gives way ("drop-oldest"), or `submit` raises QueueFullError ("reject"). top_k: as of a Predictor.
    """

    def __init__(
        self,
        engine: ForkableEngine,
        max_batch: int | None = None,
        max_delay_ms: float = 0.0,
        *,
        queue: int = 64,
        policy: Policy = "block",
        top_k: int = 5,
    ) -> None:
        self._most = _checked(engine, max_batch, max_delay_ms, queue, policy)
        self._hold_ns, self._room_for, self._policy = int(max_delay_ms * 1e6), queue, policy
        self._waiting: OrderedDict[Hashable, deque[Request]] = OrderedDict()  # by stream, whose turn is next first
        self._queued = 0
        self._counts = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
        self._pace = Pace()
        self._lanes = _open_lanes(engine, self._most, top_k)
        self._quick = quick_size(self._lanes[0].engine, self._most)
        self._slots = engine.streams  # for runs at a time
        self._filling, self._closed = False, False
        self._lock = threading.Lock()
        self._idle, self._to_fill, self._room = (threading.Condition(self._lock) for _ in range(3))
        self._ending, self._process = len(self._lanes), os.getpid()
        self._threads = [
            threading.Thread(target=self._live, args=(lane,), name="vitedge-batcher", daemon=True) for lane in self._lanes
        ]
        _open_batchers().add(self)
        for thread in self._threads:
            thread.start()

    def submit(self, frame: Frame, *, stream: Hashable = None, deadline_ms: float | None = None) -> Future[Prediction]:
        """Ask for the prediction of a frame, whose pixels must stay as they are until the future is done.

        stream: who asks; streams take turns. deadline_ms: from now; a request whose batch has not begun by then fails with
        DeadlineError. `Future.cancel` works until its picture is preprocessed. A callback of an answer runs in a thread of the
        batcher, which waits for it; it may submit, but not wait for room. Raises EngineError where the batcher is closed,
        QueueFullError and DeadlineError where there is no room. The future raises DeadlineError, QueueFullError where the
        request gave way to a newer one, or whatever its picture or the engine raised.
        """
        request = new_request(frame, stream, deadline_ms)
        if os.getpid() != self._process:
            raise EngineError("the batcher belongs to the process that this one was forked from", hint="open one here")
        with self._lock:
            given_way = self._make_room(request)
            self._waiting.setdefault(stream, deque()).append(request)
            self._queued += 1
            self._counts["submitted"] += 1
            (self._to_fill if self._filling else self._idle).notify()
        for other in given_way:
            if self._claim(other):
                self._settle("dropped", (other, QueueFullError("a newer request took the place of this one")))
        return request.future

    @property
    def capacity(self) -> int:
        """How many requests it takes to keep the engine busy: a full batch for each lane."""
        return self._most * len(self._lanes)

    def counts(self) -> Counts:
        """What became of the requests so far."""
        with self._lock:
            return Counts(**self._counts)

    def close(self, drain: bool = True) -> None:
        """Answer all that was submitted, then end; a second call does nothing. Callers that wait for room get an EngineError.

        drain: whether those that wait are answered, else they are cancelled. Called from a future's callback it does not wait
        until that is done. A batcher that nobody closes is ended with the process.
        """
        with self._lock:
            self._closed = True
            waiting = [] if drain else [request for requests in self._waiting.values() for request in requests]
            for condition in (self._idle, self._to_fill, self._room):
                condition.notify_all()
        for request in waiting:
            request.future.cancel()
        if os.getpid() != self._process:
            return  # threads do not come along into a fork
        if threading.current_thread() not in self._threads:  # a callback may close, but not wait
            for thread in self._threads:
                thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _make_room(self, request: Request) -> list[Request]:
        """Wait, or take others out, until one more may wait; those that were taken out."""
        given_way: list[Request] = []
        while not self._closed and self._queued >= self._room_for:
            if self._policy == "reject" or (self._policy == "block" and threading.current_thread() in self._threads):
                self._counts["rejected"] += 1
                raise QueueFullError(f"{self._queued} requests are waiting already", hint=FEWER)
            if self._policy == "drop-oldest":
                given_way.append(self._take(max(self._waiting, key=lambda stream: len(self._waiting[stream]))))
            elif not self._room.wait(request.seconds_left()):
                self._counts["rejected"] += 1
                raise DeadlineError("there was no room for the request before its deadline", hint=FEWER)
        if self._closed:
            raise EngineError("the batcher is closed")
        return given_way

    def _take(self, stream: Hashable) -> Request:
        """The oldest request of a stream."""
        requests = self._waiting[stream]
        request = requests.popleft()
        if not requests:
            del self._waiting[stream]
        self._queued -= 1
        return request

    def _next(self) -> Request:
        """The oldest request of the stream whose turn it is, which then goes to the end of the row."""
        stream = next(iter(self._waiting))
        self._waiting.move_to_end(stream)
        return self._take(stream)

    def _live(self, lane: _Lane) -> None:
        """Fill, run and answer, over and over; the last thread to end closes the lanes."""
        try:
            while self._fill(lane):
                ran = self._infer(lane)
                with self._lock:
                    self._slots += 1
                    self._to_fill.notify()
                if ran is not None:
                    self._read(lane, ran)
                lane.requests.clear()
        except BaseException as error:  # a bug, which nobody shall wait for in vain
            self._abandon(lane, error)
            raise
        finally:
            self._end()

    def _end(self) -> None:
        """Count a thread out; the last one closes the lanes."""
        with self._lock:
            self._ending -= 1
            if self._ending:
                return
        for lane in self._lanes:
            lane.engine.close()

    def _abandon(self, lane: _Lane, error: BaseException) -> None:
        """Close, and tell all that wait what a thread ended of."""
        with self._lock:
            self._closed, self._filling, self._slots = True, False, len(self._lanes)
            waiting = [*lane.requests, *lane.taken, *(request for requests in self._waiting.values() for request in requests)]
            self._waiting.clear()
            self._queued = 0
            for condition in (self._idle, self._to_fill, self._room):
                condition.notify_all()
        for request in waiting:
            if request.future.running() or self._claim(request):
                self._settle("failed", (request, EngineError(f"a thread of the batcher failed: {first_line(error)}")))

    def _fill(self, lane: _Lane) -> bool:
        """Preprocess one request after the other until the lane is to be run, for which it then has a slot; False at the end."""
        with self._lock:
            while self._filling or not self._queued:
                if self._closed and not self._queued:
                    return False
                self._idle.wait()
            self._filling = True
        while self._take_some(lane):
            while lane.taken:
                if self._claim(lane.taken[0]) and self._in_time(lane.taken[0]):
                    self._write(lane.taken[0], lane)
                lane.taken.popleft()
        return True

    def _take_some(self, lane: _Lane) -> bool:
        """Take the next requests for the lane that is being filled; False where it is to be run, and others may be filled."""
        with self._lock:
            while not self._due(lane):
                if self._queued and (lacking := self._enough() - len(lane.requests)) > 0:
                    lane.taken.extend(self._next() for _ in range(min(lacking, self._queued, lane.at_once)))
                    if self._queued <= self._room_for // 2:  # who waits for room is woken for more than one request
                        self._room.notify_all()
                    return True
                self._to_fill.wait(self._patience_s(lane))
            self._filling = False
            self._slots -= 1
            self._idle.notify()
            return False

    def _due(self, lane: _Lane) -> bool:
        """Whether the engine is free for the lane, and it is full or was held back for long enough."""
        if not self._slots:
            return False
        if self._closed and not self._queued:
            return True  # also of an empty lane, of which all requests were cancelled
        full = len(lane.requests) >= self._enough() or self._closed
        return bool(lane.requests) and (full or self._held_for_ns(lane) <= 0)

    def _enough(self) -> int:
        """How many requests make a batch: no more than gain something, unless so many wait that throughput is all that counts."""
        return self._most if self._queued >= self._most else self._quick

    def _patience_s(self, lane: _Lane) -> float | None:
        """How long the lane may still be held back; None while it is empty, or only a slot is missing."""
        return max(0.0, self._held_for_ns(lane) / 1e9) if lane.requests and self._slots else None

    def _held_for_ns(self, lane: _Lane) -> int:
        """How long the lane may still be held back, so that no deadline passes meanwhile."""
        until = lane.requests[0].submitted_ns + self._hold_ns
        spans = [(request.submitted_ns, request.deadline_ns) for request in lane.requests if request.deadline_ns is not None]
        return min([until, *(begin + int(HELD * (end - begin)) for begin, end in spans)]) - time.perf_counter_ns()

    def _claim(self, request: Request) -> bool:
        """Whether nobody has cancelled the request; from here on nobody can."""
        if request.future.set_running_or_notify_cancel():
            return True
        with self._lock:
            self._counts["cancelled"] += 1
        return False

    def _in_time(self, request: Request) -> bool:
        """Whether the deadline of a request is still to come; else it is settled."""
        if request.seconds_left() != 0.0:
            return True
        self._settle("late", (request, DeadlineError("the deadline passed before the batch began", hint=FEWER)))
        return False

    def _write(self, request: Request, lane: _Lane) -> None:
        request.begun_ns = time.perf_counter_ns()
        try:
            lane.engine.write(len(lane.requests), request.frame.image, request.frame.pixels)
        except Exception as error:  # noqa: BLE001  whatever is wrong with one picture is told to who sent it
            self._settle("failed", (request, error))
            return
        request.prepared_ns = time.perf_counter_ns()
        lane.at_once = AT_ONCE_NS // (request.prepared_ns - request.begun_ns + 1) or 1
        lane.requests.append(request)

    def _infer(self, lane: _Lane, size: int | None = None) -> Run | None:
        """Run a lane, at the quickest size or the given one; where that fails, each request alone. None: nothing to read."""
        wanted = [request for request in lane.requests if self._in_time(request)]
        if not wanted:
            return None
        rows = len(lane.requests)
        size = size or self._pace.size(rows)
        start = time.perf_counter_ns()
        try:
            outputs = lane.engine.run(size)
        except Exception as error:  # noqa: BLE001  whatever the engine raised is told to who waits
            self._infer_alone(lane, wanted, error)
            return None
        ran = Run(outputs[:rows], start, elapsed_ms(start))
        self._pace.note(size, ran.ms)
        with self._lock:
            self._counts["batches"] += 1
            self._counts["rows"] += rows
        return ran

    def _infer_alone(self, lane: _Lane, requests: list[Request], error: Exception) -> None:
        """Run and answer each of the requests by itself, so that only those fail that make the engine fail."""
        if len(requests) == 1:
            self._settle("failed", (requests[0], error))
            return
        for request in requests:
            alone = dataclasses.replace(lane, requests=[])
            self._write(request, alone)
            ran = self._infer(alone, size=1)  # the row behind it may hold the one that fails
            if ran is not None:
                self._read(alone, ran)

    def _read(self, lane: _Lane, ran: Run) -> None:
        """Settle the requests of a lane with the answers of its run."""
        read_ns, requests = time.perf_counter_ns(), lane.requests
        try:
            answers = lane.predictor.read(ran.outputs)
        except Exception as error:  # noqa: BLE001  as above
            if len(requests) == 1:
                self._settle("failed", (requests[0], error))
                return
            for row, request in enumerate(requests):
                alone = dataclasses.replace(lane, requests=[request])
                self._read(alone, dataclasses.replace(ran, outputs=ran.outputs[row : row + 1]))
            return
        read_ms = elapsed_ms(read_ns)
        pairs = zip(requests, answers, strict=True)
        self._settle("answered", *((request, Prediction(*answer, request.timing(ran, read_ms))) for request, answer in pairs))

    def _settle(self, outcome: Outcome, *results: tuple[Request, Prediction | BaseException]) -> None:
        """Give requests their end, and count them before anybody can see it; those that have theirs already are left alone."""
        open_results = [(request, result) for request, result in results if not request.settled]
        with self._lock:
            self._counts[outcome] += len(open_results)
        for request, result in open_results:
            request.settle(result)


@dataclasses.dataclass(slots=True, eq=False)
class _Lane:
    """A fork of the engine, the requests whose pictures are in its first rows, and those that are to follow.

    at_once: how many are taken from the queue in one go.
    """

    engine: ForkableEngine
    predictor: Predictor
    requests: list[Request] = dataclasses.field(default_factory=list)
    taken: deque[Request] = dataclasses.field(default_factory=deque)
    at_once: int = 1


def _checked(engine: ForkableEngine, max_batch: int | None, max_delay_ms: float, queue: int, policy: str) -> int:
    """The largest batch, after a look at what was asked for."""
    most = engine.max_batch if max_batch is None else max_batch
    if not 1 <= most <= engine.max_batch:
        hint = "build the engine for a larger batch (`batch` of the target)"
        raise VitEdgeError(f"max_batch must be 1 to {engine.max_batch}, for which the engine was built, not {most}", hint=hint)
    if not 0 <= max_delay_ms <= MAX_DELAY_MS:
        raise VitEdgeError(f"max_delay_ms must be 0 to {MAX_DELAY_MS:g}, not {max_delay_ms}", hint="0 holds no frame back")
    if queue < 1:
        raise VitEdgeError(f"queue must be at least 1, not {queue}", hint="64 frames of 1080p are 400 MB")
    if policy not in POLICIES:
        raise VitEdgeError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    return most


def _open_lanes(engine: ForkableEngine, most: int, top_k: int) -> list[_Lane]:
    """A lane for each stream and one to be filled meanwhile, each run once at sizes that may be compiled apart.

    And a picture, since the first one may wait for loops to be loaded, for longer than its deadline allows.
    """
    lanes: list[_Lane] = []
    with ExitStack() as opening:
        for _ in range(engine.streams + 1):
            fork = engine.fork()
            opening.callback(fork.close)
            lanes.append(_Lane(fork, Predictor(fork, top_k)))
        for lane, size in itertools.product(lanes, sorted({1, min(2, most), most})):
            lane.engine.run(size)
        lanes[0].engine.write(0, np.zeros(WARM_UP, np.uint8), "rgb")
        opening.pop_all()
    return lanes


@functools.cache
def _open_batchers() -> weakref.WeakSet[Batcher]:
    """The batchers of this process. At its end a thread that is inside an engine would crash it, so they are ended before."""
    batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()

    def end() -> None:
        for batcher in tuple(batchers):
            batcher.close(drain=False)

    atexit.register(end)
    return batchers
