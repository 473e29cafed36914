"""What one contender answered in, counts that can be merged in any order out.

    outputs, classes, the reference's outputs  ->  Tally  ─┐
    the same of other images                   ->  Tally  ─┴─> merge  ->  Tally  ->  Judged

Counts are integers, sums are exact (exact.py), and what has an order carries the number of its image: so the figures are the
same to the last digit however the images are spread over calls, processes and machines. Knows nothing of files.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vitedge.bench.document import Confused, Disagreement, Interval, Judged
from vitedge.bench.labels import UNKNOWN
from vitedge.bench.proportions import difference, percent, proportion
from vitedge.errors import VitEdgeError
from vitedge.exact import ExactSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

WORST = 12  # disagreements that are kept
CONFUSIONS = 200  # pairs of classes that are told at most, the most frequent ones
FLOAT32_NOISE = 2.0**-48  # noise power below this part of the signal is float32 rounding: SQNR ends at 144.5 dB


@dataclass(frozen=True, slots=True, order=True)
class Far:
    """An image, by its number, on which contender and reference are far apart; classes are UNKNOWN where there are none."""

    distance: float
    back: int  # minus the number of the image: of two that are as far apart, the earlier one is kept
    truth: int
    reference: int
    answer: int

    @property
    def image(self) -> int:
        """The number of the image."""
        return -self.back


@dataclass(slots=True)
class Tally:
    """What one contender got right of some images, and how far its outputs strayed from the reference's.

    right: for each run of images, by the number of its first, a byte for each labelled one: 1 where top-1 is right.
    both, lost, gained, neither: images labelled for both contenders that both, the reference alone, the contender alone, or
    none of them got right.
    """

    classifier: bool
    images: int = 0
    classes: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    compared: int = 0
    agreed: int = 0
    both: int = 0
    lost: int = 0
    gained: int = 0
    neither: int = 0
    signal: ExactSum = field(default_factory=ExactSum)
    noise: ExactSum = field(default_factory=ExactSum)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)
    right: dict[int, bytes] = field(default_factory=dict)
    worst: list[Far] = field(default_factory=list)

    def add(self, outputs: NDArray[np.float32], truth: NDArray[np.int64], numbers: Sequence[int]) -> NDArray[np.int8]:
        """Count outputs [n, ...] against class indices [n] (UNKNOWN: none); numbers: of the images, rising.

        Gives for each image 1 where top-1 is right, 0 where it is wrong, UNKNOWN where that is not known.
        """
        self.images += len(outputs)
        right = np.full(len(outputs), UNKNOWN, np.int8)
        if not self.classifier:
            return right
        known = truth != UNKNOWN
        rank = self._ranks(outputs[known], truth[known])
        right[known] = rank < 1
        self.labelled += len(rank)
        self.top1 += int((rank < 1).sum())
        self.top5 += int((rank < 5).sum())
        wrong = right == 0
        self.confusion.update(zip(truth[wrong].tolist(), outputs[wrong].argmax(-1).tolist(), strict=True))
        if len(rank):
            self.right[numbers[0]] = right[known].tobytes()
        return right

    def compare(
        self,
        outputs: NDArray[np.float32],
        reference: NDArray[np.float32],
        truth: NDArray[np.int64],
        numbers: Sequence[int],
    ) -> None:
        """Hold outputs [n, ...] against those of the reference for the same images; of another shape they say nothing."""
        if reference.shape != outputs.shape:
            return
        self.compared += len(outputs)
        signal, noise = _power(reference), _power(np.subtract(reference, outputs, dtype=np.float64))
        for of_signal, of_noise in zip(signal, noise, strict=True):
            self.signal.add(of_signal)
            self.noise.add(of_noise)
        if self.classifier:
            answers, expected = outputs.argmax(-1), reference.argmax(-1)
            self.agreed += int((answers == expected).sum())
            distances = 1 - _probabilities(outputs, expected)
            differing = np.flatnonzero(answers != expected)
        else:
            answers = expected = np.full(len(outputs), UNKNOWN)
            distances = noise / np.maximum(signal, np.finfo(np.float64).tiny)
            differing = np.flatnonzero(noise)
        far = [
            Far(float(distances[i]), -numbers[i], int(truth[i]), int(expected[i]), int(answers[i])) for i in differing.tolist()
        ]
        self.worst = heapq.nlargest(WORST, [*self.worst, *far])

    def pair(self, right: NDArray[np.int8], of_reference: NDArray[np.int8]) -> None:
        """Count what `add` gave for the same images here and of the reference, where both are known."""
        known = (right != UNKNOWN) & (of_reference != UNKNOWN)
        here, there = right[known] == 1, of_reference[known] == 1
        self.both += int((here & there).sum())
        self.lost += int((~here & there).sum())
        self.gained += int((here & ~there).sum())
        self.neither += int((~here & ~there).sum())

    def merge(self, other: Tally) -> None:
        """Take in the counts of other images."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.classes = max(self.classes, other.classes)
        self.signal.merge(other.signal)
        self.noise.merge(other.noise)
        self.confusion.update(other.confusion)
        self.right.update(other.right)
        self.worst = heapq.nlargest(WORST, [*self.worst, *other.worst])

    def judged(self, worst: tuple[Disagreement, ...] = ()) -> Judged:
        """The counts as percent and dB."""
        drop, interval = self._drop()
        frequent = sorted(self.confusion.items(), key=lambda entry: (-entry[1], entry[0]))[:CONFUSIONS]
        return Judged(
            images=self.images,
            labelled=self.labelled,
            top1=percent(self.top1, self.labelled),
            top1_interval=proportion(self.top1, self.labelled),
            top5=percent(self.top5, self.labelled) if self.classes > 5 else None,
            agreement=percent(self.agreed, self.compared) if self.classifier else None,
            sqnr_db=sqnr_db(float(self.signal), float(self.noise)),
            drop=drop,
            drop_interval=interval,
            confusion=tuple(Confused(truth, answer, images) for (truth, answer), images in frequent),
            worst=worst,
            right=_hexadecimal(b"".join(self.right[number] for number in sorted(self.right))),
        )

    def _ranks(self, logits: NDArray[np.float32], truth: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many classes are more likely than the true one, for each image."""
        self.classes = logits.shape[-1]
        if len(truth) and truth.max() >= self.classes:
            raise VitEdgeError(
                f"an image is of class {truth.max()}, but the engine knows {self.classes} classes, 0 to {self.classes - 1}"
            )
        own = np.take_along_axis(logits, truth[:, None], axis=-1)
        tied_before = (logits == own) & (np.arange(self.classes) < truth[:, None])  # as argmax, which takes the first
        rank: NDArray[np.int64] = ((logits > own) | tied_before).sum(-1)
        return rank

    def _drop(self) -> tuple[float | None, Interval | None]:
        """Points lost against the reference: of top-1, or of agreement where there are no labels."""
        count = self.both + self.lost + self.gained + self.neither
        if count:
            return 100 * (self.lost - self.gained) / count, difference(self.both, self.lost, self.gained, self.neither)
        if not self.classifier or not self.compared or self.labelled:
            return None, None
        differing = self.compared - self.agreed
        return percent(differing, self.compared), proportion(differing, self.compared)


COUNTS = ("images", "labelled", "top1", "top5", "compared", "agreed", "both", "lost", "gained", "neither")


def sqnr_db(signal: float, noise: float) -> float | None:
    """The power of a signal over that of a noise in dB, at most what float32 can tell; None where there is no signal."""
    return 10 * math.log10(signal / max(noise, signal * FLOAT32_NOISE)) if signal else None


def _hexadecimal(right: bytes) -> str:
    """Four bytes of 0 or 1 a digit, the first the highest; missing ones at the end are 0."""
    return np.packbits(np.frombuffer(right, np.uint8)).tobytes().hex()[: -(-len(right) // 4)]


def _power(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of squares of each image's output."""
    power: NDArray[np.float64] = np.square(outputs, dtype=np.float64).reshape(len(outputs), -1).sum(axis=1)
    return power


def _probabilities(logits: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of one class for each image, by softmax."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = np.take_along_axis(powers, classes[:, None], -1)[:, 0] / powers.sum(-1)
    return probabilities
