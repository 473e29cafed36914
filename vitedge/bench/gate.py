"""What was measured before and what is measured now in, what has certainly become worse out: a gate for other people's CI.

    baseline Document, limits  ->  Gate  ->  is a timing decided?  ->  Document  ->  Verdict

From run to run a machine gets faster or slower (clock, heat, neighbours), and all on it alike. So where both runs have the same
reference, the candidate's ratios to it are compared, in which that cancels; and where the baseline is a candidate of the same
run, nothing is left to cancel. Certain is what holds with 97.5 % confidence: the whole interval of the change lies beyond the
limit. Knows nothing of terminals or of how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitedge.bench.document import Candidate, Conditions, Document, Interval, Judged, Timed
from vitedge.bench.proportions import difference_of_samples, exact_difference
from vitedge.bench.statistics import ANOTHER_RUN
from vitedge.errors import VitEdgeError

MAX_SLOWER, MAX_DROP = 2.0, 0.2  # percent of the time, points of top-1
MOST = 100.0  # of a logarithm: what is beyond all measure is a number all the same


@dataclass(frozen=True, slots=True)
class Change:
    """How much worse something is than it was. amount: percent of the time, or points; negative is better."""

    amount: float
    low: float
    high: float

    def is_certain(self, limit: float) -> bool:
        """Whether it is worse by more than the limit."""
        return self.low > limit

    def is_open(self, limit: float) -> bool:
        """Whether it may be, and may not be."""
        return self.low <= limit < self.high


@dataclass(frozen=True, slots=True)
class Verdict:
    """worse: a sentence on each change beyond its limit. notes: on what was compared, and what could not be decided."""

    worse: tuple[str, ...]
    notes: tuple[str, ...]


class Gate:
    """Holds a run against a baseline.

    baseline: what was measured before, or None where the first candidate of the run itself is the baseline. called: what to call
    it. max_slower: percent that a median may be slower. max_drop: points of top-1 (or agreement) that may be lost.
    """

    def __init__(
        self, baseline: Document | None, called: str, max_slower: float = MAX_SLOWER, max_drop: float = MAX_DROP
    ) -> None:
        for option, limit in (("--max-slower", max_slower), ("--max-drop", max_drop)):
            if not 0 <= limit < math.inf:
                raise VitEdgeError(f"{option} is {limit:g}", hint="give what may be lost: 0, or more")
        self._baseline, self._called = baseline, called
        self._max_slower, self._max_drop = max_slower, max_drop

    def require_comparable(
        self, names: Sequence[str], conditions: Sequence[Conditions], environment: Mapping[str, str], images_key: str
    ) -> list[str]:
        """Raise a VitEdgeError where a run of `names` could not be held against the baseline; gives notes on what is left out.

        It is said before minutes are spent on measuring. conditions: that the run will be timed under. environment, images_key:
        as its document will have them.
        """
        if self._baseline is None:
            return []
        before = self._baseline
        _require_same_machine(before, self._called, environment)
        old = {one.name: one for one in before.finished}
        common = [name for name in names if name in old]
        if not common:
            what = f"{self._called} has none of {', '.join(names)}"
            raise VitEdgeError(what, hint=f"it has {', '.join(old) or 'nothing that did not fail'}; make it again")
        timed = {one.conditions for name in common for one in old[name].timings}
        if not timed & set(conditions):
            what = f"{self._called} was timed at {_some(timed)}, and this run is at {_some(conditions)}"
            raise VitEdgeError(what, hint="give the same --batch, --threads and --streams, or make it again")
        notes = [f"{name} is not in {self._called}, so it is held against nothing" for name in names if name not in old]
        notes += [f"{name} is in {self._called}, and is not measured now" for name in old if name not in names]
        if len(common) == 1 or before.reference != names[0]:
            notes.append(
                f"without a reference that is in {self._called} too, times are compared as they are, and a machine that is "
                "slower today looks like a slower engine: give a second engine that does not change, such as FP32, first in both"
            )
        if images_key != before.images_key:
            notes.append(f"{self._called} was judged on other images, so accuracies are compared as of two samples")
        return notes

    def undecided(self, timed: Mapping[str, Timed]) -> bool:
        """Whether more time could tell if one of these is too slow."""
        return any(
            change.is_open(self._max_slower) and self._is_wide(change)
            for name, one in timed.items()
            if (change := self._slower(name, one, timed.keys()))
        )

    def verdict(self, document: Document) -> Verdict:
        """What of a run is worse than the baseline by more than the limits."""
        worse, notes = list[str](), list[str]()
        names = {one.name for one in document.finished}
        for candidate in document.candidates:
            old = self._old(candidate.name, document)
            if old is None:
                continue
            if candidate.failed:
                worse.append(f"{candidate.name} failed while {candidate.failed}, which it did not in {self._called}")
                continue
            for timed in candidate.timings:
                if change := self._slower(candidate.name, timed, names):
                    self._say_time(candidate, timed, change, worse, notes)
            if found := _lost(candidate, old, self._is_paired(document)):
                self._say_loss(candidate, *found, worse, notes)
        return Verdict(tuple(worse), tuple(notes))

    def _old(self, name: str, document: Document) -> Candidate | None:
        """What a candidate is held against."""
        if self._baseline is not None:
            return next((one for one in self._baseline.finished if one.name == name), None)
        first = document.candidates[0]
        return None if name == first.name or first.failed else first

    def _is_paired(self, document: Document) -> bool:
        return self._baseline is None or self._baseline.images_key == document.images_key

    def _slower(self, name: str, timed: Timed, names: Collection[str]) -> Change | None:
        """How many percent slower than in the baseline, under the same conditions; None where there is nothing to compare.

        names: of all that run now. Of the reference nothing is said where others are held against it: its own time tells how
        fast the machine is.
        """
        if self._baseline is None:
            return _slower_now(timed)
        before = {one.name: one for one in self._baseline.finished}
        timings = before[name].timings if name in before else ()
        old = next((one for one in timings if one.conditions == timed.conditions), None)
        if old is None:
            return None
        is_reference = timed.speedup is None and old.speedup is None
        return None if is_reference and len(before.keys() & set(names)) > 1 else _slower_since(timed, old)

    def _is_wide(self, change: Change) -> bool:
        """Whether the change is so near the limit because little time was spent on it, and not because it is there."""
        return change.high - change.low > self._max_slower / 4

    def _say_time(self, candidate: Candidate, timed: Timed, change: Change, worse: list[str], notes: list[str]) -> None:
        what = f"{candidate.name} at {_some([timed.conditions])}"
        between = f"{_signed(change.low)} to {_signed(change.high)} %"
        if change.is_certain(self._max_slower):
            worse.append(
                f"{what} is {change.amount:.1f} % slower than {self._called} ({between}), more than the {self._max_slower:g} % "
                "that --max-slower allows"
            )
        elif change.is_open(self._max_slower):
            notes.append(
                f"{what} may be more than {self._max_slower:g} % slower than {self._called}, or not ({between}): --seconds tells"
            )
        else:
            notes.append(f"{what} is no more than {self._max_slower:g} % slower than {self._called} ({between})")

    def _say_loss(self, candidate: Candidate, what: str, lost: Change, worse: list[str], notes: list[str]) -> None:
        between = f"{_signed(lost.low, 2)} to {_signed(lost.high, 2)}"
        if lost.is_certain(self._max_drop):
            worse.append(
                f"{candidate.name} has lost {lost.amount:.2f} points of {what} against {self._called} ({between}), more than the "
                f"{self._max_drop:g} that --max-drop allows"
            )
        elif lost.amount > self._max_drop:
            notes.append(
                f"{candidate.name} has lost {lost.amount:.2f} points of {what} against {self._called}, which may be chance "
                f"({between}): more images tell"
            )


def _require_same_machine(baseline: Document, called: str, environment: Mapping[str, str]) -> None:
    for key in ("machine", "cores", "gpu"):
        before, now = (where.get(key, "") for where in (baseline.environment, environment))
        if before != now:
            what = f"{called} was measured on another machine: {key} {before or 'unknown'}, here {now or 'unknown'}"
            hint = (
                "measure it here; or give the engine, ONNX file or model that it is about to --baseline, and both are timed here"
            )
            raise VitEdgeError(what, hint=hint)


def _slower_now(timed: Timed) -> Change | None:
    """Against the reference of the same run, which is the baseline."""
    if timed.speedup is None or timed.speedup_interval is None:
        return None
    middle = -math.log(timed.speedup)
    above = math.log(timed.speedup / timed.speedup_interval.low) / ANOTHER_RUN
    below = math.log(timed.speedup_interval.high / timed.speedup) / ANOTHER_RUN
    return _percent(middle, below, above)


def _slower_since(now: Timed, before: Timed) -> Change:
    """Against another run: by the ratios to the reference if both have one, else by the times themselves."""
    if now.speedup and before.speedup and now.speedup_interval and before.speedup_interval:
        new, old = (now.speedup, now.speedup_interval), (before.speedup, before.speedup_interval)
        middle = math.log(before.speedup / now.speedup)
        below, above = math.hypot(_up(*new), _down(*old)), math.hypot(_down(*new), _up(*old))
    else:
        middle = math.log(now.p50_ms / before.p50_ms)
        below = math.hypot(_down(now.p50_ms, now.p50), _up(before.p50_ms, before.p50))
        above = math.hypot(_up(now.p50_ms, now.p50), _down(before.p50_ms, before.p50))
    return _percent(middle, below / ANOTHER_RUN, above / ANOTHER_RUN)


def _percent(middle: float, below: float, above: float) -> Change:
    """Of a logarithm and what it may be less or more."""
    return Change(*(100 * math.expm1(min(one, MOST)) for one in (middle, middle - below, middle + above)))


def _up(value: float, interval: Interval) -> float:
    return math.log(max(interval.high / value, 1.0))


def _down(value: float, interval: Interval) -> float:
    return math.log(max(value / interval.low, 1.0))


def _lost(now: Candidate, before: Candidate, paired: bool) -> tuple[str, Change] | None:
    """What was lost, and how many points; None where accuracy was not measured in both. paired: on the same images."""
    new, old = now.judged or Judged(0), before.judged or Judged(0)
    if paired and new.right and old.right and new.labelled == old.labelled:
        lost, won = (old.right_bits & ~new.right_bits).bit_count(), (new.right_bits & ~old.right_bits).bit_count()
        between = exact_difference(lost, won, old.labelled)
        return "top-1", Change(100 * (lost - won) / old.labelled, between.low, between.high)
    if new.top1 is not None and old.top1 is not None:
        return "top-1", _lost_by_samples(old.top1, old.labelled, new.top1, new.labelled)
    if new.agreement is not None and old.agreement is not None:
        return "agreement", _lost_by_samples(old.agreement, old.images, new.agreement, new.images)
    return None


def _lost_by_samples(old: float, old_images: int, new: float, new_images: int) -> Change:
    between = difference_of_samples(old, old_images, new, new_images)
    return Change(old - new, between.low, between.high)


def _some(conditions: Iterable[Conditions]) -> str:
    """ "batch 1, 8; batch 1 on 2 threads"."""
    parts = []
    for batch, threads, streams in sorted(conditions, key=str):
        on = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((threads, "thread"), (streams, "stream")) if count]
        shown = on[:1] * (threads is not None) + on[-1:] * (streams != 1)
        parts.append(f"batch {batch}" + (f" on {' and '.join(shown)}" if shown else ""))
    return ", ".join(parts)


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}"
