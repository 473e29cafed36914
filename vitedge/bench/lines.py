"""Documents in, what their tables are made of out: a line a timing, as a reader calls it, and the columns that say something.

    [Document, ...]  ->  lines    ->  [Line, ...]
    [Line, ...]      ->  columns  ->  [Column, ...]: how one figure of a line is shown

A column in which nothing was measured is left out. "±" is half of the interval of 95 %. "× bound" is p50 over the time that
no engine of this graph can beat on this device (see roofline.py); "files/s" is the rate from disk to answer (see throughput.py).
Knows nothing of how anything was measured, or of what draws the table (tables.py, sections.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vitedge.bench.choice import Choice, is_choice
from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed
from vitedge.bench.frontier import Point, drop_of, locate, machine_names, setting_text
from vitedge.bench.plot import three

CHOSEN, ON, MAYBE = "★", "●", "○"
LEGEND = f"{CHOSEN} to ship   {ON} on the frontier: none is as fast and as accurate   {MAYBE} on it or off it, within the noise"


@dataclass(frozen=True, slots=True)
class Line:
    """One timing of a candidate. machine, name: what to call them here. setting: threads and streams, where there are several.

    point: its place, None where it was not judged.
    """

    document: Document
    candidate: Candidate
    timed: Timed
    machine: str
    name: str
    setting: str
    point: Point | None
    chosen: bool

    @property
    def title(self) -> str:
        """The name, with the threads and streams where there are several."""
        return ", ".join(filter(None, (self.name, self.setting)))

    @property
    def mark(self) -> str:
        """Whether it is the one to ship, on the frontier, or may be on it; "" where it surely is not."""
        if self.chosen:
            return CHOSEN
        if self.point is None:
            return ""
        return (ON if self.point.frontier else "") if self.point.certain else MAYBE

    @property
    def owner(self) -> tuple[int, str]:
        """What tells its candidate from those of its own and of other documents."""
        return id(self.document), self.candidate.name

    @property
    def is_reference(self) -> bool:
        """Whether the others of its document are compared with it."""
        return self.candidate.name == self.document.reference

    @property
    def judged(self) -> Judged:
        """What it answered, of no images where it was not judged."""
        return self.candidate.judged or Judged(0)

    @property
    def drop(self) -> float | None:
        """Points lost against the reference."""
        return None if self.is_reference else drop_of(self.document, self.candidate)


@dataclass(frozen=True, slots=True)
class Column:
    """How one figure of a line is shown.

    digits: behind the point; None for as many as make three in all. spread: its interval. best: set in bold, among the lines of a
    document and batch. last, plain: when a narrow terminal gives up the column, and its interval; the highest goes first.
    """

    head: str
    value: Callable[[Line], str | float | None]
    about: str
    digits: int | None = 0
    spread: Callable[[Line], Interval | None] = lambda line: None
    best: Literal["low", "high"] | None = None
    last: int = 0
    plain: int = 0

    def text(self, line: Line, spread: bool = True) -> str:
        """The figure, with half of its interval if `spread`; a dash where there is none."""
        value = self.value(line)
        if value is None or isinstance(value, str):
            return value or "–"
        shown = three(value) if self.digits is None else f"{value:,.{self.digits}f}"
        between = self.spread(line) if spread and self.digits is not None else None
        return shown + (f" ±{(between.high - between.low) / 2:,.{self.digits}f}" if between else "")

    def is_number(self, lines: Sequence[Line]) -> bool:
        """Whether it aligns to the right."""
        return any(isinstance(self.value(line), (int, float)) for line in lines)

    def is_best(self, line: Line, lines: Sequence[Line]) -> bool:
        """Whether the line has the best of several values that do not all look the same."""
        rivals = [one for one in lines if one.document is line.document and one.timed.batch == line.timed.batch]
        values = [value for one in rivals if isinstance(value := self.value(one), (int, float))]
        if not self.best or len({self.text(one, False) for one in rivals if self.value(one) is not None}) < 2:
            return False
        return self.value(line) == (min(values) if self.best == "low" else max(values))


COLUMNS = (
    Column("", lambda line: line.mark, LEGEND),
    Column("machine", lambda line: line.machine, "where it was measured"),
    Column("candidate", lambda line: line.name, "what was measured"),
    Column("model", lambda line: line.candidate.model, "the model's name", last=45),
    Column("runtime", lambda line: line.candidate.runtime, "what ran it", last=40),
    Column("batch", lambda line: line.timed.batch, "images in a call", last=5),
    Column("threads", lambda line: line.timed.threads or "all", "of the processor"),
    Column("streams", lambda line: line.timed.streams, "calls under way at a time"),
    Column(
        "p50 ms", lambda line: line.timed.p50_ms, "half of the calls took no longer", 2,
        lambda line: line.timed.p50, "low", 0, 70,
    ),
    Column("p99 ms", lambda line: line.timed.p99_ms, "all calls but one in a hundred took no longer", 2, best="low", last=60),
    Column("images/s", lambda line: line.timed.images_per_s, "answered in a second", None, best="high", last=50),
    Column("files/s", lambda line: line.candidate.sustained_per_s, "from disk to answer", None, best="high", last=58),
    Column(
        "speed-up", lambda line: line.timed.speedup, "how many times as fast as the reference, round by round", 2,
        lambda line: line.timed.speedup_interval, None, 20, 30,
    ),
    Column(
        "top-1 %", lambda line: line.judged.top1, "images whose first answer is right", 2,
        lambda line: line.judged.top1_interval, "high", 0, 75,
    ),
    Column(
        "drop", lambda line: line.drop, "points of top-1, else of agreement, lost against the reference, image by image", 2,
        lambda line: line.judged.drop_interval, None, 10, 35,
    ),
    Column("agreement %", lambda line: line.judged.agreement, "images with the reference's answer", 2, best="high", last=55),
    Column("SQNR dB", lambda line: line.judged.sqnr_db, "of the output against the reference's", 1, best="high", last=80),
    Column("× bound", lambda line: _over_bound(line.timed), "p50 over the time that no engine can beat", 1, last=85),
    Column("size MiB", lambda line: line.candidate.size_mib or None, "on disk", 1, best="low", last=65),
)  # fmt: skip
MORE_COLUMNS = (
    Column("p90 ms", lambda line: line.timed.p90_ms, "nine calls in ten took no longer", 2, best="low"),
    Column("max ms", lambda line: line.timed.max_ms, "no call took longer", 2, best="low"),
    Column("jitter ms", lambda line: line.timed.jitter_ms, "from one call to the next, on average", 3, best="low"),
    Column("end to end ms", lambda line: line.timed.end_to_end_ms, "from a decoded picture to its answer", 2, best="low"),
    Column("top-5 %", lambda line: line.judged.top5, "images with the right answer among the first five", 2, best="high"),
    Column("opens in ms", lambda line: line.candidate.open_ms or None, "until it can be called", 0, best="low"),
    Column("first call ms", lambda line: line.candidate.first_ms or None, "the first call after it opened", 1, best="low"),
    Column("memory MiB", lambda line: line.candidate.peak_mib, "the most that it took", 0, best="low"),
    Column("power W", lambda line: line.timed.power_w, "while it runs", 1, best="low"),
    Column("mJ an image", lambda line: line.timed.energy_mj, "energy", None, best="low"),
    Column("calls", lambda line: line.timed.calls, "that were timed"),
    Column("disturbed", lambda line: line.timed.disturbed, "rounds of which other processes had a share"),
)


def lines(documents: Sequence[Document], choice: Choice | None = None) -> list[Line]:
    """A line for each timing of each candidate that finished: machine by machine, batch by batch, the reference first."""
    machines, names = machine_names(documents), display_names(documents)
    points = {
        timing_key(p.document, p.candidate, p.timed): p for batch in _all_batches(documents) for p in locate(documents, batch)
    }
    found = [
        Line(
            document, one, timed, machine, names[one.name], setting_text(timed, documents),
            points.get(timing_key(document, one, timed)), choice is not None and is_choice(choice, one, timed),
        )
        for document, machine in zip(documents, machines, strict=True)
        for one in document.finished
        for timed in one.timings
    ]  # fmt: skip
    place = {id(document): index for index, document in enumerate(documents)}
    return sorted(found, key=lambda line: (place[id(line.document)], line.timed.batch))


def failures(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """What did not finish, and why."""
    names = display_names(documents)
    several = len(documents) > 1
    return [
        (names[one.name] + (f" on {machine}" if several else ""), one.failed)
        for document, machine in zip(documents, machine_names(documents), strict=True)
        for one in document.candidates
        if one.failed
    ]


def display_names(documents: Sequence[Document]) -> dict[str, str]:
    """What to call each candidate: its name, without a MODEL/ and an @RUNTIME that all have."""
    names = list(dict.fromkeys(one.name for document in documents for one in document.candidates))
    parts = [re.fullmatch(r"([^/@]+/)?([^/@]+)(@[^/@]+)?", name) for name in names]
    known = [part.groups("") for part in parts if part]
    models, runtimes = ({part[place] for part in known} for place in (0, 2))
    if len(known) < len(names):
        return {name: name for name in names}
    model, runtime = (only.pop() if len(only) == 1 else "" for only in (models, runtimes))
    return {name: name.removeprefix(model).removesuffix(runtime) for name in names}


def columns(shown: Sequence[Line], of: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns that say something of these lines: one that is the same for all is left out if it only names."""
    naming = {"machine", "model", "runtime", "threads", "streams"}
    found = []
    for column in of:
        values = {column.value(line) for line in shown}
        if values - {None, ""} and (column.head not in naming or len(values) > 1):
            found.append(column)
    return found


def timing_key(document: Document, candidate: Candidate, timed: Timed) -> tuple[int, str, int]:
    """What tells a timing from all others; candidates may share one."""
    return id(document), candidate.name, id(timed)


def _over_bound(timed: Timed) -> float | None:
    return timed.p50_ms / timed.bound_ms if timed.bound_ms else None


def _all_batches(documents: Sequence[Document]) -> list[int]:
    return sorted({timed.batch for document in documents for one in document.finished for timed in one.timings})
