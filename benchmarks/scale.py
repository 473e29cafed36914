"""Judging and calibrating over Ray workers: how fast, how many bytes move, and whether the figures are those of one process.

    engines/*, examples/*/.cache (make demo)  ->  one process, then 1, 2, 4 workers, in turns  ->  results/scale.json

    python -m benchmarks.scale [--workers 1 2 4] [--rounds 3] [--output results/scale.json]

`seconds` is without what a cluster takes to start, which is `start_s`; that every worker opens the engines is in it.
Of several rounds the fastest counts: other processes only ever add. `driver_ms` is what merging a part takes the
process that gives the parts out. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vitedge.bench.accuracy import judge
from vitedge.bench.contenders import open_contenders
from vitedge.bench.environment import environment
from vitedge.cluster import Cluster, on_one_core, open_cluster
from vitedge.compiler.calibrate import calibrate
from vitedge.images import ImageFile, list_images
from vitedge.specs import to_dict
from vitedge.workspace import find_engines, find_graph, load_recipe, write_json

ROOT = Path(__file__).parents[1]
err = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A model of examples/EXAMPLE, the part of its images that is judged, and how many are judged and calibrated on."""

    example: str
    part: str
    judged: int
    calibrated: int


SUBJECTS = {"fashion-vit": Subject("fashion_mnist", "test", 10_000, 128), "focus-vits14": Subject("focus", "judge", 256, 32)}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One way to do one thing. workers: 0 for one process without Ray, on all cores. image_bytes: of one as it is stored."""

    task: str
    model: str
    workers: int
    images: int
    image_bytes: int
    start_s: float
    seconds: float
    images_per_s: float
    sent_bytes: int
    received_bytes: int
    driver_ms: float
    same: bool


class Clocked:
    """A spread, and what the process that asks for the parts does between them."""

    def __init__(self, spread: Callable[..., Iterator[Any]]) -> None:
        self._spread = spread
        self.parts, self.busy_s = 0, 0.0

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        parts = self._spread(*arguments)
        for part in parts:
            start = time.perf_counter()
            yield part
            self.busy_s += time.perf_counter() - start
            self.parts += 1

    @property
    def driver_ms(self) -> float:
        """A part."""
        return 1e3 * self.busy_s / max(self.parts, 1)


def main() -> None:
    """Measure every task with every number of workers, and write the rows."""
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "scale.json")
    given = parser.parse_args()
    rows = []
    for model in SUBJECTS:
        for task in (judged, calibrated):
            rows += best_of(given.rounds, partial(task, model), [0, *given.workers])
    where = {**environment(), "command": shlex.join(["python", "-m", "benchmarks.scale", *sys.argv[1:]])}
    write_json(given.output, {"environment": where, "rows": [to_dict(row) for row in rows]})


def best_of(rounds: int, measure: Callable[[int], tuple[Row, Any]], counts: Sequence[int]) -> list[Row]:
    """The fastest row of each number of workers; `same` where each result is that of one process."""
    found: dict[int, list[Row]] = {count: [] for count in counts}
    expected = None
    for _ in range(rounds):
        for count in counts:
            row, result = measure(count)
            expected = result if expected is None else expected
            found[count].append(dataclasses.replace(row, same=result == expected))
            err.print(found[count][-1])
    return [
        dataclasses.replace(min(rows, key=lambda row: row.seconds), same=all(row.same for row in rows)) for rows in found.values()
    ]


def judged(model: str, workers: int) -> tuple[Row, Any]:
    """The accuracy of the FP32 and the INT8 engine on the example's test images."""
    count = SUBJECTS[model].judged
    files = images(model, SUBJECTS[model].part)
    files = (files * -(-count // len(files)))[:count]  # focus has few: taken several times
    names = [str(find_engines(Path(model) / variant)[0]) for variant in ("fp32", "int8")]
    with ExitStack() as stack:
        contenders = stack.enter_context(open_contenders(names))
        judge(contenders, files[:16])  # opens them
        start = time.perf_counter()
        cluster = stack.enter_context(open_cluster(str(workers))) if workers else None
        spread = Clocked(cluster.judging(partial(on_one_core, names))) if cluster else None
        return timed("judge", model, workers, files, start, cluster, spread, lambda: judge(contenders, files, spread=spread))


def calibrated(model: str, workers: int) -> tuple[Row, Any]:
    """The scale table of the recipe int8, from the example's calibration images."""
    files, graph, recipe = images(model, "calibration"), find_graph(Path(model) / "fp32.onnx"), load_recipe("int8")
    start = time.perf_counter()
    with ExitStack() as stack:
        cluster = stack.enter_context(open_cluster(str(workers))) if workers else None
        spread = Clocked(cluster.surveying()) if cluster else None
        drawn = files[: SUBJECTS[model].calibrated]
        return timed(
            "calibrate", model, workers, drawn, start, cluster, spread, lambda: calibrate(graph, drawn, recipe, spread=spread)
        )


def timed(
    task: str,
    model: str,
    workers: int,
    files: Sequence[ImageFile],
    start: float,
    cluster: Cluster | None,
    spread: Clocked | None,
    run: Callable[[], Any],
) -> tuple[Row, Any]:
    """A row about one run, and its result."""
    before = (cluster.sent, cluster.received) if cluster else (0, 0)
    began = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - began
    moved = (cluster.sent - before[0], cluster.received - before[1]) if cluster else (0, 0)
    size = sum(file.path.stat().st_size for file in files) // len(files)
    driver_ms, per_s = spread.driver_ms if spread else 0.0, len(files) / seconds
    row = Row(task, model, workers, len(files), size, began - start, seconds, per_s, *moved, driver_ms, same=True)
    return row, result


def images(model: str, part: str) -> list[ImageFile]:
    """The images of an example, which `make demo` made."""
    return list_images(ROOT / "examples" / SUBJECTS[model].example / ".cache" / part)


if __name__ == "__main__":
    main()
