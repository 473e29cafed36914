"""What TensorRT's inspector tells becomes layers.

The files in tests/data/inspector were written to the form that NVIDIA documents (see vitedge/backends/inspector.py) and to what
users show of it in NVIDIA/TensorRT#4020 and #4397; they were not captured from an engine. They hold one ViT block with a fused
attention, a Q that did not fuse, a Q/DQ pair on the residual stream and a reformat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import ROOT
from vitedge.backends.inspector import measure, parse
from vitedge.backends.layers import Layer
from vitedge.errors import EngineError

DATA = ROOT / "tests" / "data" / "inspector"
DETAILED = ("detailed_10", "detailed_11")


def text_of(name: str) -> str:
    return (DATA / f"{name}.json").read_text("utf-8")


def names_of(name: str) -> list[str]:
    return [entry if isinstance(entry, str) else entry["Name"] for entry in json.loads(text_of(name))["Layers"]]


def layers_of(name: str) -> tuple[Layer, ...]:
    return parse(text_of(name), {layer: 0.25 * place for place, layer in enumerate(names_of(name), 1)})


@pytest.mark.parametrize("name", DETAILED)
def test_every_linear_is_found_with_its_precision_and_what_the_graph_wants(name: str) -> None:
    linears = {layer.linears: (layer.precision, layer.quantized) for layer in layers_of(name) if layer.kind == "linear"}
    quantized = ("patch_embed", "blocks.0.attention.qkv", "blocks.0.attention.proj", "blocks.0.mlp.0", "blocks.0.mlp.2")
    assert linears == {(node,): ("int8", True) for node in quantized} | {("head",): ("fp16", False)}


@pytest.mark.parametrize("name", DETAILED)
def test_what_a_layer_does_is_told_by_its_type_its_tactic_and_its_nodes(name: str) -> None:
    layers = layers_of(name)
    assert [layer.kind for layer in layers] == [
        "reformat", "linear", "norm", "linear", "reformat", "attention", "quantize", "linear", "other", "norm", "linear",
        "linear", "norm", "linear", "reformat",
    ]  # fmt: skip
    (attention,) = (layer for layer in layers if layer.kind == "attention")
    assert attention.origins == (
        "blocks.0.attention/Mul",
        "blocks.0.attention",
        "blocks.0.attention/Softmax",
        "blocks.0.attention.2",
    )
    assert attention.precision == "fp16" and attention.linears == ()


def test_both_schemas_say_the_same() -> None:
    assert layers_of("detailed_10") == layers_of("detailed_11")
    assert "Bindings" in json.loads(text_of("detailed_10")) and "I/O Tensors" in json.loads(text_of("detailed_11"))


def test_products_and_a_softmax_of_their_own_are_no_fused_attention() -> None:
    nodes = ["b.0.attn", "b.0.attn/Softmax", "b.0.attn.2", "b.0.attn.proj"]
    data = {
        "Layers": [{"Name": f"{i}", "LayerType": "gemm", "Metadata": f"[ONNX Layer: {node}]"} for i, node in enumerate(nodes)]
    }
    assert [layer.kind for layer in parse(json.dumps(data), {})] == ["product", "softmax", "product", "linear"]


@pytest.mark.parametrize("separator", ["", "\x1e", "\x1f"])
def test_nodes_are_read_whatever_separates_them(separator: str) -> None:
    metadata = separator.join(f"[ONNX Layer: {node}]" for node in ("a.fc", "a.fc/Add", "a.fc"))
    (layer,) = parse(json.dumps({"Layers": [{"Name": "x", "LayerType": "gemm", "Metadata": metadata}]}), {})
    assert layer.origins == ("a.fc", "a.fc/Add") and layer.linears == ("a.fc",)


@pytest.mark.parametrize(
    ("told", "precision"),
    [
        ({"Format/Datatype": "Row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"Format/Datatype": "Half"}, "fp16"),
        ({"Format": "Row major linear FP16 format", "Datatype": "Half"}, "fp16"),
        ({"Format": "Row major linear format", "Datatype": "BFloat16"}, "bf16"),
        ({"Format": "Row major linear format", "DataType": "Float"}, "fp32"),
        ({"Format/Datatype": "Bool"}, "unknown"),
    ],
)
def test_types_have_several_names(told: dict[str, str], precision: str) -> None:
    for key in ("Inputs", "Outputs"):
        (layer,) = parse(json.dumps({"Layers": [{"Name": "x", key: [{"Name": "mask", "Format/Datatype": "Bool"}, told]}]}), {})
        assert layer.precision == precision


def test_of_names_alone_the_layers_are_known_and_their_precisions_are_not() -> None:
    layers = layers_of("names_only")
    assert [layer.kind for layer in layers] == ["reformat", "linear", "linear", "attention", "linear"]
    assert {layer.precision for layer in layers} == {"unknown"} and layers[2].linears == ("blocks.0.attention.qkv",)


def test_times_of_layers_that_only_the_profiler_knows_are_kept() -> None:
    layers = parse(text_of("detailed_10"), {"head_myl0_13": 0.5, "Memcpy": 0.25})
    assert sum(layer.ms for layer in layers) == 0.75 and layers[-1] == Layer("Memcpy", "", "other", "unknown", 0.25)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"Layers": 1}', '{"Layers": [1]}', '{"Layers": [{"LayerType": "gemm"}]}'], ids=repr
)
def test_damaged_json_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(EngineError, match="the engine inspector's answer") as caught:
        parse(text, {})
    assert caught.value.hint


def test_times_of_another_engine_are_refused() -> None:
    with pytest.raises(EngineError, match="such as 'conv1', are not those"):
        parse(text_of("detailed_10"), {"conv1": 1.0})


class Recorded:
    """A session that answers with a file and with fixed times, as the GPU that would give others is not here."""

    def __init__(self) -> None:
        self.input: NDArray[Any] = np.zeros((4, 256, 588), np.int8)
        self.ran: list[int] = []

    def run(self, count: int) -> NDArray[np.float32]:
        self.ran.append(int(self.input[:count].sum()))
        return np.zeros((count, 10), np.float32)

    def profile(self, count: int, calls: int) -> dict[str, list[float]]:
        return {name: [0.001] * calls for name in names_of("detailed_11")}

    def inspect(self) -> str:
        return text_of("detailed_11")


def test_a_session_is_timed_on_the_rows_that_are_given() -> None:
    session = Recorded()
    profile = measure(session, np.ones((2, 256, 588), np.int8), 0)
    assert set(session.ran) == {2 * 256 * 588} and profile.calls >= 10
    assert [layer.ms for layer in profile.layers] == pytest.approx([0.001] * 15)
    assert sum(layer.ms for layer in profile.layers) + profile.between_ms == pytest.approx(profile.profiled_ms)


def test_the_files_are_as_documented() -> None:
    for path in sorted(DATA.glob("*.json")):
        assert set(json.loads(Path(path).read_text("utf-8"))) in ({"Layers", "Bindings"}, {"Layers", "I/O Tensors"})
