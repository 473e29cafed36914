"""Medians of rounds in, intervals out that hold from run to run, also where a machine drifts.

    rounds of one candidate            ->  interval of its median
    rounds of it and of the reference  ->  their ratio, round by round, and its interval

The calls within a round share what the machine did in that moment, and neighbouring rounds share much of it: so what is drawn
again and again are blocks of neighbouring rounds (the circular block bootstrap of Politis and Romano, 1992). An interval is as
wide as it takes for the figure of *another* run of the same length to lie in it with 95 % confidence, and so by the square
root of 2 wider than one for the true value. Knows nothing of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitedge.bench.document import Interval
from vitedge.errors import VitEdgeError

DRAWS = 2000
BLOCKS = 10  # that rounds are cut into: as long as can be, so that a drift over many rounds shows between them
SEED = 0
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's, for so many blocks
NORMAL_95 = 1.96
ANOTHER_RUN = math.sqrt(2)  # two runs differ by this much more than one from the truth
LEAST = 0.002  # of the figure: what no interval is narrower than, as memory lies elsewhere in each process


def median_interval(rounds_ms: Sequence[float]) -> Interval:
    """Where the median over the rounds of another run would lie."""
    low, high = _interval(np.log(np.asarray(rounds_ms, np.float64)))
    return Interval(math.exp(low), math.exp(high))


def speedup(reference_ms: Sequence[float], given_ms: Sequence[float]) -> tuple[float, Interval]:
    """How many times as fast as the reference: the median of the rounds' ratios, and where that of another run would lie.

    Both have as many rounds, and round i of both was measured within the same seconds: what slowed both is in neither.
    """
    ratios = np.log(np.asarray(reference_ms, np.float64)) - np.log(np.asarray(given_ms, np.float64))
    low, high = _interval(ratios)
    return math.exp(float(np.median(ratios))), Interval(math.exp(low), math.exp(high))


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """About the median of logarithms, in order of time."""
    middle, count = float(np.median(values)), len(values)
    length = math.ceil(count / BLOCKS)
    blocks = math.ceil(count / length)
    if blocks < 2:
        raise VitEdgeError(f"an interval takes two rounds at least, not {count}")
    starts = np.random.default_rng(SEED).integers(0, count, (DRAWS, blocks, 1))
    drawn = values[(starts + np.arange(length)) % count].reshape(DRAWS, -1)[:, :count]
    spread = np.percentile(np.median(drawn, axis=1), (2.5, 97.5)) - middle
    # Of few blocks, the bootstrap knows the spread too well by these two factors.
    wider = ANOTHER_RUN * T_95[min(blocks, 10)] / NORMAL_95 * math.sqrt(blocks / (blocks - 1))
    return middle + min(-LEAST, wider * float(spread[0])), middle + max(LEAST, wider * float(spread[1]))
