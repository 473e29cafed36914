"""A plain ViT for images of one size in, the same for images of another size out, without a look at its torch code.

    patches i8[B, N, P*P*C] ─ MatMul ─ Pad ─ + positions [1, 1 + N, C] ─ blocks ─ class token, mean or a map [B, C, rows, columns]

The number of tokens is rewritten wherever a shape holds it, and the table of positions is resampled on the grid of patches:
bicubic with antialiasing, the rows of other tokens kept, as timm does (resample_abs_pos_embed). A decoder of convolutions goes
along. What depends on the number of tokens in another way is refused with the name of the node.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from onnx import ModelProto, NodeProto

from vitedge.compiler.activations import run_once
from vitedge.compiler.graph import Array, attribute, constant, prune, put_constant
from vitedge.compiler.tokens import HINT, Axes, Shapes, axes_behind, picked_tokens, shapes_of
from vitedge.errors import ModelError, first_line
from vitedge.preprocess import input_shape
from vitedge.specs import ModelCard, TensorSpec

MOST_TOKENS = 1 << 16  # of which attention alone holds 16 GiB a head


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Where a tensor holds the tokens of patches: along `axes`, with so many others `first` and `last`."""

    axes: Axes
    first: int = 0
    last: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Grids:
    """Rows and columns of patches, before and after."""

    old: tuple[int, int]
    new: tuple[int, int]

    def count(self, held: _Held) -> int:
        """How many tokens there will be."""
        return math.prod(self.new) + held.first + held.last


def resize_input(model: ModelProto, card: ModelCard, size: tuple[int, int]) -> ModelCard:
    """Let a plain ViT take images of `size` (height, width) in place; returns the card that says so.

    A size that is no multiple of the patch, and a model that is no plain ViT, are ModelErrors.
    """
    if card.patch is None:
        raise ModelError(f"{card.name} does not cut its images into square patches, so its size is fixed", hint=HINT)
    if any(side % card.patch for side in size):
        below = tuple(max(card.patch, side // card.patch * card.patch) for side in size)
        what = f"{size[0]} x {size[1]} is no multiple of the patches of {card.patch} x {card.patch}"
        which = "smallest" if min(size) < card.patch else "next smaller"
        raise ModelError(what, hint=f"the {which} one is {below[0]} x {below[1]}")
    if (tokens := (size[0] // card.patch) * (size[1] // card.patch)) > MOST_TOKENS:
        what = f"an image of {size[0]} x {size[1]} is cut into {tokens} patches, and {MOST_TOKENS} are the most"
        raise ModelError(what, hint=f"{card.name} was made for {card.preprocess.size[0]} x {card.preprocess.size[1]}")
    old, new = ((one[0] // card.patch, one[1] // card.patch) for one in (card.preprocess.size, size))
    card = dataclasses.replace(card, preprocess=dataclasses.replace(card.preprocess, size=size))
    _follow(model, _Grids(old, new))
    card = dataclasses.replace(card, inputs=(dataclasses.replace(card.inputs[0], shape=(None, *input_shape(card))),))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = math.prod(new)
    prune(model)
    return dataclasses.replace(card, outputs=_outputs(model, card))


def _follow(model: ModelProto, grids: _Grids) -> None:
    """Rewrite every node that the patches reach, as long as they are tokens."""
    shapes, held = shapes_of(model), {model.graph.input[0].name: _Held((1,))}
    for node in list(model.graph.node):
        ours = {name: held[name] for name in node.input if name in held}
        if ours:
            found = _behind(model, node, ours, shapes, grids)
            held.update(dict.fromkeys(node.output, found) if found else {})


def _behind(model: ModelProto, node: NodeProto, ours: Mapping[str, _Held], shapes: Shapes, grids: _Grids) -> _Held | None:
    """What the outputs of a node hold, which is rewritten where it depends on the number of tokens; None for no tokens."""
    one = next(iter(ours.values()))
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return one
    if node.op_type == "Pad":
        return _padded(model, node, one)
    if node.op_type in ("Gather", "Slice", "ReduceMean", "ReduceMax") and _along_tokens(model, node, one, shapes):
        return _taken(model, node, one, shapes)
    if node.op_type == "Reshape" and (shape := _grid_shape(model, node, one, shapes, grids)) is not None:
        node.input[1] = put_constant(model, f"{node.output[0]}.shape", shape)
        return None
    tables = _tables(model, node, one, shapes)
    axes = axes_behind(node, {name: entry.axes for name, entry in ours.items()}, {**shapes, **tables}, mixing=True)
    if axes is None or len({(entry.first, entry.last) for entry in ours.values()}) > 1:
        raise ModelError(f"{node.name!r} ({node.op_type}) is made for one number of tokens", hint=HINT)
    for name in tables:
        table = constant(model, name)
        assert table is not None  # or it would not be among them
        index = list(node.input).index(name)
        node.input[index] = put_constant(model, f"{name}.resized", resampled(table, grids.old, grids.new, one.first, one.last))
    if node.op_type == "Reshape":
        shape = constant(model, node.input[1])
        assert shape is not None
        shape = np.array([grids.count(one) if i in axes and side > 0 else side for i, side in enumerate(shape)], np.int64)
        node.input[1] = put_constant(model, f"{node.output[0]}.shape", shape)
    return _Held(axes, one.first, one.last)


def _padded(model: ModelProto, node: NodeProto, one: _Held) -> _Held:
    """Other tokens are put around those of the patches."""
    pads = constant(model, node.input[1])
    if pads is None or len(pads) != 6 or any(pads[[0, 2, 3, 5]]) or one.axes != (1,):
        raise ModelError(f"{node.name!r} pads something else than tokens", hint=HINT)
    return _Held(one.axes, one.first + int(pads[1]), one.last + int(pads[4]))


def _along_tokens(model: ModelProto, node: NodeProto, one: _Held, shapes: Shapes) -> bool:
    """Whether a Gather, Slice or Reduce works along the axis of tokens."""
    if node.op_type == "Gather":
        return attribute(node, "axis", 0) % len(shapes[node.input[0]]) in one.axes
    axes = constant(model, node.input[3 if node.op_type == "Slice" else 1])
    return axes is not None and any(axis % len(shapes[node.input[0]]) in one.axes for axis in axes)


def _taken(model: ModelProto, node: NodeProto, one: _Held, shapes: Shapes) -> _Held | None:
    """A mean of tokens, tokens that are no patches, or all patches; other choices would be other patches of another grid."""
    tokens = shapes[node.input[0]][one.axes[0]]
    if node.op_type.startswith("Reduce"):
        return None
    picked = picked_tokens(model, node, tokens)
    if picked is not None and np.isin(picked, range(one.first)).all():
        return None
    patches = np.arange(one.first, tokens - one.last)
    if node.op_type == "Slice" and picked is not None and np.isin(patches, picked).all():
        left = tokens - 1 - int(picked[-1])
        end = np.array([-left if left else np.iinfo(np.int64).max])  # counted from the end, of however many tokens
        node.input[2] = put_constant(model, f"{node.output[0]}.end", end)
        return _Held(one.axes, one.first - int(picked[0]), one.last - left)
    raise ModelError(f"{node.name!r} ({node.op_type}) picks tokens by their numbers", hint=HINT)


def _grid_shape(model: ModelProto, node: NodeProto, one: _Held, shapes: Shapes, grids: _Grids) -> Array | None:
    """The new shape of a Reshape of tokens to their rows and columns; None where it does something else."""
    before, after, shape = shapes[node.input[0]], shapes[node.output[0]], constant(model, node.input[1])
    if shape is None or one.first or one.last or len(one.axes) != 1:
        return None
    for index in range(len(after) - 1):
        if (
            after[index : index + 2] == grids.old
            and min(shape[index : index + 2]) > 0
            and math.prod(after[:index]) == math.prod(before[: one.axes[0]])
        ):
            changed: Array = shape.copy()
            changed[index : index + 2] = grids.new
            return changed
    return None


def _tables(model: ModelProto, node: NodeProto, one: _Held, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The constants [1, tokens, C] or [tokens, C] that are added to tokens, with the shape of one that fits any number."""
    if node.op_type != "Add" or one.axes != (1,) or len(shapes[node.output[0]]) != 3:
        return {}
    tokens = shapes[node.output[0]][1]
    known = {name: value for name in node.input if (value := constant(model, name)) is not None}
    return {
        name: (*value.shape[:-2], 1, value.shape[-1])
        for name, value in known.items()
        if value.ndim in (2, 3) and value.shape[-2] == tokens and math.prod(value.shape[:-2]) == 1
    }


def resampled(table: Array, old: tuple[int, int], new: tuple[int, int], first: int, last: int) -> Array:
    """A table of positions [.., first + rows * columns + last, C] on another grid."""
    end = table.shape[-2] - last
    grid = torch.from_numpy(table[..., first:end, :].astype(np.float32)).reshape(1, *old, -1).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)
    inner = wide.permute(0, 2, 3, 1).reshape(*table.shape[:-2], math.prod(new), -1).numpy()
    whole: Array = np.concatenate([table[..., :first, :], inner, table[..., end:, :]], axis=-2)
    return whole


def _outputs(model: ModelProto, card: ModelCard) -> tuple[TensorSpec, ...]:
    """The outputs with the shapes that they now have; a graph that does not run at the new size is a ModelError."""
    names = [output.name for output in model.graph.output]
    try:
        answers = run_once(model, names)
    except Exception as error:  # onnxruntime's exception types live in a private module
        raise ModelError(f"{card.name} does not run at this size: {first_line(error)}", hint=HINT) from error
    for output in model.graph.output:
        for dim, side in zip(output.type.tensor_type.shape.dim[1:], answers[output.name].shape[1:], strict=True):
            dim.dim_value = side
    return tuple(dataclasses.replace(spec, shape=(None, *answers[spec.name].shape[1:])) for spec in card.outputs)
