"""What an engine is made of once its backend has fused it, and how long each part takes.

A backend fills these in from what its vendor tells; `bench/explain.py` reads them. Names of ONNX nodes are as
`compiler/export.py` gives them: the torch module's, with the operator behind a slash unless the node is the module's product
("blocks.0.attn.qkv", "blocks.0.norm1/LayerNormalization"). Knows nothing of any vendor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vitedge.specs import MERGE

Kind = Literal["linear", "convolution", "attention", "product", "softmax", "norm", "activation", "quantize", "reformat", "other"]
QDQ = ("QuantizeLinear", "DequantizeLinear")
MOVING = ("Cast", "Concat", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
ACTIVATIONS = ("Gelu", "Erf", "Relu", "Sigmoid", "Swish", "HardSwish", "Tanh")


@dataclass(frozen=True, slots=True)
class Layer:
    """One step that an engine executes, in milliseconds a call.

    name, type: the vendor's words. kind: "attention" is one kernel for both products and the softmax, "product" a matrix
    product of two activations by itself, "quantize" a Q or DQ by itself, "reformat" a change of type or layout alone.
    precision: of what it reads, "unknown" where the vendor does not tell. origins: the ONNX nodes it was made from.
    linears: those of them that are a Linear or a convolution. quantized: whether the graph quantizes these.
    """

    name: str
    type: str
    kind: Kind
    precision: str
    ms: float
    origins: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class Profile:
    """The layers of an engine in the order they run, timed in `calls` calls.

    profiled_ms: of one of these calls. plain_ms: of a call that no profiler watched, in the same run. All times are means, so
    that those of the layers and of what lies between them add up to that of the call.
    """

    layers: tuple[Layer, ...]
    profiled_ms: float
    plain_ms: float
    calls: int

    @property
    def between_ms(self) -> float:
        """What a call takes beyond its layers: the way in and out, and from one layer to the next."""
        return self.profiled_ms - sum(layer.ms for layer in self.layers)


def merges(layer: Layer) -> bool:
    """Whether a layer does nothing but merge tokens (see compiler/merging.py)."""
    return bool(layer.origins) and all(map(is_merge, layer.origins))


def is_merge(node: str) -> bool:
    """Whether an ONNX node is part of a merge of tokens."""
    return module(node).endswith(MERGE)


def operator(node: str) -> str:
    """The operator in the name of an ONNX node, "" of a module's product: "Add" of "blocks.0/Add.2"."""
    _, slash, name = node.rpartition("/")
    return re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] if slash else ""


def module(node: str) -> str:
    """The torch module in the name of an ONNX node: "blocks.0" of "blocks.0/Add.2"."""
    return node.rpartition("/")[0] if "/" in node else node
