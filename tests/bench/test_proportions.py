"""Intervals against published values, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from vitedge.bench.document import Interval
from vitedge.bench.proportions import difference, difference_of_samples, exact_difference, percent, proportion


def test_wilson_equals_newcombes_example() -> None:
    """81 of 263: 0.2553 to 0.3662 in table I of Newcombe, "Two-sided confidence intervals for the single proportion", 1998."""
    found = proportion(81, 263)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(25.53, abs=0.005), pytest.approx(36.62, abs=0.005))


def test_a_difference_equals_newcombes_example() -> None:
    """Method 10 for 36, 12, 2 and 0 of 50, in table II of the paper that the docstring names."""
    found = difference(36, 12, 2, 0)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(5.69, abs=0.01), pytest.approx(34.04, abs=0.01))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.86, 0.04, 0.03, 0.07])
    held = 0
    for table in random.multinomial(1000, shares, 400):
        found = difference(*map(int, table))
        assert found is not None
        held += found.low <= 1.0 <= found.high
    assert 370 <= held <= 398  # 95 % of 400 are 380


def test_no_images_have_no_proportion() -> None:
    assert (percent(0, 0), proportion(0, 0), difference(0, 0, 0, 0)) == (None, None, None)


def test_a_perfect_score_is_not_certain() -> None:
    alike, perfect = difference(1000, 0, 0, 0), proportion(100, 100)
    assert perfect is not None and perfect.low < 97 and perfect.high == 100
    assert alike is not None and -0.5 < alike.low < 0 < alike.high < 0.5


def test_the_exact_interval_is_clopper_and_pearsons() -> None:
    """Of 10 of 20: 27.20 % to 72.80 %, of 0 of 10: 0 to 30.85 %, as any table says."""
    even, none = exact_difference(10, 10, 20), exact_difference(0, 10, 100)
    assert (even.low, even.high) == (pytest.approx(-45.60, abs=0.01), pytest.approx(45.60, abs=0.01))
    assert (none.low, none.high) == (-10.0, pytest.approx(10 * (2 * 0.3085 - 1), abs=0.01))
    assert exact_difference(0, 0, 100) == Interval(0, 0)


def test_two_samples_differ_as_newcombe_found() -> None:
    """56 of 70 less 48 of 80: 0.0524 to 0.3339 by method 10 in table II of "Interval estimation for the difference", 1998."""
    found = difference_of_samples(100 * 56 / 70, 70, 100 * 48 / 80, 80)
    assert (found.low, found.high) == (pytest.approx(5.24, abs=0.01), pytest.approx(33.39, abs=0.01))
