"""A float or Q/DQ graph in, its Linears as steps from one named tensor to another out.

    x ─ Q ─ DQ ─┐
    W int8 ─ DQ ┴ MatMul ─ Add(bias) ─ y       one Layer "blocks.0.fc1": x -> y, whatever lies in between

Two graphs of one model can so be compared step by step, though one of them is quantized: a rewrite that changes what a
tensor means also changes its name. A Stretch is what leads to a layer's output from the nearest tensors that both graphs have.
Knows nothing of images or of what is made of the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from onnx import ModelProto, NodeProto, TensorProto, helper

from vitedge.compiler.activations import open_session
from vitedge.compiler.graph import Array, consumers, producers

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8", "tensor(uint8)": "uint8"}
Values = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A Linear with all that belongs to it.

    name: the torch module it came from. shape: of the weight. input, output: the tensors before its Q/DQ and after its bias.
    nodes: those in between.
    """

    name: str
    shape: tuple[int, ...]
    input: str
    output: str
    nodes: tuple[NodeProto, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a graph. layer: at its end. inputs: the tensors that it begins with. nodes: by the first tensor each makes.

    within: the names of the other Linears in it.
    """

    layer: Layer
    inputs: tuple[str, ...]
    nodes: dict[str, NodeProto]
    within: tuple[str, ...]


def find_layers(model: ModelProto) -> list[Layer]:
    """Every MatMul and Gemm with a constant two-dimensional weight, in floating point or dequantized, in execution order."""
    makers, readers = producers(model), consumers(model)
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    found = []
    for node in (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")):
        dequantize = _made_by("DequantizeLinear", node.input[1], makers)
        shape = constants.get((dequantize or node).input[0 if dequantize else 1], ())
        if len(shape) == 2:
            before = _activation(node.input[0], makers)
            bias = _bias(node.output[0], readers, constants) if node.output[0] not in outputs else []
            nodes = (*before, *([dequantize] if dequantize else []), node, *bias)
            found.append(Layer(node.name, shape, nodes[0].input[0] if before else node.input[0], nodes[-1].output[0], nodes))
    return found


def landmarks(model: ModelProto) -> set[str]:
    """The tensors that two graphs of one model may be compared at: around the Linears, and the residual stream."""
    norms = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    return norms.union(*((layer.input, layer.output) for layer in find_layers(model))) & producers(model).keys()


def find_stretches(model: ModelProto, layers: Sequence[Layer], known: Collection[str]) -> list[Stretch]:
    """What leads to each of `layers` from the tensors `known`, or from the graph's input where there are none."""
    makers, entry = producers(model), model.graph.input[0].name
    everything = find_layers(model)
    found = []
    for layer in layers:
        inputs, nodes, open_ends = dict[str, None](), dict[str, NodeProto](), [layer.output]
        while open_ends:
            tensor = open_ends.pop()
            if tensor == entry or (tensor in known and tensor != layer.output):
                inputs[tensor] = None
            elif tensor in makers and makers[tensor].output[0] not in nodes:
                nodes[makers[tensor].output[0]] = makers[tensor]
                open_ends += makers[tensor].input
        within = (other.name for other in everything if other.output in nodes and other.name != layer.name)
        found.append(Stretch(layer, tuple(inputs), nodes, tuple(within)))
    return found


def open_stretches(
    model: ModelProto, stretches: Sequence[Stretch], known: Collection[str]
) -> Callable[[Values], dict[str, Array]]:
    """What runs each stretch by itself: all inputs, by tensor name, in, and the output of each layer, by tensor name, out."""
    outputs = [stretch.layer.output for stretch in stretches]
    session = open_session(_isolated(model, stretches, known), [_alone(output) for output in outputs], optimize=False)
    types = {entry.name: DTYPES[entry.type] for entry in session.get_inputs()}

    def run(inputs: Values) -> dict[str, Array]:
        answers = session.run(None, {name: inputs[name].astype(dtype, copy=False) for name, dtype in types.items()})
        return dict(zip(outputs, answers, strict=True))

    return run


def _made_by(operator: str, tensor: str, makers: Mapping[str, NodeProto]) -> NodeProto | None:
    maker = makers.get(tensor)
    return maker if maker is not None and maker.op_type == operator else None


def _activation(tensor: str, makers: Mapping[str, NodeProto]) -> list[NodeProto]:
    """The Q/DQ pair that `tensor` comes out of, if it does; the engine's own int8 input has no Q."""
    dequantize = _made_by("DequantizeLinear", tensor, makers)
    quantize = _made_by("QuantizeLinear", dequantize.input[0], makers) if dequantize else None
    return [quantize, dequantize] if dequantize and quantize else []


def _bias(product: str, readers: Mapping[str, list[NodeProto]], constants: Collection[str]) -> list[NodeProto]:
    """The Add of a constant that alone reads the tensor `product`, if there is one."""
    only = readers[product][0] if len(readers[product]) == 1 else None
    return [only] if only and only.op_type == "Add" and any(name in constants for name in only.input) else []


def _isolated(model: ModelProto, stretches: Sequence[Stretch], known: Collection[str]) -> ModelProto:
    """A model of `stretches` alone, unconnected: one may begin with what another makes, so what is made gets another name."""
    kept = {name for stretch in stretches for name in stretch.nodes}
    nodes = [_copy(node) for node in model.graph.node if node.output[0] in kept]
    for node in nodes:
        for index, name in enumerate(node.output):
            if name in known:
                node.output[index] = _alone(name)
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    names = dict.fromkeys(name for stretch in stretches for name in stretch.inputs)
    entries = {entry.name: entry for entry in model.graph.input}
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in constants)
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    inputs = [entries.get(name) or helper.make_tensor_value_info(name, dtype, None) for name in names]
    outputs = [helper.make_empty_tensor_value_info(_alone(stretch.layer.output)) for stretch in stretches]
    graph = helper.make_graph(nodes, "stretches", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _alone(tensor: str) -> str:
    return f"{tensor}.alone"
