"""Vision Transformers of four sizes on every CPU engine that their user might choose, judged and timed in turns.

    ViT-Ti/16, ViT-S/16, ViT-B/16 with random weights  ->  vitedge, OpenVINO + NNCF, ONNX Runtime, torch.compile, ...
    the ViT-S/14 of examples/focus with its own        ->  one run of vitedge.bench.run  ->  results/peers_cpu.json

    pip install -e '.[compile,cpu,camera,hf,bench]'
    python -m benchmarks.peers_cpu [--only vit-ti16] [--engines 'vitedge*' '*NNCF*'] [--seconds 10] [--output FILE]

Batch 1, all cores, one process, 224 x 224 pixels. Each engine gets what a careful user would give it (see cpu_latency.py, whose
engines these are). Resizing and normalising are outside of the timed region for all of them. SQNR is against torch in FP32, on
images that calibration never saw; of random weights it says what the arithmetic loses and nothing of accuracy. What vitedge makes
is what `vitedge make` makes by default. Built models are kept in .cache/peers_cpu/. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.cpu_latency import (
    FOCUS,
    ROOT,
    WEIGHTS,
    Candidate,
    Float32,
    Subject,
    err,
    kept,
    onnx_runtime,
    onnx_runtime_int8,
    openvino_float,
    openvino_nncf,
    torch_eager,
    versions,
    vitedge_graph,
)
from tests.compiler.families import save_random
from vitedge.backends.build import build_engine
from vitedge.bench import document as bench
from vitedge.bench.contenders import Contender, Origin, open_contenders
from vitedge.bench.environment import environment
from vitedge.bench.frontier import locate
from vitedge.bench.plan import Plan
from vitedge.bench.run import benchmark
from vitedge.bench.statistics import speedup
from vitedge.bench.tables import terminal
from vitedge.compiler.models import load_model
from vitedge.errors import VitEdgeError
from vitedge.images import list_images
from vitedge.preprocess import write_input
from vitedge.specs import ModelCard, PixelFormat, to_dict
from vitedge.workspace import content_key, load_recipe, load_target, read_json, sha256, write_json

CACHE = ROOT / ".cache" / "peers_cpu"
OURS = "vitedge int8"
SIZES = {"vit-ti16": (192, 3), "vit-s16": (384, 6), "vit-b16": (768, 12)}  # width, heads
SPREAD = 0.02  # of the noise on all weights, as transformers starts them itself
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "do_resize": True, "do_rescale": True,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255,
}  # fmt: skip


@dataclass(slots=True)
class Pixels:
    """A Candidate of cpu_latency.py as a Session that takes uint8 pixels, which it normalises when they are others than before.

    Comparing them takes some ten microseconds of the timed calls.
    """

    candidate: Candidate
    card: ModelCard
    images: Float32
    input: NDArray[np.uint8]
    streams: int = 1
    _seen: NDArray[np.uint8] | None = None

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> None:
        """Prepare a picture."""
        write_input(picture, self.card, self.input[row], pixels)

    def run(self, count: int) -> Float32:
        """The answer to the pixels in `input`."""
        if self._seen is None or not np.array_equal(self._seen, self.input):
            spec = self.card.preprocess
            scaled = (self.input.astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
            np.copyto(self.images, scaled.transpose(0, 3, 1, 2))
            self._seen = self.input.copy()
        return self.candidate.run()

    def fork(self) -> Pixels:
        """Not asked for at one stream."""
        raise NotImplementedError

    def close(self) -> None:
        """Whoever opened the candidate closes it."""


def main() -> None:
    """Measure the subjects and write them as JSON."""
    arguments = parse()
    facts = {**environment(), "command": shlex.join(["python", "-m", "benchmarks.peers_cpu", *sys.argv[1:]])}
    names = [name for name in (*SIZES, "focus") if any(fnmatch(name, pattern) for pattern in arguments.only)]
    if not names:
        raise VitEdgeError(f"no model is called {' or '.join(arguments.only)}", hint=f"there are {', '.join((*SIZES, 'focus'))}")
    sections = read_json(arguments.output)["sections"] if arguments.output.is_file() else {}
    for name in names:
        sections[name] = section(name, subject(name), arguments)
        ordered = {key: sections[key] for key in (*SIZES, "focus") if key in sections}
        protocol = {"batch": 1, "seconds": arguments.seconds, "ratio_to": OURS, "interval": "95 %"}
        write_json(arguments.output, {"environment": facts, "versions": versions(), **protocol, "sections": ordered})
    err.print(f"{arguments.output}: written")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers_cpu", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="models by name or shell pattern; others stay")
    parser.add_argument("--engines", nargs="+", metavar="NAME", default=["*"], help="engines, likewise; torch is always there")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each engine is timed")
    parser.add_argument("--judge", type=int, default=32, help="images that the answers are compared on")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "peers_cpu.json")
    return parser.parse_args()


def subject(name: str) -> Subject:
    """A model, its images, and the folder that its built forms are kept in, named after its weights and the packages."""
    if not WEIGHTS.exists() or not (FOCUS / ".cache" / "judge").exists():
        subprocess.run([sys.executable, str(FOCUS / "fetch.py")], check=True, stdout=sys.stderr)
    if name == "focus":
        module, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
        key = content_key(sha256(WEIGHTS), sha256(FOCUS / "model.py"), versions())
    else:
        folder = kept(CACHE / f"{name}-{content_key(versions(), SPREAD)}", partial(save_vit, SIZES[name]))
        module, card = load_model(f"hf:{folder}")
        card = replace(card, name=name)
        key = content_key(sha256(folder / "model.safetensors"), versions())
    images = np.zeros((1, card.preprocess.channels, *card.preprocess.size), np.float32)
    calibration, judge = (list_images(FOCUS / ".cache" / part) for part in ("calibration", "judge"))
    return Subject(module, card, calibration, judge, CACHE / f"{name}-built-{key}", images)


def save_vit(size: tuple[int, int], folder: Path) -> None:
    """Write a plain ViT/16 of 12 blocks and 1,000 classes with random weights, as transformers has it."""
    width, heads = size

    def make(transformers: Any) -> Any:
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "num_hidden_layers": 12}
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000, **sizes))

    save_random(make, folder, PROCESSOR, SPREAD)


def torch_compiled(subject: Subject, stack: ExitStack) -> Candidate:
    """torch.compile, which makes C++ of the module and links it with oneDNN and MKL."""
    stack.enter_context(torch.inference_mode())
    images, compiled = (
        torch.from_numpy(subject.images),
        torch.compile(subject.module, dynamic=False, mode="max-autotune-no-cudagraphs"),
    )
    return Candidate("fp32", lambda image: None, lambda: compiled(images).numpy())


def quantized_by_vitedge(subject: Subject, stack: ExitStack) -> Contender:
    """export -> calibrate -> quantize -> build, with the recipe that `vitedge make` takes by default."""
    graph = vitedge_graph(subject, load_recipe("int8"))
    return stack.enter_context(open_contenders([str(build_engine(graph, load_target("cpu"), subject.folder))]))[0]


PEERS: dict[str, Callable[[Subject, ExitStack], Candidate]] = {
    "torch": torch_eager,
    "torch.compile": torch_compiled,
    "ONNX Runtime": onnx_runtime,
    "ONNX Runtime int8": onnx_runtime_int8,
    "OpenVINO": openvino_float,
    "OpenVINO + NNCF int8": openvino_nncf,
}


def section(name: str, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """All engines on one model, as plain data."""
    err.rule(name)
    notes: list[str] = []
    with ExitStack() as stack, Progress(console=err, transient=True) as bar:
        task = bar.add_task(name, total=1.0)
        contenders = opened(subject, stack, arguments.engines)
        plan = Plan(seconds=arguments.seconds, end_to_end=False, dataset="photographs")
        files = subject.judge[: arguments.judge]
        found = benchmark(
            contenders, files, plan, notes=notes,
            progress=lambda stage, done: bar.update(task, description=f"{name}: {stage}", completed=done),
        )  # fmt: skip
    err.print(terminal([found], width=err.width))
    for note in notes:
        err.print(f"note: {note}", markup=False)
    kept_ones = tuple(stripped(one) for one in found.candidates)
    return {"ratios": ratios(found), "frontier": on_frontier(found), "document": to_dict(replace(found, candidates=kept_ones))}


def opened(subject: Subject, stack: ExitStack, patterns: Sequence[str]) -> list[Contender]:
    """Torch, and the engines whose names fit; each is built where that was not done before."""
    contenders = []
    for name, build in PEERS.items():
        if name == "torch" or any(fnmatch(name, pattern) for pattern in patterns):
            err.print(f"{name} ...")
            contenders.append(peer(name, build, subject, stack))
    if any(fnmatch(OURS, pattern) for pattern in patterns):
        err.print(f"{OURS} ...")
        ours = quantized_by_vitedge(subject, stack)
        ours.facts = replace(ours.facts, name=OURS)
        contenders.append(ours)
    return contenders


def peer(name: str, build: Callable[[Subject, ExitStack], Candidate], subject: Subject, stack: ExitStack) -> Contender:
    """An engine of cpu_latency.py as a Contender."""
    card = replace(subject.card, patch=None)  # which takes pixels
    facts = bench.Candidate(
        name=name, model=card.name, variant="int8" if name.endswith("int8") else "fp32", runtime=name.split()[0]
    )
    try:
        precision = build(subject, stack).precision
    except ModuleNotFoundError as error:
        raise VitEdgeError(f"{name} needs the package {error.name!r}", hint="pip install -e '.[bench]'") from error
    facts = replace(facts, float_type=precision.split(", ")[-1], image=card.preprocess.size)
    shape = (1, *card.preprocess.size, card.preprocess.channels)
    return Contender(
        Origin(name, name, max_batch=1), facts, card,
        lambda setting: Pixels(build(subject, stack), card, subject.images, np.zeros(shape, np.uint8)),
    )  # fmt: skip


def ratios(found: bench.Document) -> dict[str, tuple[float, float, float]]:
    """How many times as long as ours each engine takes, and the interval of that, round by round."""
    times = {one.name: one.timings[0].rounds_ms for one in found.finished if one.timings}
    if OURS not in times:
        return {}
    found_ratios = {name: speedup(rounds, times[OURS]) for name, rounds in times.items() if name != OURS}
    return {name: (round(ratio, 4), round(at.low, 4), round(at.high, 4)) for name, (ratio, at) in found_ratios.items()}


def on_frontier(found: bench.Document) -> list[str]:
    """The engines that no other beats in both latency and SQNR."""
    return [point.candidate.name for point in locate([found]) if point.frontier]


def stripped(one: bench.Candidate) -> bench.Candidate:
    """Without what no table shows: pictures, single answers, single rounds."""
    judged = one.judged and replace(one.judged, worst=(), confusion=(), right="")
    return replace(one, judged=judged, timings=tuple(replace(timed, rounds_ms=()) for timed in one.timings))


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
