"""Turns, samples and percentiles; no test asserts how long anything took."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from vitedge.bench import latency
from vitedge.bench.latency import Latency, measure
from vitedge.errors import VitEdgeError


class Recorder:
    """An engine that writes its name into a shared log whenever it runs."""

    def __init__(self, name: str, log: list[tuple[str, int]], max_batch: int = 4) -> None:
        self.path = Path(name)
        self.log = log
        self.max_batch = max_batch

    def run(self, count: int) -> None:
        self.log.append((self.path.name, count))


@pytest.fixture(autouse=True)
def shortest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURN_S", 0.0)
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)


def test_engines_take_turns_and_the_order_is_reversed_each_round() -> None:
    log: list[tuple[str, int]] = []
    engines = [Recorder(name, log) for name in "ABC"]
    measure(engines, 2, seconds=0, warmup=3)

    names = "".join(name for name, _ in log)
    turn = 1 + latency.TURN_CALLS  # one call is not counted
    rounds = latency.MIN_SAMPLES // latency.TURN_CALLS
    forth, back = ("".join(name * turn for name in order) for order in ("ABC", "CBA"))
    expected = "".join(back if i % 2 else forth for i in range(rounds))
    assert names == "AAABBBCCC" + expected
    assert {count for _, count in log} == {2}


def test_no_engine_has_fewer_calls_than_a_percentile_needs() -> None:
    for result in measure([Recorder("a", []), Recorder("b", [])], 1, seconds=0):
        assert result.samples_ms.shape == (latency.MIN_SAMPLES,)
        assert result.samples_ms.dtype == np.float64
        assert (result.samples_ms >= 0).all()


def test_the_time_is_for_each_engine() -> None:
    for result in measure([Recorder("a", []), Recorder("b", [])], 1, seconds=0.005):
        assert result.samples_ms.sum() >= 5


def make_busy(monkeypatch: pytest.MonkeyPatch, turns: Iterable[bool]) -> None:
    """Let other processes have ten seconds of the processor in each turn that is True."""
    readings = itertools.chain.from_iterable((0.0, 10.0 * busy) for busy in turns)  # one before a turn and one after it
    monkeypatch.setattr(latency, "_others_s", lambda: next(readings))


def test_a_disturbed_turn_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    make_busy(monkeypatch, itertools.chain([False, True, True], itertools.repeat(False)))
    (result,) = measure([Recorder("a", log)], 1, seconds=0.05, warmup=0)
    assert result.disturbed == 0
    assert result.samples_ms.size == result.turns * latency.TURN_CALLS
    assert len(log) == (result.turns + 2) * (1 + latency.TURN_CALLS)


def test_taking_again_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    make_busy(monkeypatch, itertools.repeat(True))
    (result,) = measure([Recorder("a", log)], 1, seconds=0.001, warmup=0)
    assert result.disturbed == result.turns == result.samples_ms.size // latency.TURN_CALLS
    assert len(log) > result.turns * (1 + latency.TURN_CALLS)


def test_without_time_for_it_a_disturbed_turn_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    make_busy(monkeypatch, itertools.cycle([True, False]))
    (result,) = measure([Recorder("a", [])], 1, seconds=0)
    assert (result.turns, result.disturbed) == (5, 3)


def test_where_the_system_does_not_tell_nothing_is_disturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "STAT", tmp_path / "stat")
    (result,) = measure([Recorder("a", [])], 1, seconds=0)
    assert (result.turns, result.disturbed) == (5, 0)


def test_idle_time_and_our_own_are_no_disturbance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(latency, "STAT", stat)
    monkeypatch.setattr(latency.time, "process_time", lambda: 4.0)
    stat.write_text("cpu  {} {} {} 900 800 {} {} {} 0 0\ncpu0 1 2 3\n".format(*(tick * s for s in (7, 1, 2, 1, 1, 3))))
    assert latency._others_s() == 7 + 1 + 2 + 1 + 1 + 3 - 4


def test_percentiles_are_numpys_and_the_rate_counts_all_time() -> None:
    samples = np.random.default_rng(0).gamma(2.0, size=137)
    result = Latency(8, samples, 9, 0)
    assert [result.p50_ms, result.p90_ms, result.p99_ms] == [np.percentile(samples, p) for p in (50, 90, 99)]
    assert result.images_per_s == pytest.approx(137 * 8 / (samples.sum() / 1000))


@pytest.mark.parametrize("batch", [0, -1, 5])
def test_a_batch_beyond_the_engine_is_refused_before_anything_runs(batch: int) -> None:
    log: list[tuple[str, int]] = []
    engines = [Recorder("large", log, 64), Recorder("small", log, 4)]
    with pytest.raises(VitEdgeError, match=f"1 to {64 if batch < 1 else 4} images at once, not {batch}") as caught:
        measure(engines, batch)
    assert caught.value.hint
    assert not log


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    measure([Recorder("a", []), Recorder("b", [])], 1, seconds=0, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) == latency.MIN_SAMPLES // latency.TURN_CALLS


def test_no_engines_give_no_latencies() -> None:
    assert measure([], 1) == []
