"""Real images in, the activations of named tensors out, one image at a time.

    model.onnx + images -> onnxruntime -> {tensor name: float32[1, ...]} , image after image

Memory does not grow with the number of images. One at a time, because the last bits of a product depend on how many rows it
has: so no statistic can depend on a batch size. Knows nothing of what is made of the activations.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, helper

from vitedge.compiler.graph import Array, copy_of, model_card, prune
from vitedge.errors import ImageError, ModelError
from vitedge.images import ImageFile, read_bytes, stream
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.workspace import sha256

Activations = dict[str, NDArray[np.float32]]


def stream_activations(
    model: ModelProto, tensors: Sequence[str], files: Sequence[ImageFile], skipped: list[str]
) -> Iterator[tuple[ImageFile, Activations]]:
    """Yield each image with its activations of `tensors`.

    Undecodable images are left out and listed in `skipped`. A NaN or an infinity is a ModelError that names the tensor
    and the image.
    """
    probe = Probe(model, tensors)
    for file, image in stream(files, skipped):
        yield file, probe.run(image, file)


class Probe:
    """A model that is run for the activations of some of its tensors; none: then it is not run at all."""

    def __init__(self, model: ModelProto, tensors: Sequence[str], threads: int = 0) -> None:
        self._card, self._tensors = model_card(model), list(tensors)
        self._session = open_session(model, tensors, threads=threads) if tensors else None
        self._row = np.empty((1, *input_shape(self._card)), input_dtype(self._card))

    def run(self, image: NDArray[np.uint8], file: ImageFile) -> Activations:
        """The activations of an image, which is that of `file`."""
        if self._session is None:
            return {}
        write_input(image, self._card, self._row[0])
        values = self._session.run(self._tensors, {self._session.get_inputs()[0].name: self._row})
        for name, array in zip(self._tensors, values, strict=True):
            if not np.isfinite(array).all():
                raise ModelError(
                    f"the activation {name!r} is NaN or infinite for {file}",
                    hint="the model overflows on this image; does it do so in torch as well?",
                )
        return dict(zip(self._tensors, values, strict=True))


def read_inputs(model: ModelProto, files: Sequence[ImageFile], count: int) -> NDArray[Any]:
    """The first `count` images of `files` that can be decoded, as a batch of the model's input."""
    card = model_card(model)
    images = [image for _, image in itertools.islice(stream(files, []), count)]
    rows = np.empty((len(images), *input_shape(card)), input_dtype(card))
    for image, row in zip(images, rows, strict=True):
        write_input(image, card, row)
    return rows


def images_sha256(files: Sequence[ImageFile]) -> str:
    """One hash over the bytes of all files, in order."""
    state = hashlib.sha256()
    for file in files:
        state.update(_sha256(file).encode())
    return state.hexdigest()


def _sha256(file: ImageFile) -> str:
    """Of a file, or of a member of an archive; "unreadable" of one that is gone."""
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest() if file.member else sha256(file.path)
    except (OSError, ImageError):
        return "unreadable"


def open_session(model: ModelProto, outputs: Sequence[str], *, optimize: bool = True, threads: int = 0) -> Any:
    """An onnxruntime session of that part of `model` which makes the tensors `outputs`, each named once.

    threads: that it computes with, 0 for as many as there are cores; they do not change a bit of what comes out.
    """
    probe = copy_of(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    prune(probe)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # a Q/DQ rounds where it stands, and weights only once
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_once(model: ModelProto, tensors: Sequence[str], rows: Array | None = None) -> dict[str, Array]:
    """The values of `tensors`, node by node as the graph says, for a batch of its input; by default of one blank image."""
    distinct = list(dict.fromkeys(tensors))
    if not distinct:
        return {}
    session = open_session(model, distinct, optimize=False)
    entry = session.get_inputs()[0]
    if rows is None:
        dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
        rows = np.zeros((1, *entry.shape[1:]), dtype)
    return dict(zip(distinct, session.run(distinct, {entry.name: rows}), strict=True))
