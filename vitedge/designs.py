"""The ways to build a model, what was found of one, and what is asked for: the nouns of a search.

    Space  ->  [Design, ...]     Design + measurement  ->  Found     Goal: what a Found is worth

Knows nothing of how designs are chosen (search.py), built (workshop.py) or measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitedge.specs import Reduction

WORST_POINTS = 10.0  # of top-1 or agreement: who loses more is worth nothing
FINE_POINTS = 0.1  # below this, points are counted linearly, above it by their logarithm
WORST_DB, BEST_DB = 6.0, 60.0  # SQNR of an output that is worth nothing, and above which more is worth nothing
SILENT = 2.0**-48  # noise of float32 rounding, as in compiler/sensitivity.py


@dataclass(frozen=True, slots=True, order=True)
class Design:
    """One way to build the model.

    freed: so many of the costliest Linears compute in float. floats: the type of all that is not INT8; "" for the recipe's.
    merged: tokens that each block merges; of several numbers, one for each block, beginning again after the last; () for none.
    size: of the image, height and width in pixels; 0 for the model's own.
    """

    recipe: str
    freed: int = 0
    floats: str = ""
    merged: tuple[int, ...] = ()
    size: int = 0

    @property
    def name(self) -> str:
        """For people."""
        parts = (
            (self.freed, f"{self.freed} Linear{'s' * (self.freed > 1)} in float"),
            (self.floats, f"floats in {self.floats}"),
            (self.merged, Reduction(merge_tokens=self.merged).suffix.replace(".merge", "merging ")),
            (self.size, f"{self.size} px"),
        )
        return ", ".join([self.recipe, *(part for given, part in parts if given)])

    @property
    def plain(self) -> Design:
        """The same at all tokens."""
        return replace(self, merged=(), size=0)


@dataclass(frozen=True, slots=True)
class Found:
    """What a trial measured.

    ratio: of its latency to the reference's, measured in turns; doubt: by how much its logarithm differs from measurement to
    measurement (a standard deviation). loss: points, or noise as a part of the signal (see Goal); spread: its standard error.
    images: that it was judged on.
    """

    design: Design
    ratio: float
    loss: float
    spread: float
    images: int
    doubt: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether a measurement can give these figures."""
        spreads = 0 <= self.spread < math.inf and 0 <= self.doubt < math.inf
        return 0 < self.ratio < math.inf and math.isfinite(self.loss) and spreads and self.images > 0


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure next: a design, and on how many images."""

    design: Design
    images: int


@dataclass(frozen=True, slots=True)
class Goal:
    """What a loss counts, and what is asked for.

    points: losses are points of top-1 or of agreement; else the energy of the noise as a part of the signal's. max_ratio,
    max_loss: what is slower, or loses more, is of little use.
    """

    points: bool
    max_ratio: float | None = None
    max_loss: float | None = None

    def worth(self, loss: float) -> float:
        """1 of what loses nothing, down to 0; equal steps are equal factors, of points as of noise."""
        if self.points:
            worth = 1 - math.log1p(max(loss, 0.0) / FINE_POINTS) / math.log1p(WORST_POINTS / FINE_POINTS)
        else:
            worth = (decibels(loss) - WORST_DB) / (BEST_DB - WORST_DB)
        return min(max(worth, 0.0), 1.0)

    def fits(self, ratio: float, loss: float) -> bool:
        """Whether it is as fast and as accurate as was asked for."""
        slow = self.max_ratio is not None and ratio > self.max_ratio
        return not slow and (self.max_loss is None or loss <= self.max_loss)


@dataclass(frozen=True, slots=True)
class Space:
    """What may be combined.

    recipes: the first is the reference; quantized: those of them that make INT8. freed, floats, merged,
    sizes: without what stands for none. tokens, blocks: of the model, at its own `size` in pixels; 0 where it is no plain ViT.
    """

    recipes: tuple[str, ...]
    quantized: frozenset[str]
    freed: tuple[int, ...] = ()
    floats: tuple[str, ...] = ()
    merged: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    tokens: int = 0
    blocks: int = 0
    size: int = 0

    @property
    def reference(self) -> Design:
        """What the others are compared with."""
        return Design(self.recipes[0])

    def designs(self) -> list[Design]:
        """All of them."""
        axes = itertools.product(self.recipes, (0, *self.freed), ("", *self.floats), ((), *self.merged), (0, *self.sizes))
        every = [Design(*point) for point in axes]
        return [one for one in every if one.recipe in self.quantized or not (one.freed or one.floats)]

    def work(self, merged: Sequence[int], size: int) -> float:
        """The part of the tokens that its blocks still see, as the mean of all blocks."""
        if not self.tokens or not self.blocks:
            return 1.0
        tokens, seen = self.tokens * ((size or self.size) / self.size) ** 2, 0.0
        for count in itertools.islice(itertools.cycle(merged or (0,)), self.blocks):
            tokens -= min(count, tokens / 2)  # half of them have a partner to merge into
            seen += tokens
        return seen / self.blocks / self.tokens


def decibels(noise: float) -> float:
    """The SQNR of a noise that is given as a part of the signal."""
    return -10 * math.log10(max(noise, SILENT))
