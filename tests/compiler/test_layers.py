"""Linears found in float and Q/DQ graphs alike, and run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx")

from onnx import ModelProto, NodeProto, helper

from tests.compiler.conftest import Tiny
from tests.engines import Made, quantize_plainly
from tests.models import float_graph, run_graph
from vitedge.compiler import graph
from vitedge.compiler.layers import Layer, Values, find_layers, find_stretches, landmarks, open_stretches
from vitedge.compiler.precision import to_half

RANDOM = np.random.default_rng(0)
W1, W2, B = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((6, 8), (8, 6), (8,)))


def node(operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=name or f"{output}/{operator}", **attributes)


def steps(model: ModelProto) -> list[tuple[str, str, str]]:
    return [(layer.name, layer.input, layer.output) for layer in find_layers(model)]


def alone(model: ModelProto, layers: Sequence[Layer], inputs: Values) -> dict[str, NDArray[Any]]:
    known = landmarks(model)
    return open_stretches(model, find_stretches(model, layers, known), known)(inputs)


def x(count: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)


def two_linears() -> ModelProto:
    """fc1 with a bias, whose output fc2 reads just as it is."""
    nodes = [node("MatMul", "xw", "p", "fc1"), node("Add", "bp", "h"), node("Gemm", "hv", "y", "fc2")]
    return float_graph(nodes, {"w": W1, "b": B, "v": W2}, [6])


def test_a_linear_goes_from_its_input_to_behind_its_bias() -> None:
    assert steps(two_linears()) == [("fc1", "x", "h"), ("fc2", "h", "y")]
    assert [layer.shape for layer in find_layers(two_linears())] == [(6, 8), (8, 6)]


@pytest.mark.parametrize("more", [[node("Relu", "p", "z")], []], ids=["read twice", "an output"])
def test_an_add_that_is_not_the_only_reader_is_no_bias(more: list[NodeProto]) -> None:
    nodes = [node("MatMul", "xw", "p", "fc1"), node("Add", "pb", "y"), *more]
    model = float_graph(nodes, {"w": W1, "b": B}, [6], ["y", "z" if more else "p"])
    assert steps(model) == [("fc1", "x", "p")]


def test_products_of_two_activations_are_no_linears() -> None:
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "xt", "y", "scores")]
    assert steps(float_graph(nodes, {}, [6])) == []


def test_the_quantized_graph_has_the_same_linears_with_the_same_tensors(made: Made, tmp_path: Path) -> None:
    float_, int8 = graph.load(made.graphs["fp32"]), graph.load(quantize_plainly(made, tmp_path))
    assert steps(float_) == steps(int8) and len(steps(int8)) == 18
    assert not any(layer.input.endswith((".dq", ".int8")) for layer in find_layers(int8)[1:])
    operators = [[node.op_type for node in layer.nodes] for layer in find_layers(int8)]
    assert operators[0] == ["DequantizeLinear", "MatMul", "Add"]  # the patches are int8 as they come
    assert operators[1] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]


def test_layers_run_alone_as_they_do_in_the_graph_even_where_one_reads_another() -> None:
    model = two_linears()
    layers = find_layers(model)
    inputs = {"x": x(), "h": RANDOM.normal(size=(2, 8)).astype(np.float32)}
    given = alone(model, layers, inputs)
    assert given.keys() == {"h", "y"}
    assert np.allclose(given["h"], inputs["x"] @ W1 + B, atol=1e-5)
    assert np.allclose(given["y"], inputs["h"] @ W2, atol=1e-5)  # of the h that was given, not of the one just made


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_every_layer_of_a_real_graph_gives_alone_what_it_gives_inside(made: Made, variant: str) -> None:
    model = graph.load(made.graphs[variant])
    layers = find_layers(model)
    card = graph.model_card(model)
    rows = np.random.default_rng(2).integers(-128, 128, (1, *card.inputs[0].shape[1:])).astype(np.int8)
    names = list(dict.fromkeys([*(layer.input for layer in layers), *(layer.output for layer in layers)]))
    values = dict(zip(names, run_graph(model, rows, names), strict=True))
    for name, value in alone(model, layers, {**values, model.graph.input[0].name: rows}).items():
        assert np.allclose(value, values[name], atol=1e-5), name


def test_a_stretch_begins_where_the_graphs_last_had_a_tensor_in_common(made: Made) -> None:
    model = graph.load(made.graphs["fp32"])
    layers = {layer.name: layer for layer in find_layers(model)}
    query, proj = layers["blocks.1.attention.qkv"], layers["blocks.1.attention.proj"]
    known = landmarks(model)
    (whole,) = find_stretches(model, [proj], known)
    assert whole.inputs == (proj.input,) and whole.within == ()
    known -= {query.input, query.output, proj.input}
    (longer,) = find_stretches(model, [proj], known)
    norm = graph.producers(model)[query.input]
    assert longer.inputs == (norm.input[0],) and longer.within == (query.name,)
    (all_,) = find_stretches(model, [proj], ())
    assert all_.inputs == (model.graph.input[0].name,) and len(all_.within) == 6


def test_layers_in_fp16_take_inputs_in_fp32(tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    half = graph.load(tiny.onnx)
    to_half(half)
    assert steps(model)[:-1] == steps(half)[:-1]  # the answer is cast back to FP32 under its old name
    layer, same = find_layers(model)[3], find_layers(half)[3]
    inputs = {layer.input: RANDOM.normal(size=(1, 5, layer.shape[0])).astype(np.float32)}
    exact, given = alone(model, [layer], inputs)[layer.output], alone(half, [same], inputs)[layer.output]
    assert given.dtype == np.float16 and 0 < np.abs(exact - given).max() < 0.02
