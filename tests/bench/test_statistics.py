"""Intervals against what they promise: the figure of another run lies within."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from vitedge.bench.document import Interval
from vitedge.bench.statistics import LEAST, median_interval, speedup
from vitedge.errors import VitEdgeError

RUNS, ROUNDS = 120, 60
Noise = Callable[[np.random.Generator], NDArray[np.float64]]  # gives logarithms of the times of ROUNDS rounds


def white(random: np.random.Generator) -> NDArray[np.float64]:
    return random.normal(0, 0.03, ROUNDS)


def drifting(random: np.random.Generator) -> NDArray[np.float64]:
    """Each round remembers half of the one before it."""
    steps, value, values = random.normal(0, 0.02, ROUNDS), random.normal(0, 0.03), []
    for step in steps:
        value = 0.5 * value + step
        values.append(value)
    return np.array(values)


def spiky(random: np.random.Generator) -> NDArray[np.float64]:
    """Now and then another process takes half of the machine."""
    return random.normal(0, 0.01, ROUNDS) + 0.7 * (random.random(ROUNDS) < 0.2)


@pytest.mark.parametrize("noise", [white, drifting, spiky])
def test_nine_of_ten_pairs_of_runs_lie_within_each_others_interval(noise: Noise) -> None:
    random = np.random.default_rng(0)
    runs = [speedup(3 * np.exp(noise(random)), np.exp(noise(random))) for _ in range(RUNS)]
    pairs = list(itertools.combinations(runs, 2))
    held = sum(inside(one, theirs) and inside(other, mine) for (one, mine), (other, theirs) in pairs)
    assert held / len(pairs) >= 0.9
    assert np.median([value for value, _ in runs]) == pytest.approx(3, rel=0.02)
    assert np.mean([interval.high / interval.low for _, interval in runs]) < 1.2, "an interval that says nothing is no feat"


OPENINGS = 8


def opened_elsewhere(random: np.random.Generator) -> NDArray[np.float64]:
    """Logarithms of the times of ROUNDS rounds, some percent of which are those of where an engine lay in memory."""
    return np.repeat(random.normal(0, 0.03, OPENINGS), ROUNDS // OPENINGS) + random.normal(0, 0.01, ROUNDS // OPENINGS * OPENINGS)


def test_the_interval_knows_that_openings_differ() -> None:
    random = np.random.default_rng(5)
    openings = [ROUNDS // OPENINGS] * OPENINGS
    every = [np.exp(opened_elsewhere(random)) for _ in range(RUNS)]
    runs = [speedup(np.ones(len(times)), times, openings=openings) for times in every]
    pairs = list(itertools.combinations(runs, 2))
    held = sum(inside(one, theirs) and inside(other, mine) for (one, mine), (other, theirs) in pairs)
    assert held / len(pairs) >= 0.9
    alone = [speedup(np.ones(openings[0]), times[: openings[0]]) for times in every]
    fooled = sum(inside(one, theirs) and inside(other, mine) for (one, mine), (other, theirs) in itertools.combinations(alone, 2))
    assert fooled / len(pairs) < 0.6, "one opening does not tell what the next one finds"


def inside(value: float, interval: Interval) -> bool:
    return interval.low <= value <= interval.high


def test_what_slows_both_cancels() -> None:
    mood = np.exp(np.linspace(0, 1, ROUNDS))  # the machine gets slower all the while
    times = np.exp(white(np.random.default_rng(1)))
    value, interval = speedup(2 * mood * times, mood * times)
    assert value == pytest.approx(2)
    assert interval.low == pytest.approx(2 * np.exp(-LEAST)) and interval.high == pytest.approx(2 * np.exp(LEAST))
    alone = median_interval(mood)
    assert alone.high / alone.low > 1.5, "the median of a drifting machine is not known well, however smooth it drifts"


def test_the_interval_shrinks_with_the_rounds_and_grows_with_disturbance() -> None:
    random = np.random.default_rng(2)
    few, many = random.normal(0, 0.05, 20), random.normal(0, 0.05, 2000)
    narrow, wide = (median_interval(np.exp(values)) for values in (many, few))
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3
    rough = median_interval(np.exp(few), disturbed=1.0)
    assert np.log(rough.high / rough.low) == pytest.approx(2 * np.log(wide.high / wide.low))


def test_the_same_rounds_give_the_same_interval() -> None:
    times = np.exp(white(np.random.default_rng(3)))
    assert median_interval(times) == median_interval(times)


@pytest.mark.parametrize("count", [2, 5, 7, 11, 23])
def test_few_rounds_give_a_wide_interval_around_the_figure(count: int) -> None:
    times = np.random.default_rng(4).uniform(1.0, 1.1, count)
    interval = median_interval(times)
    assert interval.low < np.median(times) < interval.high


def test_one_round_gives_none() -> None:
    with pytest.raises(VitEdgeError, match="two rounds"):
        median_interval([1.0])
