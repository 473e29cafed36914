"""Contenders and image files in, a Document out: judged, then timed side by side, in every setting that is asked for.

    [Contender, ...] + [ImageFile, ...]  ->  open  ->  judge  ->  time in turns, setting by setting  ->  Document
                                                  ->  memory, in processes of their own  ->  layers  ->

Whoever fails on the way leaves, and is in the document with the reason; the others go on. The first one that does not fail is
the reference. Knows nothing of backends, terminals or reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any

from vitedge.bench.accuracy import Spread, judge
from vitedge.bench.contenders import Contender
from vitedge.bench.document import Document, LayerTime
from vitedge.bench.energy import Meter
from vitedge.bench.environment import environment
from vitedge.bench.explain import explain
from vitedge.bench.memory import peak_mib
from vitedge.bench.plan import Entry, Plan, Progress, Undecided, remaining
from vitedge.bench.timing import Timer
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, images_key

LAYERS_S = 3.0  # an engine, at most


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
    entries = [Entry(contender) for contender in contenders]
    for done, entry in enumerate(entries):
        progress("opening", done / len(entries))
        _open(entry)
    remaining(entries)
    told = list[str]()
    if files:  # first, so that the buffers hold real images when they are timed
        _judge(entries, files, told, lambda done: progress("accuracy", done / len(files)), spread)
    with closing(Meter()) as meter:
        notes += Timer(entries, plan, files, meter, progress, undecided).time()  # ahead of skipped files, which may be many
    notes += told
    remaining(entries)
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


def _open(entry: Entry) -> None:
    with entry.doing("opening"):
        start = time.perf_counter_ns()
        entry.contender.open()
        opened = time.perf_counter_ns()
        entry.contender.run(1)
        entry.open_ms, entry.first_ms = (opened - start) / 1e6, (time.perf_counter_ns() - opened) / 1e6


def _judge(
    entries: Sequence[Entry], files: Sequence[ImageFile], notes: list[str], progress: Callable[[int], Any], spread: Spread | None
) -> None:
    """Judge all that are here; where the reference fails, the next one is it."""
    here, failed = remaining(entries), dict[str, str]()
    contenders = [entry.contender for entry in here]
    if spread:  # to other processes: here, only so many images as fill the buffers
        judge(contenders, files[: max(contender.max_batch for contender in contenders)], failed={})
    found = judge(contenders, files, notes=notes, progress=progress, failed=failed, spread=spread)
    for entry, judged in zip(here, found, strict=True):
        if why := failed.get(entry.name):
            entry.leave("judging", why)
        else:
            entry.judged = judged


def _weigh(entries: Sequence[Entry], batch: int, notes: list[str], progress: Callable[[float], object]) -> None:
    """Find the memory that each takes; whose process fails has none, and a note."""
    here = remaining(entries)
    bare = peak_mib(None)
    for done, entry in enumerate(here):
        progress((1 + done) / (1 + len(here)))
        try:
            whole = peak_mib(entry.contender.ready_made, batch)
        except VitEdgeError as error:
            notes.append(f"{entry.name}: {error}")
        else:
            entry.peak_mib = None if whole is None or bare is None else max(0.0, whole - bare)


def _explain(entries: Sequence[Entry], seconds: float, progress: Callable[[float], object]) -> None:
    """Find what each engine's time goes to, where its backend tells."""
    for done, entry in enumerate(here := remaining(entries)):
        progress(done / len(here))
        if entry.contender.folder is not None:
            with suppress(VitEdgeError):
                (found,) = explain([entry.contender.folder], None, seconds)
                entry.layers = tuple(
                    LayerTime(one.layer.name, one.block, one.part, one.layer.precision, one.layer.ms) for one in found.layers
                )


def _document(entries: Sequence[Entry], files: Sequence[ImageFile], plan: Plan, notes: list[str]) -> Document:
    reference = remaining(entries)[0]
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
