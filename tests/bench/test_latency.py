"""Turns, samples and percentiles; no test asserts how long anything took."""

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


def test_engines_take_turns_and_the_order_is_reversed_each_round() -> None:
    log: list[tuple[str, int]] = []
    engines = [Recorder(name, log) for name in "ABC"]
    measure(engines, 2, seconds=0, warmup=3)

    names = "".join(name for name, _ in log)
    turn = 1 + latency.TURN_CALLS  # one call is not counted
    rounds = latency.MIN_SAMPLES // latency.TURN_CALLS
    forth, back = ("".join(name * turn for name in order) for order in ("ABC", "CBA"))
    expected = "".join(back if i % 2 else forth for i in range(rounds))
    assert names == "ABC" + "AAABBBCCC" + expected
    assert {count for _, count in log} == {2}


def test_no_engine_has_fewer_calls_than_a_percentile_needs() -> None:
    for result in measure([Recorder("a", []), Recorder("b", [])], 1, seconds=0):
        assert result.samples_ms.shape == (latency.MIN_SAMPLES,)
        assert result.samples_ms.dtype == np.float64
        assert (result.samples_ms >= 0).all()
        assert result.first_ms >= 0


def test_the_time_is_for_each_engine() -> None:
    for result in measure([Recorder("a", []), Recorder("b", [])], 1, seconds=0.005):
        assert result.samples_ms.sum() >= 5


def test_percentiles_are_numpys_and_the_rate_counts_all_time() -> None:
    samples = np.random.default_rng(0).gamma(2.0, size=137)
    result = Latency(8, samples, 3.0)
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
