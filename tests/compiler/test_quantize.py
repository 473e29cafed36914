"""The quantization contract, held against the weights of the torch module and arithmetic in numpy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.helper import make_node
from torch import nn

from tests.compiler.conftest import Tiny
from tests.engines import sqnr_db
from tests.models import DEPTH, PLAIN, engine_rows, float_graph, operators, random_images, run_graph, tiny_preprocess
from vitedge.compiler import graph
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.qdq import QMAX
from vitedge.compiler.quantize import leave_float, quantize, quantize_linears
from vitedge.compiler.rounding import round_to_nearest
from vitedge.compiler.select import chosen_linears, quantized_activations
from vitedge.compiler.weights import weight_scales
from vitedge.errors import ModelError
from vitedge.images import decode
from vitedge.preprocess import resize
from vitedge.specs import ModelCard, Recipe, ScaleTable

RECIPE = Recipe(min_images=4)


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """An INT8 graph, the table it was made with, and ways to look around in it."""

    path: Path
    model: ModelProto
    table: ScaleTable
    makers: dict[str, NodeProto]
    known: dict[str, NDArray[Any]]

    def node(self, name: str) -> NodeProto:
        return next(node for node in self.model.graph.node if node.name == name)

    def weight(self, name: str) -> NodeProto:
        """The DequantizeLinear in front of a Linear's weight."""
        return self.makers[self.node(name).input[1]]


def quantized(tiny: Tiny, folder: Path, recipe: Recipe = RECIPE) -> Quantized:
    table = calibrate(tiny.onnx, tiny.files, recipe).table
    quantize(tiny.onnx, table, folder / "int8.onnx", tiny.files)
    model = graph.load(folder / "int8.onnx")
    return Quantized(folder / "int8.onnx", model, table, graph.producers(model), graph.constants(model))


@pytest.fixture(scope="module")
def int8(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return quantized(tiny, tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The weights as torch has them, each rounded to nearest."""
    return quantized(tiny, tmp_path_factory.mktemp("plain"), PLAIN)


def torch_linears(tiny: Tiny) -> dict[str, nn.Linear]:
    return {name: module for name, module in tiny.module.named_modules() if isinstance(module, nn.Linear)}


def rows(tiny: Tiny) -> NDArray[np.int8]:
    """The calibration images as patches."""
    images = np.stack([resize(decode(file.path), tiny_preprocess()) for file in tiny.files])
    return np.asarray(engine_rows(images, ModelCard("tiny", "embed", tiny_preprocess(), patch=8)))


# What is quantized


def test_every_linear_gets_int8_weights_and_an_int8_input(tiny: Tiny, int8: Quantized) -> None:
    assert len(torch_linears(tiny)) == 6 * DEPTH + 1
    for name in torch_linears(tiny):
        dequantized = int8.makers[int8.node(name).input[0]]
        assert dequantized.op_type == int8.weight(name).op_type == "DequantizeLinear"
        assert int8.makers[dequantized.input[0]].op_type == "QuantizeLinear"
        assert int8.known[int8.weight(name).input[0]].dtype == np.int8


def test_the_patch_product_has_int8_weights_and_reads_the_engines_own_int8_input(int8: Quantized) -> None:
    assert int8.makers[int8.node("patch_embed").input[0]].input[0] == "patches"
    assert int8.known[int8.weight("patch_embed").input[0]].dtype == np.int8


def test_one_quantizelinear_serves_q_k_and_v(int8: Quantized) -> None:
    for block in range(DEPTH):
        inputs = {int8.node(f"blocks.{block}.attention.{name}").input[0] for name in "qkv"}
        assert len(inputs) == 1
    counts = Counter(operators(int8.model))
    assert counts["QuantizeLinear"] == 4 * DEPTH + 1  # after each norm, and in front of proj, fc2 and head
    assert counts["DequantizeLinear"] == 1 + counts["QuantizeLinear"] + 6 * DEPTH + 2  # patches, activations, weights


def test_nothing_but_linears_reads_int8_values(tiny: Tiny, int8: Quantized) -> None:
    names = {"patch_embed", *torch_linears(tiny)}
    readers = graph.consumers(int8.model)
    for node in int8.model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in readers[node.output[0]]] == ["DequantizeLinear"]
        if node.op_type == "DequantizeLinear":
            assert {reader.name for reader in readers[node.output[0]]} <= names
    kept = [node for node in int8.model.graph.node if node.op_type in ("Add", "LayerNormalization", "Softmax", "Gelu", "Pad")]
    assert Counter(node.op_type for node in kept)["LayerNormalization"] == 2 * DEPTH + 1
    for node in kept:
        assert not any(int8.makers[name].op_type == "DequantizeLinear" for name in node.input if name in int8.makers)


def test_products_of_attention_stay_in_floating_point(int8: Quantized) -> None:
    products = [node for node in int8.model.graph.node if node.op_type == "MatMul" and node.input[1] in int8.makers]
    batched = [node for node in products if int8.makers[node.input[1]].op_type != "DequantizeLinear"]
    assert len(batched) == 2 * DEPTH
    assert all(int8.makers[name].op_type != "DequantizeLinear" for node in batched for name in node.input)


# Scales


def test_everything_is_symmetric(int8: Quantized) -> None:
    for node in int8.model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero, scale = int8.known[node.input[2]], int8.known[node.input[1]]
            assert zero.dtype == np.int8 and not zero.any() and zero.shape == scale.shape
            assert scale.dtype == np.float32 and (scale > 0).all() and np.isfinite(scale).all()


def test_activations_have_one_scale_that_puts_their_range_at_127(int8: Quantized) -> None:
    for name, amax in int8.table.amax.items():
        (node,) = [n for n in int8.model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]
        scale = int8.known[node.input[1]]
        assert scale.shape == () and float(scale) == np.float32(amax / QMAX)
        back = int8.makers[f"{name}.dq"]
        assert back.input[1] == node.input[1] and back.input[0] == node.output[0]


def test_weights_have_a_scale_an_output_channel_that_puts_its_largest_at_127(tiny: Tiny, plain: Quantized) -> None:
    for name, linear in torch_linears(tiny).items():
        weight = linear.weight.numpy()  # [out, in]
        node = plain.weight(name)
        stored, scale = plain.known[node.input[0]], plain.known[node.input[1]]
        axis = graph.attribute(node, "axis")
        turned = stored if axis == 0 else stored.T
        assert scale.shape == (len(weight),) == (stored.shape[axis],)
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=1) / 127, rtol=1e-6)
        assert (np.abs(turned.astype(int)).max(axis=1) == 127).all()
        np.testing.assert_array_equal(turned, np.rint(weight / scale[:, None]))
        assert np.abs(turned * scale[:, None] - weight).max() <= scale.max() / 2 * 1.001


def test_per_tensor_weights_have_one_scale(tiny: Tiny, tmp_path: Path) -> None:
    coarse = quantized(tiny, tmp_path, dataclasses.replace(PLAIN, per_channel=False))
    for name, linear in torch_linears(tiny).items():
        scale = coarse.known[coarse.weight(name).input[1]]
        assert scale.shape == () and float(scale) == pytest.approx(np.abs(linear.weight.numpy()).max() / 127, rel=1e-6)
    assert run_graph(coarse.model, rows(tiny))[0].shape == (20, 5)


WEIGHTS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


@settings(deadline=None)
@given(weight=WEIGHTS, qmax=st.sampled_from([7, 127]), per_channel=st.booleans())
def test_no_weight_is_off_by_more_than_half_a_step(weight: NDArray[np.float32], qmax: int, per_channel: bool) -> None:
    scales = weight_scales(weight, qmax, per_channel)
    integers = round_to_nearest(weight, scales, qmax)
    assert scales.shape == ((weight.shape[1],) if per_channel else ())
    assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() <= qmax
    assert (np.abs(integers * scales.astype(np.float64) - weight) <= scales * 0.5001).all()


def test_a_channel_of_zeros_stays_zeros() -> None:
    weight = np.float32([[0, 1], [0, -2], [0, 0.5]])
    scales = weight_scales(weight, 127, per_channel=True)
    assert (scales > 0).all()
    np.testing.assert_array_equal(round_to_nearest(weight, scales, 127), [[0, 64], [0, -127], [0, 32]])
    zeros = np.zeros((2, 3), np.float32)
    assert not round_to_nearest(zeros, weight_scales(zeros, 127, per_channel=False), 127).any()


def test_an_activation_that_is_always_zero_does_no_harm(tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    names = quantized_activations(model, PLAIN)
    quantize_linears(model, ScaleTable(PLAIN, "", "", 4, dict.fromkeys(names, 0.0)))
    assert np.isfinite(run_graph(model, rows(tiny))[0]).all()


# The function


def test_one_linear_equals_integer_arithmetic_in_numpy(tiny: Tiny, plain: Quantized) -> None:
    for name in ("blocks.0.attention.k", "blocks.1.fc2", "head"):
        node = plain.node(name)
        quantizer = plain.makers[plain.makers[node.input[0]].input[0]]
        end = node if node.op_type == "Gemm" else next(n for n in plain.model.graph.node if node.output[0] in n.input)
        x, y = run_graph(plain.model, rows(tiny), [quantizer.input[0], end.output[0]])
        x_scale = float(plain.known[quantizer.input[1]])
        integers = np.clip(np.rint(x / np.float32(x_scale)), -128, 127).astype(np.int64)
        dequantizer = plain.weight(name)
        stored, w_scale = plain.known[dequantizer.input[0]].astype(np.int64), plain.known[dequantizer.input[1]]
        matrix = stored.T if graph.attribute(dequantizer, "axis") == 0 else stored
        expected = (integers @ matrix) * (x_scale * w_scale.astype(np.float64)) + torch_linears(tiny)[name].bias.numpy()
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_patch_product_has_no_error_but_that_of_its_weights(tiny: Tiny, int8: Quantized) -> None:
    node = int8.node("patch_embed")
    (tokens,) = run_graph(int8.model, rows(tiny), [node.output[0]])
    dequantizer = int8.weight("patch_embed")
    matrix = int8.known[dequantizer.input[0]].astype(np.int64)
    expected = (rows(tiny).astype(np.int64) @ matrix) * (int8.known[dequantizer.input[1]].astype(np.float64) / 128)
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_quantized_model_is_close_to_the_float_model(tiny: Tiny, int8: Quantized) -> None:
    reference, given_ = (run_graph(model, rows(tiny))[0] for model in (graph.load(tiny.onnx), int8.model))
    assert 15 < sqnr_db(reference, given_) < 80  # close, and not the float model itself
    fresh = random_images(8, tiny_preprocess())
    unseen = np.asarray(engine_rows(fresh, ModelCard("tiny", "embed", tiny_preprocess(), patch=8)))
    assert sqnr_db(run_graph(graph.load(tiny.onnx), unseen)[0], run_graph(int8.model, unseen)[0]) > 15


def test_quantizing_twice_writes_the_same_bytes(tiny: Tiny, int8: Quantized, tmp_path: Path) -> None:
    assert quantize(tiny.onnx, int8.table, tmp_path / "again.onnx", tiny.files) == len(torch_linears(tiny)) + 1
    assert (tmp_path / "again.onnx").read_bytes() == int8.path.read_bytes()


def test_float_weights_are_gone_and_card_and_recipe_are_there(tiny: Tiny, int8: Quantized) -> None:
    assert not any(array.dtype == np.float32 and array.ndim == 2 for array in int8.known.values())
    assert int8.path.stat().st_size < tiny.onnx.stat().st_size
    assert graph.model_card(int8.model) == graph.model_card(graph.load(tiny.onnx))
    assert graph.metadata(int8.model)["vitedge.variant"] == "int8" and "vitedge.recipe" in graph.metadata(int8.model)


# What is left out


def test_skipped_linears_keep_their_float_weights(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, skip=("head", "blocks.*.attention.[qk]", "patch_embed"))
    partly = quantized(tiny, tmp_path, recipe)
    skipped = {"head", "patch_embed", *(f"blocks.{block}.attention.{name}" for block in range(DEPTH) for name in "qk")}
    chosen = {linear.name for linear in chosen_linears(graph.load(tiny.onnx), recipe)}
    assert chosen == {"patch_embed", *torch_linears(tiny)} - skipped
    for name in skipped:
        assert partly.known[partly.node(name).input[1]].dtype == np.float32
        assert partly.makers[partly.node(name).input[0]].op_type != "DequantizeLinear" or name == "patch_embed"
    for name in chosen:
        assert partly.weight(name).op_type == "DequantizeLinear"
    assert sqnr_db(run_graph(graph.load(tiny.onnx), rows(tiny))[0], run_graph(partly.model, rows(tiny))[0]) > 15


def test_a_pattern_that_fits_no_linear_is_an_error_that_shows_names(tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    with pytest.raises(ModelError, match=r"the recipe skips 'block.*', but no Linear has such a name") as caught:
        chosen_linears(model, Recipe(skip=("head", "block.*")))
    assert "The 14 names go from patch_embed to head" in str(caught.value.hint)


def test_to_skip_everything_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="there is nothing to quantize in the model: the recipe skips every one of its 14"):
        chosen_linears(graph.load(tiny.onnx), Recipe(skip=("*",)))
    with pytest.raises(ModelError, match="it has no Linear"):
        chosen_linears(float_graph([make_node("Relu", ["x"], ["y"])], {}, (3,)), Recipe())


def test_a_float_recipe_changes_the_metadata_alone(tiny: Tiny, tmp_path: Path) -> None:
    recipe = Recipe(name="bf16", method="none", float_type="bf16")
    leave_float(tiny.onnx, recipe, tmp_path / "bf16.onnx")
    before, after = graph.load(tiny.onnx), graph.load(tmp_path / "bf16.onnx")
    assert after.graph == before.graph
    assert (
        graph.metadata(after)["vitedge.variant"] == "bf16" and '"float_type": "bf16"' in graph.metadata(after)["vitedge.recipe"]
    )
    assert graph.model_card(after) == graph.model_card(before)


# What is refused


def test_scales_of_another_model_are_refused_and_nothing_is_written(tiny: Tiny, int8: Quantized, tmp_path: Path) -> None:
    table = dataclasses.replace(int8.table, model_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"these scales were calibrated on another model than .*fp32.onnx"):
        quantize(tiny.onnx, table, tmp_path / "int8.onnx", tiny.files)
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_a_tensor_names_it(tiny: Tiny, int8: Quantized, tmp_path: Path) -> None:
    missing = list(int8.table.amax)[3]
    amax = {name: value for name, value in int8.table.amax.items() if name != missing}
    with pytest.raises(ModelError, match=f"the scale table has no range for '{missing}'"):
        quantize(tiny.onnx, dataclasses.replace(int8.table, amax=amax), tmp_path / "int8.onnx", tiny.files)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_has_nothing_left_to_quantize(int8: Quantized) -> None:
    with pytest.raises(ModelError, match="there is nothing to quantize in the model: it has no Linear"):
        quantized_activations(int8.model, RECIPE)


def test_two_linears_of_one_weight_are_both_quantized() -> None:
    shared = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nodes = [
        make_node("MatMul", ["x", "w"], ["a"], name="first"),
        make_node("MatMul", ["a", "w"], ["b"], name="second"),
        make_node("Mul", ["b", "w"], ["y"], name="another reader"),
    ]
    model = float_graph(nodes, {"w": shared}, (4, 4))
    x = np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)
    reference = run_graph(model, x)[0]
    table = ScaleTable(PLAIN, "", "", 4, {"x": float(np.abs(x).max()), "a": float(np.abs(x @ shared).max())})
    assert quantize_linears(model, table) == 2
    assert Counter(operators(model))["QuantizeLinear"] == 2
    assert sqnr_db(reference, run_graph(model, x)[0]) > 30
