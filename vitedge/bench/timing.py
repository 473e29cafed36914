"""Entries in, their timings out: in every setting and batch of a Plan, side by side in turns.

    [Entry, ...]  ->  opened with a Setting, again and again  ->  lanes of calls  ->  latency.py  ->  Timed, in each entry
                                                                              ->  sentences on what disturbed it

An engine is faster or slower by some percent for as long as it is open, by where in memory it lies; the next run of the same
benchmark finds it elsewhere. So each is opened several times, and the intervals know how far that goes. Whoever fails on the way
leaves; the others go on. Knows nothing of accuracies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from vitedge.bench.contenders import Contender, Setting
from vitedge.bench.document import Conditions, Timed
from vitedge.bench.energy import Meter
from vitedge.bench.latency import MIN_SAMPLES, Call, Lane, Latency, measure
from vitedge.bench.plan import Entry, Plan, Progress, Undecided, remaining
from vitedge.bench.roofline import engine_bound_ms
from vitedge.bench.statistics import median_interval, speedup
from vitedge.bench.throttle import Watch
from vitedge.images import ImageFile, stream

ROUGH = 0.1  # of the turns: where others disturbed more, the times deserve a note
END_TO_END = 0.25  # of the seconds of a batch go to timing a picture's way from decoded to answered
OPENINGS = 8  # of an engine, among which the seconds of a batch are divided; not of what takes longer to open than to time
LONGER = 3  # times at most that a timing which decides nothing is taken once more


class Timer:
    """Times all that are here in each setting and batch."""

    def __init__(
        self,
        entries: Sequence[Entry],
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
                for entry in remaining(self._entries):
                    with entry.doing(f"opening with {_told(setting)}"):
                        entry.contender.open(setting)
            self._time(setting)
        if self._plan.seconds <= 0:  # of which nobody expects exact times
            return []
        return [*_disturbances(self._latencies), *self._watch.findings(), *_alike(self._entries)]

    def _time(self, setting: Setting) -> None:
        """All batches in one setting."""
        found: dict[int, dict[str, Latency]] = {batch: {} for batch in self._plan.batches}
        wanted = self._plan.batches
        for part in range(OPENINGS * (1 + LONGER)):
            if part:
                self._open_elsewhere(setting, turned=bool(part % 2))
            for batch in wanted:
                found[batch] = self._more(found[batch], setting, batch, part)
            if (part + 1) % OPENINGS == 0:
                wanted = tuple(batch for batch in wanted if self._needs_more(found[batch], setting))
            if not wanted:
                break
        for batch, latencies in found.items():
            timed = self._timed(latencies, setting)
            self._latencies += [latencies[name] for name in timed]
            if batch == 1 and setting.streams == 1 and self._picture is not None:
                timed = self._end_to_end(timed, _stage(setting, batch), self._picture)
            for entry in remaining(self._entries):
                entry.timings.append(timed[entry.name])

    def _open_elsewhere(self, setting: Setting, *, turned: bool) -> None:
        """Open anew what is quickly opened, while the old one still has its memory. turned: the last one first."""
        here = remaining(self._entries)
        for entry in here[::-1] if turned else here:
            if entry.open_ms + entry.first_ms <= 1000 * self._plan.seconds:  # the first call of torch.compile compiles
                with suppress(Exception):  # there may be no memory for two: the old one goes on
                    entry.contender.open(setting, elsewhere=True)

    def _more(self, before: Mapping[str, Latency], setting: Setting, batch: int, part: int) -> dict[str, Latency]:
        """What was timed of a batch by now, with one more part of it."""
        lanes = {entry.name: _lane(entry.contender, batch, setting) for entry in remaining(self._entries)}
        again, number = divmod(part, OPENINGS)
        stage = _stage(setting, batch) + ", continued" * bool(again)
        found = self._measure(lanes, self._plan.seconds / OPENINGS, stage, (number / OPENINGS, 1 / OPENINGS))
        return {name: before[name] + one if before else one for name, one in found.items()}

    def _needs_more(self, found: Mapping[str, Latency], setting: Setting) -> bool:
        """Whether more time is to tell what this did not."""
        return self._plan.seconds > 0 and self._undecided(self._timed(found, setting))

    def _end_to_end(self, timed: Mapping[str, Timed], stage: str, picture: NDArray[Any]) -> dict[str, Timed]:
        """The timings with how long a picture takes from decoded to answered."""
        lanes = {entry.name: _way(entry.contender, picture) for entry in remaining(self._entries)}
        ways = self._measure(lanes, self._plan.seconds * END_TO_END, f"{stage}, end to end")
        return {name: replace(timed[name], end_to_end_ms=way.centiles_ms[50]) for name, way in ways.items()}

    def _measure(
        self, lanes: Mapping[str, Lane], seconds: float, stage: str, span: tuple[float, float] = (0.0, 1.0)
    ) -> dict[str, Latency]:
        """What was timed of those that did not fail meanwhile, by name.

        span: where in the stage it begins, and how much of that it is.
        """
        begin, share = span

        def told(done: float) -> None:
            self._watch.look()
            self._progress(stage, begin + share * done)

        failed: dict[str, str] = {}
        least = math.ceil(MIN_SAMPLES * share)
        found = measure(list(lanes.values()), seconds=seconds, least=least, failed=failed, progress=told, energy=self._energy)
        for entry in self._entries:
            if entry.name in failed:
                entry.leave(f"timing ({stage})", failed[entry.name])
        remaining(self._entries)
        return {name: latency for name, latency in zip(lanes, found, strict=True) if latency}

    def _timed(self, found: Mapping[str, Latency], setting: Setting) -> dict[str, Timed]:
        """Of those that have not failed, the first of which is the reference."""
        first, *others = remaining(self._entries)
        reference = found[first.name]
        return {first.name: _timed(first.contender, setting, reference, None)} | {
            entry.name: _timed(entry.contender, setting, found[entry.name], reference) for entry in others
        }


def conditions_of(contenders: Sequence[Contender], plan: Plan) -> list[Conditions]:
    """The conditions that the timings of these will have (see `Timed`), each once."""
    found = itertools.product(contenders, plan.settings, plan.batches)
    return list(dict.fromkeys((batch, _threads(one, how), how.streams) for one, how, batch in found))


def _stage(setting: Setting, batch: int) -> str:
    return ", ".join(filter(None, ("latency", f"batch {batch}", "" if setting == Setting() else _told(setting))))


def _threads(contender: Contender, setting: Setting) -> int | None:
    """The threads that a contender has: as many as are asked for, else as its target says."""
    return setting.threads or (contender.manifest.target.threads if contender.manifest else None)


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
        threads=_threads(contender, setting),
        streams=setting.streams,
        calls=latency.samples_ms.size,
        rounds_ms=latency.rounds_ms,
        disturbed=latency.disturbed,
        centiles_ms=latency.centiles_ms,
        jitter_ms=latency.jitter_ms,
        p50=median_interval(latency.rounds_ms, _disturbed(latency), latency.openings),
        images_per_s=latency.images_per_s,
        bound_ms=engine_bound_ms(manifest, latency.batch) if manifest else None,
        power_w=watts,
        energy_mj=None if watts is None else watts / latency.images_per_s * 1000,
    )
    if reference is None:
        return timed
    disturbed = max(_disturbed(reference), _disturbed(latency))
    ratio, interval = speedup(reference.rounds_ms, latency.rounds_ms, disturbed, latency.openings)
    return replace(timed, speedup=ratio, speedup_interval=interval)


def _disturbed(latency: Latency) -> float:
    return latency.disturbed / len(latency.turns)


def _told(setting: Setting) -> str:
    parts = [(setting.threads, "thread"), (setting.streams if setting.streams != 1 else None, "stream")]
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in parts if count) or "all threads"


def _disturbances(latencies: Sequence[Latency]) -> list[str]:
    disturbed, turns = sum(latency.disturbed for latency in latencies), sum(len(latency.turns) for latency in latencies)
    dropped = sum(latency.dropped for latency in latencies)
    busy = f"another process was busy in {disturbed} of {turns} turns: the times are rough"
    back = f"the clock of this machine stood still or went back in {dropped} calls, which are not counted"
    return [busy] * (disturbed > ROUGH * turns) + [back] * (dropped > 0)


def _alike(entries: Sequence[Entry]) -> list[str]:
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
