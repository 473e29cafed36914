"""Two INT8 classifiers to serve: the trained Fashion-MNIST ViT, and a ViT-S/14 of trained weights under a random head.

    fashion(), vits()  ->  Served: an engine directory for this CPU, and pictures that its answers tell apart

For figures of time and of who got whose answer; what the random head says of a picture means nothing. Engines are kept in
.cache/classifiers/.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.cpu_latency import FOCUS, ROOT, WEIGHTS, Features
from vitedge.backends.build import build_engine
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import export
from vitedge.compiler.models import load_model
from vitedge.compiler.quantize import quantize
from vitedge.images import decode, list_images, sample
from vitedge.specs import ModelCard
from vitedge.workspace import content_key, load_recipe, load_target, sha256, staged

FASHION = ROOT / "examples" / "fashion_mnist"
CACHE = ROOT / ".cache" / "classifiers"
CLASSES, PICTURES = 1000, 32
HEIGHT, WIDTH = 720, 1280  # of the pictures for the ViT-S, as cameras deliver them


@dataclass(frozen=True, slots=True)
class Served:
    """An engine directory, and pictures, uint8[H, W, 3] RGB."""

    name: str
    engine: Path
    pictures: list[NDArray[np.uint8]]


class Headed(nn.Module):
    """A linear head on the class token of a ViT's tokens."""

    def __init__(self, tokens: nn.Module, width: int) -> None:
        super().__init__()
        self.tokens, self.head = tokens, nn.Linear(width, CLASSES)
        nn.init.normal_(self.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images)[:, 0])


def fashion() -> Served:
    """0.45 M parameters, 28 x 28 grey."""
    subprocess.run([sys.executable, str(FASHION / "dataset.py")], check=True, stdout=sys.stderr)
    module, card = load_model(f"{FASHION / 'model.py'}:vit", FASHION / "vit.safetensors")
    engine = _engine(module, card, FASHION / ".cache" / "calibration", sha256(FASHION / "vit.safetensors"))
    files = sample(list_images(FASHION / ".cache" / "test"), PICTURES, seed=0)
    return Served("Fashion-MNIST ViT", engine, [decode(file.path) for file in files])


def vits() -> Served:
    """22.1 M parameters, 224 x 224 RGB cut out of the center as is usual for a ViT-S, 1000 classes."""
    if not WEIGHTS.exists():
        subprocess.run([sys.executable, str(FOCUS / "fetch.py")], check=True, stdout=sys.stderr)
    focus, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
    module = Headed(Features(focus), 384).eval()
    spec = replace(card.preprocess, resize="crop", crop_pct=0.9)
    card = replace(card, name="vits14-classifier", task="classify", labels=(), preprocess=spec)
    engine = _engine(module, card, FOCUS / ".cache" / "calibration", content_key(sha256(WEIGHTS), sha256(Path(__file__))))
    return Served("ViT-S/14", engine, [_clouds(seed) for seed in range(PICTURES)])


MODELS: dict[str, Callable[[], Served]] = {"fashion": fashion, "vits": vits}


def _engine(module: nn.Module, card: ModelCard, images: Path, weights: str) -> Path:
    """export -> calibrate -> quantize -> build, once for the same weights."""
    graph, recipe = CACHE / f"{card.name}-{content_key(weights, load_recipe('int8').name)}.int8.onnx", load_recipe("int8")
    if not graph.exists():
        fp32, files = graph.with_suffix(".fp32.onnx"), list_images(images)
        export(module, card, fp32)
        with staged(graph) as temporary:
            quantize(fp32, calibrate(fp32, files, recipe).table, temporary, files)
    return build_engine(graph, load_target("cpu"), CACHE)


def _clouds(seed: int) -> NDArray[np.uint8]:
    """A picture of smooth colours, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
