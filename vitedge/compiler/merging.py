"""A plain ViT in, the same whose blocks merge their most similar tokens out: ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461).

    keys ─ mean of heads ─ unit length ─┬─ every other token, A ─┐
                                        └─ those between them, B ┴ B A' ─ best B of each A ─ the r most similar A ─ rows
    x [B, N, C] ───────────────────────────────── (rows == 0, 1, 2, ...) @ x, weighed by sizes ────────── [B, N - r, C]

Between a block's attention and its MLP, r tokens of A are averaged into that token of B whose key is nearest. A token that
stands for several counts as so many: in means, and in the attention of later blocks, to whose scores the logarithm of the
sizes is added. Tokens that come from no pixel (class token, registers) are never merged.

No operator reads an address out of data: each token gets the row that it goes to, the comparison of these rows with 0, 1, 2, ...
is a 0/1 matrix, and a MatMul with that makes the sums. Shapes stay static. What reads the tokens behind the blocks finds as many
as before, each with the value of the one that it was merged into; a class token or a mean over all tokens needs no such copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from vitedge.compiler.attention import LOG_SIZES, Attention, find_attentions, scale_queries
from vitedge.compiler.graph import (
    Array,
    attribute,
    constant,
    consumers,
    producers,
    prune,
    put_constant,
    put_nodes,
    rename_tensor,
    rewire,
)
from vitedge.compiler.tokens import HINT, Block, Trunk, find_trunk, picked_tokens, retarget, shapes_of
from vitedge.errors import ModelError
from vitedge.specs import MERGE, Reduction

PURPOSE = "token merging"
ALIGNED = 8  # numbers in a row of the 0/1 matrix: tensor cores and AMX tiles want whole ones
SHORTEST = 1e-6  # what a key of zeros is divided by


@dataclass(frozen=True, slots=True)
class _Stage:
    """The tokens between two merges.

    sizes: the tensor [B, 1, tokens] of how many of the first tokens each stands for. origins: [B, first tokens, tokens], 1 where
    a first token is part of one of these. Both "" where nothing has been merged yet.
    """

    tokens: int
    sizes: str = ""
    origins: str = ""


def merge_tokens(model: ModelProto, count: int | Sequence[int]) -> tuple[int, ...]:
    """Let each block of a plain ViT merge `count` tokens in place; returns how many each does.

    Several numbers are for one block each, from the first on, and then begin again: 0, 0, 24 is every third block. At most half
    of a block's tokens can be merged. What is no plain ViT is a ModelError, and a number that none merges a VitEdgeError.
    """
    if not Reduction(merge_tokens=count if isinstance(count, int) else tuple(count)):
        return ()
    scale_queries(model, find_attentions(model, PURPOSE, HINT))  # so that only sizes stand between scores and softmax
    trunk = find_trunk(model, PURPOSE)
    merges, readers = _plan(trunk, count), _outside(model, trunk)
    stages, stage_of = _merge_blocks(model, trunk, merges)
    _restore(model, trunk, readers, {name: stages[index] for name, index in stage_of.items()})
    prune(model)
    return merges


def _plan(trunk: Trunk, count: int | Sequence[int]) -> tuple[int, ...]:
    """How many tokens each block merges; a ModelError where there are more numbers than blocks."""
    counts = [count] if isinstance(count, int) else list(count)
    if len(counts) > len(trunk.blocks):
        what = f"there are {len(counts)} numbers of tokens to merge, but {len(trunk.blocks)} blocks"
        raise ModelError(what, hint="give one number for all blocks, or at most one for each; 0 merges none")
    merges, tokens = list[int](), trunk.tokens
    for each in itertools.islice(itertools.cycle(counts), len(trunk.blocks)):
        merges.append(min(each, (tokens - trunk.first - trunk.last) // 2))
        tokens -= merges[-1]
    return tuple(merges)


def _merge_blocks(model: ModelProto, trunk: Trunk, merges: Sequence[int]) -> tuple[list[_Stage], dict[str, int]]:
    """Put the merges in; returns all stages, and which of them each tensor of the trunk belongs to."""
    shapes, stages, stage_of = shapes_of(model), [_Stage(trunk.tokens)], {trunk.stream: 0}
    joined = {block.joined: (block, merged) for block, merged in zip(trunk.blocks, merges, strict=True) if merged}
    softmaxes = {block.attention.softmax.output[0]: block.attention for block in trunk.blocks}
    for node in trunk.nodes:
        index, *others = {stage_of[name] for name in node.input if name in stage_of}
        if others:
            what = f"{node.name!r} joins tokens from before and behind a merge"
            raise ModelError(f"{what}, so the blocks have connections around them", hint=HINT)
        if node.op_type == "Reshape" and index:
            retarget(model, node, trunk.axes, shapes, stages[index].tokens)
        if node.output[0] in softmaxes and index:
            _weigh(model, softmaxes[node.output[0]], stages[index])
        stage_of.update(dict.fromkeys(node.output, index))
        if node.output[0] in joined:
            stages.append(_merge(model, trunk, *joined[node.output[0]], stages[index]))
            stage_of[f"{node.output[0]}.merged"] = len(stages) - 1
    return stages, stage_of


def _weigh(model: ModelProto, attention: Attention, stage: _Stage) -> None:
    """Let each token count in an attention as the many that it stands for ("proportional attention")."""
    softmax = attention.softmax
    graph = _Nodes(model, softmax.output[0], f"{attention.name}{MERGE}")
    column = graph.put("Reshape", [stage.sizes, graph.constant("keys", np.array([-1, 1, 1, stage.tokens]))], "key_sizes")
    logs = graph.put("Log", [column], LOG_SIZES.removeprefix("."))
    softmax.input[0] = graph.put("Add", [softmax.input[0], logs], "weighed")
    put_nodes(model, graph.nodes, before=softmax)


def _merge(model: ModelProto, trunk: Trunk, block: Block, count: int, stage: _Stage) -> _Stage:
    """Merge `count` tokens of what a block has `joined`; the nodes of the trunk that read it read the result instead."""
    graph, x = _Nodes(model, f"{block.joined}.merged", f"{block.attention.name}{MERGE}"), block.joined
    layout = _layout(trunk, stage.tokens, count)
    rows = _rows(graph, _keys(model, graph, block), layout)
    left = stage.tokens - count
    hits = graph.put("Equal", [rows, graph.constant("numbers", np.arange(left).reshape(1, -1, 1))], "hits")
    members = weights = graph.put("Cast", [hits], "members", to=TensorProto.FLOAT)
    if stage.sizes:
        weights = graph.put("Mul", [members, graph.pad(stage.sizes, 2, len(layout.number) - stage.tokens, "counts")], "weights")
    sizes = graph.put("ReduceSum", [weights, graph.constant("columns", np.array([2]))], "column", keepdims=1)
    shares = graph.put("Div", [weights, sizes], "shares")  # before the product, whose sums FP16 might not hold
    padded = graph.pad(x, 1, len(layout.number) - stage.tokens, "padded")
    graph.nodes.append(helper.make_node("MatMul", [shares, padded], [graph.name], name=f"{graph.module}/MatMul"))
    row = graph.put("Reshape", [sizes, graph.constant("row", np.array([-1, 1, left]))], "sizes")
    origins = graph.put("Transpose", [members], "turned_members", perm=[0, 2, 1])
    if len(layout.number) > stage.tokens:
        origins = graph.slice(origins, 0, stage.tokens, 1, "targets")
    if stage.origins:
        origins = graph.put("MatMul", [stage.origins, origins], "origins")
    within = {id(node) for node in trunk.nodes}
    readers = [node for node in model.graph.node if x in node.input and id(node) in within]
    _put_behind(model, x, graph.nodes)
    rewire(model, x, graph.name, readers)
    return _Stage(left, row, origins)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which tokens may merge into which, and where those go that stay: first, A's, B's, last.

    a, b: (first, end) of every second token of A and B. number: int64[columns], the place in A of each token of A; -1 elsewhere.
    kept: int64[columns], the row of each token if it stays and all of A before it does; -1 of what is no token. row: of the
    first token of B. There are more columns than tokens, so that the matrix product is one that processors are fast at.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    count: int
    number: Array
    kept: Array
    row: int


def _layout(trunk: Trunk, tokens: int, count: int) -> _Layout:
    """As in the paper's code: A are the tokens of even index, B those of odd index, and tokens that stay keep their order."""
    first, end = trunk.first, tokens - trunk.last
    a, b = (first + first % 2, end), (first + 1 - first % 2, end)
    in_a, in_b = np.arange(*a, 2), np.arange(*b, 2)
    columns = -(-tokens // ALIGNED) * ALIGNED
    number = np.full(columns, -1)
    number[in_a] = np.arange(len(in_a))
    kept = np.full(columns, -1)
    kept[:tokens] = np.arange(tokens)
    kept[in_a] = first + np.arange(len(in_a))
    row = first + len(in_a) - count
    kept[in_b] = row + np.arange(len(in_b))
    kept[end:tokens] -= count
    return _Layout(a, b, count, number, kept, row)


def _keys(model: ModelProto, graph: _Nodes, block: Block) -> str:
    """The mean key of all heads for each token, [B, tokens, head size], of unit length."""
    transposed = producers(model)[block.attention.key]
    if transposed.op_type == "Transpose" and attribute(transposed, "perm") == [0, 1, 3, 2]:
        keys = transposed.input[0]
    else:
        keys = graph.put("Transpose", [block.attention.key], "keys", perm=[0, 1, 3, 2])
    mean = graph.put("ReduceMean", [keys, graph.constant("heads", np.array([1]))], "key", keepdims=0)
    length = graph.put("ReduceL2", [mean, graph.constant("size", np.array([2]))], "length", keepdims=1)
    length = graph.put("Max", [length, graph.constant("least", np.float32(SHORTEST))], "divisor")
    return graph.put("Div", [mean, length], "direction")


def _rows(graph: _Nodes, keys: str, layout: _Layout) -> str:
    """The row that each token goes to, int64[B, 1, tokens]."""
    a, b = (graph.slice(keys, *ends, 2, name) for ends, name in ((layout.a, "a"), (layout.b, "b")))
    turned = graph.put("Transpose", [a], "turned", perm=[0, 2, 1])
    likeness = graph.put("MatMul", [b, turned], "likeness")
    most, best = graph.top(likeness, 1, 1, "best")
    _, chosen = graph.top(most, layout.count, 2, "chosen")
    chosen = graph.put("Reshape", [chosen, graph.constant("list", np.array([-1, layout.count, 1]))], "merging")
    numbers = graph.constant("a", layout.number.reshape(1, 1, -1))
    goes, gone = (graph.count(operator, chosen, numbers, name) for operator, name in (("Equal", "goes"), ("Less", "gone")))
    gone = graph.put("Cast", [gone], "gap", to=TensorProto.INT64)
    stays = graph.put("Sub", [graph.constant("kept", layout.kept.reshape(1, 1, -1)), gone], "stays")
    target = graph.put("Add", [best, graph.constant("first", np.array(layout.row))], "target")
    spread = graph.put("Gather", [target, graph.constant("places", layout.number.clip(0))], "spread", axis=2)
    return graph.put("Where", [graph.put("Cast", [goes], "merges", to=TensorProto.BOOL), spread, stays], "rows")


class _Nodes:
    """New nodes to be put into the graph in one place. name: how their tensors' names begin; module: how their own do."""

    def __init__(self, model: ModelProto, name: str, module: str = "") -> None:
        self.name, self.module = name, module or name
        self.nodes: list[NodeProto] = []
        self._model = model

    def put(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output; returns that."""
        node = helper.make_node(operator, inputs, [f"{self.name}.{name}"], name=f"{self.module}/{name}", **attributes)
        self.nodes.append(node)
        return str(node.output[0])

    def top(self, tensor: str, count: int, axis: int, name: str) -> tuple[str, str]:
        """The largest `count` along an axis, and where they are."""
        outputs = [f"{self.name}.{name}.values", f"{self.name}.{name}"]
        inputs = [tensor, self.constant(f"{name}.count", np.array([count]))]
        self.nodes.append(helper.make_node("TopK", inputs, outputs, name=f"{self.module}/{name}", axis=axis))
        return outputs[0], outputs[1]

    def count(self, operator: str, rows: str, columns: str, name: str) -> str:
        """For each of `columns` how many of `rows` compare with it as `operator` says."""
        found = self.put(operator, [rows, columns], f"{name}.found")
        numbers = self.put("Cast", [found], f"{name}.counted", to=TensorProto.FLOAT)
        return self.put("ReduceSum", [numbers, self.constant(f"{name}.axis", np.array([1]))], name, keepdims=1)

    def pad(self, tensor: str, axis: int, more: int, name: str) -> str:
        """So many zeros behind a tensor of three axes; the tensor itself for none."""
        pads = np.zeros(6, np.int64)
        pads[3 + axis] = more
        return self.put("Pad", [tensor, self.constant(f"{name}.pads", pads)], name) if more else tensor

    def slice(self, tensor: str, first: int, end: int, step: int, name: str) -> str:
        """Every `step`-th entry along axis 1 from `first` on."""
        bounds = [self.constant(f"{name}.{part}", np.array([value])) for part, value in
                  (("first", first), ("end", end), ("axis", 1), ("step", step))]  # fmt: skip
        return self.put("Slice", [tensor, *bounds], name)

    def constant(self, name: str, array: Array) -> str:
        """A constant of the nodes' own."""
        return put_constant(self._model, f"{self.name}.{name}.constant", array)


def _put_behind(model: ModelProto, tensor: str, nodes: Sequence[NodeProto]) -> None:
    """Insert nodes right behind the one that makes `tensor`."""
    position = next(index for index, node in enumerate(model.graph.node) if tensor in node.output)
    for offset, node in enumerate(nodes, 1):
        model.graph.node.insert(position + offset, node)


def _outside(model: ModelProto, trunk: Trunk) -> dict[str, list[NodeProto]]:
    """The tensors of the trunk that something else reads, with those readers; [] where that is an output of the graph alone."""
    within, outputs = {id(node) for node in trunk.nodes}, {output.name for output in model.graph.output}
    readers = {name: [node for node in nodes if id(node) not in within] for name, nodes in consumers(model).items()}
    made = [name for node in trunk.nodes for name in node.output]
    return {name: readers.get(name, []) for name in made if readers.get(name) or name in outputs}


def _restore(model: ModelProto, trunk: Trunk, outside: Mapping[str, Sequence[NodeProto]], stage_of: Mapping[str, _Stage]) -> None:
    """Give whatever reads merged tokens from outside of the trunk as many tokens as there were."""
    outputs = {output.name for output in model.graph.output}
    for tensor, readers in outside.items():
        stage = stage_of[tensor]
        wanting = [node for node in readers if not _needs_no_copies(model, node, trunk, stage)]
        if stage.sizes and (wanting or tensor in outputs):
            _copy_back(model, trunk, tensor, stage, wanting)


def _copy_back(model: ModelProto, trunk: Trunk, tensor: str, stage: _Stage, readers: Sequence[NodeProto]) -> None:
    """Let `readers`, and the graph's outputs, read each merged token once for each that it stands for."""
    if trunk.axes.get(tensor, (1,)) != (1,):
        raise ModelError(f"{tensor!r} is read outside of the blocks, where its tokens have been merged", hint=HINT)
    maker, merged = producers(model)[tensor], f"{tensor}.fewer"
    rename_tensor(model, tensor, merged, maker)
    copy = helper.make_node("MatMul", [stage.origins, merged], [tensor], name=f"{tensor}/restored")
    _put_behind(model, merged, [copy])
    rewire(model, merged, tensor, readers)


def _needs_no_copies(model: ModelProto, reader: NodeProto, trunk: Trunk, stage: _Stage) -> bool:
    """Whether a reader wants only tokens that are never merged, or a mean of all, which is made a mean weighed by sizes."""
    picked = picked_tokens(model, reader, trunk.tokens)
    if picked is not None and np.isin(picked, range(trunk.first)).all():
        return True
    mean = reader if picked is None else _only_reader(model, reader)
    everything = np.arange(trunk.tokens) if picked is None else np.arange(trunk.first, trunk.tokens - trunk.last)
    if mean is None or not _is_mean(model, mean) or (picked is not None and not np.array_equal(picked, everything)):
        return False
    counted = np.zeros((1, 1, stage.tokens), np.float32)
    ends = (0, stage.tokens) if picked is None else (trunk.first, stage.tokens - trunk.last)
    counted[:, :, slice(*ends)] = 1 / len(everything)
    graph = _Nodes(model, f"{mean.output[0]}.weighed")
    weights = graph.put("Mul", [stage.sizes, graph.constant("counted", counted)], "weights")
    weighed = graph.put("MatMul", [weights, reader.input[0]], "mean")
    put_nodes(model, graph.nodes, before=mean)
    mean.input[0] = weighed  # of one token: its mean is itself, with the shape that is wanted
    return True


def _only_reader(model: ModelProto, node: NodeProto) -> NodeProto | None:
    readers = [other for other in model.graph.node if node.output[0] in other.input]
    wanted = any(output.name == node.output[0] for output in model.graph.output)
    return readers[0] if len(readers) == 1 and not wanted else None


def _is_mean(model: ModelProto, node: NodeProto) -> bool:
    """Whether a node is the mean over axis 1 alone."""
    axes = constant(model, node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
    return axes is not None and axes.tolist() == [1]
