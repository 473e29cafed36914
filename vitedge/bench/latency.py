"""Calls in, latencies out: the lanes take turns, so that a machine that drifts drifts for all of them alike.

    [Lane, ...]  ->  rounds of short turns, A B, B A, A B ...  ->  one Latency a lane

A turn during which other processes had the processor is taken again, which looks at their time and never at the turn's. In a
lane of several streams so many calls are under way at a time. Knows nothing of engines, images or what is computed.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitedge.bench.document import CENTILES
from vitedge.errors import VitEdgeError, first_line

TURN_S = 0.05  # long enough to run from warm caches, short beside the seconds over which a machine heats up
TURN_CALLS = 4  # timed calls in a turn, at least; a slow engine would otherwise spend half its calls on warming up
MIN_SAMPLES = 20  # fewer make no percentile
SETTLE_S = 0.02  # before a turn: the threads of the engine before it spin for a while, looking for work
DISTURBED = 0.05  # of all cores: a turn in which others had more is disturbed
TICK_S = 0.02  # /proc/stat counts in hundredths of a second
BROKEN = 16  # calls in a row that took no time, or less: of a clock that stands still
STAT = Path("/proc/stat")

Call = Callable[[], object]
Clock = Callable[[], int]  # nanoseconds since any moment


@dataclass(frozen=True, slots=True)
class Lane:
    """What is timed: a call, or as many as run at a time, each in a thread of its own. batch: images in a call."""

    name: str
    calls: tuple[Call, ...]
    batch: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """The calls of one turn: float64[stream, calls in order], milliseconds. wall_ms: for which the turn had the machine.

    disturbed: whether other processes had a share. dropped: calls that the clock gave no time for, or a negative one.
    joules: used meanwhile, None where that cannot be read.
    """

    streams_ms: tuple[NDArray[np.float64], ...]
    wall_ms: float
    disturbed: bool
    dropped: int = 0
    joules: float | None = None

    @property
    def samples_ms(self) -> NDArray[np.float64]:
        """The calls of all streams."""
        return np.concatenate(self.streams_ms)


@dataclass(frozen=True, slots=True, eq=False)
class Latency:
    """Every timed call of one lane. openings: how many of the turns, in order, were taken before it was opened anew."""

    batch: int
    turns: tuple[Turn, ...]
    openings: tuple[int, ...] = ()

    def __add__(self, other: Latency) -> Latency:
        """The turns of both, between which it was opened anew."""
        return Latency(self.batch, self.turns + other.turns, self.openings + other.openings)

    @property
    def samples_ms(self) -> NDArray[np.float64]:
        """float64[calls] of all turns, in order."""
        return np.concatenate([turn.samples_ms for turn in self.turns])

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        """The median of each turn."""
        return tuple(float(np.median(turn.samples_ms)) for turn in self.turns)

    @property
    def centiles_ms(self) -> tuple[float, ...]:
        """The centiles 0 to 100 of all calls: the median is the 50th."""
        return tuple(np.percentile(self.samples_ms, np.arange(CENTILES)).tolist())

    @property
    def jitter_ms(self) -> float:
        """How much a call differs from the one before it in the same stream and turn, on average."""
        steps = [np.abs(np.diff(stream)) for turn in self.turns for stream in turn.streams_ms]
        every = np.concatenate(steps)
        return float(every.mean()) if every.size else 0.0

    @property
    def images_per_s(self) -> float:
        """Images finished, divided by the time of all turns, slow calls included."""
        return self.samples_ms.size * self.batch * 1000 / sum(turn.wall_ms for turn in self.turns)

    @property
    def disturbed(self) -> int:
        """Turns of which other processes had a share."""
        return sum(turn.disturbed for turn in self.turns)

    @property
    def dropped(self) -> int:
        """Calls that the clock could not time."""
        return sum(turn.dropped for turn in self.turns)

    @property
    def power_w(self) -> float | None:
        """Watts while its turns lasted; None where that cannot be read."""
        joules = [turn.joules for turn in self.turns]
        known = [one for one in joules if one is not None]
        return sum(known) / sum(turn.wall_ms for turn in self.turns) * 1000 if len(known) == len(joules) else None


def measure(
    lanes: Sequence[Lane],
    *,
    seconds: float = 3.0,
    warmup: int = 5,
    least: int = MIN_SAMPLES,
    progress: Callable[[float], object] | None = None,
    failed: dict[str, str] | None = None,
    energy: Callable[[], float | None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> list[Latency | None]:
    """Time every lane in turns, as many of each: `seconds` of timed calls, and at least `least` calls, some in each turn.

    What the calls read is timed as it is: fill it with real images first where power depends on the data (GPUs). Disturbed
    turns are taken again for up to `seconds` more a lane, then kept and counted. progress: called after each round with the
    finished part of the work, 0 to 1. failed: receives why a lane raised, whose result is None; without it, the error is
    raised. energy: joules used since it was last called. A clock that stands still is a VitEdgeError.
    """
    runners = [_Runner(lane, seconds, least, energy, clock) for lane in lanes]
    running = [runner for runner in runners if runner.tried(failed, runner.warm_up, warmup)]
    reverse = False
    while running and min(runner.finished for runner in running) < 1:
        for runner in running[::-1] if reverse else list(running):
            if not runner.tried(failed, runner.take_turn):
                running.remove(runner)
        reverse = not reverse  # A B, B A: a steady drift then costs both the same
        if progress and running:
            progress(min(runner.finished for runner in running))
    return [runner.latency() if runner in running else None for runner in runners]


def timed_turn(run: Call, seconds: float = 0.0) -> tuple[list[float], bool]:
    """Milliseconds of TURN_CALLS calls, or of as many as `seconds` hold, and whether others disturbed them."""
    turn = take_turn((run,), seconds)
    return turn.samples_ms.tolist(), turn.disturbed


def take_turn(
    calls: Sequence[Call],
    seconds: float = 0.0,
    energy: Callable[[], float | None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Turn:
    """TURN_CALLS calls of each stream, or as many as `seconds` hold.

    One call of each before them is not counted: whoever ran before had the caches.
    """
    time.sleep(SETTLE_S)
    streams = [_Stream(call, clock) for call in calls]
    if energy:
        energy()
    others, start = _others_s(), time.monotonic_ns()
    if len(streams) == 1:
        streams[0].run(seconds, lambda: None)
        wall_ms = sum(streams[0].taken_ms)
    else:
        wall_ms = _together(streams, seconds)
    joules = energy() if energy else None
    elapsed_s = (time.monotonic_ns() - start) / 1e9
    disturbed = _others_s() - others > DISTURBED * (os.cpu_count() or 1) * elapsed_s + TICK_S
    if joules is not None and elapsed_s > 0:
        joules *= wall_ms / 1000 / elapsed_s  # without the call that is not counted
    taken = tuple(np.array(stream.taken_ms) for stream in streams)
    return Turn(taken, wall_ms, disturbed, sum(stream.dropped for stream in streams), joules)


class _Stream:
    """Calls one after the other in one thread. A call to which the clock gives no time is called again and not counted."""

    def __init__(self, call: Call, clock: Clock) -> None:
        self.taken_ms: list[float] = []
        self.dropped = 0
        self.began = self.ended = 0
        self._call, self._clock = call, clock

    def run(self, seconds: float, ready: Callable[[], object]) -> None:
        """ready: called between the call that is not counted and the first that is."""
        call, clock, taken = self._call, self._clock, self.taken_ms
        call()
        ready()
        spent, least, broken = 0.0, seconds * 1000, 0
        self.began = clock()
        while len(taken) < TURN_CALLS or spent < least:
            start = clock()
            call()
            ms = (clock() - start) / 1e6
            if ms > 0:
                taken.append(ms)
                spent, broken = spent + ms, 0
            else:
                self.dropped, broken = self.dropped + 1, broken + 1
            if broken == BROKEN:
                hint = "a virtual machine may have been paused or moved; measure again, or on another clock source"
                raise VitEdgeError(f"the clock stood still, or went back, for {BROKEN} calls one after the other", hint=hint)
        self.ended = clock()


def _together(streams: Sequence[_Stream], seconds: float) -> float:
    """Run all streams at once, a thread each; the milliseconds from the first one's beginning to the last one's end."""
    gate = threading.Barrier(len(streams))

    def run(stream: _Stream) -> None:
        try:
            stream.run(seconds, gate.wait)
        except threading.BrokenBarrierError:  # another one failed, and says why
            return
        except BaseException:
            gate.abort()
            raise

    with ThreadPoolExecutor(len(streams)) as pool:
        for done in [pool.submit(run, stream) for stream in streams]:
            done.result()
    wall_ms = (max(stream.ended for stream in streams) - min(stream.began for stream in streams)) / 1e6
    return max([wall_ms, *(sum(stream.taken_ms) for stream in streams)])  # of a clock that went back in between


class _Runner:
    """The turns of one lane so far, and the time left to it for taking disturbed ones again."""

    def __init__(self, lane: Lane, seconds: float, least: int, energy: Callable[[], float | None] | None, clock: Clock) -> None:
        self._lane, self._least, self._energy, self._clock = lane, least, energy, clock
        self._turns: list[Turn] = []
        self._seconds = self._patience_s = seconds
        self._calls, self._spent_ms = 0, 0.0

    def tried(self, failed: dict[str, str] | None, action: Callable[..., None], *arguments: int) -> bool:
        """Whether `action` did not raise; if it did, `failed` says why, or without it the error is raised again."""
        try:
            action(*arguments)
        except Exception as error:
            if failed is None:
                raise
            failed[self._lane.name] = first_line(error)
        return self._lane.name not in (failed or {})

    def warm_up(self, count: int) -> None:
        """Calls that are not timed."""
        for call, _ in itertools.product(self._lane.calls, range(count)):
            call()

    def take_turn(self) -> None:
        """One turn, taken again as long as it is disturbed and there is patience."""
        turn = self._turn()
        while turn.disturbed and self._patience_s > 0:
            start = time.perf_counter()
            turn = self._turn()
            self._patience_s -= time.perf_counter() - start
        self._turns.append(turn)
        self._calls += sum(map(len, turn.streams_ms))
        self._spent_ms += turn.wall_ms

    def latency(self) -> Latency:
        """What it has had."""
        return Latency(self._lane.batch, tuple(self._turns), (len(self._turns),))

    @property
    def finished(self) -> float:
        """Which part of its calls and its time the lane has had, 0 to 1."""
        timed = self._spent_ms / 1000 / self._seconds if self._seconds > 0 else 1.0
        return min(1.0, self._calls / self._least, len(self._turns) * TURN_CALLS / self._least, timed)

    def _turn(self) -> Turn:
        return take_turn(self._lane.calls, TURN_S, self._energy, self._clock)


def _others_s() -> float:
    """Processor time, in seconds since the start, of everything but this process: other processes, the kernel, the host."""
    if not STAT.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text("ascii").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
