"""How large the numbers in a graph get on real images, and how far a half-precision form of it answers from it.

    model.onnx + images -> {tensor name: largest |x|}
    FP32 graph + its 16-bit form + images -> SQNR in dB of the worst output

The graph itself reduces each tensor to one number, so memory is that of one ordinary run, whatever the number of tensors.
Knows nothing of what is decided by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vitedge.compiler.activations import open_session, stream_activations
from vitedge.compiler.graph import copy_of, infer
from vitedge.compiler.sensitivity import decibels
from vitedge.images import ImageFile

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def tensor_types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor, as TensorProto numbers; a graph whose types contradict each other is a ModelError."""
    return {name: entry.type.tensor_type.elem_type for name, entry in infer(model, strict=True).items()}


def largest_values(
    model: ModelProto,
    tensors: Sequence[str],
    files: Sequence[ImageFile],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, float]:
    """The largest |x| of each of `tensors`, FP32, over the images. A NaN or an infinity is a ModelError that names it."""
    probe = copy_of(model)
    whole = {name: f"|{name}|" for name in tensors}
    for name, result in whole.items():
        probe.graph.node.append(helper.make_node("Abs", [name], [f"{result}.all"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [f"{result}.all"], [result], keepdims=0))
    found = dict.fromkeys(tensors, 0.0)
    for done, (_, values) in enumerate(stream_activations(probe, list(whole.values()), files, []), 1):
        found = {name: max(found[name], float(values[result])) for name, result in whole.items()}
        progress(done, len(files))
    return found


def worst_sqnr_db(reference: ModelProto, half: ModelProto, rows: NDArray[Any]) -> float:
    """The SQNR in dB of that output of `half` which is the farthest from the FP32 graph's; NaN where it is not finite.

    rows: of the input, run one by one. `half` is FP16 or BF16 with FP32 parts.
    """
    outputs = [output.name for output in reference.graph.output]
    wanted, given = _answers(reference, outputs, rows), _answers(storing_halves(half), outputs, rows)
    signal, noise = np.zeros(len(outputs)), np.zeros(len(outputs))
    for wanted_row, given_row in zip(wanted, given, strict=True):
        signal += [np.square(w, dtype=np.float64).sum() for w in wanted_row]
        noise += [np.square(g.astype(np.float64) - w).sum() for w, g in zip(wanted_row, given_row, strict=True)]
    if not np.isfinite(noise).all():
        return float("nan")
    return min(decibels(n / s) if s else decibels(n) for n, s in zip(noise, signal, strict=True))


def storing_halves(model: ModelProto) -> ModelProto:
    """A copy that stores what each node makes in 16 bits, by two Identities behind it, or for BF16 by two Casts.

    ONNX Runtime's CPU provider computes FP16 nodes in FP32 between Casts, and drops a Cast to FP16 in front of one back to
    FP32: so without these nothing would overflow or round, and a graph that overflows on a GPU would seem right. Two,
    since a single FP16 node among FP32 ones is moved to FP32 as well. BF16 nodes it does not compute at all: they become FP32,
    and what they make is cast to BF16 and back.
    """
    copy = copy_of(model)
    types = tensor_types(model)
    if TensorProto.BFLOAT16 in types.values():
        _widen(copy)
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        stores = []
        for index, name in enumerate(node.output):
            if types.get(name) in HALVES:
                node.output[index] = f"{name}.made"
                brain = types[name] == TensorProto.BFLOAT16
                for made, stored, kind in (("made", f"{name}.stored", types[name]), ("stored", name, TensorProto.FLOAT)):
                    operator, to = ("Cast", {"to": kind}) if brain else ("Identity", {})
                    stores.append(helper.make_node(operator, [f"{name}.{made}"], [stored], **to))
        copy.graph.node.extend([node, *stores])
    return copy


def _widen(model: ModelProto) -> None:
    """Let what is in BF16 compute in FP32, in place; constants keep the values that they were rounded to."""
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for entry in node.attribute:
            tensors.append(entry.t)
            if entry.name in ("to", "dtype", "output_dtype") and entry.i == TensorProto.BFLOAT16:
                entry.i = TensorProto.FLOAT
    for tensor in tensors:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _answers(model: ModelProto, outputs: Sequence[str], rows: NDArray[Any]) -> list[list[NDArray[Any]]]:
    session = open_session(model, outputs, optimize=False)  # which would drop the Identities
    feed = session.get_inputs()[0].name
    return [session.run(list(outputs), {feed: row[None]}) for row in rows]
