"""A float ONNX model and a ScaleTable in, explicit symmetric INT8 Q/DQ out.

    x -> Linear(W) -> y     ->     x -> Q -> DQ -> Linear(DQ(W int8)) -> y

Zero-point 0, one scale per activation, one per output channel of a weight: what OpenVINO and onnxruntime read
alike, and the only form that TensorRT documents for ViTs. One Q/DQ serves all readers of a tensor (Q, K and V). The
residual stream, LayerNorm, softmax and GELU inputs stay in floating point. The patch GEMM's input is int8 already and exact.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, helper

from vitedge.compiler import graph
from vitedge.compiler.graph import Array, Linear, constants, linears, producers, put_constant, put_nodes, rewire
from vitedge.errors import ModelError
from vitedge.specs import Recipe, ScaleTable
from vitedge.workspace import sha256

QMAX = 127  # symmetric: -128 is not used
TINY = float(np.finfo(np.float32).tiny)


def quantize(model_path: Path, table: ScaleTable, path: Path) -> int:
    """Write the INT8 form of the float model to `path`; returns how many Linears were quantized.

    A table that was calibrated on another model, or that lacks a tensor, is a ModelError.
    """
    if table.model_sha256 != sha256(model_path):
        raise ModelError(f"these scales were calibrated on another model than {model_path}", hint="calibrate again")
    model = graph.load(model_path)
    count = quantize_linears(model, table)
    graph.set_metadata(model, card=graph.model_card(model), variant=table.recipe.name, recipe=table.recipe)
    graph.save(model, path)
    return count


def leave_float(model_path: Path, recipe: Recipe, path: Path) -> None:
    """Write the float model under another recipe, which changes nothing but the float type that it asks for."""
    model = graph.load(model_path)
    graph.set_metadata(model, card=graph.model_card(model), variant=recipe.name, recipe=recipe)
    graph.save(model, path)


def quantized_activations(model: ModelProto, recipe: Recipe) -> list[str]:
    """The tensors that get a scale under `recipe`, in execution order."""
    integer = _integer_tensors(model)
    return list(dict.fromkeys(linear.input for linear in chosen_linears(model, recipe) if linear.input not in integer))


def chosen_linears(model: ModelProto, recipe: Recipe) -> list[Linear]:
    """The Linears that `recipe` quantizes; none at all, or a pattern in `skip` that fits none, is a ModelError."""
    found = linears(model)
    for pattern in recipe.skip:
        if not any(fnmatch(linear.name, pattern) for linear in found):
            raise ModelError(f"the recipe skips {pattern!r}, but no Linear has such a name", hint=_similar(pattern, found))
    chosen = [linear for linear in found if not any(fnmatch(linear.name, pattern) for pattern in recipe.skip)]
    if not chosen:
        what = f"the recipe skips every one of its {len(found)} Linears" if found else "it has no Linear"
        raise ModelError(
            f"there is nothing to quantize in the model: {what}", hint="is it a Vision Transformer, exported in FP32?"
        )
    return chosen


def _similar(pattern: str, found: Sequence[Linear]) -> str:
    """A hint: the names most like `pattern`, and the first and last of all."""
    names = [linear.name for linear in found]
    near = [name for name in names if name.endswith(pattern)] or difflib.get_close_matches(pattern, names, 3, 0.4)
    meant = f"did you mean {' or '.join(map(repr, near[:3]))}? " if near else ""
    return f"{meant}The {len(names)} names go from {names[0]} to {names[-1]}" if names else "the model has no Linear"


def quantize_linears(model: ModelProto, table: ScaleTable) -> int:
    """Put Q/DQ around the chosen Linears in place; returns their number."""
    chosen = chosen_linears(model, table.recipe)
    for tensor in quantized_activations(model, table.recipe):
        if tensor not in table.amax:
            raise ModelError(f"the scale table has no range for {tensor!r}", hint="calibrate again with this recipe")
        quantize_activation(model, tensor, table.amax[tensor], [x.node for x in chosen if x.input == tensor])
    weights = constants(model)
    for linear in chosen:
        _quantize_weight(model, linear, weights[linear.weight], table.recipe.per_channel)
    graph.prune(model)
    return len(chosen)


def weight_scales(weight: Array, axis: int, per_channel: bool) -> Array:
    """float32[channels] (or a scalar) such that the largest magnitude of each channel becomes 127."""
    amax = np.abs(weight).max(axis=1 - axis) if per_channel else np.abs(weight).max()
    scales: Array = np.maximum(amax / QMAX, TINY).astype(np.float32)
    return scales


def to_int8(weight: Array, scales: Array, axis: int) -> Array:
    """`weight` in steps of `scales`, rounded half to even as QuantizeLinear does, int8."""
    steps = np.expand_dims(scales, 1 - axis) if scales.ndim else scales
    integers: Array = np.clip(np.rint(weight / steps), -QMAX, QMAX).astype(np.int8)
    return integers


def quantize_activation(model: ModelProto, tensor: str, amax: float, readers: Iterable[NodeProto]) -> None:
    """Put one Q/DQ pair on `tensor` for `readers`, given in the order of the graph; everything else reads it as before."""
    readers = list(readers)
    scale = put_constant(model, f"{tensor}.int8.scale", np.float32(max(amax / QMAX, TINY)))  # "x.scale" may be a factor of x
    zero = put_constant(model, "int8.zero", np.int8(0))
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{tensor}.int8"], name=f"{tensor}/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", [f"{tensor}.int8", scale, zero], [f"{tensor}.dq"], name=f"{tensor}/DequantizeLinear"
        ),
    ]
    put_nodes(model, nodes, before=readers[0])
    rewire(model, tensor, f"{tensor}.dq", readers)


def _quantize_weight(model: ModelProto, linear: Linear, weight: Array, per_channel: bool) -> None:
    scales = weight_scales(weight, linear.axis, per_channel)
    integers = put_constant(model, f"{linear.name}.weight.int8", to_int8(weight, scales, linear.axis))
    scale = put_constant(model, f"{linear.name}.weight.scale", scales)
    zero = put_constant(model, f"{linear.name}.weight.zero", np.zeros(scales.shape, np.int8))
    output = f"{linear.name}.weight.dq"
    axis = {"axis": linear.axis} if scales.ndim else {}
    node = helper.make_node("DequantizeLinear", [integers, scale, zero], [output], name=f"{linear.name}/weight", **axis)
    put_nodes(model, [node], before=linear.node)
    linear.node.input[1] = output


def _integer_tensors(model: ModelProto) -> set[str]:
    """Tensors that come straight out of int8: the engine's own input."""
    return {name for name, node in producers(model).items() if node.op_type == "DequantizeLinear"}
