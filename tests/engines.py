"""A small real model, and what the pipeline makes of it: built once a session, in a folder of its own.

examples/fashion_mnist (0.45 M parameters, trained)  ->  workspace: graphs, engines of both backends, 48 images
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.fashion_mnist.dataset import LABELS, read_idx
from vitedge import pipeline
from vitedge.backends.build import build_engine, read_manifest
from vitedge.images import decode, list_images
from vitedge.preprocess import write_input
from vitedge.runtime.engine import Engine
from vitedge.specs import Recipe, Target

ROOT = Path(__file__).parents[1]
FASHION = ROOT / "examples" / "fashion_mnist"
MODEL = f"{FASHION}/model.py:vit"
CHECKPOINT = FASHION / "vit.safetensors"
IMAGES = 48


class Silent:
    """A Watcher that keeps the lines it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, step: str) -> None:
        pass

    def progress(self, fraction: float, phase: str = "") -> None:
        assert 0 <= fraction <= 1

    def end(self, step: str, result: str) -> None:
        self.lines.append(f"{step}: {result}")


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A workspace with everything in it. graphs: by variant; engines: by (backend, variant). Tests change copies only."""

    root: Path
    images: Path
    graphs: dict[str, Path]
    engines: dict[tuple[str, str], Path]

    def copy(self, backend: str, variant: str, folder: Path) -> Path:
        """An engine to damage."""
        return Path(shutil.copytree(self.engines[backend, variant], folder / "engine"))


def make_workspace(root: Path) -> Made:
    """Export the Fashion-MNIST model with its trained weights, quantize it, and build both variants for both backends."""
    write_images(root / "images", IMAGES)
    files, engines, watcher = list_images(root / "images"), root / "engines", Silent()
    source = pipeline.ModelSource(MODEL, CHECKPOINT)
    fp32 = pipeline.export_step(source, files, engines, watcher)
    graphs = {"fp32": fp32, "int8": pipeline.quantize_step(fp32, files, Recipe(float_type="fp32"), root, watcher)}
    built = {
        (target.backend, variant): build_engine(graph, target, engines)
        for target in (Target(), Target(name="reference", backend="onnxruntime"))
        for variant, graph in graphs.items()
    }
    return Made(root, root / "images", graphs, built)


def quantize_plainly(made: Made, folder: Path) -> Path:
    """The model in INT8 by nothing but rounding to the nearest, so that every tensor keeps its name."""
    recipe = Recipe("plain", smoothing="none", rounding="nearest", bias_correction=False, float_type="fp32")
    graph = Path(shutil.copy(made.graphs["fp32"], folder / "fp32.onnx"))
    return pipeline.quantize_step(graph, list_images(made.images), recipe, folder, Silent())


def write_images(folder: Path, count: int, labels: tuple[str, ...] = LABELS) -> None:
    """Write `count` training images of Fashion-MNIST as FOLDER/LABEL/NNN.png, of the given labels alone."""
    images = read_idx(FASHION / "data" / "train1k-images-idx3-ubyte.gz")
    classes = read_idx(FASHION / "data" / "train1k-labels-idx1-ubyte.gz")
    chosen = [index for index, label in enumerate(classes) if LABELS[label] in labels][:count]
    for index in chosen:
        path = folder / LABELS[classes[index]] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)


def input_rows(engine: Engine, images: Path, count: int) -> NDArray[Any]:
    """The first `count` images as rows of the engine's input."""
    rows = np.empty((count, *engine.input.shape[1:]), engine.input.dtype)
    for row, file in zip(rows, list_images(images)[:count], strict=True):
        write_input(decode(file.path), engine.manifest.card, row)
    return rows


def sqnr_db(reference: NDArray[np.float32], given: NDArray[np.float32]) -> float:
    """10 log10 of the power of the reference over that of the difference."""
    noise = float(np.square(reference - given, dtype=np.float64).sum())
    return 10 * float(np.log10(np.square(reference, dtype=np.float64).sum() / max(noise, 1e-30)))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Overwrite keys of an engine's manifest; None removes a key."""
    read_manifest(folder)  # it was right before
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def start_python(code: str, *arguments: object, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Run Python code in another process, with this repository importable."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_python(code: str, *arguments: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process to its end."""
    process = start_python(code, *arguments, folder=folder, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
