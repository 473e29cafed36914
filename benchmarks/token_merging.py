"""What token merging costs and buys, in models that were not trained for it.

    examples/fashion_mnist, examples/focus  ->  merged engines, FP32 and INT8  ->  accuracy, operations, latency  ->  JSON

    pip install -e '.[compile,cpu]'
    python -m benchmarks.token_merging [--seconds 10] [--output results/token_merging.json]

Three subjects: the Fashion-MNIST ViT on its 10,000 test images; the focus ViT-S/14 by the SQNR of its saliency on the stills of
a clip that calibration never saw; and a ViT-S/16 with random weights that answers with its class token, for its latency alone.
All are engines of OpenVINO, at batch 1 for the latency, which all variants of a subject are timed at in turns, on one core and on
all. Built engines are kept in .cache/token_merging/. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from rich.console import Console
from torch import Tensor, nn

from benchmarks.cpu_latency import FOCUS, ROOT, WEIGHTS, Features
from vitedge.backends.build import build_engine, read_source
from vitedge.bench.accuracy import judge
from vitedge.bench.environment import environment
from vitedge.bench.latency import Lane, measure
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import convert, reduce
from vitedge.compiler.graph import copy_of
from vitedge.compiler.models import load_model
from vitedge.compiler.quantize import leave_float, quantize
from vitedge.compiler.work import save_counted
from vitedge.images import ImageFile, list_images
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Preprocess, Recipe, Reduction, Target
from vitedge.workspace import BUILTIN_RECIPES, content_key, load_recipe, sha256, write_json

CACHE = ROOT / ".cache" / "token_merging"
FASHION = ROOT / "examples" / "fashion_mnist"
FP32 = Recipe("float", method="none", float_type="fp32")
Counts = int | tuple[int, ...]
err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, how much of it is merged, and the images to calibrate and to judge it on; none to judge a random one."""

    name: str
    module: nn.Module
    card: ModelCard
    merges: tuple[Counts, ...]
    recipe: Recipe
    calibration: Sequence[ImageFile]
    judged: Sequence[ImageFile]


class ClassToken(nn.Module):
    """float32[B, 3, 224, 224] -> float32[B, 384]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[:, 0]


def main() -> None:
    """Measure all subjects and write them as JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.token_merging", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each engine is timed")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "token_merging.json")
    arguments = parser.parse_args()
    rows = [row for subject in subjects() for row in measured(subject, arguments.seconds)]
    where = {**environment(), "command": shlex.join(["python", "-m", "benchmarks.token_merging", *sys.argv[1:]])}
    write_json(arguments.output, {"environment": where, "rows": rows})


def subjects() -> Iterator[Subject]:
    """What is measured."""
    module, card = load_model(f"{FASHION / 'model.py'}:vit", FASHION / "vit.safetensors")
    pool, test = (list_images(FASHION / ".cache" / part) for part in ("calibration", "test"))
    yield Subject("fashion", module, card, (0, 1, 2, 3, 4, (0, 8)), load_recipe("int8"), pool, test)
    calibration, stills = (list_images(FOCUS / ".cache" / part) for part in ("calibration", "judge"))
    few = replace(BUILTIN_RECIPES["int8-fast"], images=16)
    module, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
    yield Subject("focus", module, card, (0, 8, (0, 0, 32), (0, 0, 0, 0, 64)), few, calibration, stills)
    preprocess = Preprocess((224, 224), (0.5,) * 3, (0.25,) * 3)
    merges = (0, 10, (24, 0, 0), (0, 0, 52, 0, 0, 0), (0, 66, *[0] * 10))  # 30 % of the operations each
    yield Subject("vit-s16", vit_s16(), ModelCard("vit-s16", "embed", preprocess), merges, few, calibration, ())


def vit_s16() -> nn.Module:
    """The blocks of the focus example on 14 x 14 patches of 16 x 16, with random weights."""
    torch.manual_seed(0)
    vit, _ = load_model(f"{FOCUS / 'model.py'}:focus", None)
    vit.patch_embed = nn.Conv2d(3, 384, 16, 16)
    vit.positions = nn.Parameter(torch.randn(1, 1 + 14 * 14, 384))
    vit.class_token = nn.Parameter(torch.randn(1, 1, 384))
    return ClassToken(Features(vit))


def measured(subject: Subject, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each way of merging."""
    err.print(f"{subject.name}: building")
    exported = convert(subject.module.eval(), subject.card)
    floats, integers = zip(*(made(subject, *exported, counts) for counts in subject.merges), strict=True)
    accuracies = judged([*floats, *integers], subject)
    one, every = (timed(integers, threads, subject, seconds) for threads in (1, None))
    work = [sum(source.work.macs.values()) for graph in integers if (source := read_source(graph)).work]
    for index, counts in enumerate(subject.merges):
        yield {
            "subject": subject.name, "merge": counts, "merged": read_source(integers[index]).card.merged,
            "macs": work[index], "part": work[index] / work[0],
            "fp32": accuracies[index], "int8": accuracies[len(floats) + index],
            "one_core_ms": one[index], "one_core_speedup": one[0] / one[index],
            "all_cores_ms": every[index], "all_cores_speedup": every[0] / every[index],
        }  # fmt: skip


def made(subject: Subject, exported: ModelProto, card: ModelCard, counts: Counts) -> tuple[Path, Path]:
    """The float graph and the INT8 graph of one way of merging."""
    code = [sha256(path) for path in sorted((ROOT / "vitedge" / "compiler").glob("*.py"))]
    folder = CACHE / f"{subject.name}-{content_key(code, counts)}"
    fp32, plain, int8 = (folder / f"{name}.onnx" for name in ("export", "fp32", "int8"))
    if not int8.exists():
        model = copy_of(exported)
        reduce(model, card, Reduction(merge_tokens=counts))
        save_counted(model, fp32)
        leave_float(fp32, FP32, plain)
        quantize(fp32, calibrate(fp32, subject.calibration, subject.recipe).table, int8, subject.calibration)
    return plain, int8


def judged(graphs: Sequence[Path], subject: Subject) -> list[dict[str, float | None]]:
    """Top-1 and SQNR of each graph, the latter against the first; {} where there is nothing to judge."""
    if not subject.judged:
        return [{}] * len(graphs)
    err.print(f"{subject.name}: judging on {len(subject.judged)} images")
    with ExitStack() as stack:
        target = Target("judge", batch=(1, 16, 16))
        engines = [stack.enter_context(open_engine(build_engine(graph, target, graph.parent / "engines"))) for graph in graphs]
        return [{"top1": each.top1, "sqnr_db": each.sqnr_db} for each in judge(engines, subject.judged)]


def timed(graphs: Sequence[Path], threads: int | None, subject: Subject, seconds: float) -> list[float]:
    """The median latency of each graph at batch 1, in ms, all in turns."""
    err.print(f"{subject.name}: timing on {threads or 'all'} core{'s' * (threads != 1)}")
    target = Target(f"cpu{threads or ''}", batch=(1, 1, 1), threads=threads)
    with ExitStack() as stack:
        engines = [stack.enter_context(open_engine(build_engine(graph, target, graph.parent / "engines"))) for graph in graphs]
        lanes = [Lane(str(index), (partial(engine.run, 1),)) for index, engine in enumerate(engines)]
        return [latency.centiles_ms[50] for latency in measure(lanes, seconds=seconds) if latency]


if __name__ == "__main__":
    main()
