"""Medians of rounds in, intervals out that hold from run to run, also where a machine drifts.

    rounds of one candidate            ->  interval of its median
    rounds of it and of the reference  ->  their ratio, round by round, and its interval

The calls within a round share what the machine did in that moment, and neighbouring rounds share much of it: so what is drawn
again and again are blocks of neighbouring rounds (the circular block bootstrap of Politis and Romano, 1992). The rounds of one
opening share where the engine lay in memory, too: of several openings, their medians are a sample of their own, with Student's t.
An interval is as wide as it takes for the figure of *another* run of the same length to lie in it with 95 % confidence, and so by
the square root of 2 wider than one for the true value. Rounds that other processes disturbed tell little of what another run,
disturbed by others, will find: where all are, an interval is twice as wide. Knows nothing of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitedge.bench.document import Interval
from vitedge.errors import VitEdgeError

DRAWS = 1000
# Into how many blocks rounds are cut. Short blocks miss a drift over many rounds, and of a few long ones the spread is not known
# well: both are tried, and the wider counts.
BLOCKS = (10, 5)
SEED = 0
# Student's t of 95 %, for so many blocks.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}
ANOTHER_RUN = math.sqrt(2)  # two runs differ by this much more than one from the truth
LEAST = 0.002  # of the figure: what no interval is narrower than, as memory lies elsewhere in each process


def median_interval(rounds_ms: Sequence[float], disturbed: float = 0.0, openings: Sequence[int] = ()) -> Interval:
    """Where the median over the rounds of another run would lie.

    disturbed: the part of the rounds that others were busy in. openings: how many of the rounds, in order, belong to each.
    """
    low, high = _interval(np.log(np.asarray(rounds_ms, np.float64)), disturbed, openings)
    return Interval(math.exp(low), math.exp(high))


def speedup(
    reference_ms: Sequence[float], given_ms: Sequence[float], disturbed: float = 0.0, openings: Sequence[int] = ()
) -> tuple[float, Interval]:
    """How many times as fast as the reference: the median of the rounds' ratios, and where that of another run would lie.

    Both have as many rounds, and round i of both was measured within the same seconds: what slowed both is in neither.
    """
    ratios = np.log(np.asarray(reference_ms, np.float64)) - np.log(np.asarray(given_ms, np.float64))
    low, high = _interval(ratios, disturbed, openings)
    return math.exp(float(np.median(ratios))), Interval(math.exp(low), math.exp(high))


def _interval(values: NDArray[np.float64], disturbed: float, openings: Sequence[int]) -> tuple[float, float]:
    """About the median of logarithms, in order of time."""
    count = len(values)
    if count < 2:
        raise VitEdgeError(f"an interval takes two rounds at least, not {count}")
    lengths = {math.ceil(count / blocks) for blocks in BLOCKS}
    reaches = [_reach(values, length) for length in lengths]
    if len(openings) > 1:
        reaches.append(_reach_of_openings(values, openings))
    reach = max(LEAST, (1 + disturbed) * ANOTHER_RUN * max(reaches))
    middle = float(np.median(values))
    return middle - reach, middle + reach


def _reach(values: NDArray[np.float64], length: int) -> float:
    """How far the true median may be from that of `values`, by drawing blocks of so many neighbours."""
    count = len(values)
    blocks = max(2, math.ceil(count / length))
    starts = np.random.default_rng(SEED).integers(0, count, (DRAWS, blocks, 1))
    drawn = values[(starts + np.arange(length)) % count].reshape(DRAWS, -1)[:, :count]
    deviation = float(np.median(drawn, axis=1).std())
    return deviation * T_95[min(blocks, max(T_95))] * math.sqrt(blocks / (blocks - 1))


def _reach_of_openings(values: NDArray[np.float64], openings: Sequence[int]) -> float:
    """The same, by how the medians of the openings differ."""
    medians = [float(np.median(part)) for part in np.split(values, np.cumsum(openings)[:-1])]
    count = len(medians)
    return float(np.std(medians, ddof=1)) * T_95[min(count, max(T_95))] / math.sqrt(count)
