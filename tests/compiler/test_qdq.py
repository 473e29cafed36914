"""One Q/DQ pair and one weight at a time, as onnxruntime computes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node

from tests.models import float_graph, operators, run_graph
from vitedge.compiler.graph import linear_bias, linears
from vitedge.compiler.qdq import QMAX, Rounded, quantize_activation, quantize_weight
from vitedge.compiler.rounding import round_to_nearest
from vitedge.compiler.weights import weight_scales

Float32 = NDArray[np.float32]


@settings(deadline=None, max_examples=60)
@given(amax=st.floats(1e-6, 1e6), seed=st.integers(0, 2**32 - 1))
def test_a_round_trip_is_off_by_half_a_step_inside_the_range_and_clips_outside(amax: float, seed: int) -> None:
    model = float_graph([make_node("Identity", ["x"], ["a"]), make_node("Neg", ["a"], ["y"])], {}, (64,))
    quantize_activation(model, "a", amax, [model.graph.node[1]])
    x = np.random.default_rng(seed).uniform(-2 * amax, 2 * amax, (1, 64)).astype(np.float32)
    x[0, :3] = 0, amax, -amax
    back = -run_graph(model, x)[0]
    step, inside = amax / QMAX, np.abs(x) <= amax
    assert np.all(np.abs(back - x)[inside] <= step / 2 * 1.0001)
    assert np.all(np.abs(back)[~inside] <= (QMAX + 1) * step * 1.0001) and np.all(np.sign(back) == np.sign(np.rint(x / step)))
    assert back[0, 0] == 0, "zero stays zero"


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e30])
def test_ranges_of_nothing_and_of_much_are_finite(amax: float) -> None:
    model = float_graph([make_node("Neg", ["x"], ["y"])], {}, (3,))
    quantize_activation(model, "x", amax, [model.graph.node[0]])
    assert np.isfinite(run_graph(model, np.float32([[0, 1, -1]]))[0]).all()


def test_readers_that_are_not_named_read_the_float_tensor() -> None:
    nodes = [make_node("Neg", ["x"], ["y"]), make_node("Neg", ["x"], ["z"])]
    model = float_graph(nodes, {}, (4,), outputs=("y", "z"))
    quantize_activation(model, "x", 1.0, [model.graph.node[1]])
    assert operators(model) == ["Neg", "QuantizeLinear", "DequantizeLinear", "Neg"]
    x = np.float32([[0.001, 0.3, -0.7, 5]])
    y, z = run_graph(model, x)
    np.testing.assert_array_equal(y, -x)
    assert (z != -x).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Gemm transB"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_weight_in_integers_is_the_weight_to_half_a_step(form: str, bits: int, per_channel: bool, biased: bool) -> None:
    random = np.random.default_rng(0)
    weight, vector = (
        random.normal(size=size).astype(np.float32) for size in ((5, 3), (3,))
    )  # 15 values of 4 bits: an odd number
    flipped = {"transB": 1} if form.endswith("transB") else {}
    nodes = [make_node(form.partition(" ")[0], ["x", "w"], ["y"], name="linear", **flipped)]
    model = float_graph(nodes, {"w": weight.T if flipped else weight}, (5,))
    model.opset_import[0].version = 21
    (linear,) = linears(model)
    scales = weight_scales(weight, 2 ** (bits - 1) - 1, per_channel)
    integers = round_to_nearest(weight, scales, 2 ** (bits - 1) - 1)
    quantize_weight(model, linear, Rounded(integers, scales, bits, vector if biased else None))
    assert operators(model).count("Add") == biased  # it had none
    stored = {tensor.data_type for tensor in model.graph.initializer if tensor.name.startswith("linear.weight.int")}
    assert stored == {TensorProto.INT8 if bits == 8 else TensorProto.INT4}
    x = random.normal(size=(4, 5)).astype(np.float32)
    expected = x @ (integers * scales) + (vector if biased else 0)
    np.testing.assert_allclose(run_graph(model, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_bias_is_replaced_where_there_is_one() -> None:
    constants = {"w": np.eye(2, dtype=np.float32), "b": np.float32([1, 2])}
    model = float_graph([make_node("Gemm", ["x", "w", "b"], ["y"], name="linear")], constants, (2,))
    (linear,) = linears(model)
    np.testing.assert_array_equal(linear_bias(model, linear), [1, 2])
    quantize_weight(model, linear, Rounded(np.eye(2, dtype=np.int8), np.float32([1, 1]), 8, np.float32([3, 4])))
    assert operators(model) == ["DequantizeLinear", "Gemm"]
    np.testing.assert_array_equal(run_graph(model, np.float32([[1, 1]]))[0], [[4, 5]])
    kept = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), [1, 2])  # others may read it
