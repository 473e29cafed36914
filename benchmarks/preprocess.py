"""A camera's frame on its way to a Vision Transformer's input, by every means that one might choose, timed in turns.

    frames uint8[1080, 1920, 3] and uint8[2160, 3840, 3]  ->  224 x 224  ->  results/preprocess.json

    python -m benchmarks.preprocess [--rounds 20] [--patience 300] [--output results/preprocess.json]

The task is that of most models: resize the shorter side to 224 by a bicubic filter, cut out the center, normalise. vitedge
writes int8 patches into the engine's input, whose first layer normalises; all others end in float32[1, 3, 224, 224], their
arrays allocated as their users' would be. Every candidate has all cores, and frames take turns, so that none lies in a
core's own cache. A turn during which other processes had the processor is taken again while the patience, in seconds, lasts;
how many had to be kept is part of the result.

How good the pictures are is measured beside: the largest and the mean difference from Pillow's, in grey levels, on frames
of edges, gradients and noise. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_latency import ratio_intervals
from vitedge import preprocess
from vitedge.bench.environment import environment
from vitedge.bench.latency import TURN_CALLS, timed_turn
from vitedge.errors import VitEdgeError
from vitedge.preprocess import input_shape, patches_to_image, write_input
from vitedge.specs import ModelCard, Preprocess
from vitedge.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
SIDE, PATCH = 224, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CARD = ModelCard("vit", "classify", Preprocess((SIDE, SIDE), MEAN, STD), PATCH)
SIZES = {"1080p": (1080, 1920), "4K": (2160, 3840)}
FRAMES = 4
OURS = "vitedge"
TOO_SLOW = ("OpenVINO BICUBIC_PILLOW",)  # for 4K: seconds a frame
PACKAGES = ("numba", "pillow", "numpy", "opencv-python-headless", "openvino", "torch", "torchvision", "transformers")
WAIT_S = 0.5  # after a turn that other processes disturbed
Frame = NDArray[np.uint8]
Prepare = Callable[[Frame], Any]  # int8[196, 768] patches, or float32[1, 3, 224, 224]
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)


def main() -> None:
    """Measure every size and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help=f"turns of {TURN_CALLS} timed calls that every candidate gets")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for taking disturbed turns again")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "preprocess.json")
    arguments = parser.parse_args()
    sections = {name: section(name, arguments.rounds, arguments.patience / len(SIZES)) for name in SIZES}
    command = shlex.join(["python", "-m", "benchmarks.preprocess", *sys.argv[1:]])
    protocol = {"rounds": arguments.rounds, "calls_per_round": TURN_CALLS, "frames": FRAMES, "ratio_to": OURS, "interval": "95 %"}
    document = {"environment": {**environment(), "command": command}, "versions": versions(), **protocol, "sections": sections}
    write_json(arguments.output, document)
    err.print(f"{arguments.output}: written")


def versions() -> dict[str, str | None]:
    """The release of every package that has a part in this; None for one that is not installed."""
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {package: installed.get(package) for package in PACKAGES}


def section(name: str, rounds: int, patience_s: float) -> dict[str, Any]:
    """All candidates on frames of one size, as plain data."""
    err.rule(name)
    frames = [frame(*SIZES[name], seed) for seed in range(FRAMES)]
    candidates, skipped = open_candidates(SIZES[name], TOO_SLOW if name == "4K" else ())
    quality = {label: differences(prepare, frames) for label, (_, prepare) in candidates.items()}
    load = os.getloadavg()[0]
    samples, again, kept = time_in_turns([prepare for _, prepare in candidates.values()], frames, rounds, patience_s)
    ours = list(candidates).index(OURS)
    rows = []
    for (label, (makes, _)), times, interval in zip(candidates.items(), samples, ratio_intervals(samples, ours), strict=True):
        median, p90 = np.percentile(times, [50, 90])
        figures = {"median_ms": median, "p90_ms": p90, "min_ms": times.min(), "ratio": median / np.median(samples[ours])}
        figures |= {"ratio_low": interval[0], "ratio_high": interval[1], **quality[label]}
        rows.append({"name": label, "makes": makes, **{key: float(f"{value:.5g}") for key, value in figures.items()}})
    err.print(table(rows))
    return {
        "size": SIZES[name], "candidates": rows, "skipped": skipped, "load_before": load,
        "turns": len(candidates) * rounds, "turns_taken_again": again, "turns_disturbed": kept,
    }  # fmt: skip


def frame(height: int, width: int, seed: int) -> Frame:
    """A picture of gradients, hard edges of many widths, and noise: what separates one filter from another."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = np.stack([np.sin((x * (c + 1) + y * (3 - c)) / (40 + 17 * seed)) for c in range(3)], axis=2) * 100 + 128
    edges = ((x // (2 + y // 90)) % 2)[..., None] * 255
    picture = np.where((y // 90 % 3 == 1)[..., None], edges, waves) + random.normal(0, 12, (height, width, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def open_candidates(size: tuple[int, int], left_out: Sequence[str]) -> tuple[dict[str, tuple[str, Prepare]], dict[str, str]]:
    """What every candidate makes and how, and for each that cannot be had here the reason."""
    opened, skipped = {}, {}
    for name, (makes, build) in CANDIDATES.items():
        if name in left_out:
            continue
        try:
            opened[name] = (makes, build(size))
        except ImportError as error:
            skipped[name] = f"the package {error.name!r} is not installed"
            err.print(f"{name} skipped: {skipped[name]}")
    return opened, skipped


def vitedge(size: tuple[int, int]) -> Prepare:
    """The compiled loops, into one buffer, as a session has it."""
    from vitedge.resample_cpu import kernels

    if kernels() is None:
        raise ModuleNotFoundError(name="numba")
    row = np.empty(input_shape(CARD), np.int8)

    def prepare(image: Frame) -> NDArray[np.int8]:
        write_input(image, CARD, row)
        return row

    return prepare


def vitedge_pillow(size: tuple[int, int]) -> Prepare:
    """What vitedge does where numba is not installed."""
    row = np.empty(input_shape(CARD), np.int8)
    resized = row.view(np.uint8).reshape(SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 3)

    def prepare(image: Frame) -> NDArray[np.int8]:
        small = preprocess.resize(image, CARD.preprocess)
        patches = small.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
        np.bitwise_xor(patches, np.uint8(0x80), out=resized)
        return row

    return prepare


def pillow(size: tuple[int, int]) -> Prepare:
    """Resize the whole, crop, normalise: what people write."""
    height, width = shorter_side(size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2

    def prepare(image: Frame) -> NDArray[np.float32]:
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        return normalised(np.asarray(picture.crop((left, top, left + SIDE, top + SIDE))))

    return prepare


def opencv(interpolation: str) -> Callable[[tuple[int, int]], Prepare]:
    """The same with cv2.resize."""

    def build(size: tuple[int, int]) -> Prepare:
        import cv2

        height, width = shorter_side(size)
        left, top, how = (width - SIDE) // 2, (height - SIDE) // 2, getattr(cv2, interpolation)

        def prepare(image: Frame) -> NDArray[np.float32]:
            resized = cv2.resize(image, (width, height), interpolation=how)
            return normalised(resized[top : top + SIDE, left : left + SIDE])

        return prepare

    return build


def openvino(size: tuple[int, int]) -> Prepare:
    """OpenVINO's own Pillow-like filter, compiled for this size with the normalisation, as its PrePostProcessor makes it."""
    import openvino
    from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

    height, width = shorter_side(size)
    left = (width - SIDE) // 2
    opset = openvino.opset13
    image = opset.parameter([1, 3, height, width], openvino.Type.f32)
    cropped = opset.slice(image, [left], [left + SIDE], [1], [3])
    steps = PrePostProcessor(openvino.Model([cropped], [image]))
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().tensor().set_color_format(ColorFormat.RGB).set_spatial_static_shape(*size)
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    steps.input().preprocess().resize(ResizeAlgorithm.RESIZE_BICUBIC_PILLOW).convert_element_type(openvino.Type.f32)
    steps.input().preprocess().mean(mean).scale(std)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(steps.build(), "CPU", settings).create_infer_request()

    def prepare(picture: Frame) -> NDArray[np.float32]:
        request.set_input_tensor(openvino.Tensor(picture[None], shared_memory=True))
        request.infer()
        return request.get_output_tensor(0).data

    return prepare


def hugging_face(size: tuple[int, int]) -> Prepare:
    """The image processor of DINOv2 and others with a center crop: on torchvision where that is installed, else on Pillow."""
    import transformers

    transformers.logging.set_verbosity_error()
    square = {"height": SIDE, "width": SIDE}
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, resample=3, image_mean=list(MEAN), image_std=list(STD)
    )
    return lambda image: np.asarray(processor(image, return_tensors="pt")["pixel_values"])


def torchvision(size: tuple[int, int]) -> Prepare:
    """torchvision's transform on tensors, antialiased."""
    import torch
    from torchvision.transforms import InterpolationMode, v2

    steps = v2.Compose([
        v2.Resize(SIDE, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SIDE), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(MEAN), list(STD)),
    ])  # fmt: skip
    return lambda image: steps(torch.from_numpy(image).permute(2, 0, 1))[None].numpy()


CANDIDATES: dict[str, tuple[str, Callable[[tuple[int, int]], Prepare]]] = {
    OURS: ("int8 patches", vitedge),
    "vitedge without numba": ("int8 patches", vitedge_pillow),
    "Pillow": ("float32", pillow),
    "OpenCV INTER_AREA": ("float32", opencv("INTER_AREA")),
    "OpenCV INTER_CUBIC": ("float32", opencv("INTER_CUBIC")),
    TOO_SLOW[0]: ("float32", openvino),
    "Hugging Face processor": ("float32", hugging_face),
    "torchvision": ("float32", torchvision),
}


def shorter_side(size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of a frame whose shorter side is resized to 224."""
    return SIDE, SIDE * size[1] // size[0]


def normalised(image: Frame) -> NDArray[np.float32]:
    """uint8[h, w, 3] -> float32[1, 3, h, w], in the textbook way."""
    scaled = (image.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def differences(prepare: Prepare, frames: Sequence[Frame]) -> dict[str, float]:
    """How many grey levels the pictures lie from what Pillow makes of the same frames: at most, and on average."""
    off = [np.abs(levels(prepare(image)) - levels(pillow(image.shape[:2])(image))) for image in frames]
    return {"worst_levels": float(np.max(off)), "mean_levels": float(np.mean(off))}


def levels(made: NDArray[Any]) -> NDArray[np.float64]:
    """The picture that a candidate made, float64[224, 224, 3] in grey levels."""
    if made.dtype == np.int8:
        return patches_to_image(made, CARD).astype(np.float64)
    grey = made[0].transpose(1, 2, 0).astype(np.float64) * STD + MEAN
    return np.round(grey * 255, 3)  # float32 has no more


def time_in_turns(
    candidates: Sequence[Prepare], frames: Sequence[Frame], rounds: int, patience_s: float
) -> tuple[NDArray[np.float64], int, int]:
    """Milliseconds of every timed call, float64[candidates, rounds, TURN_CALLS]; turns taken again, and disturbed ones kept.

    Each round has an order of its own. Which turn is taken again is decided by other processes' time, never by the turn's.
    """
    samples = np.empty((len(candidates), rounds, TURN_CALLS))
    generator, endless = np.random.default_rng(0), itertools.cycle(frames)
    again = kept = 0
    end = time.monotonic() + patience_s
    for number in range(rounds):
        for index in generator.permutation(len(candidates)):
            prepare = candidates[index]
            samples[index, number], disturbed = timed_turn(lambda prepare=prepare: prepare(next(endless)))
            while disturbed and time.monotonic() < end:
                again += 1
                time.sleep(WAIT_S)
                samples[index, number], disturbed = timed_turn(lambda prepare=prepare: prepare(next(endless)))
            kept += disturbed
    return samples, again, kept


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures for the terminal."""
    shown = Table("by", "makes", "median ms", "p90", "min", f"/ {OURS}", "95 %", "worst", "mean levels")
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("median_ms", "p90_ms", "min_ms")]
        ratios = [f"{row['ratio']:.1f}", f"{row['ratio_low']:.1f}-{row['ratio_high']:.1f}"]
        shown.add_row(row["name"], row["makes"], *figures, *ratios, f"{row['worst_levels']:.1f}", f"{row['mean_levels']:.2f}")
    return shown


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}")
