"""Real images in, statistics of the activations of a model out: in this process, or in parts wherever they are wanted.

    model + images -> {tensor name: float32[1, ...]} of image number 0, 1, ...  ->  Survey.add    ->  statistics
                                      statistics of some + of other images      ->  Survey.merge  ->  statistics of all

A Survey must not care for the order of images: what it counts are integers, maxima and exact sums. Then the statistics are the
same to the last bit however the images are spread. Knows nothing of what is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from onnx import ModelProto, load_model_from_string

from vitedge.compiler.activations import Activations, Probe
from vitedge.errors import ImageError, VitEdgeError
from vitedge.images import ImageFile, decoded

S = TypeVar("S")


class Survey(Protocol[S]):
    """What is asked of the activations; plain data, for workers in other processes."""

    @property
    def tensors(self) -> Sequence[str]:
        """The tensors that are looked at."""

    def fresh(self) -> S:
        """The statistics of no image."""

    def add(self, statistics: S, number: int, activations: Activations) -> None:
        """Take in image number `number` of all."""

    def merge(self, statistics: S, others: S) -> None:
        """Take in the statistics of other images."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Of some images. done: how many there were. skipped: by number, a sentence on each that could not be decoded."""

    done: int
    statistics: Any
    skipped: dict[int, str]


# gives the findings of all images in parts, in any order
Spread = Callable[[ModelProto, Survey[Any], Sequence[ImageFile]], Iterator[Findings]]


def conduct(
    model: ModelProto,
    survey: Survey[S],
    files: Sequence[ImageFile],
    progress: Callable[[], object],
    spread: Spread | None = None,
) -> tuple[S, list[str]]:
    """The statistics of all images that can be decoded, and a sentence on each that cannot be.

    progress: called once an image. spread: who looks at which part of the images, by default this process at all. A NaN or an
    infinity is a ModelError that names the tensor and the image; no image that can be decoded is a VitEdgeError.
    """
    if spread is None:
        found = look(Probe(model, survey.tensors), survey, files, 0, progress)
        statistics, skipped = found.statistics, found.skipped
    else:
        statistics, skipped = survey.fresh(), {}
        for part in spread(model, survey, files):
            survey.merge(statistics, part.statistics)
            skipped |= part.skipped
            for _ in range(part.done):
                progress()
    sentences = [skipped[number] for number in sorted(skipped)]
    if len(sentences) == len(files):
        reason = f"; the first: {sentences[0]}" if sentences else ""
        raise VitEdgeError(f"none of {len(files)} images could be decoded{reason}")
    return statistics, sentences


def open_stored(model: bytes, survey: Survey[Any]) -> Probe:
    """A serialized model, opened on one thread for the tensors of a survey."""
    return Probe(load_model_from_string(model), survey.tensors, threads=1)


def look(
    probe: Probe,
    survey: Survey[S],
    files: Sequence[ImageFile],
    first: int,
    progress: Callable[[], object] = lambda: None,
) -> Findings:
    """What a survey finds in `files`, of which the first is number `first` of all."""
    statistics, skipped = survey.fresh(), dict[int, str]()
    for number, (file, image) in enumerate(decoded(files), first):
        if isinstance(image, ImageError):
            skipped[number] = str(image)
        else:
            survey.add(statistics, number, probe.run(image, file))
        progress()
    return Findings(len(files), statistics, skipped)
