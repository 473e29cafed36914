"""Counts in, proportions and differences of them with 95 % intervals out, in percent.

    one sample                         ->  proportion
    two answers to the same images     ->  difference; exact_difference, for verdicts that must not err on few images
    two samples of images              ->  difference_of_samples

All intervals are computed from the counts alone, so they neither draw random numbers nor collapse to a point where every image,
or none, is right. Knows nothing of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vitedge.bench.document import Interval

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations
DOUBT = 0.025  # that a figure is beyond its interval, on one side
PRECISE = 1e-9  # of a probability


def percent(part: int, whole: int) -> float | None:
    """`part` of `whole`; None of nothing."""
    return 100 * part / whole if whole else None


def proportion(part: int, whole: int) -> Interval | None:
    """Where the proportion lies that `part` of `whole` are a sample of (Wilson, 1927); None of nothing."""
    return Interval(*(100 * limit for limit in _wilson(part, whole))) if whole else None


def difference(both: int, first: int, second: int, neither: int) -> Interval | None:
    """Where the difference of two proportions lies that were found on the same images: of the first, less of the second.

    both, first, second, neither: how many images were right for both, for one alone, for none. Newcombe's tenth method ("Improved
    confidence intervals for the difference between binomial proportions based on paired data", 1998). None of no images.
    """
    count = both + first + second + neither
    if not count:
        return None
    p, q = (both + first) / count, (both + second) / count
    (p_low, p_high), (q_low, q_high) = _wilson(both + first, count), _wilson(both + second, count)
    phi = _correlation(both, first, second, neither)
    below = math.sqrt(max((p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2, 0))
    above = math.sqrt(max((p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2, 0))
    return Interval(100 * (p - q - below), 100 * (p - q + above))


def exact_difference(first: int, second: int, images: int) -> Interval:
    """As `difference`, of `images` (at least one) of which `first` and `second` were right for one alone: never too narrow.

    Of those that only one has right, which part the first one has (Clopper and Pearson, 1934): as exact as McNemar's exact test.
    """
    share = 100 * (first + second) / images
    low, high = _clopper_pearson(first, first + second)
    return Interval(share * (2 * low - 1), share * (2 * high - 1))


def difference_of_samples(first: float, first_images: int, second: float, second_images: int) -> Interval:
    """Where the difference of two percentages of different images lies: of the first, less of the second (Newcombe, 1998)."""
    p, q = (
        proportion(round(value * images / 100), images) or Interval(0, 100)
        for value, images in ((first, first_images), (second, second_images))
    )
    below, above = math.hypot(first - p.low, q.high - second), math.hypot(p.high - first, second - q.low)
    return Interval(first - second - below, first - second + above)


def _wilson(part: int, whole: int) -> tuple[float, float]:
    share, z2 = part / whole, Z * Z / whole
    middle = (share + z2 / 2) / (1 + z2)
    reach = Z / (1 + z2) * math.sqrt(share * (1 - share) / whole + z2 / (4 * whole))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Phi of the table of four, corrected for continuity."""
    norm = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    product = float(both * neither - first * second)
    if product > 0:
        product = max(product - (both + first + second + neither) / 2, 0.0)
    return product / norm if norm else 0.0


def _clopper_pearson(part: int, whole: int) -> tuple[float, float]:
    """Where the share lies that `part` of `whole` are a sample of, 0 to 1; of nothing, a half."""
    if not whole:
        return 0.5, 0.5
    low = 0.0 if part == 0 else _root(lambda p: _at_least(part, whole, p) - DOUBT)
    high = 1.0 if part == whole else _root(lambda p: DOUBT - (1 - _at_least(part + 1, whole, p)))
    return low, high


def _at_least(part: int, whole: int, p: float) -> float:
    """The probability of `part` or more successes in `whole` tries of probability p."""
    if not 0 < p < 1:
        return float(p >= 1 or part == 0)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, whole + 1)))])  # of the factorials
    hits = np.arange(part, whole + 1)
    terms = logs[whole] - logs[hits] - logs[whole - hits] + hits * math.log(p) + (whole - hits) * math.log1p(-p)
    return min(1.0, float(np.exp(terms).sum()))


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises between 0 and 1 crosses zero."""
    low, high = 0.0, 1.0
    while high - low > PRECISE:
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
