"""A float graph in, out: where its tokens are, block by block, and along which axis of each tensor they lie.

    x [B, N, C] ─┬─ norm ─ Q K V [B, H, N, D] ─ scores [B, H, N, N] ─ context ─ proj ─ Add ─┬─ norm ─ FC1 ─ FC2 ─ Add ─┬─ ...
                 └──────────────────────────────────────────────────────────────────────────┘  the block's `joined`

Whoever changes the number of tokens must know which axes to change, and that nothing on the way depends on that number: no
table of positions, no window, no product along the tokens but attention's own. What cannot be followed is refused with the
name of the node. Structure alone is looked at: nothing here knows a family of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from vitedge.compiler.activations import run_once
from vitedge.compiler.attention import Attention, find_attentions
from vitedge.compiler.graph import Array, attribute, constant, infer, producers, put_constant
from vitedge.errors import ModelError

UNARY = (
    "Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish",
    "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where")
REDUCING = ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "ReduceSumSquare")
HINT = "this is for plain ViTs: global attention, no windows, no positions inside of the blocks"
Axes = tuple[int, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a plain ViT. attention: its own. joined: what the residual stream is once the attention is added to it."""

    attention: Attention
    joined: str


@dataclass(frozen=True, slots=True)
class Trunk:
    """All blocks of a plain ViT.

    stream: the tensor [B, tokens, C] that enters the first one. first, last: how many tokens at either end come from no pixel,
    such as a class token. nodes: from `stream` to the end of the last block, and those behind it that work on each token by
    itself, such as a last norm. axes: of each tensor on the way that holds tokens.
    """

    blocks: tuple[Block, ...]
    stream: str
    tokens: int
    first: int
    last: int
    nodes: tuple[NodeProto, ...]
    axes: dict[str, Axes]


def find_trunk(model: ModelProto, purpose: str) -> Trunk:
    """The blocks of a plain ViT; a model that is none is a ModelError, which says what stands against `purpose`."""
    shapes = shapes_of(model)
    blocks = [Block(one, joined) for one in _over_tokens(model, shapes, purpose) if (joined := _joined(model, one))]
    if not blocks:
        raise ModelError(f"the model has no attention among all of its tokens, so there is nothing for {purpose}", hint=HINT)
    stream = _beside(model, blocks[0])
    if len(shapes[stream]) != 3:
        raise ModelError(f"the blocks read {stream!r} of shape {_told(shapes[stream])}, not [batch, tokens, width]", hint=HINT)
    end = _end(model, blocks[-1].joined)
    nodes = (*_between(model, stream, end), *_behind(model, end, shapes))
    axes = follow(nodes, {stream: (1,)}, shapes, [block.attention for block in blocks])
    first, last = _constant_ends(model, stream)
    return Trunk(tuple(blocks), stream, shapes[stream][1], first, last, nodes, axes)


def shapes_of(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for one image: as ONNX infers it or, where it cannot, as one run shows it."""
    found = {}
    for name, entry in infer(model, one_image=True).items():
        kind = entry.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[name] = tuple(dim.dim_value for dim in kind.shape.dim)
    unknown = [name for node in model.graph.node for name in node.output if name and name not in found]
    return found | {name: array.shape for name, array in run_once(model, unknown).items()}


def follow(
    nodes: Iterable[NodeProto], start: Mapping[str, Axes], shapes: Shapes, within: Sequence[Attention] = ()
) -> dict[str, Axes]:
    """The axes along which each tensor that `nodes` make of `start` holds tokens; a node that mixes tokens is a ModelError.

    within: the attentions, whose softmax and second product are the only ones to run along tokens.
    """
    axes = dict(start)
    mixing = {id(node) for one in within for node in (one.softmax, one.context)}
    for node in nodes:
        held = {name: axes[name] for name in node.input if name in axes}
        if held:
            found = axes_behind(node, held, shapes, mixing=id(node) in mixing)
            if found is None:
                what = f"{node.op_type} of {' and '.join(_told(shapes.get(name, ())) for name in held)}"
                raise ModelError(f"the tokens cannot be followed through {node.name!r}: {what}", hint=HINT)
            axes.update(dict.fromkeys(node.output, found))
    return axes


def axes_behind(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, *, mixing: bool) -> Axes | None:
    """The axes of tokens in what a node makes of inputs that have some; None where the node cannot be followed.

    mixing: whether it may compute along tokens, as attention does.
    """
    rule = _rule(node)
    unknown = any(name and name not in shapes for name in (*node.input, *node.output))
    return None if unknown or rule is None else rule(node, held, shapes, mixing)


def retarget(model: ModelProto, node: NodeProto, axes: Mapping[str, Axes], shapes: Shapes, tokens: int) -> None:
    """Let a Reshape make so many tokens along the axes of its output that hold tokens."""
    shape = constant(model, node.input[1])
    assert shape is not None and len(shape) == len(shapes[node.output[0]])  # or its output's shape would not be known
    changed = [tokens if axis in axes[node.output[0]] and size > 0 else size for axis, size in enumerate(shape)]
    node.input[1] = put_constant(model, f"{node.output[0]}.shape", np.array(changed, np.int64))


def picked_tokens(model: ModelProto, node: NodeProto, tokens: int) -> Array | None:
    """The numbers of the tokens that a Gather or Slice of axis 1 by constants picks; None for another node."""
    values = [constant(model, name) for name in node.input[1:]]
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 1 and values[0] is not None:
        picked: Array = np.arange(tokens)[np.atleast_1d(values[0])]
        return picked
    if node.op_type != "Slice" or len(values) < 3:
        return None
    start, end, axis, step = (*values, np.ones(1, np.int64))[:4]
    if start is None or end is None or step is None or axis is None or axis.tolist() != [1]:
        return None
    return np.arange(tokens)[int(start[0]) : int(end[0]) : int(step[0])]


def _reshaped(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Where an axis is moved to as a whole, if it is: as many numbers must lie before it as lay before."""
    for index, size in enumerate(after):
        if size == before[axis] and math.prod(after[:index]) == math.prod(before[:axis]):
            return index
    return None


def _over_tokens(model: ModelProto, shapes: Shapes, purpose: str) -> list[Attention]:
    """The attentions in which all tokens look at all tokens; a ModelError where their numbers differ from one to the next."""
    found = [one for one in find_attentions(model, purpose, HINT) if shapes[one.query][-2] == shapes[one.key][-1]]
    counts = sorted({one.tokens for one in found})
    if len(counts) > 1:
        told = f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"
        raise ModelError(f"the blocks have {told} tokens, and {purpose} is for one number of them", hint=HINT)
    for one in found:
        if len(shapes[one.key]) != 4 or not one.over_keys:
            raise ModelError(f"the attention {one.name!r} has keys of shape {_told(shapes[one.key])}", hint=HINT)
    return found


def _joined(model: ModelProto, attention: Attention) -> str | None:
    """The sum of an attention's answer and of what is not made of it: the residual stream behind the attention."""
    made, known = {attention.context.output[0]}, {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        ours = [name in made for name in node.input]
        if any(ours):
            if node.op_type == "Add" and not all(ours) and known.isdisjoint(node.input):
                return str(node.output[0])
            made.update(node.output)
    return None


def _beside(model: ModelProto, block: Block) -> str:
    """The residual stream that a block reads: what its attention's answer is added to."""
    add = producers(model)[block.joined]
    made = _descendants(model.graph.node, block.attention.context.output[0])
    return str(next(name for name in add.input if name not in made))


def _end(model: ModelProto, joined: str) -> str:
    """The residual stream behind the last block, whose attention ends in `joined`: the sum of that and what is made of it."""
    made = _descendants(model.graph.node, joined)
    for node in model.graph.node:
        if node.op_type == "Add" and joined in node.input and all(name in made for name in node.input):
            return str(node.output[0])
    return joined


def _descendants(nodes: Iterable[NodeProto], tensor: str) -> set[str]:
    """The tensor and all that is made of it."""
    made = {tensor}
    for node in nodes:
        if made.intersection(node.input):
            made.update(node.output)
    return made


def _between(model: ModelProto, first: str, last: str) -> tuple[NodeProto, ...]:
    """The nodes on a way from one tensor to another, in execution order."""
    made, wanted, kept = _descendants(model.graph.node, first), {last}, []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output) and made.intersection(node.input):
            kept.append(node)
            wanted.update(made.intersection(node.input) - {first})
    return tuple(reversed(kept))


def _behind(model: ModelProto, end: str, shapes: Shapes) -> Iterator[NodeProto]:
    """The nodes behind the last block that work on each token by itself."""
    held, known = {end: (1,)}, {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        ours = {name: held[name] for name in node.input if name in held}
        whole = ours and node.op_type != "Reshape" and held.keys() | known >= set(filter(None, node.input))
        if whole and axes_behind(node, ours, shapes, mixing=False) == (1,) and len(shapes[node.output[0]]) == 3:
            held.update(dict.fromkeys(node.output, (1,)))
            yield node


def _constant_ends(model: ModelProto, stream: str) -> tuple[int, int]:
    """How many tokens at the beginning and at the end of `stream` no pixel changes: class token and registers."""
    entry, random = model.graph.input[0], np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
    shape = (2, *(dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:]))
    limits = np.iinfo(kind)
    first, second = run_once(model, [stream], random.integers(limits.min, limits.max, shape, kind, endpoint=True))[stream]
    changing = np.flatnonzero((first != second).any(axis=1))
    if len(changing) == 0 or len(changing) != changing[-1] - changing[0] + 1:
        raise ModelError(f"the tokens of {stream!r} that come from the image do not lie side by side", hint=HINT)
    return int(changing[0]), len(first) - 1 - int(changing[-1])


# What becomes of the axes in each kind of node: None where that cannot be said

Rule = Callable[[NodeProto, Mapping[str, Axes], Shapes, bool], Axes | None]


def _rule(node: NodeProto) -> Rule | None:
    if node.op_type in UNARY:
        return _same
    if node.op_type in BROADCASTING:
        return _broadcast
    if node.op_type in REDUCING:
        return _reduce
    return RULES.get(node.op_type)


def _same(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    return next(iter(held.values()))


def _broadcast(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """Axes are counted from the end, and an operand without tokens must not have one number for each."""
    rank = len(shapes[node.output[0]])
    found = {axis + rank - len(shapes[name]) for name, axes in held.items() for axis in axes}
    for name in node.input:
        offset = rank - len(shapes[name])
        lone = found - {axis + offset for axis in held.get(name, ())}
        if any(axis >= offset and shapes[name][axis - offset] != 1 for axis in lone):
            return None
    return tuple(sorted(found))


def _product(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """[.., rows, inner] @ [.., inner, columns]; along tokens only where `mixing`."""
    (left, right), rank = node.input, len(shapes[node.output[0]])
    if min(len(shapes[left]), len(shapes[right])) < 2:
        return None
    rows, inner = ((len(shapes[left]) - place) in held.get(left, ()) for place in (2, 1))
    summed, columns = ((len(shapes[right]) - place) in held.get(right, ()) for place in (2, 1))
    batched = sum(len(held.get(name, ())) for name in (left, right)) - rows - inner - summed - columns
    if batched or inner != summed or (inner and not mixing):
        return None
    return tuple([rank - 2] * rows + [rank - 1] * columns)


def _normalise(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    rank, axes = len(shapes[node.input[0]]), held.get(node.input[0], ())
    axis = attribute(node, "axis", -1) % rank
    return axes if len(held) == 1 and axes and max(axes) < axis else None


def _along_last(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """Softmax and LpNormalization."""
    axes = held[node.input[0]]
    return axes if mixing or attribute(node, "axis", -1) % len(shapes[node.input[0]]) not in axes else None


def _transpose(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    order = list(attribute(node, "perm", range(len(shapes[node.input[0]]))[::-1]))
    return tuple(sorted(order.index(axis) for axis in held[node.input[0]]))


def _reshape(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    before, after = shapes[node.input[0]], shapes[node.output[0]]
    found = [_reshaped(axis, before, after) for axis in held[node.input[0]]]
    return None if None in found else tuple(axis for axis in found if axis is not None)


def _reduce(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """Along other axes, which stay with size 1."""
    before, after = shapes[node.input[0]], shapes[node.output[0]]
    axes = held.get(node.input[0], ())
    return axes if len(before) == len(after) and all(after[axis] == before[axis] for axis in axes) else None


def _drop_axes(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """Squeeze, Unsqueeze and Slice: an axis of tokens keeps its size and what lies before it."""
    return _reshape(node, held, shapes, mixing)


def _slice(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    return _reduce(node, held, shapes, mixing)


def _gather(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    """Of another axis than the tokens', by one index or several."""
    axes, axis = held.get(node.input[0], ()), attribute(node, "axis", 0) % len(shapes[node.input[0]])
    if node.input[1] in held or axis in axes:
        return None
    more = len(shapes[node.input[1]]) - 1
    return tuple(each if each < axis else each + more for each in axes)


def _split(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    axes = held[node.input[0]]
    return axes if attribute(node, "axis", 0) % len(shapes[node.input[0]]) not in axes else None


def _concat(node: NodeProto, held: Mapping[str, Axes], shapes: Shapes, mixing: bool) -> Axes | None:
    axes = set(held.values())
    axis = attribute(node, "axis") % len(shapes[node.output[0]])
    return next(iter(axes)) if len(axes) == 1 and len(held) == len(node.input) and axis not in next(iter(axes)) else None


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Gather": _gather,
    "LayerNormalization": _normalise,
    "LpNormalization": _along_last,
    "MatMul": _product,
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": _along_last,
    "Split": _split,
    "Squeeze": _drop_axes,
    "Transpose": _transpose,
    "Unsqueeze": _drop_axes,
}


def _told(shape: Collection[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
