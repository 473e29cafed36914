"""The two batched products of self-attention to INT8, in the form that TensorRT fuses into one kernel.

    Q -> Mul(scale) -> QDQ ─┐
                K^T -> QDQ ─┴ BMM1 -> Softmax -> QDQ(1/127) ─┐
                                                    V -> QDQ ┴ BMM2 -> Transpose -> Reshape -> QDQ -> proj

Symmetric INT8, one scale a tensor. A softmax lies in 0..1, so its scale is not calibrated. The whole scale is on the queries: a
factor on the scores would stand between BMM1 and the softmax, where the kernel has no place for it.

Each operand is quantized where its product reads it, the keys behind their Transpose. The result of BMM2 is quantized at the
other end, behind the Transpose and Reshape that join the heads: that tensor is the input of `proj`, so it has one name, one
range and one Q/DQ for both. With one scale a tensor, quantizing commutes with moving elements, so TensorRT's rule "after
BMM2" is kept, and the DQ stays right in front of the product of `proj`, where every backend looks for it. A `proj` that the
recipe leaves in floating point gets the pair on its input all the same.

Structure alone is looked at: nothing here knows a family of models. What does not fit is refused, not left out in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vitedge.compiler.activations import run_once
from vitedge.compiler.graph import attribute, consumers, producers, prune, put_constant, put_nodes, rewire
from vitedge.compiler.qdq import quantize_activation
from vitedge.errors import ModelError

HEAD_SIZES = (16, 32, 64)  # these and MAX_TOKENS: TensorRT's guide, "Multi-Head Attention Fusion", for INT8
MAX_TOKENS = 512
LOG_SIZES = ".log_sizes"  # how the name of what token merging adds to scores ends (see merging.py)
SOFTMAX_AMAX = 1.0
MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # move elements and change none
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Where", "Clip", "Tanh", *MOVING)  # what models put between BMM1 and the softmax
HINT = "use a recipe that leaves attention in floating point, such as int8"


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """softmax(query @ key) @ value of one torch module.

    name: the module, e.g. "blocks.0.attn". query, key, value: the tensors that the products read, [..., tokens, head_size],
    the key [..., head_size, tokens]. result: the product of softmax and value, its heads joined as its first reader wants
    them. scores, softmax, context: the nodes BMM1, Softmax and BMM2. tokens: of queries or keys, whichever are more.
    over_keys: whether the softmax runs over its last axis.
    """

    name: str
    query: str
    key: str
    value: str
    result: str
    scores: NodeProto
    softmax: NodeProto
    context: NodeProto
    head_size: int
    value_size: int
    tokens: int
    over_keys: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Wiring:
    """Who makes and who reads each tensor; out of date as soon as a node changes."""

    known: dict[str, TensorProto]  # not arrays: to make them would copy all weights
    makers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    outputs: set[str]

    def alone(self, tensor: str) -> bool:
        """Whether one node, and no output of the graph, reads `tensor`."""
        return len(self.readers.get(tensor, ())) == 1 and tensor not in self.outputs

    def computed(self, tensor: str) -> bool:
        """Whether `tensor` is computed from the image, and is not a weight, float or INT8."""
        maker = self.makers.get(tensor)
        return maker is not None and not (maker.op_type == "DequantizeLinear" and maker.input[0] in self.known)


def attentions(model: ModelProto) -> list[Attention]:
    """Every attention of a model, in execution order; runs the graph once for the shapes.

    None at all, or one that TensorRT's fused INT8 attention does not take, is a ModelError with the reason. A softmax that
    weighs no computed values, such as a classifier's, is no attention.
    """
    found = find_attentions(model, "INT8 attention", HINT)
    if not found:
        raise ModelError("the model has no attention to quantize: nowhere is there a softmax(Q K) V", hint=HINT)
    for attention in found:
        if reason := _refusal(attention):
            raise ModelError(f"the attention {attention.name!r} {reason}", hint=HINT)
    return found


def find_attentions(model: ModelProto, purpose: str, hint: str) -> list[Attention]:
    """Every attention of a model, of any size, in execution order; runs the graph once for the shapes.

    More than scalar factors (and the sizes of merged tokens) between scores and softmax is a ModelError: `purpose` does not
    take it, and what to do instead says `hint`.
    """
    wiring = _wire(model)
    found = [parts for softmax in model.graph.node if (parts := _parts(softmax, wiring, purpose, hint))]
    shapes = _shapes(model, [name for scores, _, context in found for name in (*scores.input, context.input[1])])
    return [_measured(*parts, shapes, wiring) for parts in found]


def scale_queries(model: ModelProto, found: Sequence[Attention]) -> None:
    """Move every scalar factor on keys and scores to the queries, in place: exact but for the rounding of the products.

    `found` are `attentions(model)`, and out of date afterwards. Nothing changes where the queries have all factors already.
    """
    for attention in found:
        wiring = _wire(model)
        factor = _take_factors(attention.softmax, 0, wiring) * _take_factors(attention.scores, 1, wiring)
        if factor != 1:
            _scale_query(model, attention, factor * _take_factors(attention.scores, 0, wiring, moving=False))
    prune(model)


def attention_tensors(model: ModelProto) -> list[str]:
    """The tensors whose range must be calibrated, in execution order; `scale_queries` comes first."""
    return list(dict.fromkeys(name for a in attentions(model) for name in (a.query, a.key, a.value, a.result)))


def quantize_attention(model: ModelProto, amax: Mapping[str, float]) -> int:
    """Put Q/DQ around both products of every attention in place; returns the number of attentions.

    amax: the range of every `attention_tensors`. A tensor that lacks one is a ModelError. The Linears are quantized before:
    a tensor that has a Q/DQ of theirs gets no second one.
    """
    found = attentions(model)
    ranges = {**amax, **{attention.softmax.output[0]: SOFTMAX_AMAX for attention in found}}
    for tensor, readers in _to_quantize(model, found).items():
        if tensor not in ranges:
            raise ModelError(f"the scale table has no range for {tensor!r}", hint="calibrate again with this recipe")
        _quantize(model, tensor, ranges[tensor], readers)
    return len(found)


def _wire(model: ModelProto) -> _Wiring:
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    return _Wiring(known, producers(model), consumers(model), {output.name for output in model.graph.output})


def _parts(softmax: NodeProto, wiring: _Wiring, purpose: str, hint: str) -> tuple[NodeProto, NodeProto, NodeProto] | None:
    """BMM1, softmax and BMM2 if `softmax` weighs computed values by computed scores, else None.

    More than scalar factors between BMM1 and the softmax is a ModelError.
    """
    context = next((node for node in wiring.readers.get(softmax.output[0], ()) if _weighs(node, softmax, wiring)), None)
    scores = _product_above(softmax, wiring) if context is not None else None
    if context is None or scores is None:
        return None
    obstacle = _obstacle(scores, softmax, context, wiring, purpose)
    if obstacle:
        raise ModelError(f"the attention {_name(scores, softmax, context)!r} {obstacle}", hint=hint)
    return scores, softmax, context


def _weighs(node: NodeProto, softmax: NodeProto, wiring: _Wiring) -> bool:
    """Whether `node` is the product of `softmax` and something computed."""
    return (
        softmax.op_type == "Softmax"
        and node.op_type == "MatMul"
        and node.input[0] == softmax.output[0]
        and wiring.computed(node.input[1])
    )


def _product_above(softmax: NodeProto, wiring: _Wiring) -> NodeProto | None:
    """The nearest product of two computed tensors that reaches `softmax` through elementwise nodes alone."""
    queue = [softmax]
    while queue:
        node = queue.pop(0)
        if node.op_type == "MatMul" and all(wiring.computed(name) for name in node.input):
            return node
        if node is softmax or node.op_type in ELEMENTWISE:
            queue += [wiring.makers[name] for name in node.input if name in wiring.makers]
    return None


def _obstacle(scores: NodeProto, softmax: NodeProto, context: NodeProto, wiring: _Wiring, purpose: str) -> str | None:
    """What stands between the three nodes besides scalar factors, if anything, as the rest of a sentence.

    A mask or bias may be fused in floating point; for INT8 nothing says so. The sizes of merged tokens must be there.
    """
    tensor, passed = softmax.input[0], [softmax.output[0], softmax.input[0]]
    while tensor != scores.output[0]:
        maker = wiring.makers[tensor]
        factor = _factor(maker, wiring) or _sized(maker)
        if factor is None:
            what = "a bias or mask (Add)" if maker.op_type == "Add" else f"the operator {maker.op_type}"
            return f"has {what} between its scores and its softmax, which {purpose} does not take"
        tensor = factor[1]
        passed.append(tensor)
    if not all(map(wiring.alone, passed)):
        return "has scores or weights that something else reads too, so that its products cannot become one"
    return None if wiring.readers.get(context.output[0]) else "has a result that nothing reads but an output of the model"


def _factor(node: NodeProto, wiring: _Wiring) -> tuple[float, str] | None:
    """What `node` multiplies by and the tensor that it multiplies, if that is a scalar constant and changes no shape."""
    for index in range(len(node.input)) if node.op_type == "Mul" else (1,) if node.op_type == "Div" else ():
        constant = wiring.known.get(node.input[index])
        if constant is not None and tuple(constant.dims) in ((), (1,)):  # more axes might be more than the tensor has
            value = float(numpy_helper.to_array(constant).item())
            return (value if node.op_type == "Mul" else 1 / value), node.input[1 - index]
    return None


def _sized(node: NodeProto) -> tuple[float, str] | None:
    """The factor 1 and the scores that `node` adds the sizes of merged tokens to, if it does so."""
    return (1.0, node.input[0]) if node.op_type == "Add" and node.input[1].endswith(LOG_SIZES) else None


def _measured(
    scores: NodeProto, softmax: NodeProto, context: NodeProto, shapes: Mapping[str, tuple[int, ...]], wiring: _Wiring
) -> Attention:
    """The Attention of three nodes."""
    (query, key), value = scores.input, context.input[1]
    return Attention(
        name=_name(scores, softmax, context),
        query=query,
        key=key,
        value=value,
        result=_joined(context.output[0], wiring),
        scores=scores,
        softmax=softmax,
        context=context,
        head_size=shapes[key][-2],
        value_size=shapes[value][-1],
        tokens=max(shapes[query][-2], shapes[value][-2]),
        over_keys=attribute(softmax, "axis", -1) in (-1, len(shapes[query]) - 1),
    )


def _refusal(attention: Attention) -> str | None:
    """Why TensorRT would not fuse an attention in INT8, if so, as the rest of a sentence."""
    if not attention.over_keys:
        return "has a softmax that does not run over its last axis"
    if attention.head_size not in HEAD_SIZES:
        return f"has the head size {attention.head_size}, but INT8 attention takes {', '.join(map(str, HEAD_SIZES))} alone"
    if attention.value_size != attention.head_size:
        return f"has the head size {attention.head_size}, but values of size {attention.value_size}"
    if attention.tokens > MAX_TOKENS:
        return f"has {attention.tokens} tokens, but INT8 attention takes {MAX_TOKENS} at most"
    return None


def _name(*nodes: NodeProto) -> str:
    """The torch module that all `nodes` lie in: "a.b" of "a.b", "a.b/Softmax" and "a.b.2", as export names them."""
    paths = [node.name.partition("/")[0].split(".") for node in nodes]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or nodes[0].name or nodes[0].output[0]


def _joined(tensor: str, wiring: _Wiring) -> str:
    """The tensor that `tensor` becomes before anything computes with it: the input of the output projection."""
    while wiring.alone(tensor):
        (reader,) = wiring.readers[tensor]
        if reader.op_type not in MOVING or not wiring.readers.get(reader.output[0]):
            break
        tensor = reader.output[0]
    return tensor


def _shapes(model: ModelProto, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors `names` for one image: measured, for a dynamic batch defeats symbolic inference."""
    return {name: array.shape for name, array in run_once(model, names).items()}


def _take_factors(reader: NodeProto, index: int, wiring: _Wiring, *, moving: bool = True) -> float:
    """Let `reader` read its input `index` as it was before scalar factors; returns their product.

    moving: look for them behind Transpose and the like as well, unless something else wants what comes out of these scaled.
    """
    product, alone = 1.0, True
    while maker := wiring.makers.get(reader.input[index]):
        alone = alone and wiring.alone(reader.input[index])
        factor = _factor(maker, wiring)
        if factor is not None:
            product, reader.input[index] = product * factor[0], factor[1]
        elif moving and alone and maker.op_type in MOVING:
            reader, index = maker, 0
        else:
            break
    return product


def _scale_query(model: ModelProto, attention: Attention, factor: float) -> None:
    """Put one Mul on what BMM1 reads as its queries."""
    product = attention.scores.output[0]
    scale = put_constant(model, f"{product}.query.scale", np.float32(factor))
    inputs = [attention.scores.input[0], scale]
    node = helper.make_node("Mul", inputs, [f"{product}.query"], name=f"{attention.name}/{product}.query")
    put_nodes(model, [node], before=attention.scores)
    attention.scores.input[0] = node.output[0]


def _to_quantize(model: ModelProto, found: Sequence[Attention]) -> dict[str, list[NodeProto]]:
    """The tensors to put Q/DQ on, and which of their readers are to read the quantized one, in the order of the graph."""
    readers = consumers(model)
    wanted = defaultdict[str, list[NodeProto]](list)
    for attention in found:
        wanted[attention.query].append(attention.scores)
        wanted[attention.key].append(attention.scores)
        wanted[attention.softmax.output[0]].append(attention.context)
        wanted[attention.value].append(attention.context)
        if not any(node.op_type == "QuantizeLinear" for node in readers[attention.result]):
            wanted[attention.result] += readers[attention.result]
    position = {node.output[0]: index for index, node in enumerate(model.graph.node)}
    return {tensor: sorted(nodes, key=lambda node: position[node.output[0]]) for tensor, nodes in wanted.items() if nodes}


def _quantize(model: ModelProto, tensor: str, amax: float, readers: Sequence[NodeProto]) -> None:
    """Let `readers` read `tensor` through its Q/DQ, which a Linear may have brought already."""
    brought = next((node for node in consumers(model)[tensor] if node.op_type == "QuantizeLinear"), None)
    if brought is None:
        quantize_activation(model, tensor, amax, readers)
    else:
        (dequantize,) = consumers(model)[brought.output[0]]
        rewire(model, tensor, dequantize.output[0], readers)
