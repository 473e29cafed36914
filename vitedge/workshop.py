"""A Design in, an engine and what it measures out; what was measured is kept, so that a search can go on another day.

    Design  ->  export, quantize, loosen, build  ->  engine directory
            ->  beside the reference, in turns and on the same images  ->  Found  ->  a line of engines/MODEL/tune-KEY.jsonl

Every step is the pipeline's own and keeps what it makes under a name that holds the hash of all it was made from. Knows what a
trial took, and so what the next will take; knows nothing of what is worth trying: that is search.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitedge import __version__
from vitedge.backends.build import read_source
from vitedge.bench.contenders import open_contenders
from vitedge.bench.document import Candidate, Document, Judged
from vitedge.bench.frontier import drop_of
from vitedge.bench.plan import Plan
from vitedge.bench.proportions import Z
from vitedge.bench.run import benchmark
from vitedge.bound import costs_step, loosen_step
from vitedge.designs import Design, Found, Space, Trial
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, sample
from vitedge.pipeline import ModelSource, build_step, export_step, quantize_step
from vitedge.search import hopeful
from vitedge.specs import FloatType, Recipe, Target, from_dict, to_dict
from vitedge.workspace import content_key, sha256, writing

if TYPE_CHECKING:
    from vitedge.compiler.sensitivity import Point

REFERENCE = Design("fp32")  # the float model as it was exported
TIMED_S = 0.6  # of each of the two, in a trial
WARM_IMAGES, FIRST_IMAGES = 4, 64  # that the reference is measured on alone
EXPORT_S, BUILD_S, LOOSEN_S = 15.0, 3.0, 5.0  # that a step is expected to take, until one was made
PASSES = 4  # over its images, at the speed of the reference, that calibrating and quantizing are expected to take
COSTS_S = 50.0  # a second a Linear, of which a small ViT has about fifty
LEAST_IMAGE_S = 1e-4  # of judging one
NOISE_SPREAD = 0.3  # by which part the noise of images differs, about
GAINED = 0.5  # of the time that sensitivity.py's model adds for a Linear in float, on a processor with bf16


class OutOfTime(Exception):  # noqa: N818  nothing went wrong
    """A trial would end too late. No VitEdgeError, which would say that the design cannot be built."""


class Clocked:
    """A Watcher that passes on what a step says as the state of a trial, and ends the trial when its time is up.

    tell: told which step runs. taken: seconds of each step of this trial that was not fresh.
    """

    def __init__(self, clock: Callable[[], float], tell: Callable[[str], None]) -> None:
        self.taken: dict[str, float] = {}
        self.ends = math.inf
        self._clock, self._tell = clock, tell
        self._began: dict[str, float] = {}

    def begin(self, step: str) -> None:
        """A step begins."""
        self._began[step] = self._clock()
        self.progress(0.0, step)

    def progress(self, fraction: float, phase: str = "") -> None:
        """A step goes on; raises OutOfTime where the time is up."""
        if self._clock() > self.ends:
            raise OutOfTime
        self._tell(phase)

    def end(self, step: str, result: str) -> None:
        """A step has ended; one that never began was fresh."""
        if (began := self._began.pop(step, None)) is not None:
            self.taken[step] = self.taken.get(step, 0.0) + self._clock() - began


@dataclass(frozen=True, slots=True)
class Materials:
    """What designs are built from, for and judged on. recipes: by name, of all designs but the reference."""

    source: ModelSource
    files: Sequence[ImageFile]
    judged: Sequence[ImageFile]
    recipes: Mapping[str, Recipe]
    target: Target
    root: Path

    @property
    def batch(self) -> int:
        """That latency is measured at: what the target is built for."""
        return self.target.batch[1]


@dataclass(frozen=True, slots=True)
class Journal:
    """What trials found, a line each: killed half-way, a search loses no more than the trial it was at."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.is_file() else []
        entries = []
        for line in lines:
            with suppress(ValueError, RecursionError):  # cut short, or no line of ours
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line, on disk when this returns. It starts on a line of its own, whatever the last writer left."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0, os.SEEK_END)
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                torn = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


@dataclass(slots=True)
class Took:
    """Seconds that things took, by name; "image": judging one of a pair of engines."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, recipe: str, taken: Mapping[str, float], work: float) -> None:
        """Remember a trial's steps. What depends on the recipe is kept by recipe, and all of it as of all tokens."""
        quantizing = taken.get("calibrate", 0.0) + taken.get("quantize", 0.0)
        if "quantize" in taken:
            self.seconds[f"quantize {recipe}"] = quantizing / work
        self.seconds |= {step: taken[step] for step in ("export", "build", "loosen", "precision", "costs") if step in taken}


class Workshop:
    """Builds and measures designs. watcher: is told of every step, and ends a trial (see Clocked).

    reference_ms: of a call of the reference. counts_points: whether losses are points of top-1 or agreement, and not noise.
    notes: what calibrating had to say. took: see Took.
    """

    def __init__(self, materials: Materials, watcher: Clocked, clock: Callable[[], float]) -> None:
        self.materials = materials
        self.took = Took()
        self.notes: list[str] = []
        self.reference_ms, self.counts_points = 0.0, True
        self._watcher, self._clock = watcher, clock
        self._models: dict[tuple[tuple[int, ...], int], Path] = {}
        self._graphs: dict[tuple[str, tuple[int, ...], int], Path] = {}
        self._folders: dict[Design, Path] = {}
        self._designs: frozenset[Design] | None = None
        self._points: dict[str, list[Point]] = {}
        self._work: Callable[[Sequence[int], int], float] = lambda merged, size: 1.0

    def begin(self) -> Path:
        """The reference's graph, once its engine was measured alone: raises what stops all the rest."""
        folder, judged = self.build(REFERENCE), self.materials.judged
        self.benchmark([folder], sample(judged, WARM_IMAGES, 0), 0.0)  # what is done once takes time once
        document = self.benchmark([folder], sample(judged, FIRST_IMAGES, 0), TIMED_S)
        self.reference_ms = document.candidates[0].timings[0].p50_ms
        graph = self._model(REFERENCE)
        self.counts_points = read_source(graph).card.task == "classify"
        return graph

    def use_space(self, space: Space) -> None:
        """What there is to recall, and how fewer tokens shorten the steps."""
        self._work, self._designs = space.work, frozenset(space.designs())

    def journal(self) -> Journal:
        """Of this model, these images and this target: what else there is to a design, its line says."""
        from vitedge.compiler.activations import images_sha256

        ours, model = self.materials, self._model(REFERENCE)
        drawn = [images_sha256(sample(files, 2000, 0)) for files in (ours.files, ours.judged)]
        key = content_key(__version__, sha256(model), drawn, to_dict(replace(ours.target, peaks=None)))
        return Journal(model.with_name(f"tune-{key}.jsonl"))

    def entry(self, found: Found) -> dict[str, Any]:
        """A trial as a line of the journal."""
        return {"found": to_dict(found), "recipe": self._recipe_key(found.design.recipe), "took": dict(self.took.seconds)}

    def recall(self, entry: Mapping[str, Any]) -> Found | None:
        """The trial in a line of the journal; None where it is of a recipe that has changed, or damaged."""
        with suppress(VitEdgeError, KeyError, TypeError, AttributeError, ValueError, OverflowError):
            found = from_dict(Found, entry["found"])
            took = {str(name): float(value) for name, value in entry["took"].items()}
            known = self._designs is None or found.design in self._designs
            sound = found.sound and all(0 <= value < math.inf for value in took.values())
            if known and sound and entry["recipe"] == self._recipe_key(found.design.recipe):
                now = {name: value for name, value in self.took.seconds.items() if name in ("image", "measure")}
                self.took.seconds |= took | now
                return found
        return None

    def build(self, design: Design) -> Path:
        """The engine directory of a design; a VitEdgeError where the model or the target does not allow it."""
        if design not in self._folders:
            ours = self.materials
            graph = self._graph(design)
            self._folders[design] = build_step(graph, ours.target, ours.root / "engines", self._watcher, ours.files)
        return self._folders[design]

    def measure(self, trial: Trial) -> Found:
        """Build a design and hold it against the reference on some of the judge images."""
        self._watcher.taken = {}
        folder = self.build(trial.design)
        self.took.add(trial.design.recipe, self._watcher.taken, self._work(trial.design.merged, trial.design.size))
        files = sample(self.materials.judged, trial.images, 0)
        document = self.benchmark([self.build(REFERENCE), folder], files, TIMED_S)
        return self._found(trial.design, document)

    def benchmark(self, folders: Sequence[Path], files: Sequence[ImageFile], seconds: float) -> Document:
        """Engines side by side, without all that a trial need not know."""
        began, last = self._clock(), dict[str, float]()

        def progress(stage: str, done: float) -> None:
            last[stage] = self._clock()
            self._watcher.progress(done, "measure")

        plan = Plan((self.materials.batch,), seconds=seconds, end_to_end=False)
        with open_contenders([str(folder) for folder in folders]) as contenders:
            document = benchmark(contenders, files, plan, notes=[], progress=progress)
        for candidate in document.candidates:
            if candidate.failed:
                raise VitEdgeError(f"{candidate.name} failed while {candidate.failed}")
        opened_s = (document.candidates[-1].open_ms + document.candidates[-1].first_ms) / 1000
        judging_s = last.get("accuracy", began) - last.get("opening", began) - opened_s
        image_s, pairs = max(judging_s / len(files), LEAST_IMAGE_S), 2 / len(folders)
        took_s = self._clock() - began - image_s * len(files)
        self.took.seconds |= {"image": image_s * pairs, "measure": max(took_s, 0.0) * pairs}
        return document

    def seconds(self, trial: Trial) -> float:
        """What a trial will take, by what others took."""
        took = self.took.seconds
        return self._building_s(trial.design) + took["measure"] + trial.images * took["image"]

    def freeing(self, freed: int) -> tuple[float, float]:
        """The factors of loss and of latency of so many Linears in float (see search.Freeing)."""
        points = next(iter(self._points.values()), None)
        if points is None:
            return hopeful(freed)
        point = points[min(freed, len(points) - 1)]
        noise = 10 ** ((points[0].predicted_db - point.predicted_db) / 10)
        return noise**0.5 if self.counts_points else noise, 1 + GAINED * (point.latency - 1)

    def _model(self, design: Design) -> Path:
        """The float graph."""
        ours, key = self.materials, (design.merged, design.size)
        if key not in self._models:
            source = replace(ours.source, merge_tokens=design.merged, size=design.size or ours.source.size)
            self._models[key] = export_step(source, ours.files, ours.root / "engines", self._watcher)
        return self._models[key]

    def _graph(self, design: Design) -> Path:
        """The graph that the engine is built from."""
        ours, model = self.materials, self._model(design)
        if design.recipe == REFERENCE.recipe:
            return model
        recipe, key = ours.recipes[design.recipe], (design.recipe, design.merged, design.size)
        if key not in self._graphs:
            self._graphs[key] = quantize_step(model, ours.files, recipe, ours.root, self._watcher, self.notes)
        graph = self._graphs[key]
        if not (design.freed or design.floats):
            return graph
        names = [point.name for point in self._costs(design.recipe)[1 : design.freed + 1]] if design.freed else []
        floats = cast("FloatType | None", design.floats or None)
        return loosen_step(model, graph, names, floats, ours.root, _variant(graph, design), self._watcher)

    def _costs(self, recipe: str) -> list[Point]:
        """Which Linears to free first, as measured at all tokens: the names are the same at fewer."""
        if recipe not in self._points:
            ours, plain = self.materials, Design(recipe)
            graph = self._graph(plain)
            points = costs_step(self._model(plain), graph, ours.files, ours.recipes[recipe], ours.root, self._watcher)
            self._points[recipe] = points
        return self._points[recipe]

    def _building_s(self, design: Design) -> float:
        """What is still to be built."""
        if design in self._folders:
            return 0.0
        took, fewer = self.took.seconds, (design.merged, design.size)
        work, needed = self._work(*fewer), took.get("build", BUILD_S) + took.get("precision", 0.0)
        if fewer not in self._models:
            needed += took.get("export", EXPORT_S)
        if design.recipe != REFERENCE.recipe and (design.recipe, *fewer) not in self._graphs:
            needed += self._quantizing_s(self.materials.recipes[design.recipe]) * work
        if design.freed or design.floats:
            needed += took.get("loosen", LOOSEN_S)
        if design.freed and design.recipe not in self._points:
            needed += took.get("costs", COSTS_S)
        return needed

    def _quantizing_s(self, recipe: Recipe) -> float:
        expected = 1.0 if recipe.method == "none" else 5 + PASSES * recipe.images * self.reference_ms / 1000
        return self.took.seconds.get(f"quantize {recipe.name}", expected)

    def _recipe_key(self, recipe: str) -> str:
        return content_key(to_dict(self.materials.recipes[recipe]) if recipe != REFERENCE.recipe else recipe)

    def _found(self, design: Design, document: Document) -> Found:
        candidate = document.candidates[1]
        timed = candidate.timings[0]
        if timed.speedup is None or timed.speedup_interval is None or candidate.judged is None:
            raise VitEdgeError(f"{candidate.name} was not measured")
        doubt = math.log(timed.speedup_interval.high / timed.speedup_interval.low) / (2 * Z)
        loss, spread = _loss(document, candidate, points=self.counts_points)
        return Found(design, 1 / timed.speedup, loss, spread, candidate.judged.images, doubt)


def _variant(graph: Path, design: Design) -> str:
    """The variant of the graph that is loosened, with what is loosened."""
    freed = f".free{design.freed}" if design.freed else ""
    return f"{graph.stem.rpartition('-')[0]}{freed}{'.' * bool(design.floats)}{design.floats}"


def _loss(document: Document, candidate: Candidate, *, points: bool) -> tuple[float, float]:
    """The loss of a candidate as search.py counts it, and its standard error."""
    judged = candidate.judged or Judged(0)
    measured = drop_of(document, candidate) if points else judged.sqnr_db
    if measured is None or not judged.images:
        what = f"the output of {candidate.name} cannot be compared with the reference's"
        raise VitEdgeError(what, hint="is it of the same shape?")
    if not points:
        noise = 10 ** (-measured / 10)
        return noise, NOISE_SPREAD * noise / math.sqrt(judged.images)
    if judged.drop_interval is not None:
        return measured, (judged.drop_interval.high - judged.drop_interval.low) / (2 * Z)
    changed = max(1 - (judged.agreement or 0.0) / 100, 1 / judged.images)  # none of a few may be one of many
    return measured, 100 * math.sqrt(changed / judged.images)
