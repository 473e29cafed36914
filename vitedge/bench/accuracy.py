"""Contenders and image files in, what each of them answered out, in one pass over the files.

    [contender, ...] + [ImageFile, ...]  ->  judge_parts  ->  a Part for every PART files  ->  judge  ->  one Judged a contender

Each file is decoded once, prepared once for all contenders with the same input contract, and gone when it is scored. The
first contender is the reference that the others are compared with. A contender is an engine, or whatever else has its name,
card, input, max_batch and run. Knows nothing of backends, clusters or reports.

Batches are composed within a part and never across two, and parts always begin at the same files: the last bits of a product
may depend on how many rows it has. So whoever judges which part, the same answers are counted, and tallies merge exactly.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vitedge.bench.document import Disagreement, Judged
from vitedge.bench.labels import UNKNOWN, known_classes
from vitedge.bench.tally import Far, Tally
from vitedge.errors import EngineError, ImageError, VitEdgeError, first_line
from vitedge.images import ImageFile, decode, decoded, jpeg
from vitedge.preprocess import write_input
from vitedge.specs import ModelCard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vitedge.runtime.engine import Engine

PART = 64  # files that are judged, and sent to a worker, as one: few enough that a few hundred images keep several busy
PICTURE_SIDE = 96  # pixels of the longer side of a picture in a report
PICTURE_BYTES = 3000  # of its JPEG at most; base64 makes 4000 of them


class Judgeable(Protocol):
    """What can be judged: an engine, or a model on some runtime. See runtime/engine.py for what the members mean."""

    @property
    def name(self) -> str:
        """Unlike that of any other contender."""

    @property
    def card(self) -> ModelCard:
        """What the model is and how it is fed."""

    @property
    def max_batch(self) -> int:
        """The largest batch it takes."""

    @property
    def input(self) -> NDArray[Any]:
        """[max_batch, ...], to write rows into."""

    def run(self, count: int) -> NDArray[np.float32]:
        """The answers to the first `count` rows of `input`; float32[count, ...], valid until the next run."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the parts of one judging have in common; plain data, for workers in other processes.

    names: of all contenders. those: which of them are judged, the reference first. classes: label -> class index, for each of
    those. batch: how many images are answered at once. isolate: whether a contender that fails is left out, instead of raising.
    part: how many files are judged as one.
    """

    names: tuple[str, ...]
    those: tuple[int, ...]
    classes: tuple[Mapping[str, int], ...]
    batch: int
    isolate: bool
    part: int


@dataclass(frozen=True, slots=True)
class Part:
    """What was counted of some files.

    done: files that are counted or skipped. tallies: by contender. failed: by contender, why. skipped: by the number of the
    first file, a sentence for each that could not be decoded. failing: whether the reference failed, so that nothing counts.
    """

    done: int
    tallies: dict[int, Tally]
    failed: dict[int, str]
    skipped: dict[int, tuple[str, ...]]
    failing: bool = False


Spread = Callable[[Case, Sequence[ImageFile]], Iterator[Part]]  # gives the parts of all files, in any order


def judge(
    contenders: Sequence[Judgeable],
    files: Sequence[ImageFile],
    *,
    notes: list[str] | None = None,
    progress: Callable[[int], None] | None = None,
    failed: dict[str, str] | None = None,
    spread: Spread | None = None,
) -> list[Judged]:
    """Run every contender on every file and compare with the files' labels and with the first contender.

    notes: receives sentences on what did not stop the judging: labels that do not fit the model, files that were skipped.
    progress: called with the number of files finished so far. failed: receives the name of each contender that raises, or whose
    answers are not finite, with the reason; its Judged is that of no image, and where it was the reference, the next one is.
    Without `failed` that is raised: an EngineError where an output is not finite. spread: who judges the parts, by default this
    process. Raises VitEdgeError where no file can be decoded.
    """
    problems: list[str] = []
    classes = [known_classes(contender.card, files, problems) for contender in contenders]
    batch = min([PART, *(contender.max_batch for contender in contenders)])
    names = tuple(contender.name for contender in contenders)
    reasons: dict[int, str] = {}
    total = Part(0, {}, {}, {})
    while those := tuple(index for index in range(len(contenders)) if index not in reasons):
        case = Case(names, those, tuple(classes[index] for index in those), batch, failed is not None, PART)
        parts = spread(case, files) if spread else judge_parts(contenders, case, files)
        total = _total(case, contenders, parts, progress)
        reasons.update(total.failed)
        if not total.failing:
            break
    skipped = [sentence for number in sorted(total.skipped) for sentence in total.skipped[number]]
    if len(skipped) == len(files):
        reason = f"; the first: {skipped[0]}" if skipped else ""
        raise VitEdgeError(f"none of {len(files)} images could be decoded{reason}")
    if progress:
        progress(len(files))
    if notes is not None:
        notes += [*problems, *skipped]
    if failed is not None:
        failed.update({contenders[index].name: reasons[index] for index in sorted(reasons)})
    counted = {index: tally for index, tally in total.tallies.items() if index not in reasons}
    pictures = _Pictures(files)
    return [
        counted[index].judged(tuple(pictures.shown(far, contender.card) for far in counted[index].worst))
        if index in counted
        else Judged(0)
        for index, contender in enumerate(contenders)
    ]


def judge_parts(contenders: Sequence[Judgeable], case: Case, files: Sequence[ImageFile], first: int = 0) -> Iterator[Part]:
    """Judge `files`, of which the first is number `first` of all, a multiple of `case.part`; gives a Part for that many."""
    images = decoded(files)
    failed: dict[int, str] = {}
    for start in range(0, len(files), case.part):
        count = min(case.part, len(files) - start)
        sitting = _Sitting(contenders, case, failed)
        yield sitting.judge(first + start, itertools.islice(images, count))
        if case.those[0] in failed:  # all others were held against what does not count
            break


def _total(case: Case, contenders: Sequence[Judgeable], parts: Iterator[Part], progress: Callable[[int], None] | None) -> Part:
    """All parts as one, up to the first in which the reference failed."""
    total = Part(0, {index: Tally(contenders[index].card.task == "classify") for index in case.those}, {}, {})
    for part in parts:
        total.failed.update({index: why for index, why in part.failed.items() if index not in total.failed})
        if part.failing:
            return Part(total.done, {}, total.failed, {}, failing=True)
        for index, tally in part.tallies.items():
            total.tallies[index].merge(tally)
        total = Part(total.done + part.done, total.tallies, total.failed, total.skipped | part.skipped)
        if progress:
            progress(total.done)
    return total


class _Sitting:
    """One part of the files before all contenders."""

    def __init__(self, contenders: Sequence[Judgeable], case: Case, failed: dict[int, str]) -> None:
        self.contenders, self.case, self.failed = contenders, case, failed
        self.tallies = {index: Tally(contenders[index].card.task == "classify") for index in case.those}

    def judge(self, first: int, images: Iterator[tuple[ImageFile, NDArray[np.uint8] | ImageError]]) -> Part:
        """Answer and count the images, of which the first is number `first`."""
        labels, numbers, skipped, done = list[str | None](), list[int](), list[str](), 0
        for number, (file, image) in enumerate(images, first):
            done += 1
            if isinstance(image, ImageError):
                skipped.append(str(image))
                continue
            self._fill(len(labels), image)
            labels.append(file.label)
            numbers.append(number)
            if len(labels) == self.case.batch:
                self._answer(labels, numbers)
                labels, numbers = [], []
            if self._failing():
                break
        if labels and not self._failing():
            self._answer(labels, numbers)
        tallies = {index: tally for index, tally in self.tallies.items() if index not in self.failed}
        return Part(done, tallies, dict(self.failed), {first: tuple(skipped)} if skipped else {}, self._failing())

    def _fill(self, row: int, image: NDArray[np.uint8]) -> None:
        """Write an image into the buffers of all contenders that are still in, prepared once for those that are fed alike."""
        prepared: dict[Any, NDArray[Any]] = {}
        for index in self.case.those:
            if index in self.failed:
                continue
            with self._isolated(index):
                card, own = self.contenders[index].card, self.contenders[index].input[row]
                alike = (card.preprocess, card.patch)
                if alike in prepared:
                    own[...] = prepared[alike]
                else:
                    write_input(image, card, own)
                    prepared[alike] = own

    def _answer(self, labels: Sequence[str | None], numbers: Sequence[int]) -> None:
        """Run all contenders on the rows that are filled, and count."""
        reference = None
        for index, classes in zip(self.case.those, self.case.classes, strict=True):
            if index in self.failed:
                continue
            with self._isolated(index):
                outputs = _finite_outputs(self.contenders[index], len(labels))
                truth = np.array([classes.get(label or "", UNKNOWN) for label in labels])
                right = self.tallies[index].add(outputs, truth, numbers)
                if reference is None:
                    reference = outputs, right
                    continue
                self.tallies[index].compare(outputs, reference[0], truth, numbers)
                self.tallies[index].pair(right, reference[1])

    @contextmanager
    def _isolated(self, index: int) -> Iterator[None]:
        """Where a contender may fail alone, remember why."""
        try:
            yield
        except Exception as error:  # whatever a runtime raises
            if not self.case.isolate:
                raise
            self.failed[index] = first_line(error)

    def _failing(self) -> bool:
        """Whether the reference failed, so that nothing else counts."""
        return self.case.those[0] in self.failed


def _finite_outputs(contender: Judgeable, count: int) -> NDArray[np.float32]:
    outputs = contender.run(count)
    if not np.isfinite(outputs).all():
        raise EngineError(
            f"{contender.name} answers with values that are not finite numbers",
            hint="something overflows: does the fp32 engine do so too?",
        )
    return outputs


class _Pictures:
    """Small pictures of files, each decoded once more and made once."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.files = files
        self.made: dict[int, str] = {}

    def shown(self, far: Far, card: ModelCard) -> Disagreement:
        """An image on which a model of `card` is far from the reference, as a report shows it."""
        file = self.files[far.image]
        truth = _label(card, far.truth) or file.label or ""
        picture = self._picture(far.image)
        return Disagreement(file.name, truth, _label(card, far.reference), _label(card, far.answer), far.distance, picture)

    def _picture(self, number: int) -> str:
        """A JPEG, base64; "" of a file that is gone by now."""
        if number not in self.made:
            try:
                content = jpeg(decode(self.files[number]), PICTURE_SIDE, PICTURE_BYTES)
            except ImageError:
                content = b""
            self.made[number] = base64.b64encode(content).decode()
        return self.made[number]


def _label(card: ModelCard, index: int) -> str:
    """What a model calls a class; the index where it has no names, "" of no class."""
    if index == UNKNOWN:
        return ""
    return card.labels[index] if index < len(card.labels) else str(index)


class Recording:
    """A contender that runs an engine once and then answers from memory: a reference for one candidate after another.

    Whoever calls `judge` again with it must `rewind` first, and give the same files.
    """

    def __init__(self, engine: Engine) -> None:
        self.name, self.card, self.max_batch = engine.name, engine.card, engine.max_batch
        self.input = engine.input
        self._engine, self._position = engine, 0
        self._answers: list[NDArray[np.float32]] = []

    def run(self, count: int) -> NDArray[np.float32]:
        """The engine's answer to what was in `input` at this call of the first time."""
        if self._position == len(self._answers):
            self._answers.append(self._engine.run(count).copy())
        self._position += 1
        return self._answers[self._position - 1]

    def rewind(self) -> None:
        """Begin again with the first answer."""
        self._position = 0
