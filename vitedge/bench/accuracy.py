"""Engines and image files in, accuracies out, in one pass over the files.

    [engine, ...] + [ImageFile, ...]  ->  judge  ->  one Accuracy an engine

Each file is decoded once, prepared once for all engines with the same input contract, and gone when it is scored. The
first engine is the reference that the others are compared with. Knows nothing of backends, files on disk or reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import ImageFile, labels_of, stream
from vitedge.preprocess import write_input
from vitedge.specs import ModelCard, PixelFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vitedge.backends import Session
    from vitedge.runtime.engine import Engine

UNKNOWN = -1  # the class of an image without a usable label
FLOAT32_NOISE = 2.0**-48  # noise power below this part of the signal is float32 rounding: SQNR ends at 144.5 dB


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one engine did. Percent and dB; None = cannot be known from these images, this task or this output shape.

    images: scored; top1 and top5 are of those with a known class. top5: of more than five classes only.
    agreement: images with the same top-1 as the reference, of classifiers.
    sqnr_db: 10 log10 of the power of the reference's output over that of the difference, all images together.
    Of the reference itself agreement and sqnr_db are None.
    """

    images: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None


def judge(
    engines: Sequence[Engine],
    files: Sequence[ImageFile],
    *,
    notes: list[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Accuracy]:
    """Run every engine on every file and compare with the files' labels and with the first engine.

    notes: receives sentences on what did not stop the judging: labels that do not fit the model, files that were skipped.
    progress: called with the number of files finished so far.
    Raises VitEdgeError where no file can be decoded, EngineError where an output is not finite.
    """
    skipped: list[str] = []
    problems: list[str] = []
    classes = [_classes(engine.manifest.card, files, problems) for engine in engines]
    tallies = [_Tally(engine.manifest.card.task == "classify") for engine in engines]
    done = 0
    for folders in _filled(engines, files, skipped):
        reference = None
        for engine, known, tally in zip(engines, classes, tallies, strict=True):
            outputs = _finite_outputs(engine, len(folders))
            tally.add(outputs, np.array([known.get(folder or "", UNKNOWN) for folder in folders]), reference)
            reference = outputs if reference is None else reference
        done += len(folders)
        if progress:
            progress(done + len(skipped))
    if progress:
        progress(len(files))
    if notes is not None:
        notes += [*problems, *skipped]
    return [tally.accuracy() for tally in tallies]


class Recording:
    """A Session that runs an engine once and then answers from memory: a reference for one candidate after another.

    Whoever calls `judge` again with it must `rewind` first, and give the same files.
    """

    def __init__(self, engine: Engine) -> None:
        self.input, self.streams = engine.input, engine.streams
        self._engine, self._position = engine, 0
        self._answers: list[NDArray[np.float32]] = []

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of the engine's input."""
        self._engine.write(row, picture, pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The engine's answer to what was in `input` at this call of the first time."""
        if self._position == len(self._answers):
            self._answers.append(self._engine.run(count).copy())
        self._position += 1
        return self._answers[self._position - 1]

    def rewind(self) -> None:
        """Begin again with the first answer."""
        self._position = 0

    def fork(self) -> Session:
        """The engine once more, which records nothing."""
        return self._engine.fork()

    def close(self) -> None:
        """The engine belongs to whoever opened it."""


def match_labels(folders: Sequence[str], card: ModelCard) -> dict[str, int]:
    """The class index of each folder name that has one.

    A name is a label of the model exactly, or but for case, spaces, hyphens and underscores; where no name is, and all are
    whole numbers, they are class indices. A name that fits two labels is left out. Raises VitEdgeError where none fits.
    """
    found = {**_matches(folders, card.labels, _loose), **_matches(folders, card.labels, str)}  # an exact name goes first
    count = len(card.labels) or (card.outputs[0].shape[-1] if card.outputs else None)
    if not found and all(re.fullmatch("[0-9]+", folder) for folder in folders):
        found = {folder: int(folder) for folder in folders if count is None or int(folder) < count}
    if not found:
        indices = f"class index, 0 to {count - 1}" if count else "class index"
        raise VitEdgeError(
            f"the image folders ({_some(folders)}) match none of the labels of {card.name} ({_some(card.labels)})",
            hint=f"name the folders like the labels or by {indices}; until then there is no top-1",
        )
    return found


def sqnr_db(signal: float, noise: float) -> float | None:
    """The power of a signal over that of a noise in dB, at most what float32 can tell; None where there is no signal."""
    return 10 * math.log10(signal / max(noise, signal * FLOAT32_NOISE)) if signal else None


def _classes(card: ModelCard, files: Sequence[ImageFile], problems: list[str]) -> dict[str, int]:
    """Folder name -> class index for one model; folders without one are told to `problems`, once a model."""
    folders = labels_of(files)
    if card.task != "classify" or not folders:
        return {}
    try:
        found = match_labels(folders, card)
        strangers = [folder for folder in folders if folder not in found]
        problem = f"{card.name} has no label for {_some(strangers)}: their images do not count for top-1" if strangers else ""
    except VitEdgeError as error:
        found, problem = {}, f"{error}: {error.hint}"
    if problem and problem not in problems:
        problems.append(problem)
    return found


def _filled(engines: Sequence[Engine], files: Sequence[ImageFile], skipped: list[str]) -> Iterator[list[str | None]]:
    """Fill the buffers of all engines with the same images, batch by batch; gives the folder names of the rows."""
    size = min((engine.max_batch for engine in engines), default=1)
    alike: dict[Any, list[Engine]] = {}
    for engine in engines:
        alike.setdefault((engine.manifest.card.preprocess, engine.manifest.card.patch), []).append(engine)
    folders: list[str | None] = []
    for file, image in stream(files, skipped):
        for first, *others in alike.values():
            row = first.input[len(folders)]
            write_input(image, first.manifest.card, row)
            for other in others:
                other.input[len(folders)] = row
        folders.append(file.label)
        if len(folders) == size:
            yield folders
            folders = []
    if folders:
        yield folders


def _finite_outputs(engine: Engine, count: int) -> NDArray[np.float32]:
    outputs = engine.run(count)
    if not np.isfinite(outputs).all():
        raise EngineError(
            f"{engine.path} answers with values that are not finite numbers",
            hint="something overflows: does the fp32 engine do so too?",
        )
    return outputs


class _Tally:
    """What one engine got right so far, and how far its outputs strayed from the reference's."""

    def __init__(self, classifier: bool) -> None:
        self.classifier = classifier
        self.images = self.labelled = self.top1 = self.top5 = self.agreed = self.compared = self.classes = 0
        self.signal = self.noise = 0.0

    def add(self, outputs: NDArray[np.float32], truth: NDArray[np.int64], reference: NDArray[np.float32] | None) -> None:
        """Count outputs [n, ...] against class indices [n] (UNKNOWN: none) and the reference's outputs, None for its own."""
        self.images += len(outputs)
        if self.classifier:
            self._add_ranks(outputs, truth)
        if reference is None or reference.shape != outputs.shape:
            return
        self.compared += len(outputs)
        self.signal += float(np.square(reference, dtype=np.float64).sum())
        self.noise += float(np.square(np.subtract(reference, outputs, dtype=np.float64)).sum())
        if self.classifier:
            self.agreed += int((outputs.argmax(-1) == reference.argmax(-1)).sum())

    def _add_ranks(self, logits: NDArray[np.float32], truth: NDArray[np.int64]) -> None:
        self.classes = logits.shape[-1]
        if truth.max() >= self.classes:
            raise VitEdgeError(
                f"an image is of class {truth.max()}, but the engine knows {self.classes} classes, 0 to {self.classes - 1}"
            )
        logits, truth = logits[truth != UNKNOWN], truth[truth != UNKNOWN]
        own = np.take_along_axis(logits, truth[:, None], axis=-1)
        tied_before = (logits == own) & (np.arange(self.classes) < truth[:, None])  # as argmax, which takes the first
        rank = ((logits > own) | tied_before).sum(-1)
        self.labelled += len(truth)
        self.top1 += int((rank < 1).sum())
        self.top5 += int((rank < 5).sum())

    def accuracy(self) -> Accuracy:
        """The counts as percent and dB."""
        return Accuracy(
            images=self.images,
            top1=_percent(self.top1, self.labelled),
            top5=_percent(self.top5, self.labelled) if self.classes > 5 else None,
            agreement=_percent(self.agreed, self.compared) if self.classifier else None,
            sqnr_db=sqnr_db(self.signal, self.noise),
        )


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _matches(folders: Sequence[str], labels: Sequence[str], form: Callable[[str], str]) -> dict[str, int]:
    """Index of the one label whose `form` is that of the folder, for the folders that have one."""
    indices: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        indices.setdefault(form(label), []).append(index)
    return {folder: at[0] for folder in folders if len(at := indices.get(form(folder), [])) == 1}


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *["..."][: len(names) > 3]]) or "it has none"
