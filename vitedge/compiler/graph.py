"""Small pure helpers on `onnx.ModelProto`: look things up, put things in, drop what nothing needs.

Every graph pass of the compiler is written with these; none of them knows what a Vision Transformer is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper, shape_inference

from vitedge.errors import ModelError, first_line
from vitedge.specs import ModelCard, Recipe, from_dict, to_dict
from vitedge.workspace import write_file

Array = NDArray[Any]
SHAPE_SIZE = 1024  # constants of at most so many numbers may be shapes, which ONNX's inference reads
PROTOBUF_LIMIT = 2**31 - 1  # bytes; a protobuf message cannot be longer


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with constant weights: what gets quantized.

    name: the torch module it came from, e.g. "blocks.0.attn.qkv". input, weight: tensor names.
    axis: the axis of the weight that runs over output channels.
    """

    name: str
    node: NodeProto
    input: str
    weight: str
    axis: int


def load(path: Path) -> ModelProto:
    """Read an ONNX file; a damaged one, or one with NaN or infinite weights, is a ModelError."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except Exception as error:  # protobuf, the checker and external data each raise their own types
        raise ModelError(f"{path} is not a readable ONNX model: {first_line(error)}", hint="export it again") from error
    check_finite(model, str(path))
    return model


def save(model: ModelProto, path: Path) -> None:
    """Write an ONNX file whole or not at all."""
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ModelError(f"the model takes {model.ByteSize() / 2**30:.1f} GiB, but an ONNX file holds 2 GiB at most")
    write_file(path, model.SerializeToString())


def copy_of(model: ModelProto) -> ModelProto:
    """Another model of the same content."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def check_finite(model: ModelProto, where: str) -> None:
    """Raise a ModelError that names the first weight tensor with a NaN or an infinity in it."""
    for name, array in constants(model).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise ModelError(
                f"{where}: the weight {name!r} holds {bad} NaN or infinite values of {array.size}",
                hint="the checkpoint is damaged or its training diverged; use an earlier one",
            )


def constants(model: ModelProto) -> dict[str, Array]:
    """All initializers, by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def consumers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each tensor."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def infer(model: ModelProto, *, strict: bool = False, one_image: bool = False) -> dict[str, ValueInfoProto]:
    """The type of every tensor, and its shape as far as ONNX infers it without a look at large constants.

    strict: types must agree everywhere. one_image: shapes are those at batch 1. A ModelError where ONNX cannot infer.
    """
    graph = model.graph
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > SHAPE_SIZE]
    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= SHAPE_SIZE]
    known = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in (*large, *small)]
    inputs = [*(_at_batch_1(entry) if one_image else entry for entry in graph.input), *known[: len(large)]]
    outputs = [helper.make_empty_tensor_value_info(entry.name) for entry in graph.output] if one_image else graph.output
    bare = helper.make_graph(graph.node, "bare", inputs, outputs, small)  # without the weights, which would be copied
    try:
        copy = helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)
        inferred = shape_inference.infer_shapes(copy, check_type=strict, strict_mode=strict, data_prop=True).graph
    except Exception as error:  # its exceptions have no common type
        what = f"ONNX cannot infer the types and shapes of this graph: {first_line(error)}"
        raise ModelError(what, hint="export it again") from error
    return {entry.name: entry for entry in (*inferred.input, *inferred.value_info, *inferred.output, *known)}


def _at_batch_1(entry: ValueInfoProto) -> ValueInfoProto:
    result = ValueInfoProto()
    result.CopyFrom(entry)
    result.type.tensor_type.shape.dim[0].dim_value = 1
    return result


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default` where it has none."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def put_constant(model: ModelProto, name: str, array: Array) -> str:
    """Add an initializer, or replace the one of that name; returns the name."""
    tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)  # ascontiguousarray would make vectors of scalars
    for existing in model.graph.initializer:
        if existing.name == name:
            existing.CopyFrom(tensor)
            return name
    model.graph.initializer.append(tensor)
    return name


def put_nodes(model: ModelProto, nodes: Iterable[NodeProto], *, before: NodeProto) -> None:
    """Insert `nodes` in front of `before`, which keeps the graph in topological order."""
    position = next(i for i, node in enumerate(model.graph.node) if node is before)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def rewire(model: ModelProto, old: str, new: str, readers: Iterable[NodeProto] | None = None) -> None:
    """Let `readers` (default: all, and the graph's outputs) read the tensor `new` where they read `old`."""
    for node in model.graph.node if readers is None else readers:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
    outputs = {output.name for output in model.graph.output}
    if readers is None and old in outputs:  # a graph's output keeps its name, so another tensor takes that name over
        makers = producers(model)
        if old in makers:
            makers[old].output[list(makers[old].output).index(old)] = f"{old}.replaced"
        if new in outputs:
            model.graph.node.append(helper.make_node("Identity", [new], [old], name=f"{old}/Identity"))
        else:
            rename_tensor(model, new, old, makers[new])


def rename_tensor(model: ModelProto, old: str, new: str, maker: NodeProto) -> None:
    """Give the tensor `old`, made by `maker`, the name `new` everywhere."""
    maker.output[list(maker.output).index(old)] = new
    rewire(model, old, new, model.graph.node)


def prune(model: ModelProto) -> None:
    """Drop nodes that lead to no output, initializers that nobody reads, and stale shape annotations."""
    wanted = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    del model.graph.value_info[:]


def rename_constant(model: ModelProto, old: str, new: str) -> None:
    """Give the initializer `old`, if there is one, the name `new` everywhere."""
    for tensor in model.graph.initializer:
        if tensor.name == old:
            tensor.name = new
            rewire(model, old, new)


def linears(model: ModelProto) -> list[Linear]:
    """Every MatMul and Gemm with a constant two-dimensional weight, in execution order."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    found = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and _is_plain(node):
            axis = 0 if attribute(node, "transB", 0) else 1
            found.append(Linear(node.name, node, node.input[0], node.input[1], axis))
    return found


def _is_plain(node: NodeProto) -> bool:
    """Whether a MatMul or Gemm multiplies its first input as it is, and by nothing but the weight."""
    return not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1


def constant(model: ModelProto, name: str) -> Array | None:
    """The initializer called `name`, or None."""
    return next((numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name), None)


def linear_weight(model: ModelProto, linear: Linear) -> Array:
    """The weight that a Linear reads now, as float32[inputs, outputs], whichever way it is stored."""
    weight = constant(model, linear.node.input[1])
    assert weight is not None  # or it would not have been found as a Linear
    return weight if linear.axis == 1 else weight.T


def linear_bias(model: ModelProto, linear: Linear) -> Array | None:
    """The bias float32[outputs] of a Linear, in its Gemm or in the Add behind its MatMul; None where it has none."""
    slot = bias_slot(model, linear)
    return None if slot is None else constant(model, slot[0].input[slot[1]])


def linear_output(model: ModelProto, linear: Linear) -> str:
    """The tensor that a Linear makes, its bias added."""
    slot = bias_slot(model, linear)
    return str((linear.node if slot is None else slot[0]).output[0])


def set_linear(model: ModelProto, linear: Linear, weight: Array | None = None, bias: Array | None = None) -> None:
    """Give a Linear another weight, float[inputs, outputs], or bias, float[outputs]; where it had none, an Add brings it.

    They get names of their own: an initializer may have several readers.
    """
    if weight is not None:
        stored = weight if linear.axis == 1 else weight.T
        linear.node.input[1] = put_constant(model, f"{linear.name}.weight.own", stored.astype(np.float32))
    if bias is not None:
        name = put_constant(model, f"{linear.name}.bias.own", bias.astype(np.float32))
        slot = bias_slot(model, linear)
        if slot is None:
            _add_bias(model, linear, name)
        else:
            slot[0].input[slot[1]] = name


def bias_slot(model: ModelProto, linear: Linear) -> tuple[NodeProto, int] | None:
    """The node, and which of its inputs, that holds the bias of a Linear."""
    vectors = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    if linear.node.op_type == "Gemm" and len(linear.node.input) > 2:
        whole = linear.node.input[2] in vectors and attribute(linear.node, "beta", 1.0) == 1
        return (linear.node, 2) if whole else None
    product = linear.node.output[0]
    readers = [node for node in model.graph.node if product in node.input]
    if len(readers) != 1 or readers[0].op_type != "Add" or product in {output.name for output in model.graph.output}:
        return None
    return next(((readers[0], index) for index, name in enumerate(readers[0].input) if name in vectors), None)


def _add_bias(model: ModelProto, linear: Linear, bias: str) -> None:
    """Put an Add of the constant `bias` behind a Linear; the sum takes the name over."""
    output = str(linear.node.output[0])
    linear.node.output[0] = f"{output}.product"
    add = helper.make_node("Add", [f"{output}.product", bias], [output], name=f"{linear.name}/bias")
    model.graph.node.insert(next(i for i, node in enumerate(model.graph.node) if node is linear.node) + 1, add)


def metadata(model: ModelProto) -> dict[str, str]:
    """The key-value pairs that travel with the model."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_metadata(model: ModelProto, *, card: ModelCard, variant: str, recipe: Recipe | None = None) -> None:
    """Write what vitedge must know later into the ONNX metadata."""
    entries = {"vitedge.card": json.dumps(to_dict(card)), "vitedge.variant": variant}
    if recipe is not None:
        entries["vitedge.recipe"] = json.dumps(to_dict(recipe))
    helper.set_model_props(model, entries)


def model_card(model: ModelProto) -> ModelCard:
    """The ModelCard in the metadata; a ModelError for an ONNX file that vitedge did not export."""
    text = metadata(model).get("vitedge.card")
    if text is None:
        raise ModelError("this ONNX file was not exported by vitedge", hint="start from the model: vitedge export MODEL")
    try:
        return from_dict(ModelCard, json.loads(text))
    except ValueError as error:
        raise ModelError(f"the card in this ONNX file is damaged: {error}", hint="export it again") from error
