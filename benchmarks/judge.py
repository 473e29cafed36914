"""A quantized model and FP32's answers in, how far it strayed and what that cost out.

    model.onnx or model.xml  ->  one of WAYS runs it on the judge images  ->  Tally: SQNR, top-1, agreement

`exact` is ONNX Runtime with its rewrites off, which computes what the Q/DQ nodes say and nothing else, so that quantizers are
compared and not engines. The other ways show what an engine makes of it. Exact holds on average: the order in which floats are
summed turns a rounding here and there, which the blocks amplify until two runs differ by as much as either does from FP32.
So figures of few images mean little. Knows nothing of how a model was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from rich.progress import track

from benchmarks.cpu_latency import Float32, err, normalised
from benchmarks.subjects import BATCH, Classes, Image, Probe, Reference, Subject, batches, scores
from vitedge.backends.build import build_engine, read_source
from vitedge.bench.tally import FLOAT32_NOISE
from vitedge.compiler import graph
from vitedge.compiler.activations import open_session
from vitedge.errors import VitEdgeError
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Target

Answer = Callable[[list[Image]], Float32]  # at most BATCH images -> float32[images, ...]
Figures = dict[str, float]
FOLDED = ("Constant", "QuantizeLinear", "DequantizeLinear")
SCRATCH = "engines"  # inside the model's folder


def judge(way: str, folder: Path, subject: Subject, reference: Reference) -> tuple[str, Figures]:
    """Run the model in `folder` on the judge images; gives what computed it, in words, and its figures."""
    tally = Tally(reference.probe)
    with ExitStack() as stack:
        words, answer = WAYS[way](folder, subject.card, stack)
        total = -(-len(subject.judge) // BATCH)
        for index, images in enumerate(
            track(batches(subject.judge), f"  judging: {words}", total, console=err, transient=True, disable=not err.is_terminal)
        ):
            rows = slice(index * BATCH, index * BATCH + len(images))
            tally.add(answer(images), reference.outputs[rows], reference.truth[rows])
    return words, tally.figures()


def exact(folder: Path, card: ModelCard, stack: ExitStack) -> tuple[str, Answer]:
    """ONNX Runtime, node by node. A model that vitedge did not write takes normalised pixels, one image a call."""
    model = onnx.load(folder / "model.onnx")
    fold_weights(model)
    session = open_session(model, [model.graph.output[0].name], optimize=False)
    name = session.get_inputs()[0].name
    if "vitedge.card" in graph.metadata(model):
        own = graph.model_card(model)
        return "exact", lambda images: session.run(None, {name: prepared(images, own)})[0]
    return "exact", one_by_one(lambda pixels: session.run(None, {name: pixels})[0], card)


def fold_weights(model: ModelProto) -> None:
    """Run the Q/DQ of constants once and for all, in place: the same numbers, without doing it again for every batch."""
    constant, nodes = set(graph.constants(model)), []
    for node in model.graph.node:
        if node.op_type in FOLDED and constant.issuperset(node.input):
            constant.update(node.output)
            nodes.append(node)
    names = [node.output[0] for node in nodes if node.op_type == "DequantizeLinear"]
    weights = ModelProto()
    weights.CopyFrom(model)
    del weights.graph.input[:]
    values = open_session(weights, names, optimize=False).run(names, {}) if names else []
    for name, value in zip(names, values, strict=True):
        graph.producers(model)[name].output[0] = f"{name}.folded"
        graph.put_constant(model, name, value)
    graph.prune(model)


def engine(folder: Path, card: ModelCard, stack: ExitStack, *, fp32: bool) -> tuple[str, Answer]:
    """vitedge's own engine, its floats as the recipe says or all in fp32."""
    path, source = folder / "model.onnx", read_source(folder / "model.onnx")
    if fp32 and source.recipe is not None:
        model = graph.load(path)
        graph.set_metadata(model, card=source.card, variant=source.variant, recipe=replace(source.recipe, float_type="fp32"))
        path = folder / SCRATCH / "fp32.onnx"
        graph.save(model, path)
    opened = stack.enter_context(open_engine(build_engine(path, Target(), folder / SCRATCH)))
    return f"engine, {opened.manifest.float_type}", lambda images: opened(prepared(images, source.card))


def openvino(folder: Path, card: ModelCard, stack: ExitStack) -> tuple[str, Answer]:
    """OpenVINO on a model of its own kind, its floats in fp32."""
    import openvino

    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return "OpenVINO, fp32", one_by_one(lambda pixels: compiled(pixels)[0], card)


WAYS: dict[str, Callable[[Path, ModelCard, ExitStack], tuple[str, Answer]]] = {
    "exact": exact,
    "engine fp32": partial(engine, fp32=True),
    "engine": partial(engine, fp32=False),
    "openvino": openvino,
}


def prepared(images: list[Image], card: ModelCard) -> np.ndarray:
    """The images as rows of vitedge's integer input."""
    rows = np.empty((len(images), *input_shape(card)), input_dtype(card))
    for image, row in zip(images, rows, strict=True):
        write_input(image, card, row)
    return rows


def one_by_one(run: Callable[[Float32], Float32], card: ModelCard) -> Answer:
    """A model of static batch 1, as an Answer."""
    return lambda images: np.concatenate([run(normalised(image, card.preprocess)) for image in images])


class Tally:
    """What one model got right so far, and how far its answers lie from FP32's."""

    def __init__(self, probe: Probe | None) -> None:
        self.probe = probe
        self.images = self.correct = self.agreed = 0
        self.power: dict[str, list[float]] = {}  # of the signal and of the noise

    def add(self, outputs: Float32, wanted: Float32, truth: Classes) -> None:
        """Count answers [B, ...] against those of FP32 and against class indices [B]."""
        if not np.isfinite(outputs).all():
            raise VitEdgeError("its answers are not finite numbers")
        self._add_power("sqnr_db", wanted, outputs)
        if self.probe is not None:
            self._add_power("class_sqnr_db", wanted[:, 0], outputs[:, 0])
        found, right = (scores(answers, self.probe).argmax(axis=1) for answers in (outputs, wanted))
        self.images += len(truth)
        self.correct += int((found == truth).sum())
        self.agreed += int((found == right).sum())

    def _add_power(self, name: str, wanted: Float32, outputs: Float32) -> None:
        power = self.power.setdefault(name, [0.0, 0.0])
        power[0] += float(np.square(wanted, dtype=np.float64).sum())
        power[1] += float(np.square(np.subtract(wanted, outputs, dtype=np.float64)).sum())

    def figures(self) -> Figures:
        """Decibels and percent."""
        decibels = {
            name: 10 * math.log10(signal / max(noise, signal * FLOAT32_NOISE)) for name, (signal, noise) in self.power.items()
        }
        return {**decibels, "top1": 100 * self.correct / self.images, "agreement": 100 * self.agreed / self.images}
