"""What a batcher keeps of a frame on its way, and what became of all of them.

    Frame, stream, deadline  ->  Request with a future  ->  settled once, by an answer or an error  ->  Counts

Knows nothing of engines, queues or threads.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.specs import Frame, Prediction, Timing


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the requests: submitted = answered + failed + cancelled + late + dropped + waiting.

    failed: their picture or the engine's run. late: their deadline passed. dropped: a newer one took their place. Those that
    were rejected are not among the submitted. batches: runs of the engine; rows: requests in them.
    """

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    dropped: int = 0
    rejected: int = 0
    batches: int = 0
    rows: int = 0

    @property
    def waiting(self) -> int:
        """Requests that have no answer yet."""
        return self.submitted - self.answered - self.failed - self.cancelled - self.late - self.dropped


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The outputs of a lane's requests, float32[requests, ...], when their run began (perf_counter_ns), and what it took."""

    outputs: NDArray[np.float32]
    start_ns: int
    ms: float


@dataclass(slots=True, eq=False)
class Request:
    """A frame on its way; times of `perf_counter_ns`."""

    frame: Frame
    submitted_ns: int
    deadline_ns: int | None
    future: Future[Prediction] = field(default_factory=Future)
    begun_ns: int = 0
    prepared_ns: int = 0
    settled: bool = False

    def seconds_left(self) -> float | None:
        """Until the deadline, 0.0 where it has passed; None without one."""
        if self.deadline_ns is None:
            return None
        return min(max(0.0, (self.deadline_ns - time.perf_counter_ns()) / 1e9), threading.TIMEOUT_MAX)

    def settle(self, result: Prediction | BaseException) -> None:
        """Hand over the result. What a callback raises besides an Exception is reported as that of a thread, which lives on."""
        self.settled = True
        try:
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        except InvalidStateError:  # who waits for it has settled it
            pass
        except BaseException:  # noqa: BLE001  SystemExit and the like
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def timing(self, ran: Run, read_ms: float) -> Timing:
        """Where the time went, given the run and what reading its answers took."""
        waited_ns = self.begun_ns - self.submitted_ns + ran.start_ns - self.prepared_ns
        return Timing(
            capture_ms=(self.submitted_ns - self.frame.captured_ns) / 1e6,
            queue_ms=waited_ns / 1e6,
            preprocess_ms=(self.prepared_ns - self.begun_ns) / 1e6,
            infer_ms=ran.ms,
            postprocess_ms=read_ms,
        )


def new_request(frame: Frame, stream: Hashable, deadline_ms: float | None) -> Request:
    """A request of now, after a look at what was given."""
    now = time.perf_counter_ns()
    if not isinstance(frame, Frame) or not isinstance(frame.captured_ns, int):
        hint = "Frame(image, index, time.perf_counter_ns()) makes one of a picture"
        raise VitEdgeError(f"a Frame with a capture time is submitted, not {type(frame).__name__}", hint=hint)
    try:
        hash(stream)
    except TypeError as error:
        raise VitEdgeError(f"stream must be hashable, such as a name or number, not {stream!r}") from error
    if deadline_ms is None or deadline_ms == math.inf:
        return Request(frame, now, None)
    if not -math.inf < deadline_ms < math.inf:
        raise VitEdgeError(f"deadline_ms must be a number of milliseconds, not {deadline_ms}")
    return Request(frame, now, now + int(deadline_ms * 1e6))
