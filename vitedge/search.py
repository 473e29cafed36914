"""What was tried so far in, what to try next out: a search for the frontier of latency against accuracy.

    Space: recipes x Linears in float x type of the floats x merged tokens x image sizes
    {Design: Found}  ->  guess: latency and loss of every design not tried  ->  Trial: most frontier for the least time

A guess is separable: the factor by which merged tokens or a smaller image speed a model up, and the loss that they add, are
taken to be the same under every recipe. It says where to look next; what is reported is measured. Losses are measured on few
images first, and only what may still lie on the frontier is judged on more: successive halving, as in ASHA (Li et al.,
MLSys 2020, arXiv 1810.05934), ranked by dominance. Knows nothing of engines, files or clocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from vitedge.designs import SILENT, Design, Found, Goal, Space, Trial

POWER = 0.85  # latency goes with the work to this power, until it is measured
CUT_POINTS, CUT_NOISE = 8.0, 0.1  # that leaving out all tokens would lose, as the square of the part left out; likewise
HOPE_OF_FLOATS = (0.5, 1.2)  # factors of loss and of latency of floats in another type, until they are measured
HOPE = 0.8  # of the least loss seen: what an INT8 recipe not tried yet may have
OUTSIDE = 0.1  # of its gain is left to a design that misses what the user asked for
INFORMS = 0.5  # of the best gain that a trial tells more about counts as its own
NEAR = (0.9, 0.5)  # factors of latency and loss by which a guess may be too high: tried where nothing better is left
PROMISE = 0.002  # of the frontier's area: a smaller gain is not worth a trial

Stair = tuple[float, float]  # log of the speed-up, worth
Freeing = Callable[[int], tuple[float, float]]  # Linears in float -> factors of the recipe's loss and of its latency


def hopeful(freed: int) -> tuple[float, float]:
    """A Freeing of which nothing was measured: noise halves soon, and each Linear costs a little."""
    return 1 / (1 + freed / 4), 1 + 0.02 * freed


class Search:
    """What was found and refused so far, and what to do next.

    seconds: how long a trial will take. rungs: numbers of images, ascending; the first is for whatever is tried.
    required: tried before all else. freeing: what is known of freeing Linears.
    """

    def __init__(
        self,
        space: Space,
        goal: Goal,
        seconds: Callable[[Trial], float],
        rungs: Sequence[int],
        required: Sequence[Design] = (),
        freeing: Freeing = hopeful,
    ) -> None:
        self.space, self.goal, self.rungs = space, goal, tuple(rungs)
        self.found: dict[Design, Found] = {}
        self.freeing = freeing
        self._seconds = seconds
        self._required = tuple(required)
        self._open = dict.fromkeys(space.designs())

    def add(self, found: Found) -> None:
        """A trial is done."""
        self.found[found.design] = found
        self._open.pop(found.design, None)

    def refuse(self, design: Design) -> None:
        """It cannot be built: nor, where one thing alone sets it apart from a recipe, can what has more of that."""
        alike = [design]
        if design.plain == design:
            alike += [one for one in self._open if one.recipe == design.recipe and _includes(one, design)]
        elif design.plain == Design(design.recipe) and not design.size:
            alike += [one for one in self._open if one.merged]
        elif design.plain == Design(design.recipe) and not design.merged:
            alike += [one for one in self._open if one.size]
        for other in alike:
            self._open.pop(other, None)

    def next(self, left_s: float) -> Trial | None:
        """The most useful trial of those that fit into `left_s` seconds; None where none does, or none promises much."""
        for design in self._required:
            trial = Trial(design, self.rungs[0])
            if design in self._open and self._seconds(trial) <= left_s:
                return trial
        promising = self._promotion(left_s, halving=True) or self._new(left_s)
        return promising or self._promotion(left_s, halving=False) or self._new(left_s, *NEAR)

    def frontier(self) -> list[Found]:
        """What may lie on the frontier, by all that was measured, the fastest first."""
        found = sorted(self.found.values(), key=lambda one: (one.ratio, one.loss))
        return [one for one in found if not any(self._dominates(other, one) for other in found)]

    def finalists(self, limit: int) -> list[Found]:
        """What is measured at the end: the reference first, what was required, and of the frontier what adds most to it."""
        kept = [self.found[design] for design in self._required if design in self.found]
        rest = [one for one in self.frontier() if one not in kept]
        while rest and len(kept) < limit:
            best = max(rest, key=lambda one: self._gain(one.ratio, one.loss, kept))
            kept.append(best)
            rest.remove(best)
        return kept

    def guess(self, design: Design) -> tuple[float, float] | None:
        """Latency ratio and loss that a design will have; None where nothing is known of its recipe."""
        if (plain := self._plain(design.recipe)) is None:
            return None
        if (known := self.found.get(design.plain)) is not None:
            ratio, loss = known.ratio, known.loss
        else:
            less, slower = self._freed(design.recipe, design.freed, design.floats)
            ratio, loss = plain[0] * slower, max(plain[1], 0.0) * less
        factor, added = self._shrunk(design.merged, design.size, design.recipe)
        return ratio * factor, loss + added

    def _freed(self, recipe: str, freed: int, floats: str) -> tuple[float, float]:
        """The factors of loss and of latency of Linears in float, and of another type of floats."""
        plain, typed = self.found.get(Design(recipe)), self.found.get(Design(recipe, 0, floats))
        less, slower = self.freeing(freed) if freed else (1.0, 1.0)
        if floats and plain and typed:
            return less * max(typed.loss, 0.0) / max(plain.loss, SILENT), slower * typed.ratio / plain.ratio
        return (less * HOPE_OF_FLOATS[0], slower * HOPE_OF_FLOATS[1]) if floats else (less, slower)

    def _plain(self, recipe: str) -> tuple[float, float] | None:
        """Ratio and loss of a recipe alone: measured, or of an INT8 recipe not tried yet a hope."""
        if (found := self.found.get(Design(recipe))) is not None:
            return found.ratio, found.loss
        others = [one for one in self.found.values() if one.design.recipe in self.space.quantized]
        plain = [one for one in others if one.design == Design(one.design.recipe)]
        if recipe in self.space.quantized and plain:
            return min(one.ratio for one in plain), HOPE * min(max(one.loss, 0.0) for one in plain)
        return (0.7, 0.0) if self.found and recipe not in self.space.quantized else None

    def _shrunk(self, merged: tuple[int, ...], size: int, recipe: str) -> tuple[float, float]:
        """The factor of latency, and the loss added, of fewer tokens."""
        if not merged and not size:
            return 1.0, 0.0
        pairs = self._pairs(lambda one: (one.merged, one.size) == (merged, size))
        own = [pair for pair in pairs if pair[0].design.recipe == recipe] or pairs
        if own:
            factors = [math.log(one.ratio / plain.ratio) for one, plain in own]
            return math.exp(sum(factors) / len(own)), sum(one.loss - plain.loss for one, plain in own) / len(own)
        if merged and size:
            fewer, smaller = self._shrunk(merged, 0, recipe), self._shrunk((), size, recipe)
            together = self.space.work(merged, size) / self.space.work(merged, 0) / self.space.work((), size)
            return fewer[0] * smaller[0] * together**POWER, fewer[1] + smaller[1]
        cut = 1 - self.space.work(merged, size)
        along = self._pairs(lambda one: bool(one.merged) == bool(merged) and bool(one.size) == bool(size))
        if not along:
            return (1 - cut) ** POWER, cut**2 * (CUT_POINTS if self.goal.points else CUT_NOISE)
        near, plain = min(along, key=lambda pair: abs(cut - self._cut(pair[0])))
        power = math.log(near.ratio / plain.ratio) / math.log1p(-self._cut(near)) if 0 < self._cut(near) < 1 else POWER
        return (1 - cut) ** power, (near.loss - plain.loss) * (cut / max(self._cut(near), 1e-9)) ** 2  # ever worse

    def _cut(self, found: Found) -> float:
        return 1 - self.space.work(found.design.merged, found.design.size)

    def _pairs(self, which: Callable[[Design], bool]) -> list[tuple[Found, Found]]:
        """What was found of designs with fewer tokens, each with the same design at all of them."""
        pairs = [(one, one.design.plain) for one in self.found.values() if which(one.design)]
        return [(one, self.found[plain]) for one, plain in pairs if plain != one.design and plain in self.found]

    def _new(self, left_s: float, faster: float = 1.0, better: float = 1.0) -> Trial | None:
        """The design not tried yet that promises most for its time. faster, better: factors on what is guessed."""
        stairs = self._stairs((one.ratio, one.loss) for one in self.found.values())
        gains = {}
        for design in self._ready():
            guess = self.guess(design)
            gains[design] = self._gain_over(stairs, guess[0] * faster, guess[1] * better) if guess else math.inf
        if not gains or max(gains.values()) < PROMISE * max(_area(stairs), PROMISE):
            return None
        told: dict[tuple[tuple[int, ...], int], float] = {}
        for design, gain in gains.items():
            fewer = (design.merged, design.size)
            told[fewer] = max(told.get(fewer, 0.0), gain)
        known = {(one.merged, one.size) for one in self.found}
        best, trial = 0.0, None
        for design, gain in gains.items():
            fewer = (design.merged, design.size)
            value = gain + (INFORMS * told[fewer] if fewer not in known else 0.0)
            candidate = Trial(design, self.rungs[0])
            seconds = self._seconds(candidate)
            if seconds <= left_s and value / seconds > best:
                best, trial = value / seconds, candidate
        return trial

    def _ready(self) -> list[Design]:
        """What is open, and combines nothing that can be tried apart and was not."""
        seen, left = ({(bool(one.merged), bool(one.size)) for one in some} for some in (self.found, self._open))
        together = all(apart in seen or apart not in left for apart in ((True, False), (False, True)))
        plain = [one for one in self._open if one == Design(one.recipe) or Design(one.recipe) in self.found]
        return [one for one in plain if together or not (one.merged and one.size)]

    def _promotion(self, left_s: float, *, halving: bool) -> Trial | None:
        """The next of the frontier to judge on more images. halving: only while half of those on its rung stay behind."""
        frontier = [one for one in self.frontier() if one.design != self.space.reference]
        for level in reversed(range(len(self.rungs) - 1)):
            there = [one for one in self.found.values() if one.images >= self.rungs[level]]
            ahead = [one for one in there if one.images >= self.rungs[level + 1]]
            waiting = [one for one in frontier if self.rungs[level] <= one.images < self.rungs[level + 1]]
            if not waiting or (halving and len(ahead) >= len(there) // 2):
                continue
            rest = list(self.found.values())
            best = max(waiting, key=lambda one: self._gain(one.ratio, one.loss, [o for o in rest if o is not one]))
            trial = Trial(best.design, self.rungs[level + 1])
            if self._seconds(trial) <= left_s:
                return trial
        return None

    def _dominates(self, other: Found, one: Found) -> bool:
        """Whether `other` is no slower and surely better, or surely faster and no worse."""
        if other is one:
            return False
        # Losses on the same images err the same way, ratios to the same reference likewise: half of both errors is doubt enough.
        doubt, loss = (other.doubt + one.doubt) / 2, (other.spread + one.spread) / 2
        better = other.ratio <= one.ratio and self.goal.worth(other.loss + loss) > self.goal.worth(one.loss)
        return better or (math.log(one.ratio / other.ratio) > doubt and other.loss <= one.loss)

    def _gain(self, ratio: float, loss: float, found: Iterable[Found]) -> float:
        """The area that a point adds to the frontier of `found`, a little of it where it misses the goal."""
        return self._gain_over(self._stairs((one.ratio, one.loss) for one in found), ratio, loss)

    def _gain_over(self, stairs: Sequence[Stair], ratio: float, loss: float) -> float:
        more = _area([*stairs, *self._stairs([(ratio, loss)])]) - _area(stairs)
        return more if self.goal.fits(ratio, loss) else OUTSIDE * more

    def _stairs(self, points: Iterable[tuple[float, float]]) -> list[Stair]:
        """The logarithm of how many times as fast as the reference, and the worth, of each point that no other beats."""
        stairs = sorted(((-math.log(ratio), self.goal.worth(loss)) for ratio, loss in points if ratio < 1), reverse=True)
        tops = itertools.accumulate((worth for _, worth in stairs), max, initial=0.0)
        return [stair for stair, top in zip(stairs, tops, strict=False) if stair[1] > top]


def _area(stairs: Iterable[Stair]) -> float:
    """What lies below the frontier."""
    area = height = 0.0
    for speed, worth in sorted(stairs, reverse=True):  # the fastest first: each adds what rises above all that are faster
        area += max(worth - height, 0.0) * speed
        height = max(height, worth)
    return area


def _includes(one: Design, part: Design) -> bool:
    """Whether `one` frees at least what `part` frees."""
    return one.freed >= part.freed and part.floats in ("", one.floats)
