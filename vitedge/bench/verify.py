"""Two forms of a model and images in, how far apart they are out, from end to end and Linear by Linear.

    image ─┬─> reference ─> tensors ─┬─> energies of signal and noise ─> SQNR, cosine, ...
           └─> given     ─> tensors ─┘

Images go through one by one and are summed up in float64, so memory does not grow with their number. Of two ONNX files,
every Linear is compared whose output has one name in both: `sqnr_db` is what the given model has lost on the way up to there,
and `own_db` what it loses in that Linear itself, the reference's being fed what the given one gets. Where a rewrite gave that
input another meaning, both start from the nearest tensors before it that have one name in both graphs. Other pairs are
compared from end to end. Knows nothing of terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitedge.bench.sides import Run, Side, one_sentence
from vitedge.bench.tally import sqnr_db
from vitedge.errors import ModelError, VitEdgeError
from vitedge.images import ImageFile, stream
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.specs import to_dict

if TYPE_CHECKING:
    from vitedge.compiler.layers import Layer, Stretch

Array = NDArray[Any]
Values = Mapping[str, Array]  # by tensor name


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """One Linear in both graphs. None = not known: there is no signal.

    name: the torch module. tensor: that was compared. sqnr_db: of all layers up to here. own_db: of this layer alone, and of
    the Linears `within`, where a rewrite changed what lies between them and this one.
    """

    name: str
    tensor: str
    sqnr_db: float | None
    own_db: float | None
    within: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """How far `given` is from `reference` on the answers to all images together, and where between ONNX files it got there.

    sqnr_db: power of the reference over that of the difference; None of a reference that is zero. worst_db: that of the
    image it is lowest for. cosine: of the angle between them. largest: absolute difference. agreement: percent of images
    with the same top-1, of classifiers. layers: in the order of the flow. unmatched: Linears that could not be compared.
    """

    given: str
    reference: str
    images: int
    sqnr_db: float | None
    worst_db: float | None
    worst_image: str
    cosine: float | None
    largest: float
    agreement: float | None
    layers: tuple[LayerLoss, ...]
    unmatched: tuple[str, ...]


class Energies:
    """What all values of one tensor amount to, in both forms, in one pass."""

    def __init__(self) -> None:
        self.arrays = 0
        self.signal = self.noise = self.power = self.product = self.largest = 0.0

    def add(self, given: Array, reference: Array) -> None:
        """Take in two arrays of one shape."""
        self.arrays += 1
        a, b = given.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        self.signal += float(b @ b)
        self.power += float(a @ a)
        self.product += float(a @ b)
        a -= b
        self.noise += float(a @ a)
        self.largest = max(self.largest, float(np.abs(a).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float | None:
        """10 log10 of signal over noise; None before any signal."""
        return sqnr_db(self.signal, self.noise)

    @property
    def cosine(self) -> float | None:
        """1 for the same direction; None where one of the two is zero."""
        norms = math.sqrt(self.signal) * math.sqrt(self.power)
        return min(1.0, self.product / norms) if norms else None


def verify(
    given: Side,
    reference: Side,
    files: Sequence[ImageFile],
    *,
    notes: list[str] | None = None,
    progress: Callable[[float], object] = lambda fraction: None,
) -> Verification:
    """Run both on every file and compare their answers, and between ONNX files their Linears.

    notes: receives a sentence on each file that cannot be decoded. progress: called with the finished part, 0 to 1.
    Sides that answer different questions, values that are not finite (with the name of the image) and no image that can be
    decoded are VitEdgeErrors.
    """
    _require_alike(given, reference)
    inside, answers = _Inside(given, reference), _Answers(given, reference)
    skipped: list[str] = []
    for file, image in stream(files, skipped):
        answers.add(*inside.run(image, file), file)
        progress((answers.images + len(skipped)) / len(files))
    if notes is not None:
        notes += skipped
    return answers.verification(inside)


def check_sqnr(found: Verification, least: float) -> None:
    """Raise a VitEdgeError if the answers are further apart than `least` dB allow."""
    if found.sqnr_db is None or not found.sqnr_db >= least:  # a limit that is NaN allows nothing
        value = "not known, since the reference is zero" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
        raise VitEdgeError(
            f"the SQNR of {found.given} against {found.reference} is {value}, below the {least:g} dB that --min-sqnr asks for",
            hint="compare the two ONNX files, and name the layers that lose most under `skip` in the recipe",
        )


def _require_alike(given: Side, reference: Side) -> None:
    """Raise a VitEdgeError if the two are not meant to give one answer to one image."""
    ours, theirs = ({"task": side.card.task, **to_dict(side.card.preprocess)} for side in (given, reference))
    differing = [f"{key} is {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise VitEdgeError(
            f"{given.name} and {reference.name} are not two forms of one model: {', '.join(differing)}",
            hint="give the same model twice; for a torch model, --preprocess FILE.toml says how its images are prepared",
        )


class _Inside:
    """Runs both sides and, where both are graphs, sums up what happens between an image and the answers."""

    def __init__(self, given: Side, reference: Side) -> None:
        self.given, self.reference = given, reference
        ours, theirs = _layers(given, reference)
        alike = {(layer.name, layer.output, layer.shape) for layer in ours}
        self.layers = [layer for layer in theirs if (layer.name, layer.output, layer.shape) in alike]
        self.names = list(dict.fromkeys(layer.name for layer in (*theirs, *ours)))
        self.sums = {layer.output: Energies() for layer in self.layers}
        self.own = {layer.output: Energies() for layer in self.layers}
        known = _known(given, reference)
        self.stretches = _stretches(reference, self.layers, known)
        begins = (name for stretch in self.stretches for name in stretch.inputs if name != _entry(reference))
        self._outputs = list(self.sums)
        self._tensors = list(dict.fromkeys([*begins, *self._outputs]))
        self._runs = given.open(self._tensors), reference.open(self._outputs)
        self._rerun = _open_stretches(reference, self.stretches, known)

    def run(self, image: NDArray[np.uint8], file: ImageFile) -> tuple[Array, Array]:
        """The answers of both to one image, each [1, ...]."""
        rows = _row(self.given, image), _row(self.reference, image)
        answer, given = _run(self.given, self._runs[0], self._tensors, rows[0], file)
        expected, reference = _run(self.reference, self._runs[1], self._outputs, rows[1], file)
        if answer.shape != expected.shape:
            shapes = f"{self.given.name} answers with {list(answer.shape)} and {self.reference.name} with {list(expected.shape)}"
            raise ModelError(f"{shapes}: there is nothing to compare", hint="give two forms of one model")
        _add(self.sums, given, reference)
        with one_sentence("onnxruntime", f"{self.reference.name} on what {self.given.name} has inside"):
            again = self._rerun({**given, _entry(self.reference): rows[1]})
        _add(self.own, given, again)
        return answer, expected

    def losses(self) -> tuple[LayerLoss, ...]:
        """One entry a layer that was compared."""
        return tuple(
            LayerLoss(layer.name, layer.output, self.sums[layer.output].sqnr_db, self.own[layer.output].sqnr_db, stretch.within)
            for layer, stretch in zip(self.layers, self.stretches, strict=True)
            if self.sums[layer.output].arrays
        )


def _add(sums: Mapping[str, Energies], given: Values, reference: Values) -> None:
    for name, energies in sums.items():
        if given[name].shape == reference[name].shape:  # else one name means two things after all
            energies.add(given[name], reference[name])


def _layers(given: Side, reference: Side) -> tuple[list[Layer], list[Layer]]:
    """The Linears of both, in the order of their flow; none unless both are graphs."""
    if given.graph is None or reference.graph is None:
        return [], []
    from vitedge.compiler.layers import find_layers

    return find_layers(given.graph), find_layers(reference.graph)


def _known(given: Side, reference: Side) -> Collection[str]:
    """The tensors that both graphs have, and that mean the same in both."""
    if given.graph is None or reference.graph is None:
        return ()
    from vitedge.compiler.graph import producers
    from vitedge.compiler.layers import landmarks

    return landmarks(reference.graph) & producers(given.graph).keys()


def _stretches(reference: Side, layers: Sequence[Layer], known: Collection[str]) -> list[Stretch]:
    """What leads to each of `layers` in the reference from the nearest tensors that are known."""
    if not layers:
        return []
    from vitedge.compiler.layers import find_stretches

    return find_stretches(reference.graph, layers, known)


def _open_stretches(
    reference: Side, stretches: Sequence[Stretch], known: Collection[str]
) -> Callable[[Values], Mapping[str, Array]]:
    """What runs parts of the reference on values that are not its own."""
    if not stretches:
        return lambda inputs: {}
    from vitedge.compiler.layers import open_stretches

    return open_stretches(reference.graph, stretches, known)


def _entry(side: Side) -> str:
    """The name of a graph's input."""
    return "" if side.graph is None else str(side.graph.graph.input[0].name)


def _row(side: Side, image: NDArray[np.uint8]) -> Array:
    row = np.empty((1, *input_shape(side.card)), input_dtype(side.card))
    write_input(image, side.card, row[0])
    return row


def _run(side: Side, run: Run, tensors: Sequence[str], row: Array, file: ImageFile) -> tuple[Array, Values]:
    """The answer of a side to one image and the tensors within it, all of them finite."""
    answer, *inner = run(row)
    values = dict(zip(tensors, inner, strict=True))
    broken = next((name for name, array in values.items() if not np.isfinite(array).all()), None)
    if broken is not None or not np.isfinite(answer).all():
        where = f" of {broken!r}" if broken else ""
        raise ModelError(
            f"{side.name} gives values{where} that are not finite numbers for {file}",
            hint="something overflows on this image: does it do so in torch as well?",
        )
    return answer, values


class _Answers:
    """How far apart the answers are, of all images and of the worst."""

    def __init__(self, given: Side, reference: Side) -> None:
        self.given, self.reference = given, reference
        self.images = self.agreed = 0
        self.total = Energies()
        self.worst: tuple[float, str] | None = None

    def add(self, given: Array, reference: Array, file: ImageFile) -> None:
        """Take in the answers to one image."""
        self.images += 1
        self.agreed += int((given.argmax(-1) == reference.argmax(-1)).all())
        self.total.add(given, reference)
        own = Energies()
        own.add(given, reference)
        if own.sqnr_db is not None and (self.worst is None or own.sqnr_db < self.worst[0]):
            self.worst = own.sqnr_db, str(file)

    def verification(self, inside: _Inside) -> Verification:
        """What was found, with the layers of `inside`."""
        worst_db, worst_image = self.worst or (None, "")
        classifier, losses = self.given.card.task == "classify", inside.losses()
        compared = {loss.name for loss in losses}
        return Verification(
            given=self.given.name,
            reference=self.reference.name,
            images=self.images,
            sqnr_db=self.total.sqnr_db,
            worst_db=worst_db,
            worst_image=worst_image,
            cosine=self.total.cosine,
            largest=self.total.largest,
            agreement=100 * self.agreed / self.images if classifier else None,
            layers=losses,
            unmatched=tuple(name for name in inside.names if name not in compared),
        )
