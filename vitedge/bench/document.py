"""What a benchmark found, as data: what `bench` and `tune` write, and what report, gate and frontier read.

    Document  <->  JSON

Knows how nothing was measured. Times are in milliseconds, a batch where nothing else is said; accuracies in percent.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from vitedge.errors import VitEdgeError
from vitedge.specs import BenchRow, from_dict, to_dict
from vitedge.workspace import read_json, write_json

SCHEMA = 1  # of the JSON form; a change that an older reader would misread raises it
CENTILES = 101  # 0 to 100
HEXADECIMAL = re.compile("[0-9a-fA-F]*")
Conditions = tuple[int, int | None, int]  # batch, threads, streams
DAMAGED = "write it anew: vitedge bench ENGINE... --images DIR --json FILE"


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a figure lies with 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Timed:
    """One candidate at one batch size, number of threads and number of streams.

    threads: of the processor, None for all. streams: calls under way at a time, each of a thread of its own.
    rounds_ms: the median of each round, in order: entry i of every candidate was measured within the same seconds.
    centiles_ms: of all calls, 0 to 100. jitter_ms: how much a call differs from the one before it, on average.
    disturbed: rounds of which other processes had a share, all the same. p50: of the median. speedup: how many times as fast as
    the reference, round by round, at the same batch; None of the reference itself. bound_ms: see roofline.py.
    end_to_end_ms: from a decoded picture to its answer, of a batch of one. power_w: while it runs. energy_mj: an image, of
    what the machine can read (see energy.py).
    """

    batch: int
    threads: int | None
    streams: int
    calls: int
    rounds_ms: tuple[float, ...]
    disturbed: int
    centiles_ms: tuple[float, ...]
    jitter_ms: float
    p50: Interval
    images_per_s: float
    speedup: float | None = None
    speedup_interval: Interval | None = None
    bound_ms: float | None = None
    end_to_end_ms: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None

    @property
    def conditions(self) -> Conditions:
        """What another timing must have in common with this one to be held against it."""
        return self.batch, self.threads, self.streams

    @property
    def p50_ms(self) -> float:
        """Half of the calls took no longer."""
        return self.centiles_ms[50]

    @property
    def p90_ms(self) -> float:
        """Nine calls in ten took no longer."""
        return self.centiles_ms[90]

    @property
    def p99_ms(self) -> float:
        """All calls but one in a hundred took no longer."""
        return self.centiles_ms[99]

    @property
    def max_ms(self) -> float:
        """No call took longer."""
        return self.centiles_ms[100]


@dataclass(frozen=True, slots=True)
class Confused:
    """So many images of class `truth` were answered with class `answer`, another one; both are indices into the labels."""

    truth: int
    answer: int
    images: int


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An image on which a candidate and the reference are far apart.

    truth, reference, answer: labels, "" where there is none. distance: 1 minus the probability that the candidate gives the
    reference's answer; of a model without classes, the noise in its output as a part of the signal. picture: a JPEG, base64.
    """

    image: str
    truth: str
    reference: str
    answer: str
    distance: float
    picture: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What a candidate answered. None = cannot be known from these images, this task or this output shape.

    images: answered. labelled: of these, with a known class; top1 and top5 are of those. drop: points of top-1 lost against
    the reference, image by image; where there are no labels, of agreement. agreement: images with the reference's top-1.
    sqnr_db: of the output against the reference's. right: a hexadecimal bit for each labelled image in order, 1 where top-1 is.
    """

    images: int
    labelled: int = 0
    top1: float | None = None
    top1_interval: Interval | None = None
    top5: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    confusion: tuple[Confused, ...] = ()
    worst: tuple[Disagreement, ...] = ()
    right: str = ""

    @property
    def right_bits(self) -> int:
        """`right` as a number: one bit for each labelled image, so that `&` and `~` pair the images of two candidates."""
        return int(self.right or "0", 16)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer of an engine: the block and part of the model that it is in, the type that it computes in, its time."""

    name: str
    block: str
    part: str
    precision: str
    ms: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that was measured: an engine, an ONNX file on some runtime, a model in torch.

    name: unlike any other of its document. variant: "fp32", "int8", ... runtime: "openvino", "torch.compile", ...
    image: (height, width) that the model takes. merged: tokens that each block merges (see compiler/merging.py). size_mib: on
    disk. open_ms: until it could be called; first_ms: that first call; peak_mib: memory that it took, at most. layers: in the
    order of the flow.
    failed: why it did not finish, "" where it did.
    """

    name: str
    model: str
    variant: str
    runtime: str
    version: str = ""
    device: str = ""
    float_type: str = ""
    image: tuple[int, int] = (0, 0)
    merged: int = 0
    size_mib: float = 0.0
    open_ms: float = 0.0
    first_ms: float = 0.0
    peak_mib: float | None = None
    judged: Judged | None = None
    timings: tuple[Timed, ...] = ()
    sustained_per_s: float | None = None
    layers: tuple[LayerTime, ...] = ()
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """All that one run found.

    environment: see environment.py. dataset: what the images are called, and how many. images_key: changes with the images.
    labels: of the model. reference: the name of the candidate that the others are compared with.
    """

    environment: dict[str, str]
    candidates: tuple[Candidate, ...]
    reference: str
    dataset: str = ""
    images_key: str = ""
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def finished(self) -> tuple[Candidate, ...]:
        """The candidates that did not fail, the reference first if it is among them."""
        whole = [candidate for candidate in self.candidates if not candidate.failed]
        return tuple(sorted(whole, key=lambda candidate: candidate.name != self.reference))

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`."""
        return next(candidate for candidate in self.candidates if candidate.name == name)


def rows_of(document: Document) -> list[BenchRow]:
    """Every timing of every candidate that finished as a line of a table, batch by batch."""
    timings = [(timed, candidate) for candidate in document.finished for timed in candidate.timings]
    return [_row(candidate, timed) for timed, candidate in sorted(timings, key=lambda entry: entry[0].batch)]


def save_document(document: Document, path: Path) -> None:
    """Write a document as JSON."""
    write_json(path, to_dict(document))


def load_document(path: Path) -> Document:
    """Read a document back; what is none, or is of a newer vitedge, is a VitEdgeError that says so."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int) or schema < 1 or "candidates" not in content:
        raise VitEdgeError(
            f"{path} is not a benchmark of vitedge", hint="vitedge bench ENGINE... --images DIR --json FILE makes one"
        )
    if schema > SCHEMA:
        raise VitEdgeError(
            f"{path} has schema {schema}, and this vitedge reads schemas up to {SCHEMA}", hint="pip install -U vitedge"
        )
    try:
        document = from_dict(Document, content)
    except VitEdgeError as error:
        raise VitEdgeError(f"{path} is damaged: {error}", hint=DAMAGED) from error
    if flaw := _flaw(document):
        raise VitEdgeError(f"{path} is damaged: {flaw}", hint=DAMAGED)
    return document


def _flaw(document: Document) -> str:
    """What no benchmark writes, and no reader of one expects; "" where there is nothing of the kind."""
    names = [one.name for one in document.candidates]
    if document.reference not in names or len(set(names)) < len(names):
        return f"its candidates are {', '.join(names) or 'none'}, and the reference is {document.reference!r}"
    for one in document.candidates:
        if one.judged and not HEXADECIMAL.fullmatch(one.judged.right):
            return f"which answers of {one.name} are right is not written in hexadecimal"
        if one.judged and not _is_sound(one.judged):
            return f"an accuracy of {one.name} is none, or is of a number of images that cannot be"
        if not all(
            0 <= value < math.inf for value in (one.size_mib, one.open_ms, one.first_ms, *(each.ms for each in one.layers))
        ):
            return f"a size or time of {one.name} is none"
        for timed in one.timings:
            intervals = [timed.p50, *([timed.speedup_interval] if timed.speedup_interval else [])]
            figures = [*timed.centiles_ms, timed.images_per_s, 1.0 if timed.speedup is None else timed.speedup]
            figures += [end for interval in intervals for end in (interval.low, interval.high)]
            if any(interval.low > interval.high for interval in intervals):
                return f"an interval of {one.name} ends before it begins"
            if len(timed.centiles_ms) != CENTILES or not all(0 < value < math.inf for value in figures) or timed.batch < 1:
                return (
                    f"a timing of {one.name} has {len(timed.centiles_ms)} centiles of {CENTILES}, or values that no clock gives"
                )
    return ""


def _is_sound(judged: Judged) -> bool:
    """Whether accuracies are percentages, of a number of images that can be."""
    intervals = [interval for interval in (judged.top1_interval, judged.drop_interval) if interval]
    percents = [value for value in (judged.top1, judged.top5, judged.agreement) if value is not None]
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    points = [*ends, *([] if judged.drop is None else [judged.drop])]
    return (
        0 <= judged.labelled <= judged.images
        and all(0 <= value <= 100 for value in percents)
        and all(math.isfinite(value) for value in points)
    )


def _row(candidate: Candidate, timed: Timed) -> BenchRow:
    judged = candidate.judged or Judged(0)
    return BenchRow(
        model=candidate.model,
        variant=candidate.variant,
        backend=candidate.runtime,
        batch=timed.batch,
        p50_ms=timed.p50_ms,
        p90_ms=timed.p90_ms,
        p99_ms=timed.p99_ms,
        images_per_s=timed.images_per_s,
        size_mib=candidate.size_mib,
        images=judged.images,
        top1=judged.top1,
        top5=judged.top5,
        agreement=judged.agreement,
        sqnr_db=judged.sqnr_db,
        bound_ms=timed.bound_ms,
        sustained_per_s=candidate.sustained_per_s,
    )
