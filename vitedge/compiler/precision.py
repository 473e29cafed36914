"""A float or INT8 Q/DQ model in, the same graph computing in FP16 or BF16 out.

    patches i8 -> DQ -> Linear(f32) -> LayerNormalization -> ... -> logits f32
    patches i8 -> DQ -> Linear(f16) -> LayerNormalization -> ... -> Cast -> logits f32

Q/DQ scales become the data's type, as strongly typed backends ask for; LayerNormalization still adds up in FP32 (its
stash_type). BF16 has FP32's range. FP16 ends at 65504: a node that comes near it on real images stays in FP32, between
Casts, and is named. Then the answers are compared. Knows nothing of devices: which type is fast, the backend says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, version_converter

from vitedge.compiler.activations import read_inputs
from vitedge.compiler.graph import Array, attribute, constants, copy_of, load, metadata, put_constant
from vitedge.compiler.ranges import largest_values, tensor_types, worst_sqnr_db
from vitedge.compiler.work import save_counted
from vitedge.errors import ModelError, first_line
from vitedge.images import ImageFile
from vitedge.specs import FloatType

LARGEST = float(np.finfo(np.float16).max)  # 65504
NORMAL = float(np.finfo(np.float16).tiny)  # 2**-14: below it, numbers lose bits
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)  # 2**-24
BF16_LARGEST, BF16_SMALLEST = (2 - 2.0**-7) * 2.0**127, 2.0**-133
INFINITE = 1e9  # no weight is as large: such a constant masks or bounds something, which the largest FP16 does as well
RANGE_IMAGES = 32
# How far from its end FP16 is still used: images that were not measured give larger numbers. On a trained ViT-S/14, 32 others
# reached 1.14 times what 32 had shown, in the worst tensor; other data may surprise more. It is cheap: that model's largest
# number is 312, so what lies between 16376 and 65504 is as suspect as what lies above.
HEADROOM = 4.0
CHECKED_IMAGES = 3
# What the 16-bit form must keep, in dB against the graph that it is made of. That ViT-S keeps 64 in FP16. INT8 keeps 47: a
# number that FP16 rounds may take the next INT8 step, which is coarser the worse the INT8 graph is. Overflows leave about 0.
FLOOR_DB, INT8_FLOOR_DB = 20.0, 10.0
OPSET = 20  # the least: FP16 scales of Q/DQ
BF16_OPSET = 22  # from which Conv and pooling take BF16
QDQ = ("QuantizeLinear", "DequantizeLinear")
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def convert(
    graph: Path,
    float_type: FloatType,
    path: Path,
    files: Sequence[ImageFile],
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, str]:
    """Write the form of an FP32 graph that computes in `float_type` to `path`; the nodes that stay in FP32, and why.

    files: the real images on which FP16's range is measured, and answers are compared; BF16 needs none, and is not compared
    without. Answers that are not finite or far from the FP32 graph's are a ModelError, and nothing is written.
    """
    reference = load(graph)
    entries = metadata(reference)
    present = entries.get("vitedge.float_type", "fp32")
    if present != "fp32" or float_type not in HALF:
        hint = "give the graph that it was made from" if present != "fp32" else f"convert to {' or '.join(HALF)}"
        raise ModelError(f"{graph} computes in {present} and cannot be converted to {float_type}", hint=hint)
    model = copy_of(reference)
    prepare(model, float_type)
    largest = largest_values(model, _made(model), files, progress) if float_type == "fp16" else {}
    kept = to_half(model, float_type, largest)
    if float_type == "fp16" or files:
        _check(reference, model, float_type, files, graph)
    helper.set_model_props(model, {**entries, "vitedge.float_type": float_type})
    save_counted(model, path)
    return kept


def to_half(model: ModelProto, float_type: FloatType = "fp16", largest: Mapping[str, float] | None = None) -> dict[str, str]:
    """Let `model` compute in FP16 or BF16, in place; its inputs and outputs keep their types.

    largest: |x| by tensor, where it was measured. Returns the names of the nodes that stay in FP32 with the reason: those
    that FP16 cannot hold, and those of an operator that the type is not defined for; not their Q/DQ, which follow them.
    """
    prepare(model, float_type)
    kept = _kept(model, float_type, largest or {})
    nodes = [(model.graph.node[index], reason) for index, reason in kept.items()]
    reasons = {node.name or node.output[0]: reason for node, reason in nodes if node.op_type not in QDQ}
    if float_type == "fp16":
        _round_tiny_scales(model, kept)
    _Retyping(model, float_type, kept).apply()
    del model.graph.value_info[:]  # they tell the old types
    return reasons


def prepare(model: ModelProto, float_type: FloatType) -> None:
    """Bring the graph into the form and the opset that its types can be changed in; a second call changes nothing."""
    for node in model.graph.node:
        if any(entry.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for entry in node.attribute):
            raise ModelError(
                f"the node {node.name or node.output[0]!r} ({node.op_type}) holds a graph of its own",
                hint='it cannot be converted; set float_type = "fp32" in the recipe',
            )
    _lift_constants(model)
    del model.graph.value_info[:]
    opset, types = _opset(model), tensor_types(model)
    if float_type == "bf16" and any(_lacks(node, opset, types, float_type) for node in model.graph.node):
        _raise_opset(model, max(opset, BF16_OPSET))
    _raise_opset(model, max(opset, OPSET))


def _opset(model: ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _raise_opset(model: ModelProto, version: int) -> None:
    """Bring the graph to an opset, in place, where it is at a lower one."""
    if _opset(model) < version:
        try:
            model.CopyFrom(version_converter.convert_version(model, version))
        except Exception as error:  # the converter, in C++, raises RuntimeError and types of its own
            raise ModelError(f"this graph is of opset {_opset(model)}: {first_line(error)}", hint="export it again") from error


def _lift_constants(model: ModelProto) -> None:
    """Turn Constant nodes of floats into initializers, so that constants have one form."""
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        value = helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name in ("value", "value_float", "value_floats"):
            array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value, np.float32)
            put_constant(model, node.output[0], array)
            model.graph.node.remove(node)


def _made(model: ModelProto) -> list[str]:
    """The FP32 tensors that nodes make."""
    types = tensor_types(model)
    return [name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT]


def _check(reference: ModelProto, model: ModelProto, float_type: FloatType, files: Sequence[ImageFile], graph: Path) -> None:
    """Raise a ModelError where the answers of the 16-bit form `model` on some of the images are not those of `reference`."""
    quantized = any(node.op_type == "QuantizeLinear" for node in reference.graph.node)
    floor = INT8_FLOOR_DB if quantized else FLOOR_DB
    quality = worst_sqnr_db(reference, model, read_inputs(reference, files, CHECKED_IMAGES))
    if not quality >= floor:  # NaN is not
        found = "are NaN or infinite" if np.isnan(quality) else f"keep {quality:.1f} dB, less than {floor:g} dB"
        others = '"bf16" or "fp32"' if float_type == "fp16" else '"fp32"'
        raise ModelError(
            f"the answers of {graph} in {float_type.upper()} {found}",
            hint=f"compute it in another type: float_type = {others} in the recipe",
        )


# Which nodes stay in FP32


def _kept(model: ModelProto, float_type: FloatType, largest: Mapping[str, float]) -> dict[int, str]:
    """The indices of the nodes that 16 bits cannot hold, and why: a float is too large, or their operator does not know it.

    Both the node that makes a number and those that read it are among them, so nothing too large is ever cast to FP16.
    """
    opset, types = _opset(model), tensor_types(model)
    large = _too_large(model, largest) if float_type == "fp16" else set()
    kept = {}
    for index, node in enumerate(model.graph.node):
        if large.intersection((*node.input, *node.output, _inner(node))):
            kept[index] = f"too large for {float_type}"
        elif _lacks(node, opset, types, float_type):
            kept[index] = f"{float_type} is not defined for {node.op_type}"
    return kept


def _too_large(model: ModelProto, largest: Mapping[str, float]) -> set[str]:
    """The tensors that FP16 cannot hold: measured ones, those within a node, and constants, which need no headroom."""
    known = {name: _reach(array) for name, array in constants(model).items() if array.dtype == np.float32}
    squares = {_inner(node): largest.get(node.output[0], 0.0) ** 2 for node in model.graph.node if node.op_type == "ReduceL2"}
    large = {name for name, value in (*largest.items(), *squares.items()) if value * HEADROOM > LARGEST}
    return large | {name for name, value in known.items() if value > LARGEST}


def _inner(node: NodeProto) -> str:
    """A name for the sum of squares in a ReduceL2, which TensorRT's parser makes of a product, a sum and a root."""
    return f"{node.output[0]} squared"


def _reach(array: Array) -> float:
    """The largest magnitude of a constant, but for what merely stands for infinity."""
    magnitudes = np.abs(array)
    return float(np.max(magnitudes, where=magnitudes < INFINITE, initial=0))


def _lacks(node: NodeProto, opset: int, types: Mapping[str, int], float_type: FloatType) -> bool:
    """Whether ONNX does not define an operator for a 16-bit type in place of FP32.

    Statistics that a LayerNormalization puts out beside its result are FP32 whatever its data is, so that one stays, too.
    """
    if node.op_type == "LayerNormalization" and len(list(filter(None, node.output))) > 1:
        return True
    wanted = "tensor(float16)" if float_type == "fp16" else "tensor(bfloat16)"
    for name, allowed in _parameters(node, opset):
        if types.get(name) == TensorProto.FLOAT and "tensor(float)" in allowed and len(allowed) > 1 and wanted not in allowed:
            return True
    return False


def _parameters(node: NodeProto, opset: int) -> Iterator[tuple[str, Collection[str]]]:
    """Each input and output of a node with the types that ONNX allows there; () where the operator is not ONNX's."""
    if node.domain not in ("", "ai.onnx"):
        yield from ((name, ()) for name in (*node.input, *node.output))
        return
    schema = defs.get_schema(node.op_type, opset, "")
    allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            kind = formal[min(index, len(formal) - 1)].type_str  # the last one stands for all that follow
            yield name, allowed.get(kind, (kind,))


# How the others change


class _Retyping:
    """One conversion: each float tensor has a home type, that of the node which makes it, and is cast for others at most once.

    A DequantizeLinear follows its readers, and a QuantizeLinear what it reads: they turn into either type by themselves.
    """

    def __init__(self, model: ModelProto, float_type: FloatType, kept: Collection[int]) -> None:
        self.graph, self.type, self.opset = model.graph, float_type, _opset(model)
        self.floats = {name for name, kind in tensor_types(model).items() if kind == TensorProto.FLOAT}
        self.constants = {tensor.name for tensor in model.graph.initializer} & self.floats
        self.outputs = {output.name for output in model.graph.output} & self.floats
        self.wide = _with_neighbours(model, kept)
        nodes = list(enumerate(model.graph.node))
        self.wide_tensors = {entry.name for entry in model.graph.input}
        self.wide_tensors |= {name for index, node in nodes if index in self.wide for name in node.output}
        self.uses = {(name, True) for name in self.outputs}
        self.uses |= {(name, wide) for index, node in nodes for _, name, wide in self.reads(index, node)}
        for _, node in nodes:  # a DequantizeLinear that is there in both types has a scale in both
            if node.op_type == "DequantizeLinear":
                self.uses |= {(node.input[1], wide) for wide in (True, False) if (node.output[0], wide) in self.uses}

    def apply(self) -> None:
        """Change the graph."""
        nodes = [cast for entry in self.graph.input for cast in self.other_forms(entry.name, None)]
        for index, node in enumerate(self.graph.node):
            nodes.append(self.retyped(index, node))
            nodes += [form for name in node.output for form in self.other_forms(name, node)]
        tensors = [form for tensor in self.graph.initializer for form in self.constant_forms(tensor)]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(tensors)

    def reads(self, index: int, node: NodeProto) -> Iterator[tuple[int, str, bool]]:
        """The float inputs of a node: which one, the tensor, and whether in FP32, as ONNX always wants the factors of Resize."""
        for position, (name, allowed) in zip(range(len(node.input)), _parameters(node, self.opset), strict=False):
            if name in self.floats:
                yield position, name, index in self.wide or tuple(allowed) == ("tensor(float)",)

    def name_of(self, name: str, wide: bool) -> str:
        """What a tensor is called in FP32 or in 16 bits. The graph's outputs keep their names for FP32, all others at home."""
        at_home_wide = (name, False) not in self.uses if name in self.constants else name in self.wide_tensors
        bare = at_home_wide or name in self.outputs
        return name if wide == bare else f"{name}.{'fp32' if wide else self.type}"

    def retyped(self, index: int, node: NodeProto) -> NodeProto:
        """A node in its own type, reading every float in the type that it wants."""
        copy, wide = NodeProto(), index in self.wide
        copy.CopyFrom(node)
        for position, name, read_wide in self.reads(index, node):
            copy.input[position] = self.name_of(name, read_wide)
        for position, name in enumerate(node.output):
            copy.output[position] = self.name_of(name, wide) if name in self.floats else name
        if not wide:
            _halve_attributes(copy, self.type)
        return copy

    def other_forms(self, name: str, maker: NodeProto | None) -> Iterator[NodeProto]:
        """The node that makes a tensor in the type which is not its home, if anything reads it so."""
        home = name in self.wide_tensors
        if name not in self.floats or (name, not home) not in self.uses:
            return
        here, there = self.name_of(name, home), self.name_of(name, not home)
        if maker is not None and maker.op_type == "DequantizeLinear":
            scale = self.name_of(maker.input[1], not home)
            node = helper.make_node(
                maker.op_type, [maker.input[0], scale, *maker.input[2:]], [there], name=f"{there}/DequantizeLinear"
            )
            node.attribute.extend(maker.attribute)
            yield node
        else:
            kind = HALF[self.type] if home else TensorProto.FLOAT
            yield helper.make_node("Cast", [here], [there], name=f"{there}/Cast", to=kind)

    def constant_forms(self, tensor: TensorProto) -> Iterator[TensorProto]:
        """A constant in each of the types that it is read in."""
        forms = [wide for wide in (True, False) if (tensor.name, wide) in self.uses]
        if tensor.name not in self.constants or not forms:
            yield tensor
            return
        array = numpy_helper.to_array(tensor)
        for wide in forms:
            name = self.name_of(tensor.name, wide)
            yield numpy_helper.from_array(array, name) if wide else _half(array, self.type, name)


def _with_neighbours(model: ModelProto, kept: Collection[int]) -> set[int]:
    """The nodes of `kept`, each QuantizeLinear of an FP32 tensor, and each DequantizeLinear that only FP32 nodes read."""
    nodes, wide = list(enumerate(model.graph.node)), set(kept)
    tensors = {entry.name for entry in model.graph.input}
    readers: dict[str, set[int]] = {}
    for index, node in nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            wide.add(index)
        tensors |= set(node.output) if index in wide else set()
        for name in node.input:
            readers.setdefault(name, set()).add(index)
    return wide | {i for i, node in nodes if node.op_type == "DequantizeLinear" and readers.get(node.output[0], set()) <= wide}


def _round_tiny_scales(model: ModelProto, kept: Collection[int]) -> None:
    """Round scales below FP16's normal numbers up to one that FP16 has, and weights again in steps of that.

    A dead channel's scale would become zero, which TensorRT refuses. No such step is coarser than one of FP16 data. What
    only FP32 nodes read stays.
    """
    known, wide = constants(model), _with_neighbours(model, kept)
    for index, node in enumerate(model.graph.node):
        scale = known.get(node.input[1]) if node.op_type in QDQ else None
        if scale is not None and index not in wide and (scale < NORMAL).any():
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


def _halve_attributes(node: NodeProto, float_type: FloatType) -> None:
    """Convert FP32 where an attribute names a type or holds a tensor. stash_type is what LayerNormalization adds up in."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float32))))
    for entry in node.attribute:
        if entry.name in ("to", "dtype", "output_dtype") and entry.i == TensorProto.FLOAT:
            entry.i = HALF[float_type]
        if entry.t.data_type == TensorProto.FLOAT:
            entry.t.CopyFrom(_half(numpy_helper.to_array(entry.t), float_type, entry.t.name))


def _half(array: Array, float_type: FloatType, name: str) -> TensorProto:
    """A constant in 16 bits. What stands for infinity becomes the largest number, and nothing becomes zero that was not."""
    kind = np.dtype(np.float16 if float_type == "fp16" else ml_dtypes.bfloat16)
    largest, smallest = (LARGEST, SMALLEST) if float_type == "fp16" else (BF16_LARGEST, BF16_SMALLEST)
    rounded = np.clip(array, -largest, largest).astype(kind)
    lost = (rounded == 0) & (array != 0)  # something may be divided by it
    bits = np.where(lost, np.copysign(smallest, array).astype(kind), rounded)
    return helper.make_tensor(name, HALF[float_type], array.shape, bits.tobytes(), raw=True)
