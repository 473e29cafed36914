"""Exact sums against fractions, in any order and from any parts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vitedge.exact import ExactSum


def test_a_sum_is_the_exact_one_rounded_once() -> None:
    random = np.random.default_rng(0)
    arrays = random.normal(size=(60, 5)) * 10.0 ** random.integers(-30, 30, (60, 5))
    found = ExactSum()
    for array in arrays:
        found.add(array)
    expected = [float(sum(map(Fraction, column), Fraction())) for column in arrays.T.tolist()]
    assert found.value.tolist() == expected
    assert np.add.reduce(arrays).tolist() != expected  # else this proves little


@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_parts_change_a_bit(seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = random.normal(size=(50, 4)) * 10.0 ** random.integers(-12, 12, (50, 4))
    expected = ExactSum()
    for array in arrays:
        expected.add(array)
    parts = [ExactSum() for _ in range(4)]
    for array in random.permutation(arrays):
        parts[random.integers(4)].add(array)
    total = ExactSum()
    for part in parts:
        total.merge(part)
    assert total.value.tobytes() == expected.value.tobytes()


def test_a_sum_of_one_kind_of_numbers_stays_small() -> None:
    found = ExactSum()
    for array in np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32):
        found.add(np.square(array, dtype=np.float64))
    assert len(found._parts) <= 5


def test_nothing_sums_to_zero_and_numbers_are_arrays_too() -> None:
    assert float(ExactSum()) == 0
    found = ExactSum()
    for number in (1e100, 1.0, -1e100):
        found.add(number)
    assert float(found) == 1
