"""Counts, rates and quantiles of many answers, in bounded memory."""

from __future__ import annotations

import math
import time

import numpy as np

from vitedge.runtime.tally import MEASURED, RECENT, Spread, Tally
from vitedge.specs import Frame, Prediction, Timing


def test_quantiles_are_right_to_a_percent_and_memory_is_bounded() -> None:
    values = np.random.default_rng(0).lognormal(3, 1, 20_000)
    spread = Spread()
    for value in values:
        spread.add(float(value))
    for part in (0.01, 0.5, 0.9, 0.99, 1.0):
        assert math.isclose(spread.quantile(part), float(np.quantile(values, part, method="inverted_cdf")), rel_tol=0.01)
    assert len(spread._counts) < 1500


def test_durations_of_nothing_or_less_are_counted_too() -> None:
    spread = Spread()
    assert math.isnan(spread.quantile(0.5))
    for ms in (0.0, -3.0, 1e9):
        spread.add(ms)
    assert spread.quantile(0.5) < 0.01 and math.isclose(spread.quantile(1), 1e9, rel_tol=0.01)


def test_a_tally_counts_rates_and_stages() -> None:
    tally = Tally()
    assert (tally.rate, tally.rate_now, tally.lately(), tally.latest) == (0.0, 0.0, {}, None)
    for index in range(2 * RECENT):
        timing = Timing(1.0, 2.0, float(index), 4.0, 5.0)
        frame = Frame(np.zeros((1, 1, 3), np.uint8), index, time.perf_counter_ns() - 10_000_000)
        latency_ms = tally.add(frame, Prediction((("a", 1.0),), np.zeros(1, np.float32), timing))
        assert 10 <= latency_ms < 1000
        time.sleep(0.002)
    assert tally.processed == 2 * RECENT and tally.latest is not None
    assert 0 < tally.rate < 500 and 0 < tally.rate_now < 500
    lately = tally.lately()
    assert tuple(lately) == MEASURED and lately["capture"] == 1.0 and lately["queue"] == 5.0
    assert lately["infer"] == RECENT + (RECENT - 1) / 2
    assert lately["latency"] >= 10
