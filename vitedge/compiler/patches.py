"""A float NCHW image input in, the integer input of the contract out, with the normalisation folded in.

    plain ViT    images f32[B, C, H, W] -> Conv(P x P / P) -> Reshape -> Transpose
            ->   patches i8[B, N, P*P*C] -> DequantizeLinear(2**-7) -> MatMul -> Add
    other stems  images f32[B, C, H, W] -> ...
            ->   image u8[B, H, W, C] -> Cast -> Transpose -> Mul -> Add -> ...

With pixel u = p + 128 and x = (u / 255 - mean) / std, the patch convolution w * x + b is linear in p * 2**-7, so the
scale moves into its weights and the shift into its bias: nothing is approximated. 2**-7 keeps FP16 weights normal numbers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from vitedge.compiler.graph import attribute, constants, consumers, prune, put_constant, put_nodes, rename_constant, rewire
from vitedge.errors import ModelError
from vitedge.specs import ModelCard, Preprocess, TensorSpec

INPUT_SCALE = np.float32(2.0**-7)


def integer_input(model: ModelProto, card: ModelCard) -> ModelCard:
    """Change the model's input in place to int8 patches or, for another stem, a uint8 image; return the card that says which."""
    if len(model.graph.input) != 1:
        raise ModelError(f"the model has {len(model.graph.input)} inputs", hint="vitedge deploys models with one image input")
    source = model.graph.input[0].name
    for name in ("patches", "image"):  # a parameter may have the name that the input is to get
        rename_constant(model, name, f"{name}.parameter")
    readers = consumers(model)[source]
    batch = [node for node in readers if node.op_type == "Shape" and attribute(node, "end") == 1]  # the same of any input
    stem = next((node for node in readers if node not in batch), None) if len(readers) == len(batch) + 1 else None
    patch = _patch_size(stem, model, card.preprocess)
    if stem is not None and patch is not None:
        _patch_input(model, stem, patch, card.preprocess)
    else:
        _image_input(model, source, batch, card.preprocess)
    rewire(model, source, model.graph.input[0].name, batch)
    prune(model)
    entry = model.graph.input[0]
    shape = (None, *(d.dim_value for d in entry.type.tensor_type.shape.dim[1:]))
    dtype = "int8" if patch else "uint8"
    return dataclasses.replace(card, patch=patch, inputs=(TensorSpec(entry.name, shape, dtype),))


def _patch_size(stem: NodeProto | None, model: ModelProto, spec: Preprocess) -> int | None:
    """The patch side if `stem` is a convolution that cuts the image into square patches, else None."""
    if stem is None or stem.op_type != "Conv" or stem.input[1] not in constants(model):
        return None
    kernel = constants(model)[stem.input[1]].shape
    height, width = kernel[2:]
    plain = (
        height == width
        and attribute(stem, "strides") == [height, width]
        and not any(attribute(stem, "pads", [0]))
        and attribute(stem, "group", 1) == 1
        and set(attribute(stem, "dilations", [1])) == {1}
        and spec.size[0] % height == 0
        and spec.size[1] % width == 0
    )
    return int(height) if plain else None


def _patch_input(model: ModelProto, stem: NodeProto, patch: int, spec: Preprocess) -> None:
    """Replace the stem, and the Reshape and Transpose behind it, by DequantizeLinear, MatMul and Add."""
    known = constants(model)
    weight = known[stem.input[1]].astype(np.float64)  # [D, C, P, P]
    bias = known[stem.input[2]].astype(np.float64) if len(stem.input) > 2 else np.zeros(len(weight))
    mean, std = (np.array(v, np.float64)[:, None, None] for v in (spec.mean, spec.std))
    bias = bias + (weight * (128 / 255 - mean) / std).sum(axis=(1, 2, 3))
    weight = weight * (1 / float(INPUT_SCALE)) / (255 * std)
    rows, columns = spec.size[0] // patch, spec.size[1] // patch
    features, depth = patch * patch * spec.channels, len(weight)

    name = stem.name or "patch_embed"
    scale = put_constant(model, "patches.scale", INPUT_SCALE)
    zero = put_constant(model, "patches.zero_point", np.int8(0))
    matrix = put_constant(model, f"{name}.weight", weight.transpose(2, 3, 1, 0).reshape(features, depth).astype(np.float32))
    offset = put_constant(model, f"{name}.bias", bias.astype(np.float32))
    nodes = [
        helper.make_node("DequantizeLinear", ["patches", scale, zero], ["patches.float"], name="patches/DequantizeLinear"),
        helper.make_node("MatMul", ["patches.float", matrix], [f"{name}.product"], name=name),
        helper.make_node("Add", [f"{name}.product", offset], [f"{name}.tokens"], name=f"{name}/Add"),
    ]
    tokens, replaced = f"{name}.tokens", stem.output[0]
    flattened = _flattened(model, stem, (depth, rows * columns))
    if flattened is None:  # something wants the feature map: give it back its shape
        grid = put_constant(model, f"{name}.grid", np.array([-1, depth, rows, columns], np.int64))
        nodes += [
            helper.make_node("Transpose", [tokens], [f"{name}.rows"], name=f"{name}/Transpose", perm=[0, 2, 1]),
            helper.make_node("Reshape", [f"{name}.rows", grid], [f"{name}.map"], name=f"{name}/Reshape"),
        ]
        tokens = f"{name}.map"
    else:
        replaced = flattened
    put_nodes(model, nodes, before=stem)
    rewire(model, replaced, tokens)
    _set_input(model, "patches", TensorProto.INT8, [rows * columns, features])


def _flattened(model: ModelProto, stem: NodeProto, shape: tuple[int, int]) -> str | None:
    """The tensor [B, N, D] that a Reshape to [B, *shape] and a Transpose make of the feature map, if nothing else reads it."""
    known, readers = constants(model), consumers(model)
    outputs = {output.name for output in model.graph.output}
    first = readers[stem.output[0]]
    flat = len(first) == 1 and first[0].op_type == "Reshape" and tuple(known.get(first[0].input[1], ())[1:]) == shape
    second = readers[first[0].output[0]] if flat else []
    if flat and not outputs.isdisjoint((stem.output[0], first[0].output[0])):
        return None
    if len(second) == 1 and second[0].op_type == "Transpose" and attribute(second[0], "perm") == [0, 2, 1]:
        return str(second[0].output[0])
    return None


def _image_input(model: ModelProto, source: str, batch: list[NodeProto], spec: Preprocess) -> None:
    """Put Cast, Transpose and the normalisation in front of the graph."""
    scale = 1 / (255 * np.array(spec.std, np.float64))
    shift = -np.array(spec.mean, np.float64) / np.array(spec.std, np.float64)
    multiplier = put_constant(model, "image.multiplier", scale.astype(np.float32).reshape(1, -1, 1, 1))
    offset = put_constant(model, "image.offset", shift.astype(np.float32).reshape(1, -1, 1, 1))
    nodes = [
        helper.make_node("Cast", ["image"], ["image.float"], name="image/Cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["image.float"], ["image.planes"], name="image/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["image.planes", multiplier], ["image.scaled"], name="image/Mul"),
        helper.make_node("Add", ["image.scaled", offset], ["image.normalised"], name="image/Add"),
    ]
    rewire(model, source, "image.normalised", [node for node in model.graph.node if node not in batch])
    put_nodes(model, nodes, before=model.graph.node[0])
    _set_input(model, "image", TensorProto.UINT8, [*spec.size, spec.channels])


def _set_input(model: ModelProto, name: str, dtype: int, shape: list[int]) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(name, dtype, ["batch", *shape]))
