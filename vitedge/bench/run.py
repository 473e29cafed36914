"""Contenders and image files in, a Document out: judged, then timed side by side, in every setting that is asked for.

    [Contender, ...] + [ImageFile, ...]  ->  open  ->  judge  ->  time in turns, setting by setting  ->  Document
                                                  ->  memory, in processes of their own  ->  layers  ->

Whoever fails on the way leaves, and is in the document with the reason; the others go on. The first one that does not fail is
the reference. Knows nothing of backends, terminals or reports.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from vitedge.bench.accuracy import Spread, judge
from vitedge.bench.contenders import Contender, Setting
from vitedge.bench.document import Candidate, Document, Judged, LayerTime, Timed
from vitedge.bench.energy import Meter
from vitedge.bench.environment import environment
from vitedge.bench.explain import explain
from vitedge.bench.latency import Call, Lane, Latency, measure
from vitedge.bench.memory import peak_mib
from vitedge.bench.roofline import engine_bound_ms
from vitedge.bench.statistics import median_interval, speedup
from vitedge.bench.throttle import Watch
from vitedge.errors import VitEdgeError, first_line
from vitedge.images import ImageFile, images_key, stream

ROUGH = 0.1  # of the turns: where others disturbed more, the times deserve a note
END_TO_END = 0.25  # of the seconds of a batch go to timing a picture's way from decoded to answered
LONGER = 3  # times at most that a timing which decides nothing is taken once more
LAYERS_S = 3.0  # an engine, at most

Progress = Callable[[str, float], object]
Undecided = Callable[[Mapping[str, Timed]], bool]  # told what was timed at one setting and batch, by candidate


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. batches, threads, streams: every combination of them. threads: None for all.

    seconds: of timed calls, for each candidate in each combination. end_to_end: also from a decoded picture to its answer.
    memory: also what each takes, in a process of its own. layers: also where the time of each engine goes. dataset: what the
    images are called.
    """

    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    streams: tuple[int, ...] = (1,)
    seconds: float = 3.0
    end_to_end: bool = True
    memory: bool = False
    layers: bool = False
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
        self.peak_mib: float | None = None
        self.judged: Judged | None = None
        self.timings: list[Timed] = []
        self.layers: tuple[LayerTime, ...] = ()
        self.failed = ""

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

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
        with suppress(Exception):  # which has failed already
            self.contender.close()

    def candidate(self) -> Candidate:
        """All that was found."""
        return replace(
            self.contender.facts,
            open_ms=self.open_ms,
            first_ms=self.first_ms,
            peak_mib=self.peak_mib,
            judged=self.judged,
            timings=tuple(self.timings),
            layers=self.layers,
            failed=self.failed,
        )


def benchmark(
    contenders: Sequence[Contender],
    files: Sequence[ImageFile],
    plan: Plan,
    *,
    notes: list[str],
    progress: Progress = lambda stage, done: None,
    undecided: Undecided = lambda timed: False,
    spread: Spread | None = None,
) -> Document:
    """Judge every contender on `files` (none: latency alone), then time it in each setting and batch.

    notes: receives sentences on what did not stop it. progress: called with a stage, such as "accuracy" or "latency, batch 8",
    and its finished part, 0 to 1. undecided: whether a timing decides nothing yet, and is to be continued, up to LONGER times as
    long again. spread: who judges the images, by default this process. A batch that an engine does not take, and failure of all,
    are VitEdgeErrors.
    """
    for batch in plan.batches:
        require_batch(contenders, batch)
    entries = [_Entry(contender) for contender in contenders]
    for done, entry in enumerate(entries):
        progress("opening", done / len(entries))
        _open(entry)
    _go_on(entries)
    told = list[str]()
    if files:  # first, so that the buffers hold real images when they are timed
        _judge(entries, files, told, lambda done: progress("accuracy", done / len(files)), spread)
    with closing(Meter()) as meter:
        notes += _Timer(entries, plan, files, meter, progress, undecided).time()  # ahead of skipped files, which may be many
    notes += told
    _go_on(entries)
    if plan.memory:
        _weigh(entries, max(plan.batches), notes, partial(progress, "memory"))
    if plan.layers:
        _explain(entries, min(plan.seconds, LAYERS_S), partial(progress, "layers"))
    return _document(entries, files, plan, notes)


def require_batch(contenders: Sequence[Contender], batch: int) -> None:
    """Raise VitEdgeError unless every contender takes `batch` images at once."""
    for contender in contenders:
        if not 1 <= batch <= contender.max_batch:
            hint = "measure a batch within that, or build the engine for a larger one (`batch` of the target)"
            raise VitEdgeError(f"{contender.name} takes 1 to {contender.max_batch} images at once, not {batch}", hint=hint)


def _document(entries: Sequence[_Entry], files: Sequence[ImageFile], plan: Plan, notes: list[str]) -> Document:
    reference = _go_on(entries)[0]
    if reference is not entries[0]:
        notes.append(f"{entries[0].name} failed, so the others are compared with {reference.name}")
    return Document(
        environment=environment(),
        candidates=tuple(entry.candidate() for entry in entries),
        reference=reference.name,
        dataset=plan.dataset,
        images_key=images_key(files) if files else "",
        labels=reference.contender.card.labels,
        notes=tuple(notes),
    )


def _go_on(entries: Sequence[_Entry]) -> list[_Entry]:
    """Those that did not fail; none is a VitEdgeError with what the first one failed of."""
    here = [entry for entry in entries if not entry.failed]
    if not here:
        what = f"{entries[0].name} failed while {entries[0].failed}"
        raise VitEdgeError(what if len(entries) == 1 else f"all {len(entries)} failed; {what}")
    return here


def _open(entry: _Entry) -> None:
    with entry.doing("opening"):
        start = time.perf_counter_ns()
        entry.contender.open()
        opened = time.perf_counter_ns()
        entry.contender.run(1)
        entry.open_ms, entry.first_ms = (opened - start) / 1e6, (time.perf_counter_ns() - opened) / 1e6


def _judge(
    entries: Sequence[_Entry], files: Sequence[ImageFile], notes: list[str], progress: Callable[[int], Any], spread: Spread | None
) -> None:
    """Judge all that are here; where the reference fails, the next one is it."""
    here, failed = _go_on(entries), dict[str, str]()
    contenders = [entry.contender for entry in here]
    if spread:  # to other processes: here, only so many images as fill the buffers
        judge(contenders, files[: max(contender.max_batch for contender in contenders)], failed={})
    found = judge(contenders, files, notes=notes, progress=progress, failed=failed, spread=spread)
    for entry, judged in zip(here, found, strict=True):
        if why := failed.get(entry.name):
            entry.leave("judging", why)
        else:
            entry.judged = judged


class _Timer:
    """Times all that are here in each setting and batch."""

    def __init__(
        self,
        entries: Sequence[_Entry],
        plan: Plan,
        files: Sequence[ImageFile],
        meter: Meter,
        progress: Progress,
        undecided: Undecided,
    ) -> None:
        self._entries, self._plan, self._progress, self._undecided = entries, plan, progress, undecided
        self._energy = meter.used_j if meter.sensors else None
        self._watch = Watch()
        self._latencies: list[Latency] = []
        self._picture: NDArray[Any] | None = None
        if plan.end_to_end and files:
            self._picture = next((image for _, image in stream(files, [])), None)

    def time(self) -> list[str]:
        """All of it; gives sentences on what disturbed it."""
        for number, setting in enumerate(self._plan.settings):
            if number or setting != Setting():
                for entry in _go_on(self._entries):
                    with entry.doing(f"opening with {_told(setting)}"):
                        entry.contender.open(setting)
            for batch in self._plan.batches:
                self._time(setting, batch)
        if self._plan.seconds <= 0:  # of which nobody expects exact times
            return []
        return [*_disturbances(self._latencies), *self._watch.findings(), *_alike(self._entries)]

    def _time(self, setting: Setting, batch: int) -> None:
        stage = ", ".join(filter(None, ("latency", f"batch {batch}", "" if setting == Setting() else _told(setting))))
        lanes = {entry.name: _lane(entry.contender, batch, setting) for entry in _go_on(self._entries)}
        found = self._measure(lanes, self._plan.seconds, stage)
        timed = self._timed(found, setting)
        for _ in range(LONGER):
            if self._plan.seconds <= 0 or len(timed) < 1 or not self._undecided(timed):
                break
            more = self._measure({name: lanes[name] for name in found}, self._plan.seconds, f"{stage}, continued")
            found = {name: replace(one, turns=found[name].turns + one.turns) for name, one in more.items()}
            timed = self._timed(found, setting)
        self._latencies += found.values()
        if batch == 1 and setting.streams == 1 and self._picture is not None:
            lanes = {entry.name: _way(entry.contender, self._picture) for entry in self._entries if entry.name in found}
            ways = self._measure(lanes, self._plan.seconds * END_TO_END, f"{stage}, end to end")
            timed = {name: replace(one, end_to_end_ms=ways[name].centiles_ms[50]) for name, one in timed.items() if name in ways}
        for entry in self._entries:
            if not entry.failed and entry.name in timed:
                entry.timings.append(timed[entry.name])

    def _measure(self, lanes: Mapping[str, Lane], seconds: float, stage: str) -> dict[str, Latency]:
        """What was timed of those that did not fail meanwhile, by name."""

        def told(done: float) -> None:
            self._watch.look()
            self._progress(stage, done)

        failed: dict[str, str] = {}
        found = measure(list(lanes.values()), seconds=seconds, failed=failed, progress=told, energy=self._energy)
        for entry in self._entries:
            if entry.name in failed:
                entry.leave(f"timing ({stage})", failed[entry.name])
        _go_on(self._entries)
        return {name: latency for name, latency in zip(lanes, found, strict=True) if latency}

    def _timed(self, found: Mapping[str, Latency], setting: Setting) -> dict[str, Timed]:
        reference = next(iter(found.values()), None)
        entries = [entry for entry in self._entries if entry.name in found]
        return {
            entry.name: _timed(entry.contender, setting, found[entry.name], None if found[entry.name] is reference else reference)
            for entry in entries
        }


def _lane(contender: Contender, batch: int, setting: Setting) -> Lane:
    """One call a stream, each on a buffer of its own with the same images."""
    forks = [contender.fork() for _ in range(setting.streams - 1)]
    for fork in forks:
        fork.input[:] = contender.input
    calls: tuple[Call, ...] = (partial(contender.run, batch), *(partial(fork.run, batch) for fork in forks))
    return Lane(contender.name, calls, batch)


def _way(contender: Contender, picture: NDArray[Any]) -> Lane:
    """From a decoded picture to its answer."""

    def call() -> None:
        contender.write(0, picture)
        contender.run(1)

    return Lane(contender.name, (call,))


def _timed(contender: Contender, setting: Setting, latency: Latency, reference: Latency | None) -> Timed:
    manifest, watts = contender.manifest, latency.power_w
    timed = Timed(
        batch=latency.batch,
        threads=setting.threads or (manifest.target.threads if manifest else None),
        streams=setting.streams,
        calls=latency.samples_ms.size,
        rounds_ms=latency.rounds_ms,
        disturbed=latency.disturbed,
        centiles_ms=latency.centiles_ms,
        jitter_ms=latency.jitter_ms,
        p50=median_interval(latency.rounds_ms, _disturbed(latency)),
        images_per_s=latency.images_per_s,
        bound_ms=engine_bound_ms(manifest, latency.batch) if manifest else None,
        power_w=watts,
        energy_mj=None if watts is None else watts / latency.images_per_s * 1000,
    )
    if reference is None:
        return timed
    disturbed = max(_disturbed(reference), _disturbed(latency))
    ratio, interval = speedup(reference.rounds_ms, latency.rounds_ms, disturbed)
    return replace(timed, speedup=ratio, speedup_interval=interval)


def _disturbed(latency: Latency) -> float:
    return latency.disturbed / len(latency.turns)


def _weigh(entries: Sequence[_Entry], batch: int, notes: list[str], progress: Callable[[float], object]) -> None:
    """Find the memory that each takes; whose process fails has none, and a note."""
    here = _go_on(entries)
    bare = peak_mib(None)
    for done, entry in enumerate(here):
        progress((1 + done) / (1 + len(here)))
        try:
            whole = peak_mib(entry.contender.ready_made, batch)
        except VitEdgeError as error:
            notes.append(f"{entry.name}: {error}")
        else:
            entry.peak_mib = None if whole is None or bare is None else max(0.0, whole - bare)


def _explain(entries: Sequence[_Entry], seconds: float, progress: Callable[[float], object]) -> None:
    """Find what each engine's time goes to, where its backend tells."""
    for done, entry in enumerate(here := _go_on(entries)):
        progress(done / len(here))
        if entry.contender.folder is not None:
            with suppress(VitEdgeError):
                (found,) = explain([entry.contender.folder], None, seconds)
                entry.layers = tuple(
                    LayerTime(one.layer.name, one.block, one.part, one.layer.precision, one.layer.ms) for one in found.layers
                )


def _told(setting: Setting) -> str:
    parts = [(setting.threads, "thread"), (setting.streams if setting.streams != 1 else None, "stream")]
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in parts if count) or "all threads"


def _disturbances(latencies: Sequence[Latency]) -> list[str]:
    disturbed, turns = sum(latency.disturbed for latency in latencies), sum(len(latency.turns) for latency in latencies)
    dropped = sum(latency.dropped for latency in latencies)
    busy = f"another process was busy in {disturbed} of {turns} turns: the times are rough"
    back = f"the clock of this machine stood still or went back in {dropped} calls, which are not counted"
    return [busy] * (disturbed > ROUGH * turns) + [back] * (dropped > 0)


def _alike(entries: Sequence[_Entry]) -> list[str]:
    """Which cannot be told apart from the reference."""
    here = [entry for entry in entries if not entry.failed]
    found = []
    for entry in here[1:]:
        ranges = [(timed.batch, timed.speedup_interval) for timed in entry.timings if timed.speedup_interval]
        batches = list(dict.fromkeys(batch for batch, range_ in ranges if range_.low <= 1 <= range_.high))
        if batches:
            where = f"batch {' and '.join(map(str, batches))}"
            found.append(f"at {where}, {entry.name} and {here[0].name} cannot be told apart on this machine: time them longer")
    return found
