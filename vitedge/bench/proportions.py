"""Counts in, proportions with 95 % intervals out, in percent.

Both intervals are computed from the counts alone, so they neither draw random numbers nor collapse to a point where every image,
or none, is right. Knows nothing of images.
"""

from __future__ import annotations

import math

from vitedge.bench.document import Interval

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


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
