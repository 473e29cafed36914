"""A model, images and some minutes in; the engines on the frontier of latency and accuracy, and which to ship, out.

    TuneJob  ->  the reference  ->  Space, Goal  ->  Search: trial after trial until the time is nearly up
             ->  finalists, side by side on as many images as the rest of the time allows  ->  Document, Choice, report

What was measured is kept (see workshop.py), so that a second run goes on where the first one stopped. Ctrl-C ends the search, and
what was found until then is measured and reported. Knows nothing of terminals: what happens is told to a Watcher.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitedge.backends import load_backend
from vitedge.backends.build import read_source
from vitedge.backends.metadata import count_operators
from vitedge.bench.contenders import open_contenders
from vitedge.bench.document import Document
from vitedge.bench.plan import Plan
from vitedge.bench.run import benchmark
from vitedge.datasets import list_dataset
from vitedge.designs import Design, Found, Goal, Space, decibels
from vitedge.errors import VitEdgeError
from vitedge.images import sample
from vitedge.pipeline import FLATTERED, ModelSource, Watcher, absent, require_compiler
from vitedge.search import Search
from vitedge.specs import ModelCard, Recipe, Target
from vitedge.workshop import REFERENCE, Clocked, Journal, Materials, OutOfTime, Workshop
from vitedge.workspace import known_recipes, load_recipe, load_target

FINAL = 0.3  # of the time, kept for measuring the finalists
FINALISTS = 8
HURRY_S = 20.0  # for the finalists after Ctrl-C
FIRST_S = 1.5  # of judging a pair, at first and at least
LAST_PART = 0.1  # of the time that judging a pair may take at last
FEWEST, FEWEST_POINTS = 16, 64  # images that a trial is judged on, for noise and for points of accuracy
RUNG = 4  # times as many images from rung to rung
FINAL_SHARE = 0.3  # of the last part goes to judging, as much to timing; the rest is for opening, memory and layers
TURNS = 4.0  # times as long as its timed calls an engine takes, with what lies between turns, and opened several times
LEAST_TIMED_S, MOST_TIMED_S = 0.5, 10.0
SLACK_S = 0.5  # between a trial that ends and the next
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # parts of all tokens that merging leaves out
SIDES = (0.86, 0.72, 0.58)  # of the image's own
FREED = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class TuneJob:
    """What `tune` is asked for.

    images: calibration images. judge: labelled or other images to measure accuracy on; the calibration images if None.
    recipes: those to try; all that suit the target if empty. budget_ms: of one call at the target's best batch. max_drop: points
    of top-1, or agreement, that may be lost. backend: in place of the target's own.
    labels: a table of the labels of what is judged (see datasets.py).
    """

    model: ModelSource
    images: Path
    root: Path
    judge: Path | None = None
    minutes: float = 10.0
    recipes: tuple[str, ...] = ()
    target: str = "cpu"
    backend: str | None = None
    budget_ms: float | None = None
    max_drop: float | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The finalists side by side, their engines by the candidate's name, what the graphs lie beside, and how many were tried."""

    document: Document
    engines: dict[str, Path]
    folder: Path
    tried: int


class Budget:
    """Seconds that are left of `seconds`, by a clock that may be a test's."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self.clock = seconds, clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Since the start."""
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Until all is over."""
        return self.seconds - self.spent

    @property
    def search_left(self) -> float:
        """Until the finalists have to be measured."""
        return self.left - FINAL * self.seconds

    @property
    def search_ends(self) -> float:
        """When that is, by the clock."""
        return self._start + (1 - FINAL) * self.seconds

    def told(self) -> str:
        """For people."""
        left = max(0, round(self.left))
        return f"{left // 60}:{left % 60:02} left"


def tune(job: TuneJob, watcher: Watcher, clock: Callable[[], float] = time.monotonic) -> Tuned:
    """Search the designs of a model for `minutes`, measure the best of them side by side, and say what was found.

    What stops the reference stops all: a VitEdgeError. A design that cannot be built is left out, with a note.
    """
    budget = Budget(60 * job.minutes, clock)
    target = load_target(job.target, job.backend)
    recipes = suitable(job.recipes, target)
    if reason := absent(target):
        hint = "run it on the device; `vitedge make` builds, or packs, what is for another machine"
        raise VitEdgeError(f"tune has to measure engines, and {reason}", hint=hint)
    require_compiler()
    odd: list[str] = []
    files = list_dataset(job.images, None if job.judge else job.labels, odd)
    judged = list_dataset(job.judge, job.labels, odd) if job.judge else files
    told = Told(watcher, budget)
    workshop = Workshop(Materials(job.model, files, judged, recipes, target, job.root), told.clocked, clock)
    told.begin(REFERENCE.name)
    graph = workshop.begin()
    told.end(f"{workshop.reference_ms:.2f} ms: the reference")
    search = _search(job, workshop, graph, budget)
    journal = workshop.journal()
    notes = [*odd, *([FLATTERED] if judged is files else [])]
    _recall(journal, workshop, search, told)
    hurried = run(search, workshop, journal, told, notes)
    notes += dict.fromkeys(workshop.notes)
    document, engines = _finish(search, workshop, told, HURRY_S if hurried else budget.left, notes, job.judge or job.images)
    return Tuned(document, engines, graph.parent, len(search.found))


def suitable(names: Sequence[str], target: Target) -> dict[str, Recipe]:
    """The recipes called `names`, or without any all of the workspace that differ from each other on `target`.

    A bound in a recipe is left to the search, which frees Linears itself; attention in INT8 pays where a backend fuses it.
    """
    if names:
        return {name: load_recipe(name) for name in dict.fromkeys(names) if name != REFERENCE.recipe}
    backend = load_backend(target.backend)
    native = backend.float_types(target)
    found = {recipe.name: recipe for recipe in map(load_recipe, known_recipes())}

    def suits(recipe: Recipe) -> bool:
        computes = recipe.float_type in ("auto", *native)
        if recipe.method == "none":
            return computes and recipe.float_type not in ("auto", "fp32")
        return computes and not recipe.min_sqnr_db and (backend.TYPED or not recipe.attention)

    return {name: recipe for name, recipe in found.items() if suits(recipe)}


def space_of(recipes: Mapping[str, Recipe], card: ModelCard, graph: Path, native: Sequence[str]) -> Space:
    """What may be combined for a model: fewer tokens only where it is a plain ViT, as far as its card and graph tell."""
    operators = count_operators(graph)
    blocks = operators["Softmax"] + operators["Attention"]
    linears = operators["MatMul"] + operators["Gemm"] - 2 * operators["Softmax"]
    quantized = frozenset(name for name, recipe in recipes.items() if recipe.method != "none")
    typed = any(recipes[name].float_type == "auto" for name in quantized) and native[0] != "fp32" and "fp32" in native
    space = Space((REFERENCE.recipe, *recipes), quantized, tuple(k for k in FREED if k < linears), ("fp32",) if typed else ())
    height, width = card.preprocess.size
    if not card.patch or not blocks:
        return space
    plain = replace(space, tokens=(height // card.patch) * (width // card.patch), blocks=blocks, size=height)
    sides = [card.patch * round(part * height / card.patch) for part in SIDES] if height == width else []
    if card.task == "dense":  # whose answers to smaller images are smaller: there is nothing to compare them with
        sides = []
    return replace(plain, merged=_rates(plain), sizes=tuple(dict.fromkeys(side for side in sides if 0 < side < height)))


def _rates(space: Space) -> tuple[tuple[int, ...], ...]:
    """Tokens to merge in each block, the fewest that leave out each of the parts CUTS: in one block, in two, in all.

    A merge takes time whatever it leaves out: on a processor, one large one often does better than many small ones.
    """
    every = range(space.blocks)
    patterns = ((space.blocks // 4,), (space.blocks // 4, space.blocks // 2), every)
    found = []
    for blocks, cut in itertools.product(patterns, CUTS):
        rates = (tuple(rate if block in blocks else 0 for block in every) for rate in range(1, space.tokens // 2 + 1))
        found.append(next((rate for rate in rates if 1 - space.work(rate, 0) >= cut), ()))
    return tuple(dict.fromkeys(filter(None, found)))


def _search(job: TuneJob, workshop: Workshop, graph: Path, budget: Budget) -> Search:
    """The search for what is asked for, before its first trial."""
    ours, card = workshop.materials, read_source(graph).card
    space = space_of(ours.recipes, card, graph, load_backend(ours.target.backend).float_types(ours.target))
    workshop.use_space(space)
    points = workshop.counts_points
    goal = Goal(
        points,
        job.budget_ms / workshop.reference_ms if job.budget_ms is not None else None,
        job.max_drop if points else None,
    )
    floats = [name for name in space.recipes[1:] if name not in space.quantized]
    quantized = sorted(space.quantized, key=lambda name: (name != Recipe().name, name))  # the default first
    required = _first(space, [REFERENCE, *map(Design, floats[:1])], [Design(name) for name in quantized[:1]])
    fewest = FEWEST_POINTS if points else FEWEST
    took = workshop.took.seconds
    first_s = max(FIRST_S, took["measure"] / 2)  # fewer images would hardly be quicker
    rungs = rungs_of(len(ours.judged), took["image"], first_s, budget.seconds, fewest)
    return Search(space, goal, workshop.seconds, rungs, required, workshop.freeing)


def _first(space: Space, floats: Sequence[Design], quantized: Sequence[Design]) -> tuple[Design, ...]:
    """One design in each direction, for the search to go on from: types, Linears in float, and, quickly built, one merge."""
    freed = [replace(one, freed=space.freed[len(space.freed) // 2]) for one in quantized if space.freed]
    merged = [replace(floats[-1], merged=space.merged[min(1, len(space.merged) - 1)])] if space.merged else []
    return (*floats, *quantized, *freed, *merged)


def rungs_of(images: int, image_s: float, first_s: float, seconds: float, fewest: int) -> tuple[int, ...]:
    """Numbers of images to judge on: what takes `first_s`, and RUNG times as many, up to all or to a part of all `seconds`."""
    last = max(min(images, int(LAST_PART * seconds / image_s)), min(images, fewest))
    first = min(max(int(first_s / image_s), fewest), last)
    rungs = [first]
    while 2 * rungs[-1] <= last:  # a rung that is hardly higher tells nothing new
        rungs.append(min(RUNG * rungs[-1], last))
    return (*rungs[:-1], last)


def _recall(journal: Journal, workshop: Workshop, search: Search, told: Told) -> None:
    """What earlier runs measured, of each design the last."""
    search.add(Found(REFERENCE, 1.0, 0.0, 0.0, len(workshop.materials.judged)))
    known = [found for entry in journal.read() if (found := workshop.recall(entry)) and found.design != REFERENCE]
    for found in known:
        search.add(found)
    if designs := {found.design for found in known}:
        told.note(f"{len(designs)} design{'s were' if len(designs) > 1 else ' was'} measured by an earlier run")


def run(search: Search, workshop: Workshop, journal: Journal, told: Told, notes: list[str]) -> bool:
    """Try one design after another until nothing fits into the time or promises much; whether Ctrl-C ended it."""
    told.clocked.ends = told.budget.search_ends
    try:
        while (trial := search.next(told.budget.search_left - SLACK_S)) is not None:
            told.begin(trial.design.name)
            try:
                found = workshop.measure(trial)
            except VitEdgeError as error:
                search.refuse(trial.design)
                notes.append(f"{trial.design.name} was left out: {error}")
                told.end(f"left out: {error}")
                continue
            search.add(found)
            journal.append(workshop.entry(found))
            told.end(describe(found, search.goal))
    except OutOfTime:
        told.end("not finished, as the time is up; what was built is kept for another run")
    except KeyboardInterrupt:
        told.end("interrupted; what was found until now is measured, unless you interrupt that, too")
        return True
    finally:
        told.clocked.ends = math.inf
    return False


def describe(found: Found, goal: Goal) -> str:
    """A trial as one line for people."""
    lost = f"loses {found.loss:.2f} ± {2 * found.spread:.2f} points" if goal.points else f"{decibels(found.loss):.1f} dB"
    return f"{1 / found.ratio:.2f} times as fast as fp32, {lost}, on {found.images} images"


def _finish(
    search: Search, workshop: Workshop, told: Told, left_s: float, notes: list[str], folder: Path
) -> tuple[Document, dict[str, Path]]:
    """The finalists side by side, on as many images and for as long as `left_s` seconds allow."""
    finalists, ours = search.finalists(FINALISTS), workshop.materials
    told.begin(f"{len(finalists)} finalists")
    folders = [workshop.build(one.design) for one in finalists]
    each_s = max(left_s, 0.0) * FINAL_SHARE / len(folders)
    count = int(each_s / (workshop.took.seconds["image"] / 2))  # which is of a pair
    files = sample(ours.judged, min(max(count, FEWEST), len(ours.judged)), 0)
    if len(files) < len(ours.judged):
        notes.append(f"time allowed for {len(files)} of {len(ours.judged)} images; `vitedge bench` takes all of them")
    seconds = min(max(each_s / TURNS, LEAST_TIMED_S), MOST_TIMED_S)
    plan = Plan((ours.batch,), seconds=seconds, layers=True, dataset=folder.resolve().name)
    with open_contenders([str(path) for path in folders]) as contenders:
        document = benchmark(
            contenders, files, plan, notes=notes, progress=lambda stage, done: told.clocked.progress(done, stage)
        )
        engines = {contender.name: path for contender, path in zip(contenders, folders, strict=True)}
    told.end(f"{len(files)} images, {seconds:.1f} s an engine, in turns")
    return document, engines


class Told:
    """Tells a Watcher of trials, one line each, and of the time that is left while they run."""

    def __init__(self, watcher: Watcher, budget: Budget) -> None:
        self.budget = budget
        self.clocked = Clocked(budget.clock, self._state)
        self._watcher, self._trial = watcher, ""

    def begin(self, trial: str) -> None:
        """A trial begins."""
        self._trial = trial
        self._watcher.begin("tune")
        self._state("")

    def end(self, result: str) -> None:
        """It has ended."""
        self._watcher.end("tune", f"{self._trial}: {result}")

    def note(self, what: str) -> None:
        """Something that is no trial."""
        self._watcher.end("tune", what)

    def _state(self, phase: str) -> None:
        step = f", {phase}" if phase else ""
        self._watcher.progress(min(self.budget.spent / self.budget.seconds, 1.0), f"{self._trial}{step}; {self.budget.told()}")


def check_minutes(minutes: float) -> None:
    """Raise VitEdgeError unless a search may last so long."""
    if not 0 < minutes < math.inf:
        raise VitEdgeError(f"a search lasts some minutes, not {minutes:g}", hint="give --minutes a number above 0")
