"""An exported graph in, the same function with nothing in it that only the exporter needed.

    shape arithmetic, masks   ->  constants          (they depend on nothing but the batch, which becomes -1 or broadcasts)
    class token Expand+Concat ->  Pad + Add          (no shape is computed at run time)
    Reshape-Transpose-Reshape ->  one Transpose      (how the exporter writes the transposed keys)
    scale on Q and on K       ->  one scale on Q     (what fused attention kernels look for)
    Resize to a shape         ->  Resize by a factor (the shape would hold the batch)
    + 0, NaN guards, Identity ->  nothing

Each pass changes the model in place. What does not depend on pixels is found by running the graph at two batch sizes
rather than by symbolic inference: what is equal is a constant, what differs is the batch, and the comparison with torch
that follows every export catches a coincidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper

from vitedge.compiler.activations import open_session
from vitedge.compiler.graph import Array, attribute, constants, consumers, producers, prune, put_constant, put_nodes, rewire

BATCHES = (3, 5)
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Where", "And", "Or")


def simplify(model: ModelProto) -> None:
    """Run all passes on a float model with one image input of dynamic batch."""
    fold_constants(model)
    scale_resizes(model)
    drop_no_ops(model)
    merge_transposes(model)
    move_scale_to_queries(model)


def fold_constants(model: ModelProto) -> None:
    """Replace everything that does not depend on pixels by constants, and class tokens by padding."""
    small, large = (_evaluate(model, _edge_of_data(model), batch) for batch in BATCHES)
    repeated = {}  # tensors whose rows are the same for every image of the batch
    for name in small:
        a, b = small[name], large[name]
        if a.shape == b.shape and np.array_equal(a, b):
            rewire(model, name, put_constant(model, f"{name}.folded", a), model.graph.node)  # an output stays computed
        elif a.ndim == 1 and a.shape == b.shape and (a != b).sum() == 1:
            _free_batch(model, name, np.where(a != b, -1, a))
        elif a.ndim > 1 and len(a) == BATCHES[0] and len(b) == BATCHES[1] and (a == a[:1]).all() and (b == a[:1]).all():
            repeated[name] = a[:1]
    for name, row in repeated.items():
        readers = [node for node in consumers(model)[name] if node.op_type in BROADCASTING]
        if readers:
            rewire(model, name, put_constant(model, f"{name}.row", row), readers)
    _pad_prefix_tokens(model, repeated)
    prune(model)


def scale_resizes(model: ModelProto) -> None:
    """Give Resize nodes that compute their output's shape the constant factors instead."""
    known = constants(model)
    found = [node for node in model.graph.node if node.op_type == "Resize" and len(node.input) > 3 and node.input[3] not in known]
    shapes = _shapes(model, [name for node in found for name in (node.input[0], node.output[0])])
    for node in found:
        factors = _factors(shapes[node.input[0]], shapes[node.output[0]])
        node.input[2] = put_constant(model, f"{node.output[0]}.factors", factors)
        del node.input[3]
    prune(model)


def drop_no_ops(model: ModelProto) -> None:
    """Drop Identity, Dropout, sums with zero, and the guard that turns the NaN of a fully masked softmax into 0."""
    makers = producers(model)
    fixed = constants(model).keys() | {entry.name for entry in model.graph.input}
    zero_sums = _zero_sums(model)
    for node in [node for node in model.graph.node if node.input]:
        source = node.input[2] if node.op_type == "Where" else node.input[0]
        if node.op_type == "Where":
            idle = _guards_softmax(node, makers)
        else:
            idle = node.op_type in ("Identity", "Dropout") or node.output[0] in zero_sums
        if idle and source not in fixed:
            model.graph.node.remove(node)
            rewire(model, node.output[0], source)
    prune(model)


def merge_transposes(model: ModelProto) -> None:
    """Turn [b, h, n, d] -> Reshape -> Transpose(0, 2, 1) -> Reshape -> [b, h, d, n] into one Transpose(0, 1, 3, 2)."""
    makers = producers(model)
    chains = []
    for last in model.graph.node:
        middle = makers.get(last.input[0]) if last.op_type == "Reshape" else None
        first = makers.get(middle.input[0]) if middle is not None and attribute(middle, "perm") == [0, 2, 1] else None
        if first is not None and first.op_type == "Reshape":
            chains.append((first.input[0], first.output[0], last))
    shapes = _shapes(model, [name for source, middle, last in chains for name in (source, middle, last.output[0])])
    for source, middle, last in chains:
        before, between, after = shapes[source], shapes[middle], shapes[last.output[0]]
        whole = len(before) == 4 and between == (before[0] * before[1], *before[2:])
        if whole and after == (*before[:2], before[3], before[2]):
            merged = helper.make_node("Transpose", [source], list(last.output), name=f"{last.name}.Transpose", perm=[0, 1, 3, 2])
            put_nodes(model, [merged], before=last)
            model.graph.node.remove(last)
    prune(model)


def move_scale_to_queries(model: ModelProto) -> None:
    """Turn (Q * s) @ (K * t) into (Q * (s * t)) @ K for scalars s and t."""
    known, makers, readers = constants(model), producers(model), consumers(model)
    outputs = {output.name for output in model.graph.output}

    def scalar(node: NodeProto | None) -> bool:
        return node is not None and node.op_type == "Mul" and node.input[1] in known and known[node.input[1]].size == 1

    for product in [node for node in model.graph.node if node.op_type == "MatMul"]:
        queries, keys = makers.get(product.input[0]), makers.get(product.input[1])
        alone = len(readers[product.input[0]]) == 1 and product.input[0] not in outputs
        if queries is not None and keys is not None and scalar(queries) and scalar(keys) and alone:
            scale = known[queries.input[1]] * known[keys.input[1]]
            queries.input[1] = put_constant(model, f"{queries.output[0]}.scale", scale)
            rewire(model, keys.output[0], keys.input[0], [product])
    prune(model)


def _factors(before: tuple[int, ...], after: tuple[int, ...]) -> Array:
    """The factors of a Resize, float32, rounded up so that floor(size * factor) is never one pixel short."""
    factors = np.array(after, np.float32) / np.array(before, np.float32)
    short = factors.astype(np.float64) * np.array(before) < np.array(after)
    rounded: Array = np.where(short, np.nextafter(factors, np.float32(np.inf)), factors)
    return rounded


def _edge_of_data(model: ModelProto) -> list[str]:
    """The computed tensors that depend on no pixel (at most on the batch size) but are read by a node that does."""
    data = {entry.name for entry in model.graph.input}
    edge = dict[str, None]()
    known = constants(model).keys()
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and not data.isdisjoint(node.input):
            edge.update(dict.fromkeys(name for name in node.input if name and name not in data and name not in known))
            data.update(node.output)
    return list(edge)


def _free_batch(model: ModelProto, name: str, shape: Array) -> None:
    """Let every Reshape to the computed `name` read `shape`, in which the batch is -1."""
    readers = [node for node in consumers(model)[name] if node.op_type == "Reshape"]
    if readers:
        rewire(model, name, put_constant(model, f"{name}.folded", shape), readers)
    for node in readers:  # allowzero means nothing beside a -1, and some parsers refuse it
        for entry in [a for a in node.attribute if a.name == "allowzero"]:
            node.attribute.remove(entry)


def _pad_prefix_tokens(model: ModelProto, repeated: dict[str, Array]) -> None:
    """Turn Concat(class token, patches) [+ positions] into Pad(patches) + one constant."""
    found = []
    for node in model.graph.node:
        patches = [name for name in node.input if name not in repeated]
        if node.op_type == "Concat" and attribute(node, "axis") in (1, -2) and len(patches) == 1 < len(node.input):
            found.append((node, patches[0]))
    shapes = _shapes(model, [patches for _, patches in found])
    for concat, patches in found:
        if len(shapes[patches]) == 3:
            rows = [repeated.get(name, np.zeros((1, *shapes[patches][1:]), np.float32)) for name in concat.input]
            _pad_and_add(model, concat, patches, rows)


def _pad_and_add(model: ModelProto, concat: NodeProto, patches: str, rows: list[Array]) -> None:
    """Replace `concat` by Pad and Add; an Add of constant positions right behind it is taken in."""
    constant, last, known = np.concatenate(rows, axis=1), concat, constants(model)
    readers = consumers(model)[concat.output[0]]
    wanted = any(output.name == concat.output[0] for output in model.graph.output)  # as it is, without the positions
    if len(readers) == 1 and readers[0].op_type == "Add" and not wanted:
        other = next((name for name in readers[0].input if name in known), None)
        if other is not None:
            last, constant = readers[0], constant + known[other]
    position = list(concat.input).index(patches)
    before, after = (sum(row.shape[1] for row in part) for part in (rows[:position], rows[position + 1 :]))
    name = concat.output[0]
    pads = put_constant(model, f"{name}.pads", np.array([0, before, 0, 0, after, 0], np.int64))
    tokens = put_constant(model, f"{name}.tokens", constant.astype(np.float32))
    pad = helper.make_node("Pad", [patches, pads], [f"{name}.padded"], name=f"{concat.name}.Pad")
    add = helper.make_node("Add", [f"{name}.padded", tokens], [last.output[0]], name=f"{concat.name}.Add")
    put_nodes(model, [pad, add], before=last)
    model.graph.node.remove(last)
    if last is not concat:
        model.graph.node.remove(concat)


def _zero_sums(model: ModelProto) -> set[str]:
    """The results of adding a mask of zeros, unless that makes more elements of its other input."""
    zeros = {name for name, array in constants(model).items() if array.ndim > 2 and not array.any()}
    sums = [node for node in model.graph.node if node.op_type == "Add" and node.input[1] in zeros]
    shapes = _shapes(model, [name for node in sums for name in (node.input[0], node.output[0])])
    return {node.output[0] for node in sums if shapes[node.input[0]] == shapes[node.output[0]]}


def _guards_softmax(where: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """Whether `where` is Where(IsNaN(x), anything, x) of a softmax x."""
    test, softmax = makers.get(where.input[0]), makers.get(where.input[2])
    guarded = test is not None and test.op_type == "IsNaN" and test.input[0] == where.input[2]
    return guarded and softmax is not None and softmax.op_type == "Softmax"


def _shapes(model: ModelProto, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors `names` at one batch size."""
    return {name: array.shape for name, array in _evaluate(model, names, BATCHES[0]).items()}


def _evaluate(model: ModelProto, names: Sequence[str], batch: int) -> dict[str, Array]:
    """The values of the tensors `names` for an all-zero input of `batch` images."""
    if not names:
        return {}
    distinct = list(dict.fromkeys(names))
    session = open_session(model, distinct, optimize=False)
    feed = {i.name: np.zeros((batch, *i.shape[1:]), np.float32) for i in session.get_inputs()}
    return dict(zip(distinct, session.run(distinct, feed), strict=True))
