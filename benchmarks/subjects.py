"""Trained Vision Transformers and real labelled images in, what a quantizer's answers are judged by out.

    examples/NAME + images  ->  Subject: module, card, calibration pool, judge images  ->  Reference: FP32's answers and classes

`focus` gives features and no classes, so a linear probe on them says what they are worth: a logistic regression on the class
token and the mean patch token, trained on FP32's features of images that nobody is judged on. `fashion` classifies by itself.
FP32 is torch in float32; its answers are kept in .cache/quantizers/. Knows nothing of quantization.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import nn

from benchmarks.cpu_latency import FOCUS, ROOT, WEIGHTS, Features, Float32, err, normalised
from vitedge.compiler.activations import images_sha256
from vitedge.compiler.models import load_model
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, labels_of, list_images, sample, stream
from vitedge.specs import ModelCard
from vitedge.workspace import content_key, sha256, staged

FASHION = ROOT / "examples" / "fashion_mnist"
CACHE = ROOT / ".cache" / "quantizers"
BATCH = 8
L2 = 0.1  # of the probe, whose inputs are standardised
Image = NDArray[np.uint8]
Classes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to quantize, and the images for it.

    pool: what `calibration` images are drawn from. probe: labelled images for a linear probe, () for a classifier.
    labels: the classes, by index. key: changes with the model.
    """

    name: str
    module: nn.Module
    card: ModelCard
    key: str
    pool: tuple[ImageFile, ...]
    calibration: int
    judge: tuple[ImageFile, ...]
    probe: tuple[ImageFile, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier: float64[features, classes] and float64[classes]."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """What FP32 answers, float32[N, ...], and the class of each image, int64[N]; the probe makes scores of answers."""

    outputs: Float32
    truth: Classes
    probe: Probe | None


def focus(arguments: argparse.Namespace) -> Subject:
    """The ViT-S/14's tokens after its last norm, on the labelled photographs in --images."""
    if arguments.images is None:
        hint = "give --images DIR with DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or --subject fashion alone"
        raise VitEdgeError("the subject focus is judged on labelled images, of which this repository has none", hint=hint)
    if not WEIGHTS.exists():
        subprocess.run([sys.executable, str(FOCUS / "fetch.py")], check=True, stdout=sys.stderr)
    module, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
    train, test = (list_images(arguments.images / part) for part in ("train", "test"))
    return Subject(
        "focus", Features(module).eval(), replace(card, name="focus-vits14-features", task="embed"),
        content_key(sha256(WEIGHTS), sha256(FOCUS / "model.py")), tuple(train), 64,
        tuple(sample(test, arguments.judge or 1000, 0)), tuple(sample(train, arguments.probe, 0)), labels_of(train),
    )  # fmt: skip


def fashion(arguments: argparse.Namespace) -> Subject:
    """The small Fashion-MNIST classifier, whose weights and images are in this repository."""
    subprocess.run([sys.executable, str(FASHION / "dataset.py")], check=True, stdout=sys.stderr)
    module, card = load_model(f"{FASHION / 'model.py'}:vit", FASHION / "vit.safetensors")
    pool, test = (tuple(list_images(FASHION / ".cache" / part)) for part in ("calibration", "test"))
    return Subject(
        "fashion", module, card, content_key(sha256(FASHION / "vit.safetensors"), sha256(FASHION / "model.py")), pool, 256,
        tuple(sample(test, arguments.judge or 10_000, 0)), (), card.labels,
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {"focus": focus, "fashion": fashion}


def reference(subject: Subject) -> Reference:
    """FP32's answers to the judge images, and the probe where the model needs one."""
    probe = None
    if subject.probe:
        features = kept_array(subject, "probe", subject.probe, pooled)
        probe = train(features, classes(subject.probe, subject.labels), len(subject.labels))
    outputs = kept_array(subject, "judge", subject.judge, lambda tokens: tokens)
    return Reference(outputs, classes(subject.judge, subject.labels), probe)


def scores(outputs: Float32, probe: Probe | None) -> NDArray[Any]:
    """[B, classes]: a classifier's outputs themselves, else those of the probe on tokens, float32[B, 1 + N, C]."""
    return outputs if probe is None else pooled(outputs).astype(np.float64) @ probe.weight + probe.bias


def pooled(tokens: Float32) -> Float32:
    """Tokens float32[B, 1 + N, C], the class token first -> features float32[B, 2 C]."""
    return np.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=1)


def train(features: Float32, truth: Classes, count: int) -> Probe:
    """Logistic regression in float64 by L-BFGS from zero: convex, so there is one answer and no seed."""
    inputs = torch.from_numpy(np.asarray(features, np.float64))
    mean, std = inputs.mean(dim=0), inputs.std(dim=0).clamp_min(1e-6)
    inputs = (inputs - mean) / std
    layer = nn.Linear(inputs.shape[1], count, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = nn.functional.cross_entropy(layer(inputs), torch.from_numpy(truth))
        value = entropy + L2 / 2 * layer.weight.square().sum()
        value.backward()
        return value

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small products: threads that wait for each other take ten times as long on a busy machine
    optimizer.step(loss)
    torch.set_num_threads(threads)
    weight = layer.weight.detach() / std  # the standardising is folded in
    return Probe(weight.T.numpy(), (layer.bias.detach() - weight @ mean).numpy())


def kept_array(subject: Subject, part: str, files: Sequence[ImageFile], reduce: Callable[[Float32], Float32]) -> Float32:
    """FP32's answers to `files`, each batch reduced, read where they lie on disk; computed where they are not there."""
    key = content_key(subject.key, sha256(Path(__file__)), torch.__version__, images_sha256(files))
    path = CACHE / f"{subject.name}-{part}-{key}.npy"
    if not path.exists():
        with staged(path) as temporary, torch.inference_mode():
            answers = [reduce(answer) for answer in fp32(subject, part, files)]
            np.save(temporary, np.concatenate(answers))
    return np.load(path, mmap_mode="r")


def fp32(subject: Subject, part: str, files: Sequence[ImageFile]) -> Iterator[Float32]:
    """The module's answers, batch by batch."""
    total = -(-len(files) // BATCH)
    for images in track(
        batches(files), f"{subject.name} fp32: {part} images", total, console=err, transient=True, disable=not err.is_terminal
    ):
        rows = np.concatenate([normalised(image, subject.card.preprocess) for image in images])
        yield subject.module(torch.from_numpy(rows)).numpy()


def batches(files: Sequence[ImageFile], size: int = BATCH) -> Iterator[list[Image]]:
    """The images, a few at a time; one that cannot be read is an error, as every answer belongs to a class."""
    skipped: list[str] = []
    images = (image for _, image in stream(files, skipped))
    while batch := list(islice(images, size)):
        yield batch
    if skipped:
        raise VitEdgeError(skipped[0])


def classes(files: Sequence[ImageFile], labels: Sequence[str]) -> Classes:
    """The index of each file's label."""
    strange = {str(file.label) for file in files if file.label not in labels}
    if strange:
        raise VitEdgeError(f"there is no class {sorted(strange)[0]!r}; there are {', '.join(labels)}")
    return np.array([labels.index(file.label or "") for file in files])
