"""A frame in, a prediction out, and where the time went.

    Frame  ->  preprocess into a row of the engine's input  ->  engine  ->  softmax and top-k, or the row itself  ->  Prediction

Knows nothing of cameras, files or backends: it asks of an engine only what `InferenceEngine` names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import EngineError, VitEdgeError
from vitedge.specs import Frame, Manifest, ModelCard, PixelFormat, Prediction, Timing

EXPORT_CLASSIFIER = "export it again, with an output of [batch, classes] or as a model of another task"
EXPORT_LABELS = "export the model again with one label a class, in the order of its outputs"
SORTED = 64  # classes, up to which Python sorts all before numpy has found the largest
Top = tuple[tuple[str, float], ...]


class InferenceEngine(Protocol):
    """What the predictor needs of an engine."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def max_batch(self) -> int: ...

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of the input."""

    def run(self, count: int) -> NDArray[np.float32]:
        """The outputs float32[count, ...] of the first `count` rows of the input; valid until the next run."""


class Predictor:
    """Predictions for frames, one at a time or in batches. It neither opens nor closes the engine.

    A classifier answers with its `top_k` best labels (the class index as text where the card has none) and their softmax
    probabilities; a model of another task with `Prediction.array` alone. It fills the engine's one buffer, so threads
    need an engine and a predictor each. Raises EngineError where the manifest's labels and output do not fit.
    """

    def __init__(self, engine: InferenceEngine, top_k: int = 5) -> None:
        if top_k < 1:
            raise VitEdgeError(f"top_k must be at least 1, not {top_k}")
        self._engine = engine
        self._card = engine.manifest.card
        self._top_k = top_k
        _check_labels(self._card)

    def __call__(self, frame: Frame) -> Prediction:
        """The prediction for one frame of uint8[H, W, 3] RGB, whatever its size."""
        return self.predict_batch((frame,))[0]

    def predict_batch(self, frames: Sequence[Frame]) -> list[Prediction]:
        """The predictions for up to `engine.max_batch` frames, in one run of the engine.

        Their timings: `capture_ms` is the age of that frame when work on the batch began, `preprocess_ms` is its own, `infer_ms`
        and `postprocess_ms` are its equal shares of the batch's. Summed over a batch they give the time the
        batch took; a single frame waited for all of it. Raises EngineError for too many frames or an output that is no number
        or has not one number a label.
        """
        if len(frames) > self._engine.max_batch:
            raise EngineError(f"a batch of {len(frames)} frames for an engine built for at most {self._engine.max_batch}")
        if not frames:
            return []
        began = time.perf_counter_ns()
        prepared = [self._prepare(frame, row) for row, frame in enumerate(frames)]
        infer = time.perf_counter_ns()
        outputs = self._engine.run(len(frames))
        infer_ms = elapsed_ms(infer) / len(frames)
        start = time.perf_counter_ns()
        answers = self.read(outputs)
        postprocess_ms = elapsed_ms(start) / len(frames)
        return [
            Prediction(top, array, Timing((began - frame.captured_ns) / 1e6, preprocess_ms, infer_ms, postprocess_ms))
            for (top, array), frame, preprocess_ms in zip(answers, frames, prepared, strict=True)
        ]

    def read(self, outputs: NDArray[np.float32]) -> list[tuple[Top, NDArray[np.float32]]]:
        """The rows of the engine's output as `Prediction.top` and `Prediction.array`, which outlive the next run."""
        return [self._answer(output) for output in outputs]

    def _answer(self, output: NDArray[np.float32]) -> tuple[Top, NDArray[np.float32]]:
        """Behind an engine's run each call of numpy finds cold caches and takes five times as long as alone: so there are few."""
        peak = float(output.max())  # a NaN anywhere comes through; a logit of -inf is a probability of 0
        if not math.isfinite(peak):
            raise EngineError(f"the engine's output holds {peak}", hint="an overflow? compare it with the fp32 engine")
        top = _top(output, peak, self._card, self._top_k) if self._card.task == "classify" else ()
        return top, output.copy()

    def _prepare(self, frame: Frame, row: int) -> float:
        """Fill one row of the engine's input; the milliseconds that took."""
        start = time.perf_counter_ns()
        self._engine.write(row, frame.image, frame.pixels)
        return elapsed_ms(start)


def elapsed_ms(start_ns: int) -> float:
    """Milliseconds since a time of `perf_counter_ns`."""
    return (time.perf_counter_ns() - start_ns) / 1e6


def _check_labels(card: ModelCard) -> None:
    """Refuse what the manifest says of itself; a size that it leaves open shows with the first answer."""
    if card.task != "classify" or not card.outputs:
        return
    shape = card.outputs[0].shape
    if len(shape) < 2:
        raise EngineError(f"{card.name} classifies, but its output has the shape {list(shape)}", hint=EXPORT_CLASSIFIER)
    if card.labels and shape[-1] is not None and len(card.labels) != shape[-1]:
        raise EngineError(f"{card.name} has {shape[-1]} outputs and {len(card.labels)} labels", hint=EXPORT_LABELS)


def _top(logits: NDArray[np.float32], peak: float, card: ModelCard, count: int) -> Top:
    """The `count` classes of the highest softmax probability, best first; of equals, the lower index first."""
    labels = card.labels
    if logits.ndim != 1:
        raise EngineError(f"{card.name} classifies, but answers with the shape {list(logits.shape)}", hint=EXPORT_CLASSIFIER)
    if labels and len(labels) != len(logits):
        raise EngineError(f"{card.name} has {len(logits)} outputs and {len(labels)} labels", hint=EXPORT_LABELS)
    if len(logits) <= max(SORTED, count):
        values = logits.tolist()
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)
        total = sum([math.exp(value - peak) for value in values])  # relative to the peak no logit is too large
    else:
        exact = logits.astype(np.float64)
        best = np.flatnonzero(exact >= np.partition(exact, -count)[-count]).tolist()
        values = {index: float(exact[index]) for index in best}
        best.sort(key=values.__getitem__, reverse=True)
        exact -= peak
        total = float(np.exp(exact, out=exact).sum())
    return tuple([(labels[i] if labels else str(i), math.exp(values[i] - peak) / total) for i in best[:count]])
