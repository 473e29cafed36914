"""ViT-B/16 and ViT-S/16 in, what a camera's frame costs on this GPU out: stage by stage, with and without CUDA graphs.

    random weights  ->  fp16.onnx, int8.onnx (floats in FP16)  ->  TensorRT or TensorRT-RTX, whichever is installed
        ->  stages: milliseconds between CUDA events around copies, kernel and plan, one by one
        ->  frames: a 1080p frame to its result, in turns with torch, each with the device's roofline beside it
        ->  results/gpu_runtime_<device>.json

    make test-gpu                               installs what is needed; or, with this benchmark, benchmarks/gpu_all.sh
    python -m benchmarks.gpu_runtime [--prepare] [--rounds 60] [--only vit-s16] [--output FILE]

Batch 1. Weights decide nothing about latency, so they are random, and INT8 is calibrated on noise; nothing here says how
accurate an engine is. `graphs` and `preprocess` are the switches: CUDA graphs or one call after another, pictures prepared by
the kernel or on the CPU. torch is the same model in FP16, eagerly and by torch.compile, fed as its users do: OpenCV's cvtColor,
Pillow, normalised on the CPU, copied. Where torch has no CUDA, or an engine cannot be built, the file says why. `--prepare`
makes the graphs, which takes minutes and no GPU, and leaves them in .cache/gpu_runtime/. Knows nothing of Markdown: that is
readme.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitedge.backends import cuda, load_backend
from vitedge.backends.build import build_engine
from vitedge.bench.environment import environment
from vitedge.bench.roofline import engine_bound_ms
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, list_images
from vitedge.runtime.engine import Engine, open_engine
from vitedge.specs import ModelCard, Peaks, PixelFormat, Recipe, Target, to_dict
from vitedge.workspace import BUILTIN_RECIPES, content_key, known_targets, load_target, write_json

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "gpu_runtime"
BACKENDS = ("tensorrt", "tensorrt-rtx")
BATCH = (1, 1, 8)
FRAME: tuple[tuple[int, ...], PixelFormat] = ((1620, 1920), "nv12")  # 1080p as a camera or a video decoder gives it
NOISE = 16  # images to calibrate on
STAGE_RUNS, WARM_RUNS = 200, 20
WIDTHS = {
    "vit-s16": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
RECIPES = {"fp16": BUILTIN_RECIPES["fp16"], "int8": replace(BUILTIN_RECIPES["int8-fast"], images=NOISE, float_type="fp16")}
SWITCHES = [(preprocess, graphs) for preprocess in ("gpu", "cpu") for graphs in (True, False)]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way from a frame to a result. call: goes it once. facts: what the JSON says of it."""

    call: Callable[[], object]
    facts: dict[str, Any]


def main() -> None:
    """Measure all models that are asked for and write what they took as JSON."""
    arguments = parse()
    if arguments.prepare:
        for name in arguments.only:
            module, card = random_model(name)
            for kind in RECIPES:
                told(str(typed_graph(name, module, card, kind)))
        return
    gpu, backend = cuda.require_gpu(), installed_backend()
    peaks, known = peaks_here(gpu)
    output = arguments.output or ROOT / "results" / f"gpu_runtime_{slug(gpu.name)}.json"
    facts = {**environment(), "command": " ".join(["python", "-m", "benchmarks.gpu_runtime", *sys.argv[1:]])}
    document: dict[str, Any] = {"environment": facts, "device": dataclasses.asdict(gpu), "peaks": known, "backend": backend}
    document |= {"backend_version": load_backend(backend).version(), "frame": {"shape": FRAME[0], "pixels": FRAME[1]}}
    document |= {"rounds": arguments.rounds, "models": {}}
    for name in arguments.only:
        document["models"][name] = model_figures(name, Target("local", backend, BATCH, peaks=peaks), arguments.rounds)
        write_json(output, document)  # what is measured is kept, whatever comes next
    print(f"{output}: written")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_runtime", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=60, help="turns that every candidate gets")
    parser.add_argument("--prepare", action="store_true", help="make the graphs and stop; needs no GPU")
    parser.add_argument("--only", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="models")
    parser.add_argument("--output", type=Path, help="default: results/gpu_runtime_<device>.json")
    return parser.parse_args()


def installed_backend() -> str:
    """The first of BACKENDS that is installed."""
    for name in BACKENDS:
        with suppress(MissingPackageError):
            load_backend(name).version()
            return name
    raise VitEdgeError("neither TensorRT nor TensorRT-RTX is installed", hint="pip install tensorrt, or '.[rtx]'")


def peaks_here(gpu: cuda.Gpu) -> tuple[Peaks | None, str]:
    """What a device of that capability can do at most, by the target that its name fits best, and which that is."""
    targets = [load_target(name) for name in known_targets()]
    fitting = [each for each in targets if each.peaks and each.capability == gpu.capability]
    named = [each for each in fitting if each.name.replace("-", " ").lower() in gpu.name.replace("-", " ").lower()]
    best = (named or fitting or [None])[0]
    if best is None:
        return None, f"no target of vitedge's has the compute capability {gpu.capability}: there is no roofline"
    return best.peaks, f"those of the target {best.name}" + ("" if named else ", the only kind known of this capability")


def model_figures(name: str, target: Target, rounds: int) -> dict[str, Any]:
    """Stages and frames of one model in both types, and torch."""
    told(name)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        module, card = random_model(name)
        opened, skipped = dict[str, Engine](), dict[str, str]()
        for kind in RECIPES:
            try:
                graph = typed_graph(name, module, card, kind)
                opened[kind] = stack.enter_context(open_engine(build_engine(graph, target, Path(folder))))
            except VitEdgeError as error:  # noqa: PERF203
                skipped[kind] = str(error)
        stages = {f"{kind}, {stage}": ms for kind, engine in opened.items() for stage, ms in stages_of(engine).items()}
        candidates = [one for kind, engine in opened.items() for one in engine_candidates(kind, engine, stack)]
        try:
            candidates += torch_candidates(module, card)
        except VitEdgeError as error:
            skipped["torch"] = str(error)
        return {"stages_ms": stages, "frames": in_turns(candidates, rounds) if candidates else [], "skipped": skipped}


def random_model(name: str) -> tuple[Any, ModelCard]:
    """The module with random weights, the same each time, and its card."""
    from tests.compiler.families import save_random
    from vitedge.compiler.models import load_model

    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}

    def make(t: Any) -> Any:
        return t.ViTForImageClassification(t.ViTConfig(num_labels=1000, **WIDTHS[name]))

    with tempfile.TemporaryDirectory() as folder:
        return load_model(f"hf:{save_random(make, Path(folder) / name, processor, 0.02)}")


def typed_graph(name: str, module: Any, card: ModelCard, kind: str) -> Path:
    """The model as an ONNX file in one of the types, its floats in FP16; made where it is not there yet."""
    from vitedge.compiler.calibrate import calibrate
    from vitedge.compiler.export import export
    from vitedge.compiler.precision import convert
    from vitedge.compiler.quantize import leave_float, quantize

    recipe: Recipe = RECIPES[kind]
    path = CACHE / f"{name}-{kind}-{content_key(WIDTHS[name], to_dict(recipe), NOISE)}.onnx"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        fp32, single, files = Path(folder) / "fp32.onnx", Path(folder) / "single.onnx", noise_images(Path(folder) / "noise")
        export(module, card, fp32)
        if recipe.method == "none":
            leave_float(fp32, recipe, single)
        else:
            quantize(fp32, calibrate(fp32, files, recipe).table, single, files)
        convert(single, "fp16", path, files)
    return path


def noise_images(folder: Path) -> list[ImageFile]:
    """Images to calibrate on."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(NOISE):
        coarse = generator.integers(0, 256, (16, 16, 3), np.uint8)  # so that patches differ in more than their noise
        Image.fromarray(coarse).resize((256, 256)).save(folder / f"{index}.png")
    return list_images(folder)


def stages_of(engine: Engine) -> dict[str, float]:
    """Median milliseconds between events in the stream: a session without graphs, one stage after another."""
    own = engine.fork()
    session: Any = own._session
    session.graphs = False
    frame = noise_frame()
    stream, samples = session._stream, {"host copy, upload and kernel": [], "input upload": [], "plan": [], "download": []}
    with cuda.Device():
        marks = [cuda.Event(timed=True) for _ in range(5)]
        for number in range(STAGE_RUNS + WARM_RUNS):
            own.write(0, frame, FRAME[1])
            own.run(1)
            stream.synchronize()
            for mark, work in zip(marks, (*stage_work(session, frame), None), strict=True):
                mark.record(stream)
                if work:
                    work()
            stream.synchronize()
            for taken, before, after in zip(samples.values(), marks, marks[1:], strict=False):
                if number >= WARM_RUNS:
                    taken.append(after.ms_since(before))
        for mark in marks:
            mark.close()
    own.close()
    on_cpu = "" if not session.write_note else " (on the CPU)"
    return {f"{stage}{on_cpu if 'kernel' in stage else ''}": rounded(float(np.median(taken))) for stage, taken in samples.items()}


def stage_work(session: Any, frame: NDArray[np.uint8]) -> Iterator[Callable[[], object]]:
    """What a session does for a frame, part by part."""
    yield lambda: session.write(0, frame, FRAME[1])
    yield lambda: session._in.upload(1, session._stream)
    yield lambda: session._execute(session._execution(1))
    yield lambda: session._out[0].download(1, session._stream)


def engine_candidates(kind: str, engine: Engine, stack: ExitStack) -> Iterator[Candidate]:
    """A session for each combination of the switches, and one that only runs."""
    bound, frame = engine_bound_ms(engine.manifest, 1), noise_frame()
    for preprocess, graphs in SWITCHES:
        own = engine.fork()
        stack.callback(own.close)
        session: Any = own._session
        session.graphs = graphs and session.graphs
        if preprocess == "cpu":
            session.write_note = "switched off by the benchmark"
        for _ in range(WARM_RUNS):
            own.write(0, frame, FRAME[1])
            own.run(1)
        facts = {"engine": kind, "roofline_ms": rounded(bound) if bound else None, "preprocess": preprocess, "graphs": graphs}
        notes = {} if preprocess == "cpu" else {"write_note": session.write_note}
        notes |= {"graphs_note": session.graphs_note} if graphs else {}
        facts |= {key: note for key, note in notes.items() if note}
        yield Candidate(lambda own=own: (own.write(0, frame, FRAME[1]), own.run(1)), {"what": "frame to result", **facts})
        if preprocess == "gpu":
            yield Candidate(lambda own=own: own.run(1), {"what": "run alone", **facts})


def torch_candidates(module: Any, card: ModelCard) -> list[Candidate]:
    """The module in FP16 on the GPU, eagerly and compiled; a VitEdgeError where torch has no CUDA."""
    import torch

    from vitedge.preprocess import resize
    from vitedge.runtime.opencv import load_cv2

    if not torch.cuda.is_available():
        raise VitEdgeError("this torch has no CUDA")
    cv2, frame, spec = load_cv2(), noise_frame(), card.preprocess
    mean, std = (np.asarray(values, np.float32) for values in (spec.mean, spec.std))
    half = module.half().cuda().eval()
    compiled = torch.compile(half, mode="reduce-overhead")  # with CUDA graphs
    row = torch.zeros((1, 3, *spec.size), dtype=torch.float16).pin_memory()

    def prepare() -> Any:
        scaled = (resize(cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12), spec).astype(np.float32) / 255 - mean) / std
        row.copy_(torch.from_numpy(scaled.transpose(2, 0, 1)[None]))
        return row.cuda(non_blocking=True)

    found = []
    with torch.inference_mode():
        given = prepare()
    for name, model in (("torch fp16", half), ("torch.compile fp16", compiled)):
        facts = {"engine": name, "preprocess": "cpu", "graphs": name != "torch fp16"}

        def whole(model: Any = model) -> Any:
            with torch.inference_mode():
                return model(prepare()).cpu()

        def alone(model: Any = model) -> Any:
            with torch.inference_mode():
                return model(given).cpu()

        for _ in range(WARM_RUNS):
            whole()
        found += [Candidate(whole, {"what": "frame to result", **facts}), Candidate(alone, {"what": "run alone", **facts})]
    return found


def in_turns(candidates: list[Candidate], rounds: int) -> list[dict[str, Any]]:
    """The facts of each candidate with its milliseconds; all take turns, so that a drift costs all the same."""
    from benchmarks.cpu_latency import time_in_turns

    samples, again = time_in_turns([candidate.call for candidate in candidates], rounds)
    rows = []
    for candidate, taken in zip(candidates, samples, strict=True):
        median, p90, p99 = np.percentile(taken, [50, 90, 99])
        figures = {"median_ms": median, "p90_ms": p90, "p99_ms": p99, "min_ms": taken.min()}
        row = {**candidate.facts, **{key: rounded(float(value)) for key, value in figures.items()}, "turns_taken_again": again}
        told(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return rows


def noise_frame() -> NDArray[np.uint8]:
    """A frame of FRAME's layout, the same each time."""
    return np.random.default_rng(0).integers(0, 256, FRAME[0], np.uint8)


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("nvidia", "")).strip("_")


def rounded(value: float) -> float:
    """Four significant digits: more than a latency has."""
    return float(f"{value:.4g}")


def told(line: str) -> None:
    """Progress, for whoever waits."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
