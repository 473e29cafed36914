"""One ViT-S/14 on every CPU engine that its user might choose, timed in turns.

    examples/focus  ->  float module, 64 calibration images  ->  candidates  ->  rounds of turns  ->  results/cpu_latency.json

    pip install -e '.[compile,cpu,camera,bench]'
    python benchmarks/cpu_latency.py [--rounds 40] [--rebuild] [--output results/cpu_latency.json]

Batch 1, all cores, one process. Two sections: `features`, the tokens after the last norm, and `whole`, the model with its
decoder of convolutions, which vitedge leaves in floating point and NNCF quantizes too. Every candidate gets what a
careful user would give it: a static shape, its own latency settings, memory that is allocated before. Preparing the input
(resizing, normalising, cutting into patches) is outside of the timed region for all of them. A turn during which other
processes had the processor is taken again.

How good the answers are is measured beside: SQNR and cosine against torch in FP32 on 32 images that calibration never saw.
Built models are kept in .cache/cpu_latency/. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import math
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from vitedge.backends.build import build_engine
from vitedge.bench.environment import environment
from vitedge.bench.latency import TURN_CALLS, timed_turn
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import export
from vitedge.compiler.models import load_model
from vitedge.compiler.quantize import leave_float, quantize
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, list_images, stream
from vitedge.preprocess import resize, write_input
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Preprocess, Recipe
from vitedge.workspace import content_key, load_recipe, load_target, sha256, staged, write_json

ROOT = Path(__file__).resolve().parents[1]
FOCUS = ROOT / "examples" / "focus"
WEIGHTS = FOCUS / ".cache" / "focus.safetensors"
CACHE = ROOT / ".cache" / "cpu_latency"
PACKAGES = ("torch", "onnxscript", "onnxruntime", "openvino", "nncf")
OURS = "vitedge int8"
# the largest magnitude seen and round to nearest: what everyone can do
PLAIN = Recipe(name="plain", smoothing="none", rounding="nearest", bias_correction=False)
WAIT_S = 0.5  # after a turn that other processes disturbed
RESAMPLES = 2000  # of the bootstrap
Image = NDArray[np.uint8]
Float32 = NDArray[np.float32]
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)


class Features(nn.Module):
    """FocusViT without its decoder: float32[B, 3, 224, 224] -> tokens float32[B, 1 + 256, 384]."""

    def __init__(self, focus: nn.Module) -> None:
        super().__init__()
        self.vit = focus

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        x = vit.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.class_token.expand(x.shape[0], -1, -1), x], dim=1) + vit.positions
        return vit.norm(vit.blocks(x))


@dataclass(frozen=True, slots=True)
class Subject:
    """What the candidates of a section all compute, what they are calibrated on, and where their built models are kept.

    images: float32[1, 3, H, W], the input of every candidate that takes normalised pixels, read where it lies.
    """

    module: nn.Module
    card: ModelCard
    calibration: Sequence[ImageFile]
    judge: Sequence[ImageFile]
    folder: Path
    images: Float32


@dataclass(frozen=True, slots=True)
class Candidate:
    """An open engine: `feed` prepares an image, uint8[H, W, 3], and `run` gives the answer for it, float32[1, ...]."""

    precision: str
    feed: Callable[[Image], None]
    run: Callable[[], Float32]


def main() -> None:
    """Measure both sections and write them as JSON."""
    arguments = parse()
    if arguments.rebuild:
        shutil.rmtree(CACHE, ignore_errors=True)
    if not WEIGHTS.exists() or not (FOCUS / ".cache" / "judge").exists():
        subprocess.run([sys.executable, str(FOCUS / "fetch.py")], check=True, stdout=sys.stderr)
    sections = {name: section(name, subject, arguments.rounds) for name, subject in subjects().items()}
    command = shlex.join(["python", "benchmarks/cpu_latency.py", *sys.argv[1:]])
    protocol = {"batch": 1, "rounds": arguments.rounds, "calls_per_round": TURN_CALLS, "ratio_to": OURS, "interval": "95 %"}
    document = {"environment": {**environment(), "command": command}, "versions": versions(), **protocol, "sections": sections}
    write_json(arguments.output, document)
    err.print(f"{arguments.output}: written")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help=f"turns of {TURN_CALLS} timed calls that every candidate gets")
    parser.add_argument("--rebuild", action="store_true", help="build all models again, also those in .cache/cpu_latency")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "cpu_latency.json")
    return parser.parse_args()


def subjects() -> dict[str, Subject]:
    """The two sections. Their folders change their names with the weights and the packages."""
    module, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
    key = content_key(sha256(WEIGHTS), sha256(FOCUS / "model.py"), versions())
    images = np.zeros((1, card.preprocess.channels, *card.preprocess.size), np.float32)
    whole = Subject(
        module, card, list_images(FOCUS / ".cache" / "calibration"), list_images(FOCUS / ".cache" / "judge"),
        CACHE / f"whole-{key}", images,
    )  # fmt: skip
    features = replace(
        whole, module=Features(module).eval(), card=replace(card, name="focus-vits14-features", task="embed"),
        folder=CACHE / f"features-{key}",
    )  # fmt: skip
    return {"features": features, "whole": whole}


def versions() -> dict[str, str | None]:
    """The release of every package that has a part in this; None for one that is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def section(name: str, subject: Subject, rounds: int) -> dict[str, Any]:
    """Open all candidates, judge them, time them, and return their figures as plain data."""
    err.rule(name)
    with ExitStack() as stack:
        candidates, skipped = open_candidates(subject, stack)
        quality = judge(candidates, subject)
        samples, again = time_in_turns([candidate.run for candidate in candidates.values()], rounds)
    rows = []
    intervals = ratio_intervals(samples, list(candidates).index(OURS))
    ours = np.median(samples[list(candidates).index(OURS)])
    for (label, candidate), times, interval in zip(candidates.items(), samples, intervals, strict=True):
        median, p90 = np.percentile(times, [50, 90])
        figures = {"median_ms": median, "p90_ms": p90, "min_ms": times.min(), "ratio": median / ours}
        figures |= {"ratio_low": interval[0], "ratio_high": interval[1], **quality.get(label, {})}
        rows.append({"name": label, "precision": candidate.precision, **{key: rounded(value) for key, value in figures.items()}})
    err.print(table(rows))
    return {
        "model": subject.card.name, "calibration_images": len(subject.calibration), "judge_images": len(subject.judge),
        "turns_taken_again": again, "candidates": rows, "skipped": skipped,
    }  # fmt: skip


def open_candidates(subject: Subject, stack: ExitStack) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Every candidate that can be opened here, and for each that cannot the reason."""
    opened, skipped = {}, {}
    for name, build in CANDIDATES.items():
        err.print(f"{name} ...")
        try:
            opened[name] = build(subject, stack)
        except ModuleNotFoundError as error:
            skipped[name] = f"the package {error.name!r} is not installed"
        except VitEdgeError as error:
            skipped[name] = str(error)
        if name in skipped:
            err.print(f"  skipped: {skipped[name]}")
    return opened, skipped


def torch_eager(subject: Subject, stack: ExitStack) -> Candidate:
    """The module itself."""
    stack.enter_context(torch.inference_mode())
    images = torch.from_numpy(subject.images)
    return Candidate("fp32", feed(subject), lambda: subject.module(images).numpy())


def onnx_runtime(subject: Subject, stack: ExitStack) -> Candidate:
    """ONNX Runtime on what torch.onnx.export gives."""
    return onnx_runtime_session(float_onnx(subject), "fp32", subject)


def onnx_runtime_int8(subject: Subject, stack: ExitStack) -> Candidate:
    """ONNX Runtime's own static quantization: pre-processed, Q/DQ, S8S8, per channel, ranges from min and max.

    Only MatMul, Gemm and Conv: all kinds of nodes, its default, is slower and 2.4 dB worse on this model.
    """
    return onnx_runtime_session(
        kept(subject.folder / "onnxruntime-int8.onnx", partial(quantize_static, subject)), "int8, fp32", subject
    )


def openvino_float(subject: Subject, stack: ExitStack, **config: str) -> Candidate:
    """OpenVINO on what its converter makes of the torch module, which is as fast as what it makes of the ONNX file."""
    return openvino_request(float_openvino(subject), "", config, subject)


def openvino_nncf(subject: Subject, stack: ExitStack) -> Candidate:
    """OpenVINO on what NNCF makes of the float model with its defaults for a transformer."""
    folder = kept(subject.folder / "nncf", partial(quantize_nncf, subject))
    return openvino_request(folder / "model.xml", "int8, ", {}, subject)


def vitedge(subject: Subject, stack: ExitStack, recipe: Recipe | None = None) -> Candidate:
    """export -> calibrate -> quantize -> build -> open, as `vitedge make` does."""
    graph = vitedge_graph(subject, recipe)
    engine = stack.enter_context(open_engine(build_engine(graph, load_target("cpu"), subject.folder)))
    card, floats = engine.manifest.card, engine.manifest.float_type
    precision = floats if recipe is None or recipe.method == "none" else f"int8, {floats}"
    return Candidate(precision, lambda image: write_input(image, card, engine.input[0]), lambda: engine.run(1))


CANDIDATES: dict[str, Callable[[Subject, ExitStack], Candidate]] = {
    "torch eager": torch_eager,
    "ONNX Runtime": onnx_runtime,
    "ONNX Runtime int8": onnx_runtime_int8,
    "OpenVINO f32": partial(openvino_float, INFERENCE_PRECISION_HINT="f32"),
    "OpenVINO default": openvino_float,
    "OpenVINO + NNCF int8": openvino_nncf,
    "vitedge fp32": vitedge,
    "vitedge bf16": partial(vitedge, recipe=load_recipe("bf16")),
    "vitedge plain int8": partial(vitedge, recipe=PLAIN),
    OURS: partial(vitedge, recipe=load_recipe("int8")),
}


def feed(subject: Subject) -> Callable[[Image], None]:
    """Writes an image into the input that all float candidates share."""
    return lambda image: np.copyto(subject.images, normalised(image, subject.card.preprocess))


def normalised(image: Image, spec: Preprocess) -> Float32:
    """uint8[H, W, 3] -> float32[1, 3, h, w], in the textbook way."""
    scaled = (resize(image, spec).astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def calibration_inputs(subject: Subject) -> Iterator[Float32]:
    """The calibration images as the float candidates take them."""
    return (normalised(image, subject.card.preprocess) for _, image in stream(subject.calibration, []))


def kept(path: Path, write: Callable[[Path], object]) -> Path:
    """The file or folder `path`, written by `write` where it is not yet there."""
    if not path.exists():
        with staged(path) as temporary, quiet():
            write(temporary)
    return path


def float_onnx(subject: Subject) -> Path:
    """The module as torch.onnx.export writes it, with a static shape."""

    def write(path: Path) -> None:
        program = torch.onnx.export(subject.module, (torch.from_numpy(subject.images),), dynamo=True, verbose=False)
        program.save(path)

    return kept(subject.folder / "float.onnx", write)


def onnx_runtime_session(path: Path, precision: str, subject: Subject) -> Candidate:
    """All optimizations (the default), inputs and outputs bound to memory that is there already."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output = np.zeros(session.get_outputs()[0].shape, np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, subject.images)
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, np.float32, output.shape, output.ctypes.data)

    def run() -> Float32:
        session.run_with_iobinding(binding)
        return output

    return Candidate(precision, feed(subject), run)


def quantize_static(subject: Subject, path: Path, method: str = "MinMax") -> None:
    """Write ONNX Runtime's INT8 form of the float model to `path`; method: the name of a CalibrationMethod."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """Gives the calibration images one by one."""

        def __init__(self) -> None:
            self.inputs = calibration_inputs(subject)

        def get_next(self) -> dict[str, Float32] | None:
            images = next(self.inputs, None)
            return None if images is None else {"images": images}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(float_onnx(subject), prepared)
    quantize_static(
        prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
    )  # fmt: skip
    prepared.unlink()


def float_openvino(subject: Subject) -> Path:
    """The module as OpenVINO's own converter reads it, with a static shape."""
    import openvino

    def write(folder: Path) -> None:
        images = torch.from_numpy(subject.images)
        model = openvino.convert_model(subject.module, example_input=images, input=list(images.shape))
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    return kept(subject.folder / "openvino", write) / "model.xml"


def openvino_request(path: Path, prefix: str, config: dict[str, str], subject: Subject) -> Candidate:
    """The model compiled for latency, with an input that is read where it lies."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY", **config})
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(subject.images, shared_memory=True))
    floats = {"bf16": "bf16", "f32": "fp32"}[compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]

    def run() -> Float32:
        request.infer()
        return request.get_output_tensor(0).data

    return Candidate(prefix + floats, feed(subject), run)


def quantize_nncf(subject: Subject, folder: Path) -> None:
    """Write NNCF's INT8 form of the float model into `folder`."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset(list(calibration_inputs(subject)))
    model = openvino.Core().read_model(float_openvino(subject))
    model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(subject.calibration))
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def vitedge_graph(subject: Subject, recipe: Recipe | None) -> Path:
    """The ONNX file of a recipe; that of the float model for None."""
    sources = sorted((ROOT / "vitedge" / "compiler").glob("*.py"))
    folder = subject.folder / f"vitedge-{content_key([sha256(path) for path in sources])}"
    float_graph = kept(folder / "fp32.onnx", lambda path: export(subject.module, subject.card, path))
    if recipe is None:
        return float_graph

    def write(path: Path) -> None:
        if recipe.method == "none":
            leave_float(float_graph, recipe, path)
        else:
            table = calibrate(float_graph, subject.calibration, recipe).table
            quantize(float_graph, table, path, subject.calibration)

    return kept(folder / f"{recipe.name}.onnx", write)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the builders have to say off the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def judge(candidates: dict[str, Candidate], subject: Subject) -> dict[str, dict[str, float]]:
    """SQNR in dB over all judge images, and the mean cosine of an image's answer, of each candidate against the first."""
    signal = 0.0
    noise = dict.fromkeys(candidates, 0.0)
    cosines: dict[str, list[float]] = {name: [] for name in candidates}
    for _, image in stream(subject.judge, []):
        answers = {}
        for name, candidate in candidates.items():
            candidate.feed(image)
            answers[name] = candidate.run().astype(np.float64).ravel()
        reference = next(iter(answers.values()))
        signal += reference @ reference
        for name, answer in answers.items():
            noise[name] += float(np.square(reference - answer).sum())
            cosines[name].append(reference @ answer / math.sqrt((reference @ reference) * (answer @ answer)))
    return {
        name: {"sqnr_db": 10 * math.log10(signal / noise[name]), "cosine": float(np.mean(cosines[name]))}
        for name in list(candidates)[1:]
    }


def time_in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> tuple[NDArray[np.float64], int]:
    """Milliseconds of every timed call, float64[candidates, rounds, TURN_CALLS], and how many turns were taken again.

    Each round has an order of its own. A turn during which other processes had the processor is taken again, which looks
    at their time and never at the turn's.
    """
    samples = np.empty((len(runs), rounds, TURN_CALLS))
    generator = np.random.default_rng(0)
    again = 0
    with Progress(console=err, transient=True) as progress:
        for number in progress.track(range(rounds), description="timing"):
            for index in generator.permutation(len(runs)):
                samples[index, number], disturbed = timed_turn(runs[index])
                while disturbed:
                    again += 1
                    progress.console.print("another process is busy: waiting for it") if again == 1 else None
                    time.sleep(WAIT_S)
                    samples[index, number], disturbed = timed_turn(runs[index])
    return samples, again


def ratio_intervals(samples: NDArray[np.float64], ours: int) -> NDArray[np.float64]:
    """95 % intervals of each candidate's median over ours, float64[candidates, 2]; whole rounds are drawn, as they drift."""
    generator = np.random.default_rng(0)
    rounds = samples.shape[1]
    ratios = np.empty((RESAMPLES, len(samples)))
    for row in ratios:
        drawn = samples[:, generator.integers(rounds, size=rounds)]
        medians = np.median(drawn.reshape(len(samples), -1), axis=1)
        row[:] = medians / medians[ours]
    return np.percentile(ratios, [2.5, 97.5], axis=0).T


def rounded(value: float) -> float:
    """Five significant digits: more than any of these figures has."""
    return float(f"{value:.5g}")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures for the terminal."""
    shown = Table("engine", "precision", "median ms", "p90", "min", f"/ {OURS}", "95 %", "SQNR dB", "cosine")
    for row in rows:
        figures = [f"{row[key]:.1f}" for key in ("median_ms", "p90_ms", "min_ms")]
        ratios = [f"{row['ratio']:.2f}", f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"]
        quality = [f"{row['sqnr_db']:.1f}", f"{row['cosine']:.5f}"] if "sqnr_db" in row else ["", ""]
        shown.add_row(row["name"], row["precision"], *figures, *ratios, *quality)
    return shown


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}")
