"""What a benchmark is to measure, and what is known of each contender by now.

    Plan: batches, threads, streams, seconds      Entry: a Contender, what was found of it, why it left if it did

Knows nothing of how anything is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from vitedge.bench.contenders import Contender, Setting
from vitedge.bench.document import Candidate, Judged, LayerTime, Timed
from vitedge.errors import VitEdgeError, first_line

Progress = Callable[[str, float], object]  # told the stage, and its finished part, 0 to 1
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


class Entry:
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


def remaining(entries: Sequence[Entry]) -> list[Entry]:
    """Those that did not fail; none is a VitEdgeError with what the first one failed of."""
    here = [entry for entry in entries if not entry.failed]
    if not here:
        what = f"{entries[0].name} failed while {entries[0].failed}"
        raise VitEdgeError(what if len(entries) == 1 else f"all {len(entries)} failed; {what}")
    return here
