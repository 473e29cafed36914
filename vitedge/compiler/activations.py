"""Real images in, the activations of named tensors out, a few images at a time.

    model.onnx + images -> onnxruntime -> {tensor name: float32[batch, ...]} , batch after batch

Memory does not grow with the number of images. Knows nothing of what is made of the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, helper

from vitedge.compiler.graph import model_card, prune
from vitedge.errors import ModelError
from vitedge.images import ImageFile, stream
from vitedge.preprocess import input_dtype, input_shape, write_input

BATCH = 8
Activations = dict[str, NDArray[np.float32]]


def stream_activations(
    model: ModelProto, tensors: Sequence[str], files: Sequence[ImageFile], skipped: list[str]
) -> Iterator[tuple[list[ImageFile], Activations]]:
    """Yield each batch of images with its activations of `tensors`.

    Undecodable images are left out and listed in `skipped`. A NaN or an infinity is a ModelError that names the tensor
    and the image.
    """
    card = model_card(model)
    session = open_session(model, tensors) if tensors else None  # none: the images are read and counted all the same
    rows = np.empty((BATCH, *input_shape(card)), input_dtype(card))
    batch: list[ImageFile] = []
    for file, image in stream(files, skipped):
        write_input(image, card, rows[len(batch)])
        batch.append(file)
        if len(batch) == BATCH:
            yield batch, _run(session, tensors, rows, batch)
            batch = []
    if batch:
        yield batch, _run(session, tensors, rows[: len(batch)], batch)


def open_session(model: ModelProto, outputs: Sequence[str], *, optimize: bool = True) -> Any:
    """An onnxruntime session of that part of `model` which makes the tensors `outputs`, each named once."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    prune(probe)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, tensors: Sequence[str], rows: NDArray[Any], batch: list[ImageFile]) -> Activations:
    values = session.run(list(tensors), {session.get_inputs()[0].name: rows}) if tensors else []
    for name, array in zip(tensors, values, strict=True):
        if not np.isfinite(array).all():
            worst = next(i for i, row in enumerate(array) if not np.isfinite(row).all())
            raise ModelError(
                f"the activation {name!r} is NaN or infinite for {batch[worst].path}",
                hint="the model overflows on this image; does it do so in torch as well?",
            )
    return dict(zip(tensors, values, strict=True))
