"""A float or INT8 Q/DQ model in, the same graph computing in FP16 out.

    patches i8 -> DQ -> Linear(f32) -> LayerNormalization -> ... -> logits f32
    patches i8 -> DQ -> Linear(f16) -> LayerNormalization -> ... -> Cast -> logits f32

In ONNX the types of the constants, Casts and inputs decide all others, so those alone are changed and no type is inferred.
Q/DQ scales become FP16 too, as strongly typed backends ask for; LayerNormalization still adds up in FP32 (its stash_type).
A graph whose numbers FP16 cannot hold is refused rather than clipped; what only activations exceed, a measurement shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vitedge.compiler.graph import (
    Array,
    attribute,
    constants,
    load,
    metadata,
    producers,
    put_constant,
    put_nodes,
    rename_tensor,
    rewire,
)
from vitedge.compiler.work import save_counted
from vitedge.errors import ModelError
from vitedge.images import ImageFile
from vitedge.specs import FloatType

LARGEST = float(np.finfo(np.float16).max)  # 65504
NORMAL = float(np.finfo(np.float16).tiny)  # 2**-14: below it, numbers lose bits
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)  # 2**-24
INFINITE = 1e9  # no weight is as large: such a number masks or bounds something, which the largest FP16 does as well


RANGE_IMAGES = 32


def convert(
    graph: Path,
    float_type: FloatType,
    path: Path,
    files: Sequence[ImageFile],
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[str]:
    """Write the form of an FP32 graph that computes in `float_type` to `path`; returns the nodes that stay in FP32."""
    model = load(graph)
    to_half(model)
    helper.set_model_props(model, {**metadata(model), "vitedge.float_type": float_type})
    save_counted(model, path)
    return []


def to_half(model: ModelProto) -> None:
    """Let `model` compute in FP16, in place; its inputs and outputs keep their types.

    A constant that is out of FP16's range, and does not merely stand for infinity, is a ModelError that names it.
    """
    _lift_constants(model)
    _round_tiny_scales(model)
    _halve_initializers(model)
    for node in model.graph.node:
        _halve_attributes(node)
    _cast_inputs(model)
    _cast_outputs(model)
    del model.graph.value_info[:]  # they tell the old types


def _lift_constants(model: ModelProto) -> None:
    """Turn Constant nodes of floats into initializers, so that constants have one form."""
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        value = helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name in ("value", "value_float", "value_floats"):
            array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value, np.float32)
            put_constant(model, node.output[0], array)
            model.graph.node.remove(node)


def _round_tiny_scales(model: ModelProto) -> None:
    """Round scales below FP16's normal numbers up to one that FP16 has, and weights again in steps of that.

    A dead channel's scale would become zero, which TensorRT refuses. No such step is coarser than one of FP16 data.
    """
    known = constants(model)
    for node in model.graph.node:
        scale = known.get(node.input[1]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is not None and (scale < NORMAL).any():
            rounded = np.where(scale < NORMAL, np.ceil(scale / SMALLEST) * SMALLEST, scale).astype(np.float32)
            put_constant(model, node.input[1], rounded)
            weight = known.get(node.input[0])
            if weight is not None:
                steps = weight.astype(np.float32) * _spread(scale / rounded, node, weight.shape)
                put_constant(model, node.input[0], np.rint(steps).astype(weight.dtype))


def _spread(scales: Array, node: NodeProto, shape: tuple[int, ...]) -> Array:
    """The scales of a DequantizeLinear, per tensor, channel or block, so that they broadcast to the weight's shape."""
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if block:
        return np.repeat(scales, block, axis).take(range(shape[axis]), axis)
    return scales.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if scales.ndim else scales


def _halve_initializers(model: ModelProto) -> None:
    """Convert all FP32 initializers but the factors of Resize, which ONNX wants in FP32 beside data of any type."""
    factors = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[2:3]}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in factors:
            _halve(tensor, tensor.name)


def _halve_attributes(node: NodeProto) -> None:
    """Convert FP32 where an attribute names a type or holds a tensor. stash_type is what LayerNormalization adds up in."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float32))))
    for entry in node.attribute:
        if entry.name in ("to", "dtype", "output_dtype") and entry.i == TensorProto.FLOAT:
            entry.i = TensorProto.FLOAT16
        if entry.t.data_type == TensorProto.FLOAT:
            _halve(entry.t, node.output[0])


def _halve(tensor: TensorProto, name: str) -> None:
    tensor.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(tensor), name), tensor.name))


def _half(array: Array, name: str) -> Array:
    """The FP16 form of `array`, in which no number becomes zero that was not: something may be divided by it."""
    magnitudes = np.abs(array)
    weights = magnitudes[magnitudes < INFINITE]
    if weights.size and weights.max() > LARGEST:
        raise ModelError(
            f"the constant {name!r} reaches {weights.max():.3g}, but FP16 ends at {LARGEST:.0f}",
            hint='compute this model in another type: float_type = "fp32" or "bf16"',
        )
    rounded = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
    lost = (rounded == 0) & (array != 0)
    return np.where(lost, np.copysign(np.float16(SMALLEST), rounded), rounded)


def _cast_inputs(model: ModelProto) -> None:
    """Put a Cast behind every float input; those of vitedge's own graphs are integers."""
    for entry in model.graph.input:
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT:
            inner = f"{entry.name}.half"
            rewire(model, entry.name, inner, model.graph.node)
            cast = helper.make_node("Cast", [entry.name], [inner], name=f"{entry.name}/Cast", to=TensorProto.FLOAT16)
            put_nodes(model, [cast], before=model.graph.node[0])


def _cast_outputs(model: ModelProto) -> None:
    """Put a Cast in front of every float output, which keeps its name and type."""
    makers = producers(model)
    for entry in model.graph.output:
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT:
            inner = f"{entry.name}.half"
            rename_tensor(model, entry.name, inner, makers[entry.name])
            cast = helper.make_node("Cast", [inner], [entry.name], name=f"{entry.name}/Cast", to=TensorProto.FLOAT)
            model.graph.node.append(cast)
