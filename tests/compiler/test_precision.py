"""The FP16 form of a graph: close to the FP32 form, of one type throughout, and refused where FP16 cannot hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor

from tests.compiler.conftest import Tiny
from tests.compiler.families import NAMES, Exported
from tests.compiler.test_export import OverlappingStem, TokensAreAnOutput, Upsampled, converted
from tests.engines import sqnr_db
from tests.models import engine_rows, float_graph, operators, random_images, run_graph
from vitedge.compiler import graph
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.precision import to_half
from vitedge.compiler.quantize import quantize
from vitedge.errors import ModelError
from vitedge.specs import ModelCard, Recipe

Load = Callable[[str], Exported]
SMALLEST = 2.0**-24


def halved(model: ModelProto) -> ModelProto:
    """The FP16 form of a copy, every type of which ONNX has checked."""
    copy = ModelProto()
    copy.CopyFrom(model)
    to_half(copy)
    onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
    return copy


def rows(card: ModelCard) -> NDArray[np.generic]:
    return engine_rows(random_images(4, card.preprocess), card)


def float_types(model: ModelProto) -> dict[str, set[int]]:
    """By type, the float initializers of a graph."""
    found: dict[int, set[str]] = {TensorProto.FLOAT: set(), TensorProto.FLOAT16: set()}
    for tensor in model.graph.initializer:
        found.setdefault(tensor.data_type, set()).add(tensor.name)
    return {"fp32": found[TensorProto.FLOAT], "fp16": found[TensorProto.FLOAT16]}


# The function


@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_the_same_to_eleven_bits(name: str, family: Load) -> None:
    exported = family(name)
    half = halved(exported.model)
    assert float_types(half)["fp32"] == set() != float_types(half)["fp16"]
    (reference,), (given,) = (run_graph(model, rows(exported.card)) for model in (exported.model, half))
    assert 55 < sqnr_db(reference, given) < 90  # close, and not FP32


@pytest.mark.parametrize("kind", [OverlappingStem, TokensAreAnOutput, Upsampled], ids=lambda kind: kind.__name__)
def test_images_maps_and_several_outputs_do_too(kind: type) -> None:
    model, card = converted(kind).model, converted(kind).card
    for reference, given in zip(run_graph(model, rows(card)), run_graph(halved(model), rows(card)), strict=True):
        assert sqnr_db(reference, given) > 60


def test_the_int8_form_is_as_far_from_fp32_in_either_type(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny.onnx, calibrate(tiny.onnx, tiny.files, Recipe()).table, tmp_path / "int8.onnx", tiny.files)
    reference, int8 = graph.load(tiny.onnx), graph.load(tmp_path / "int8.onnx")
    half, patches = halved(int8), rows(graph.model_card(reference))
    (y,), (single,), (halves,) = (run_graph(model, patches) for model in (reference, int8, half))
    assert abs(sqnr_db(y, single) - sqnr_db(y, halves)) < 1.5
    known = graph.constants(half)
    for node in half.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert known[node.input[1]].dtype == np.float16 and known[node.input[2]].dtype == np.int8


def test_inputs_outputs_and_metadata_stay(tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    half = halved(model)
    assert (half.graph.input, half.graph.output) == (model.graph.input, model.graph.output)
    assert half.metadata_props == model.metadata_props
    assert operators(half) == [*operators(model), "Cast"]


def test_layernorm_adds_up_in_fp32(tiny: Tiny) -> None:
    norms = [node for node in halved(graph.load(tiny.onnx)).graph.node if node.op_type == "LayerNormalization"]
    assert norms and all(graph.attribute(node, "stash_type", 1) == TensorProto.FLOAT for node in norms)


def test_the_factors_of_resize_stay_fp32_as_onnx_wants_them() -> None:
    half = halved(converted(Upsampled).model)
    factors = {node.input[2] for node in half.graph.node if node.op_type == "Resize"}
    assert float_types(half)["fp32"] == factors != set()


def test_types_in_attributes_follow() -> None:
    nodes = [
        make_node("Constant", [], ["one"], value=make_tensor("", TensorProto.FLOAT, [1], [1.0])),
        make_node("Constant", [], ["two"], value_float=2.0),
        make_node("Constant", [], ["three"], value_floats=[1.0, 2.0, 3.0]),
        make_node("Constant", [], ["shape"], value_ints=[3]),
        make_node("ConstantOfShape", ["shape"], ["zeros"]),
        make_node("ConstantOfShape", ["shape"], ["fours"], value=make_tensor("", TensorProto.FLOAT, [1], [4.0])),
        make_node("Cast", ["shape"], ["five"], to=TensorProto.FLOAT),
        make_node("Sum", ["x", "one", "two", "three", "zeros", "fours", "five"], ["y"]),
    ]
    model = float_graph(nodes, {}, (3,))
    (y,) = run_graph(halved(model), np.zeros((2, 3), np.float32))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, [[11, 12, 13]] * 2)


# What FP16 cannot hold


def scaled(**constants: NDArray[np.float32]) -> ModelProto:
    """y = x * a / b"""
    nodes = [make_node("Mul", ["x", "a"], ["z"]), make_node("Div", ["z", "b"], ["y"])]
    return float_graph(nodes, constants, (2,))


@pytest.mark.parametrize("worst", [65536.0, -1e5, 9e8])
def test_a_weight_out_of_range_is_named(worst: float) -> None:
    model = scaled(a=np.float32([1, worst]), b=np.float32(1))
    with pytest.raises(
        ModelError, match=f"the constant 'a' reaches {abs(worst):.3g}, but FP16 ends at 65504".replace("+", r"\+")
    ) as e:
        to_half(model)
    assert "fp32" in str(e.value.hint)


@pytest.mark.parametrize("mask", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_a_mask_still_masks(mask: float) -> None:
    nodes = [make_node("Add", ["x", "mask"], ["z"]), make_node("Softmax", ["z"], ["y"])]
    model = float_graph(nodes, {"mask": np.float32([0, mask, 0])}, (3,))
    (y,) = run_graph(halved(model), np.float32([[1, 100, 1]]))
    np.testing.assert_array_equal(y, [[0.5, 0, 0.5]])


def test_what_is_divided_by_does_not_become_zero() -> None:
    half = halved(scaled(a=np.float32([0, -1e-12]), b=np.float32(1e-12)))
    np.testing.assert_array_equal(graph.constants(half)["a"], np.float16([0, -SMALLEST]))
    np.testing.assert_array_equal(run_graph(half, np.ones((1, 2), np.float32))[0], [[0, -1]])


def dequantized(weight: NDArray[np.generic], scale: NDArray[np.float32], **attributes: int) -> ModelProto:
    """y = x @ dequantized weight"""
    nodes = [make_node("DequantizeLinear", ["w", "s"], ["d"], **attributes), make_node("MatMul", ["x", "d"], ["y"])]
    model = float_graph(nodes, {"s": scale}, (len(weight),))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.opset_import[0].version = 21
    return model


def weight_of(model: ModelProto) -> NDArray[np.float64]:
    """The dequantized weight, computed here."""
    known, (node,) = graph.constants(model), [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    weight, scale = known["w"].astype(np.float64), known["s"].astype(np.float64)
    block = graph.attribute(node, "block_size", 0)
    return weight * (np.repeat(scale, block, 0)[: len(weight)] if block else scale)


def test_a_dead_channel_and_tiny_ones_keep_their_weights_to_half_a_step() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (64, 6)).astype(np.int8)
    scale = np.float32([1e-3, np.finfo(np.float32).tiny, 5e-5, 1.7e-6, 1.4 * SMALLEST, 1e-9])
    weight[:, 1] = 0
    model = dequantized(weight, scale, axis=1)
    half = halved(model)
    known = graph.constants(half)
    assert (known["s"] > 0).all() and (known["s"][1:] >= scale[1:]).all()
    np.testing.assert_array_equal(known["w"][:, 0], weight[:, 0])
    steps = np.abs(weight_of(half) - weight_of(model)) / known["s"]
    assert (steps[:, 1:] <= 0.5001).all() and not known["w"][:, 1].any()


@pytest.mark.parametrize("length", [8, 7])
def test_blocks_of_int4_are_rounded_by_their_own_scales(length: int) -> None:
    weight = np.random.default_rng(0).integers(-7, 8, (length, 2)).astype(ml_dtypes.int4)
    model = dequantized(weight, np.float32([[0.5, 1e-7], [1.3 * SMALLEST, 0.25]]), axis=0, block_size=4)
    half = halved(model)
    assert graph.constants(half)["w"].dtype == ml_dtypes.int4
    np.testing.assert_allclose(weight_of(half), weight_of(model), rtol=0, atol=SMALLEST)
    np.testing.assert_array_equal(graph.constants(half)["w"][4:, 1], weight[4:, 1])


def test_an_activation_that_is_always_zero_keeps_a_scale_that_is_not() -> None:
    scale = np.float32(np.finfo(np.float32).tiny)
    nodes = [make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    half = halved(float_graph(nodes, {"s": scale, "z": np.int8(0)}, (2,)))
    assert float(graph.constants(half)["s"]) == SMALLEST
    np.testing.assert_array_equal(run_graph(half, np.zeros((1, 2), np.float32))[0], [[0, 0]])
