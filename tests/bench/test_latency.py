"""Turns, samples and percentiles; no test asserts how long anything took."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vitedge.bench import latency
from vitedge.bench.latency import Lane, Latency, Turn, measure, take_turn
from vitedge.errors import VitEdgeError


def lane(name: str, log: list[str] | None = None) -> Lane:
    """A call that writes its name into a shared log."""
    log = [] if log is None else log
    return Lane(name, (lambda: log.append(name),))


@pytest.fixture(autouse=True)
def shortest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURN_S", 0.0)
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)


def test_lanes_take_turns_and_the_order_is_reversed_each_round() -> None:
    log: list[str] = []
    measure([lane(name, log) for name in "ABC"], seconds=0, warmup=3)

    turn = 1 + latency.TURN_CALLS  # one call is not counted
    rounds = latency.MIN_SAMPLES // latency.TURN_CALLS
    forth, back = ("".join(name * turn for name in order) for order in ("ABC", "CBA"))
    expected = "".join(back if i % 2 else forth for i in range(rounds))
    assert "".join(log) == "AAABBBCCC" + expected


def test_no_lane_has_fewer_calls_than_a_percentile_needs() -> None:
    for result in measure([lane("a"), lane("b")], seconds=0):
        assert result is not None and result.samples_ms.shape == (latency.MIN_SAMPLES,)
        assert len(result.rounds_ms) == latency.MIN_SAMPLES // latency.TURN_CALLS
        assert result.samples_ms.dtype == np.float64
        assert (result.samples_ms > 0).all()


def test_the_time_is_for_each_lane() -> None:
    for result in measure([lane("a"), lane("b")], seconds=0.005):
        assert result is not None and result.samples_ms.sum() >= 5


def make_busy(monkeypatch: pytest.MonkeyPatch, turns: Iterable[bool]) -> None:
    """Let other processes have ten seconds of the processor in each turn that is True."""
    readings = itertools.chain.from_iterable((0.0, 10.0 * busy) for busy in turns)  # one before a turn and one after it
    monkeypatch.setattr(latency, "_others_s", lambda: next(readings))


def measured(seconds: float, log: list[str] | None = None) -> Latency:
    (result,) = measure([lane("a", log)], seconds=seconds, warmup=0)
    assert result is not None
    return result


def test_a_disturbed_turn_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    make_busy(monkeypatch, itertools.chain([False, True, True], itertools.repeat(False)))
    result = measured(0.05, log)
    assert result.disturbed == 0
    assert result.samples_ms.size == len(result.turns) * latency.TURN_CALLS
    assert len(log) == (len(result.turns) + 2) * (1 + latency.TURN_CALLS)


def test_taking_again_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    make_busy(monkeypatch, itertools.repeat(True))
    result = measured(0.001, log)
    assert result.disturbed == len(result.turns) == result.samples_ms.size // latency.TURN_CALLS
    assert len(log) > len(result.turns) * (1 + latency.TURN_CALLS)


def test_without_time_for_it_a_disturbed_turn_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    make_busy(monkeypatch, itertools.cycle([True, False]))
    result = measured(0)
    assert (len(result.turns), result.disturbed) == (5, 3)


def test_where_the_system_does_not_tell_nothing_is_disturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "STAT", tmp_path / "stat")
    result = measured(0)
    assert (len(result.turns), result.disturbed) == (5, 0)


def test_idle_time_and_our_own_are_no_disturbance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(latency, "STAT", stat)
    monkeypatch.setattr(latency.time, "process_time", lambda: 4.0)
    stat.write_text("cpu  {} {} {} 900 800 {} {} {} 0 0\ncpu0 1 2 3\n".format(*(tick * s for s in (7, 1, 2, 1, 1, 3))))
    assert latency._others_s() == 7 + 1 + 2 + 1 + 1 + 3 - 4


def turn(*streams: list[float], wall_ms: float | None = None, joules: float | None = None) -> Turn:
    return Turn(tuple(map(np.array, streams)), sum(streams[0]) if wall_ms is None else wall_ms, False, 0, joules)


def test_centiles_are_numpys_and_the_rate_counts_all_time() -> None:
    samples = np.random.default_rng(0).gamma(2.0, size=137)
    result = Latency(8, (turn(samples[:40].tolist()), turn(samples[40:].tolist())))
    assert len(result.centiles_ms) == 101
    assert [result.centiles_ms[p] for p in (0, 50, 90, 100)] == [np.percentile(samples, p) for p in (0, 50, 90, 100)]
    assert result.rounds_ms == (np.median(samples[:40]), np.median(samples[40:]))
    assert result.images_per_s == pytest.approx(137 * 8 / (samples.sum() / 1000))


def test_jitter_is_between_neighbours_of_a_stream() -> None:
    assert Latency(1, (turn([1.0, 2.0], [10.0, 10.5]), turn([30.0]))).jitter_ms == pytest.approx((1.0 + 0.5) / 2)
    assert Latency(1, (turn([30.0]),)).jitter_ms == 0


def test_power_is_known_where_all_turns_were_read() -> None:
    assert Latency(1, (turn([500.0], joules=2.0), turn([1500.0], joules=8.0))).power_w == pytest.approx(5.0)
    assert Latency(1, (turn([500.0], joules=2.0), turn([500.0]))).power_w is None


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    measure([lane("a"), lane("b")], seconds=0, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) == latency.MIN_SAMPLES // latency.TURN_CALLS


def test_no_lanes_give_no_latencies() -> None:
    assert measure([]) == []


# Streams


def test_streams_run_at_once_and_the_rate_counts_them_all() -> None:
    """Two calls that wait for each other end only if both are under way at a time."""
    meeting = threading.Barrier(2, timeout=20)
    taken = take_turn((meeting.wait, meeting.wait))
    assert [len(stream) for stream in taken.streams_ms] == [latency.TURN_CALLS] * 2
    assert taken.wall_ms >= max(stream.sum() for stream in taken.streams_ms)
    assert Latency(3, (turn([4.0], [4.0], wall_ms=6.0),)).images_per_s == pytest.approx(2 * 3 * 1000 / 6)


def test_a_stream_that_fails_does_not_leave_the_others_waiting() -> None:
    def broken() -> None:
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        take_turn((lambda: None, broken, lambda: None))


# What fails


def failing(after: int) -> Callable[[], None]:
    count = itertools.count()

    def call() -> None:
        if next(count) >= after:
            raise RuntimeError("the device is lost\nwith a long trace")

    return call


@pytest.mark.parametrize("after", [0, 5, 12])
def test_a_lane_that_fails_leaves_and_the_others_finish(after: int) -> None:
    failed: dict[str, str] = {}
    lanes = [lane("a"), Lane("broken", (failing(after),)), lane("c")]
    first, broken, last = measure(lanes, seconds=0, failed=failed)
    assert broken is None and failed == {"broken": "the device is lost"}
    assert (
        first is not None
        and last is not None
        and len(first.turns) == len(last.turns) == latency.MIN_SAMPLES // latency.TURN_CALLS
    )


def test_all_may_fail() -> None:
    failed: dict[str, str] = {}
    assert measure([Lane("x", (failing(7),))], seconds=0, failed=failed) == [None] and set(failed) == {"x"}


def test_without_a_place_for_it_the_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="the device is lost"):
        measure([lane("a"), Lane("broken", (failing(7),))], seconds=0)


# The clock


def ticking(steps: Iterator[int]) -> Callable[[], int]:
    """A clock in nanoseconds that moves by the next step each time it is asked."""
    return itertools.accumulate(steps, initial=10**18).__next__


def test_calls_in_which_the_clock_stands_still_or_goes_back_are_not_counted() -> None:
    steps = itertools.cycle([1_000_000, 0, 1_000_000, -3_600_000_000_000, 1_000_000, 2_000_000])
    taken = take_turn((lambda: None,), 0.02, clock=ticking(steps))
    assert taken.dropped > 0 and set(taken.samples_ms.tolist()) <= {1.0, 2.0}
    assert taken.wall_ms == taken.samples_ms.sum() >= 20


def test_streams_survive_a_clock_that_goes_back() -> None:
    taken = take_turn((lambda: None, lambda: None), clock=ticking(itertools.cycle([1_000_000, 1_000_000, -9_000_000])))
    assert (taken.samples_ms > 0).all() and taken.wall_ms >= max(stream.sum() for stream in taken.streams_ms)


@pytest.mark.parametrize("step", [0, -5])
def test_a_clock_that_never_moves_on_ends_in_a_sentence(step: int) -> None:
    with pytest.raises(VitEdgeError, match="the clock stood still, or went back, for 16 calls") as caught:
        take_turn((lambda: None,), 0.02, clock=ticking(itertools.repeat(step)))
    assert caught.value.hint
