"""Scales and integers in, Q/DQ nodes in the graph out.

    x -> Linear(W) -> y     ->     x -> Q -> DQ -> Linear(DQ(W int8)) -> y

Zero-point 0 throughout: the only form that TensorRT takes, and one that OpenVINO and onnxruntime read alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from vitedge.compiler.graph import Array, Linear, put_constant, put_nodes, rewire, set_linear

QMAX = 127  # symmetric: -128 is not used
TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, slots=True)
class Rounded:
    """The weight of a Linear in integers, int8[inputs, outputs] of `bits` bits, its scales, and what its bias becomes."""

    integers: NDArray[np.int8]
    scales: Array
    bits: int
    bias: Array | None


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


def quantize_weight(model: ModelProto, linear: Linear, rounded: Rounded) -> None:
    """Let a Linear read its weight from a DequantizeLinear, and give it its bias."""
    set_linear(model, linear, bias=rounded.bias)
    name, scales = f"{linear.name}.weight", rounded.scales
    stored = rounded.integers if linear.axis == 1 else rounded.integers.T
    kind = np.dtype(np.int8) if rounded.bits == 8 else helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    inputs = [
        put_constant(model, f"{name}.int{rounded.bits}", stored.astype(kind)),
        put_constant(model, f"{name}.scale", scales),
        put_constant(model, f"{name}.zero", np.zeros(scales.shape, kind)),
    ]
    axis = {"axis": linear.axis} if scales.ndim else {}
    put_nodes(
        model,
        [helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{linear.name}/weight", **axis)],
        before=linear.node,
    )
    linear.node.input[1] = f"{name}.dq"
