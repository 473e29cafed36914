"""What TensorRT's engine inspector says of an engine, and its profiler's times, into layers.

    IEngineInspector.get_engine_information(JSON), {layer name: ms}  ->  (Layer, ...)
    an open session that profiles and inspects itself                ->  Profile

Reads the form of TensorRT 8 to 10 and that of 11, which differ in how they list the engine's inputs and outputs ("Bindings"
became "I/O Tensors") and in "Format/Datatype", which became two keys. Of an engine built without
ProfilingVerbosity.DETAILED the inspector tells names alone; its precisions are then unknown.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html and, for 11,
https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html

Needs no TensorRT, and no GPU.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vitedge.backends.layers import ACTIVATIONS, MOVING, QDQ, Kind, Layer, Profile, operator
from vitedge.errors import EngineError

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")
PRECISIONS = {  # what their names of types contain -> ours; the first that fits, since "bfloat16" contains "float16"
    "int8": "int8",
    "int4": "int4",
    "fp4": "fp4",
    "fp8": "fp8",
    "float8": "fp8",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "half": "fp16",
    "fp16": "fp16",
    "float16": "fp16",
    "fp32": "fp32",
    "float": "fp32",
}
MOVES = ("reformat", "shuffle", "cast", "noop", "copy", "concatenation", "slice")  # types of layers that compute nothing
FUSED_ATTENTION = re.compile(r"gem[mv]_mha|fmha|mha_v\d")  # in the name of a layer or its tactic, such as _gemm_mha_v2
NORMS = ("LayerNormalization", "RMSNormalization", "InstanceNormalization")
UNNAMED = re.compile(r"__my|Reformat|\{|^\(")  # names that TensorRT makes up itself


CALLS = 10  # at least, with the profiler and without
WARMUP = 3


class Inspectable(Protocol):
    """A session that tells what it is made of: `TensorRtSession`."""

    @property
    def input(self) -> NDArray[Any]: ...

    def run(self, count: int) -> NDArray[np.float32]: ...
    def profile(self, count: int, calls: int) -> Mapping[str, list[float]]: ...
    def inspect(self) -> str: ...


def measure(session: Inspectable, rows: NDArray[Any], seconds: float) -> Profile:
    """Time the layers of a session on `rows`, after calls without a profiler for half of `seconds`.

    A call is what `run` does: the way of the input to the GPU and of the output back are "between" the layers.
    """
    count = len(rows)
    session.input[:count] = rows
    for _ in range(WARMUP):
        session.run(count)
    plain_ms: list[float] = []
    end = time.perf_counter() + seconds / 2
    while len(plain_ms) < CALLS or time.perf_counter() < end:
        start = time.perf_counter_ns()
        session.run(count)
        plain_ms.append((time.perf_counter_ns() - start) / 1e6)
    session.profile(count, WARMUP)
    calls = len(plain_ms)
    start = time.perf_counter_ns()
    times = session.profile(count, calls)
    profiled_ms = (time.perf_counter_ns() - start) / 1e6 / calls
    layers = parse(session.inspect(), {name: sum(taken) / calls for name, taken in times.items()})
    return Profile(layers, profiled_ms, float(np.mean(plain_ms)), calls)


def parse(text: str, times: Mapping[str, float]) -> tuple[Layer, ...]:
    """The layers in the order they run, out of what `get_engine_information` gives as JSON.

    times: milliseconds by the name of a layer; it is 0 for a layer that the profiler does not report.
    Whether the graph quantizes a Linear is read off the DequantizeLinear of its weight among the ONNX nodes, and off the
    layer itself being INT8. Times of a name that the inspector does not have come last, as layers of an unknown kind.
    Raises EngineError where `text` is not what an inspector writes, or where no time belongs to any of the layers.
    """
    entries = [entry if isinstance(entry, dict) else {"Name": entry} for entry in _entries(text)]
    names = [_text(entry, "Name") for entry in entries]
    if times and not set(times) & set(names):
        raise EngineError(
            f"the profiler's layers, such as {next(iter(times))!r}, are not those of the engine inspector",
            hint="profile and inspect the same engine",
        )
    nodes = {node for entry in entries for node in _origins(entry)}
    found = [_layer(entry, times, nodes) for entry in entries]
    unknown = [Layer(name, "", "other", "unknown", ms) for name, ms in times.items() if name not in names]
    return (*found, *unknown)


def _entries(text: str) -> list[Any]:
    """What the JSON says of each layer: an object, or a name alone."""
    hint = "it is what get_engine_information(LayerInformationFormat.JSON) gives; build the engine again"
    try:
        data = json.loads(text)
    except ValueError as error:
        raise EngineError(f"the engine inspector's answer is not JSON: {error}", hint=hint) from error
    entries = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("Name"), str)) for entry in entries
    ):
        raise EngineError('the engine inspector\'s answer has no "Layers", each a name or an object that has one', hint=hint)
    return entries


def _layer(entry: Mapping[str, Any], times: Mapping[str, float], nodes: Collection[str]) -> Layer:
    """One layer; `nodes` are the ONNX nodes of all of them."""
    name, origins = _text(entry, "Name"), _origins(entry)
    precision = _precision(entry)
    moves = _text(entry, "Origin") == "REFORMAT"  # for the sake of the Linear that it is named after, at most
    linears = tuple(node for node in origins if _is_linear(node, nodes) and not moves)
    return Layer(
        name=name,
        type=_text(entry, "LayerType"),
        kind=_kind(entry, origins, linears, nodes),
        precision=precision,
        ms=float(times.get(name, 0.0)),
        origins=origins,
        linears=linears,
        quantized=bool(linears) and (precision == "int8" or all(f"{node}/weight" in nodes for node in linears)),
    )


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key, "")
    return value if isinstance(value, str) else ""


def _origins(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The ONNX nodes in a layer's metadata; failing that, those that its name is put together from."""
    told = ONNX_LAYER.findall(_text(entry, "Metadata"))
    if not told:
        parts = re.sub(r"_myl\d+_\d+$", "", _text(entry, "Name")).split(" + ")
        told = [part for part in parts if not UNNAMED.search(part)]
    return tuple(dict.fromkeys(told))


def _precision(entry: Mapping[str, Any]) -> str:
    """The type of the first numbers that a layer reads, or of those it makes where it reads none: masks and indices aside."""
    for key in ("Inputs", "Outputs"):
        tensors = entry.get(key)
        for tensor in tensors if isinstance(tensors, list) else []:
            told = " ".join(str(tensor.get(k, "")) for k in ("Datatype", "DataType", "Format/Datatype", "Format")).lower()
            precision = next((ours for theirs, ours in PRECISIONS.items() if theirs in told), None)
            if precision:
                return precision
    return "unknown"


def _is_linear(node: str, nodes: Collection[str]) -> bool:
    """Whether a node is a product with a weight: named after its module, and not one of an attention's two."""
    if operator(node).startswith("Conv"):
        return True
    base = re.sub(r"\.\d+$", "", node)
    inside = any(f"{name}/{op}" in nodes for name in (node, base) for op in ("Softmax", "Attention"))
    return "/" not in node and not inside


def _kind(entry: Mapping[str, Any], origins: Collection[str], linears: Collection[str], nodes: Collection[str]) -> Kind:
    """What a layer does, by its type, its tactic and the ONNX nodes in it."""
    layer = _text(entry, "LayerType").lower()
    operators = [operator(node) for node in origins]
    computing = {name for name in operators if name not in QDQ}
    if _text(entry, "Origin") == "REFORMAT" or _text(entry, "Name").startswith("Reformatting CopyNode"):
        return "reformat"
    if FUSED_ATTENTION.search(f"{_text(entry, 'Name')} {_text(entry, 'TacticName')}") or {"Attention"} & computing:
        return "attention"
    if linears:
        plain = all("/" in node or (f"{node}/weight" not in nodes and f"{node}/Add" not in nodes) for node in linears)
        return "convolution" if plain and "conv" in f"{layer} {' '.join(operators)}".lower() else "linear"
    if "Softmax" in computing:
        return "attention" if operators.count("") > 1 else "softmax"
    if "" in computing:
        return "product"
    if _text(entry, "Origin") == "QDQ" or layer in ("quantize", "dequantize") or (origins and not computing):
        return "quantize"
    if computing & set(NORMS):
        return "norm"
    if any(word in layer for word in MOVES) or (computing and computing <= set(MOVING)):
        return "reformat"
    return "activation" if computing and computing <= set(ACTIVATIONS) else "other"
