"""The integer input computes what the convolution made of the normalised image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node

from tests.models import engine_rows, float_graph, operators, random_images, run_graph
from vitedge.compiler.patches import INPUT_SCALE, integer_input
from vitedge.errors import ModelError
from vitedge.specs import ModelCard, Preprocess, TensorSpec

FLATTEN = [make_node("Reshape", ["map", "flat"], ["rows"]), make_node("Transpose", ["rows"], ["y"], perm=[0, 2, 1])]


def card_of(height: int, width: int, channels: int = 3) -> ModelCard:
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    return ModelCard("m", "embed", Preprocess((height, width), mean, std, channels=channels))


def weights(depth: int, channels: int, side: int, *, bias: bool = True) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(depth)
    values: dict[str, NDArray[Any]] = {"w": random.normal(size=(depth, channels, side, side)).astype(np.float32)}
    return values | ({"b": random.normal(size=depth).astype(np.float32)} if bias else {})


def stem(known: dict[str, NDArray[Any]], side: int, **others: Any) -> NodeProto:
    return make_node("Conv", ["x", *known], ["map"], name="stem", kernel_shape=[side, side], strides=[side, side], **others)


def feature_map(images: NDArray[np.uint8], card: ModelCard, known: dict[str, NDArray[Any]], **conv: Any) -> NDArray[np.float64]:
    """Convolution of the normalised images in double precision, in the textbook way."""
    scaled = (images / 255 - np.array(card.preprocess.mean)) / np.array(card.preprocess.std)
    pixels, weight = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy()), torch.from_numpy(known["w"]).double()
    bias = torch.from_numpy(known["b"]).double() if "b" in known else None
    return torch.nn.functional.conv2d(pixels, weight, bias, **conv).numpy()


def assert_equal(given: NDArray[Any], expected: NDArray[Any]) -> None:
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(deadline=None, max_examples=40)
@given(
    side=st.integers(1, 9),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    depth=st.integers(1, 12),
    channels=st.sampled_from([1, 3]),
    bias=st.booleans(),
)
def test_folded_patches_equal_the_convolution_of_the_normalised_image(
    side: int, rows: int, columns: int, depth: int, channels: int, bias: bool
) -> None:
    card, known = card_of(rows * side, columns * side, channels), weights(depth, channels, side, bias=bias)
    model = float_graph(
        [stem(known, side), *FLATTEN], known | {"flat": np.array([-1, depth, rows * columns])}, (channels, *card.preprocess.size)
    )
    card = integer_input(model, card)
    assert card.patch == side and card.inputs == (TensorSpec("patches", (None, rows * columns, side * side * channels), "int8"),)
    assert operators(model) == ["DequantizeLinear", "MatMul", "Add"]
    images = random_images(3, card.preprocess)
    expected = feature_map(images, card, known, stride=side).reshape(3, depth, -1).transpose(0, 2, 1)
    assert_equal(run_graph(model, engine_rows(images, card))[0], expected)


def test_the_input_scale_keeps_fp16_weights_normal_numbers() -> None:
    known = weights(8, 3, 14)
    known["w"] *= 0.02  # as small as those of trained models
    model = float_graph([stem(known, 14), *FLATTEN], known | {"flat": np.array([-1, 8, 4])}, (3, 28, 28))
    integer_input(model, card_of(28, 28))
    (matrix,) = [t for t in model.graph.initializer if t.name == "stem.weight"]
    folded = np.frombuffer(matrix.raw_data, np.float32)
    assert INPUT_SCALE == 2**-7 and (np.abs(folded) > np.finfo(np.float16).tiny).mean() > 0.99


SIDE, ROWS, COLUMNS, DEPTH = 4, 3, 2, 6
OTHER_READERS: dict[str, list[NodeProto]] = {
    "an activation": [make_node("Relu", ["map"], ["y"])],
    "an activation, then the flattening": [
        make_node("Relu", ["map"], ["active"]),
        make_node("Reshape", ["active", "flat"], ["rows"]),
        make_node("Transpose", ["rows"], ["y"], perm=[0, 2, 1]),
    ],
    "a flattening that mixes channels and rows": [make_node("Reshape", ["map", "odd"], ["rows"]), FLATTEN[1]],
    "a flattening without transpose": [make_node("Reshape", ["map", "flat"], ["y"])],
    "a transpose of other axes": [
        make_node("Reshape", ["map", "flat"], ["rows"]),
        make_node("Transpose", ["rows"], ["y"], perm=[2, 0, 1]),
    ],
    "the flattening and something else": [
        make_node("Reshape", ["map", "flat"], ["rows"]),
        make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        make_node("GlobalAveragePool", ["map"], ["mean"]),
        make_node("Reshape", ["mean", "vector"], ["row"]),
        make_node("Add", ["tokens", "row"], ["y"]),
    ],
    "the flattened rows and something else": [
        make_node("Reshape", ["map", "flat"], ["rows"]),
        make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        make_node("MatMul", ["rows", "tokens"], ["y"]),
    ],
}


@pytest.mark.parametrize("readers", OTHER_READERS.values(), ids=OTHER_READERS.keys())
def test_where_the_feature_map_itself_is_read_it_gets_its_shape_back(readers: list[NodeProto]) -> None:
    card, known = card_of(ROWS * SIDE, COLUMNS * SIDE), weights(DEPTH, 3, SIDE)
    shapes = {"flat": [-1, DEPTH, ROWS * COLUMNS], "odd": [-1, DEPTH * ROWS, COLUMNS], "vector": [-1, 1, DEPTH]}
    used = {name for node in readers for name in node.input}
    constants = known | {name: np.array(shape) for name, shape in shapes.items() if name in used}
    model = float_graph([stem(known, SIDE), *readers], constants, (3, *card.preprocess.size))
    images = random_images(3, card.preprocess)
    alone = float_graph(readers, {k: v for k, v in constants.items() if k in shapes}, (DEPTH, ROWS, COLUMNS))
    for node in alone.graph.node:
        node.input[:] = ["x" if name == "map" else name for name in node.input]
    expected = run_graph(alone, feature_map(images, card, known, stride=SIDE).astype(np.float32))[0]
    card = integer_input(model, card)
    assert card.patch == SIDE and "Conv" not in operators(model)
    assert_equal(run_graph(model, engine_rows(images, card))[0], expected)


@pytest.mark.parametrize("other", ["map", "rows"])
def test_a_feature_map_that_is_an_output_besides_keeps_its_shape(other: str) -> None:
    card, known = card_of(ROWS * SIDE, COLUMNS * SIDE), weights(DEPTH, 3, SIDE)
    constants = known | {"flat": np.array([-1, DEPTH, ROWS * COLUMNS])}
    model = float_graph([stem(known, SIDE), *FLATTEN], constants, (3, *card.preprocess.size), ("y", other))
    images = random_images(3, card.preprocess)
    expected = feature_map(images, card, known, stride=SIDE)
    card = integer_input(model, card)
    assert card.patch == SIDE and "Conv" not in operators(model)
    tokens, given = run_graph(model, engine_rows(images, card))
    assert_equal(tokens, expected.reshape(3, DEPTH, -1).transpose(0, 2, 1))
    assert_equal(given, expected if other == "map" else expected.reshape(3, DEPTH, -1))


STEMS: dict[str, dict[str, Any]] = {
    "patches that overlap": {"strides": [2, 2]},
    "patches with gaps": {"strides": [5, 5]},
    "patches that are not square": {"kernel": (4, 2), "strides": [4, 2]},
    "padding": {"pads": [1, 1, 1, 1]},
    "padding on one side": {"pads": [0, 0, 0, 2]},
    "dilation": {"dilations": [2, 2]},
    "groups": {"group": 3},
    "an image that patches do not divide": {"size": (14, 8)},
}


@pytest.mark.parametrize("other", STEMS.values(), ids=STEMS.keys())
def test_any_other_stem_gets_a_uint8_image(other: dict[str, Any]) -> None:
    card, known = card_of(*other.get("size", (12, 8))), weights(6, 3, SIDE)
    options = {"strides": [SIDE, SIDE], **{k: v for k, v in other.items() if k not in ("size", "kernel")}}
    height, width = other.get("kernel", (SIDE, SIDE))
    known["w"] = known["w"][:, : 3 // options.get("group", 1), :height, :width]
    conv = make_node("Conv", ["x", "w", "b"], ["y"], name="stem", kernel_shape=[height, width], **options)
    check_image_input(float_graph([conv], known, (3, *card.preprocess.size)), card)


def test_an_image_that_is_read_twice_is_an_image_input() -> None:
    card, known = card_of(12, 8), weights(6, 3, SIDE)
    nodes = [
        stem(known, SIDE),
        *FLATTEN[:1],
        make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        make_node("Add", ["rows", "mean"], ["y"]),
    ]
    check_image_input(float_graph(nodes, known | {"flat": np.array([-1, 6, 6])}, (3, 12, 8)), card)


def test_a_stem_with_computed_weights_is_an_image_input() -> None:
    card, known = card_of(12, 8), weights(6, 3, SIDE, bias=False)
    nodes = [make_node("Softmax", ["raw"], ["w"]), make_node("Conv", ["x", "w"], ["y"], strides=[4, 4])]
    check_image_input(float_graph(nodes, {"raw": known["w"]}, (3, 12, 8)), card)


def test_a_graph_without_any_convolution_is_an_image_input() -> None:
    check_image_input(float_graph([make_node("Relu", ["x"], ["y"])], {}, (1, 5, 7)), card_of(5, 7, 1))


def check_image_input(model: ModelProto, card: ModelCard) -> None:
    """The uint8 form of `model` equals its float form on normalised images."""
    images = random_images(2, card.preprocess)
    scaled = (images / 255 - np.array(card.preprocess.mean)) / np.array(card.preprocess.std)
    expected = run_graph(model, scaled.transpose(0, 3, 1, 2).astype(np.float32))[0]
    card = integer_input(model, card)
    assert card.patch is None
    assert card.inputs == (TensorSpec("image", (None, *card.preprocess.size, card.preprocess.channels), "uint8"),)
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8 and operators(model)[0] == "Cast"
    assert_equal(run_graph(model, images)[0], expected)


def test_the_batch_size_may_be_read_off_the_input_besides() -> None:
    card, known = card_of(12, 8), weights(6, 3, SIDE)
    nodes = [
        make_node("Shape", ["x"], ["count"], start=0, end=1),
        stem(known, SIDE),
        make_node("Concat", ["count", "rest"], ["flat"], axis=0),
        *FLATTEN,
    ]
    model = float_graph(nodes, known | {"rest": np.array([6, 6])}, (3, 12, 8))
    images = random_images(3, card.preprocess)
    card = integer_input(model, card)
    assert card.patch == SIDE
    expected = feature_map(images, card, known, stride=SIDE).reshape(3, 6, -1).transpose(0, 2, 1)
    assert_equal(run_graph(model, engine_rows(images, card))[0], expected)


def test_a_model_of_two_inputs_is_refused() -> None:
    model = float_graph([make_node("Relu", ["x"], ["y"])], {}, (3, 8, 8))
    model.graph.input.append(model.graph.input[0])
    with pytest.raises(ModelError, match="the model has 2 inputs"):
        integer_input(model, card_of(8, 8))
