"""An ONNX graph in, what its matrix products ask of a device out.

    ModelProto -> count_work -> (LayerWork, ...) -> total -> Work -> "vitedge.work" in the metadata of the file

Counted for one image: multiply-adds, the weights as they are stored, and the bytes of activations that go in and out. How
many products compute in INT8 is "vitedge.int8_products", so that a build sees what became of them. A product
computes in INT8 where both of its operands come out of a DequantizeLinear, and else in the float type of its result.
Biases, norms and tables are left out: next to nothing, and a bound may be too low but not too high. Shapes come from ONNX's
own inference, without a look at any weight; where a graph computes them, from one run on a blank image. Knows nothing of
devices: bench/roofline.py does.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from vitedge.compiler.activations import run_once
from vitedge.compiler.graph import attribute, infer, metadata, producers, save
from vitedge.errors import ModelError
from vitedge.specs import MOVING, PRODUCTS, WEIGHT_BITS, ComputeType, Work, to_dict

TYPES = {
    TensorProto.INT4: "int4",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT: "fp32",
}


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One matrix product for one image.

    type: what it computes in. weight: the constant that it multiplies by, None for a product of two activations.
    weight_count, weight_type: how many numbers that holds, and what they are stored in.
    in_bytes, out_bytes: of the activations that are read, as they are stored before a DequantizeLinear, and of the result.
    """

    name: str
    type: ComputeType
    macs: int
    weight: str | None
    weight_count: int
    weight_type: str
    in_bytes: int
    out_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Of the constant as it is stored; 4-bit numbers lie two in a byte."""
        return math.ceil(self.weight_count * WEIGHT_BITS.get(self.weight_type, 0) / 8)


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * WEIGHT_BITS[self.type] / 8)


@dataclass(frozen=True, slots=True)
class _Operand:
    """What a product reads, followed back to where it is stored. shape: as the product sees it."""

    shape: tuple[int, ...]
    stored: _Tensor
    constant: str | None
    dequantized: bool


def count_work(model: ModelProto) -> tuple[LayerWork, ...]:
    """The work of every MatMul, Gemm, Conv and ConvTranspose, in execution order.

    A graph whose shapes cannot be known, or that multiplies in another type than vitedge writes, is a ModelError.
    """
    tensors, makers = _tensors(model), producers(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    read = {name for node in products for name in node.input[:2]}
    wanted = read | {_stored(name, makers, constants)[0] for name in read} | {node.output[0] for node in products}
    if wanted - tensors.keys():
        tensors |= _run(model, sorted(makers.keys() - tensors.keys()))
    if unknown := wanted - tensors.keys():  # an input
        raise ModelError(f"no shape is known of {', '.join(sorted(unknown)[:3])}, so the work cannot be counted")
    return tuple(_layer(node, tensors, makers, constants) for node in products)


def total(layers: Sequence[LayerWork]) -> Work:
    """The work of all layers together; a weight that several of them read is stored, and read, once."""
    macs, weights = Counter[str](), Counter[str]()
    for layer in layers:
        macs[layer.type] += layer.macs
    for layer in {layer.weight: layer for layer in layers if layer.weight}.values():
        weights[layer.weight_type] += layer.weight_count
    return Work(dict(macs), dict(weights))


def save_counted(model: ModelProto, path: Path) -> None:
    """Write an ONNX file with its work, and how many products are INT8, in the metadata; without, where it cannot be counted."""
    entries = {key: value for key, value in metadata(model).items() if key not in ("vitedge.work", "vitedge.int8_products")}
    with suppress(ModelError):  # an exotic graph has no bound, and is as good as others
        layers = count_work(model)
        entries["vitedge.work"] = json.dumps(to_dict(total(layers)))
        if integer := sum(layer.type == "int8" for layer in layers):
            entries["vitedge.int8_products"] = str(integer)
    helper.set_model_props(model, entries)
    save(model, path)


def _tensors(model: ModelProto) -> dict[str, _Tensor]:
    """Shape and type of every tensor for one image, as far as ONNX infers them."""
    return {name: tensor for name, entry in infer(model, one_image=True).items() if (tensor := _tensor(entry))}


def _run(model: ModelProto, names: Sequence[str]) -> dict[str, _Tensor]:
    """Shape and type of the tensors `names`, which depend on what other tensors hold."""
    try:
        values = run_once(model, names)
    except Exception as error:  # onnxruntime's exception types live in a private module
        raise ModelError(f"no shape is known of {', '.join(names[:3])}, so the work cannot be counted") from error
    return {
        name: _Tensor(value.shape, TYPES.get(helper.np_dtype_to_tensor_dtype(value.dtype), "")) for name, value in values.items()
    }


def _tensor(entry: ValueInfoProto) -> _Tensor | None:
    kind, dims = entry.type.tensor_type, entry.type.tensor_type.shape.dim
    whole = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
    return _Tensor(tuple(dim.dim_value for dim in dims), TYPES.get(kind.elem_type, "")) if whole else None


def _layer(node: NodeProto, tensors: Mapping[str, _Tensor], makers: Mapping[str, NodeProto], constants: set[str]) -> LayerWork:
    left, right = (_operand(name, tensors, makers, constants) for name in node.input[:2])
    result = tensors[node.output[0]]
    if not {left.stored.type, right.stored.type, result.type} <= WEIGHT_BITS.keys():
        raise ModelError(f"{node.name} multiplies numbers of a type that is not counted")
    weight = next((operand for operand in (right, left) if operand.constant), None)
    return LayerWork(
        name=node.name,
        type=cast(ComputeType, "int8" if left.dequantized and right.dequantized else result.type),
        macs=_macs(node, left, right, result),
        weight=weight.constant if weight else None,
        weight_count=weight.stored.size if weight else 0,
        weight_type=weight.stored.type if weight else "",
        in_bytes=sum(operand.stored.bytes for operand in (left, right) if not operand.constant),
        out_bytes=result.bytes,
    )


def _operand(name: str, tensors: Mapping[str, _Tensor], makers: Mapping[str, NodeProto], constants: set[str]) -> _Operand:
    """What a product reads as `name`."""
    stored, dequantized = _stored(name, makers, constants)
    return _Operand(tensors[name].shape, tensors[stored], stored if stored in constants else None, dequantized)


def _stored(name: str, makers: Mapping[str, NodeProto], constants: set[str]) -> tuple[str, bool]:
    """The tensor that holds what is read as `name`, and whether that is dequantized on the way.

    Followed back through what moves elements, and through one DequantizeLinear; it is `name` itself where the way leads to
    neither a constant nor what was quantized.
    """
    stored, dequantized = name, False
    while (maker := makers.get(stored)) is not None and (
        maker.op_type in MOVING or (maker.op_type == "DequantizeLinear" and not dequantized)
    ):
        dequantized = dequantized or maker.op_type == "DequantizeLinear"
        stored = maker.input[0]
    return (stored if stored in constants or dequantized else name), dequantized


def _macs(node: NodeProto, left: _Operand, right: _Operand, result: _Tensor) -> int:
    """Multiply-adds: each number of a result, or of a ConvTranspose each that is read, takes as many as one filter has."""
    if node.op_type == "Conv":  # filters [out, in / groups, kernel]
        return result.size * math.prod(right.shape[1:])
    if node.op_type == "ConvTranspose":  # filters [in, out / groups, kernel]
        return math.prod(left.shape) * math.prod(right.shape[1:])
    return result.size * left.shape[0 if attribute(node, "transA", 0) else -1]
