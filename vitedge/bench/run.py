"""Contenders and image files in, a Document out: judged, then timed side by side, in every setting that is asked for.

    [Contender, ...] + [ImageFile, ...]  ->  open  ->  judge  ->  time in turns, setting by setting  ->  Document

Whoever fails on the way leaves, and is in the document with the reason; the others go on. The first one that does not fail is
the reference. Knows nothing of backends, terminals or reports.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vitedge.bench.accuracy import judge
from vitedge.bench.contenders import Contender, Setting
from vitedge.bench.document import Candidate, Document, Judged, Timed
from vitedge.bench.environment import environment
from vitedge.bench.latency import Call, Lane, Latency, measure
from vitedge.bench.roofline import engine_bound_ms
from vitedge.bench.statistics import median_interval, speedup
from vitedge.errors import VitEdgeError, first_line
from vitedge.images import ImageFile
from vitedge.workspace import sha256

ROUGH = 0.1  # of the turns: where others disturbed more, the times deserve a note
END_TO_END_S = 0.25  # of the time of a batch of one

Progress = Callable[[str, float], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. batches, threads, streams: every combination of them. threads: None for all.

    seconds: of timed calls, for each candidate in each combination. end_to_end: also from a decoded picture to its answer.
    dataset: what the images are called.
    """

    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    streams: tuple[int, ...] = (1,)
    seconds: float = 3.0
    end_to_end: bool = True
    dataset: str = ""

    @property
    def settings(self) -> list[Setting]:
        """Every combination of threads and streams."""
        return [Setting(threads, streams) for threads, streams in itertools.product(self.threads, self.streams)]


class _Entry:
    """A contender and what is known of it by now. failed: why it left, "" while it is here."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.open_ms = self.first_ms = 0.0
        self.judged: Judged | None = None
        self.timings: list[Timed] = []
        self.failed = ""

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Whatever is raised within makes it leave."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  a runtime may raise anything, and the others go on
            self.leave(what, first_line(error))

    def leave(self, what: str, why: str) -> None:
        """It failed while `what` was done."""
        self.failed = f"{what}: {why}"
        self.contender.close()

    def candidate(self) -> Candidate:
        """All that was found."""
        timings = tuple(self.timings)
        return replace(
            self.contender.facts,
            open_ms=self.open_ms,
            first_ms=self.first_ms,
            judged=self.judged,
            timings=timings,
            failed=self.failed,
        )


def benchmark(
    contenders: Sequence[Contender],
    files: Sequence[ImageFile],
    plan: Plan,
    *,
    notes: list[str],
    progress: Progress = lambda stage, done: None,
) -> Document:
    """Judge every contender on `files` (none: latency alone), then time it in each setting and batch.

    notes: receives sentences on what did not stop it. progress: called with a stage, such as "accuracy" or "latency, batch 8",
    and its finished part, 0 to 1. A batch that an engine does not take, and failure of all, are VitEdgeErrors.
    """
    for batch in plan.batches:
        require_batch(contenders, batch)
    entries = [_Entry(contender) for contender in contenders]
    for done, entry in enumerate(entries):
        progress("opening", done / len(entries))
        _open(entry)
    _go_on(entries)
    if files:  # first, so that the buffers hold real images when they are timed
        _judge(entries, files, notes, lambda done: progress("accuracy", done / len(files)))
    _time(entries, plan, files, notes, progress)
    reference = _go_on(entries)[0].contender.name
    if contenders and reference != contenders[0].name:
        notes.append(f"{contenders[0].name} failed, so that the others are compared with {reference}")
    return Document(
        environment=environment(),
        candidates=tuple(entry.candidate() for entry in entries),
        reference=reference,
        dataset=plan.dataset,
        images_key=images_key(files),
        labels=contenders[0].card.labels,
        notes=tuple(notes),
    )


def require_batch(contenders: Sequence[Contender], batch: int) -> None:
    """Raise VitEdgeError unless every contender takes `batch` images at once."""
    for contender in contenders:
        if not 1 <= batch <= contender.max_batch:
            hint = "measure a batch within that, or build the engine for a larger one (`batch` of the target)"
            raise VitEdgeError(f"{contender.name} takes 1 to {contender.max_batch} images at once, not {batch}", hint=hint)


def images_key(files: Sequence[ImageFile]) -> str:
    """Changes with the bytes, the order and the labels of the images; "" without any."""
    state = hashlib.sha256()
    for file in files:
        state.update(f"{file.label} {sha256(file.path) if file.path.is_file() else ''}\n".encode())
    return state.hexdigest()[:16] if files else ""


def _go_on(entries: Sequence[_Entry]) -> list[_Entry]:
    """Those that did not fail; none is a VitEdgeError with what the first one failed of."""
    here = [entry for entry in entries if not entry.failed]
    if not here:
        more = f"; so did all {len(entries)}" if len(entries) > 1 else ""
        raise VitEdgeError(f"{entries[0].contender.name} failed {entries[0].failed}{more}")
    return here


def _open(entry: _Entry) -> None:
    with entry.doing("opening"):
        start = time.perf_counter_ns()
        entry.contender.open()
        opened = time.perf_counter_ns()
        entry.contender.run(1)
        entry.open_ms, entry.first_ms = (opened - start) / 1e6, (time.perf_counter_ns() - opened) / 1e6


def _judge(entries: Sequence[_Entry], files: Sequence[ImageFile], notes: list[str], progress: Callable[[int], Any]) -> None:
    """Judge all that are here; where the reference fails, the next one is it."""
    here, failed = _go_on(entries), dict[str, str]()
    found = judge([entry.contender for entry in here], files, notes=notes, progress=progress, failed=failed)
    for entry, judged in zip(here, found, strict=True):
        if why := failed.get(entry.contender.name):
            entry.leave("judging", why)
        else:
            entry.judged = judged


def _time(entries: Sequence[_Entry], plan: Plan, files: Sequence[ImageFile], notes: list[str], progress: Progress) -> None:
    """Time all that are here in each setting and batch, and say where that was not done well."""
    latencies: list[Latency] = []
    for number, setting in enumerate(plan.settings):
        if number or setting != Setting():
            for entry in _go_on(entries):
                with entry.doing(f"opening with {_told(setting)}"):
                    entry.contender.open(setting)
        for batch in plan.batches:
            here = _go_on(entries)
            stage = ", ".join(filter(None, ("latency", f"batch {batch}", "" if setting == Setting() else _told(setting))))
            found = _measure(here, batch, setting, plan.seconds, partial(progress, stage))
            latencies += filter(None, found)
            reference = next((latency for latency in found if latency), None)
            for entry, latency in zip(here, found, strict=True):
                if latency and reference:
                    entry.timings.append(_timed(entry, setting, latency, None if latency is reference else reference))
    if plan.seconds > 0:
        notes += _disturbances(latencies)


def _measure(
    here: Sequence[_Entry], batch: int, setting: Setting, seconds: float, progress: Callable[[float], object]
) -> list[Latency | None]:
    failed: dict[str, str] = {}
    lanes = [Lane(entry.contender.name, _calls(entry.contender, batch, setting), batch) for entry in here]
    found = measure(lanes, seconds=seconds, failed=failed, progress=progress)
    for entry in here:
        if why := failed.get(entry.contender.name):
            entry.leave(f"timing batch {batch}", why)
    return found


def _calls(contender: Contender, batch: int, setting: Setting) -> tuple[Call, ...]:
    """One call a stream, each on a buffer of its own with the same images."""
    forks = [contender.fork() for _ in range(setting.streams - 1)]
    for fork in forks:
        fork.input[:] = contender.input
    return (partial(contender.run, batch), *(partial(fork.run, batch) for fork in forks))


def _timed(entry: _Entry, setting: Setting, latency: Latency, reference: Latency | None) -> Timed:
    manifest = entry.contender.manifest
    timed = Timed(
        batch=latency.batch,
        threads=setting.threads or (manifest.target.threads if manifest else None),
        streams=setting.streams,
        calls=latency.samples_ms.size,
        rounds_ms=latency.rounds_ms,
        disturbed=latency.disturbed,
        centiles_ms=latency.centiles_ms,
        jitter_ms=latency.jitter_ms,
        p50=median_interval(latency.rounds_ms),
        images_per_s=latency.images_per_s,
        bound_ms=engine_bound_ms(manifest, latency.batch) if manifest else None,
        power_w=latency.power_w,
    )
    if reference is None:
        return timed
    ratio, interval = speedup(reference.rounds_ms, latency.rounds_ms)
    return replace(timed, speedup=ratio, speedup_interval=interval)


def _told(setting: Setting) -> str:
    parts = [(setting.threads, "thread"), (setting.streams if setting.streams != 1 else None, "stream")]
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in parts if count) or "all threads"


def _disturbances(latencies: Sequence[Latency]) -> list[str]:
    disturbed, turns = sum(latency.disturbed for latency in latencies), sum(len(latency.turns) for latency in latencies)
    dropped = sum(latency.dropped for latency in latencies)
    busy = f"another process was busy in {disturbed} of {turns} turns: the times are rough"
    back = f"the clock of this machine stood still or went back in {dropped} calls, which are not counted"
    return [busy] * (disturbed > ROUGH * turns) + [back] * (dropped > 0)
