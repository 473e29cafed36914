"""The small operations on ONNX graphs, and files that are no graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_node

from tests.compiler.conftest import Tiny
from tests.models import float_graph, operators, run_graph
from vitedge.compiler import graph
from vitedge.errors import ModelError, VitEdgeError
from vitedge.specs import ModelCard, Preprocess, Recipe, TensorSpec

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 6)


def chain() -> ModelProto:
    """x -> Relu -> a -> Add(c) -> b -> Neg -> y; Exp(a) -> z; Sqrt(a) -> unused."""
    nodes = [
        make_node("Relu", ["x"], ["a"], name="relu"),
        make_node("Add", ["a", "c"], ["b"], name="add"),
        make_node("Neg", ["b"], ["y"], name="neg"),
        make_node("Exp", ["a"], ["z"], name="exp"),
        make_node("Sqrt", ["a"], ["unused"], name="sqrt"),
    ]
    constants = {"c": np.float32([2]), "nobody": np.float32([3])}
    return float_graph(nodes, constants, (6,), outputs=("y", "z"))


# Looking things up


def test_producers_and_consumers_know_who_makes_and_reads_a_tensor() -> None:
    model = chain()
    makers, readers = graph.producers(model), graph.consumers(model)
    assert {name: node.name for name, node in makers.items()} == {
        "a": "relu",
        "b": "add",
        "y": "neg",
        "z": "exp",
        "unused": "sqrt",
    }
    assert [node.name for node in readers["a"]] == ["add", "exp", "sqrt"]
    assert readers["y"] == []


def test_an_attribute_has_its_value_or_the_default() -> None:
    node = make_node("Transpose", ["x"], ["y"], perm=[1, 0], name="t")
    assert graph.attribute(node, "perm") == [1, 0]
    assert graph.attribute(node, "axis") is None and graph.attribute(node, "axis", 3) == 3


def test_linears_are_products_with_a_constant_matrix_and_know_their_output_channels() -> None:
    nodes = [
        make_node("MatMul", ["x", "in_out"], ["a"], name="matmul"),
        make_node("Gemm", ["x", "in_out"], ["b"], name="gemm"),
        make_node("Gemm", ["x", "out_in"], ["c"], name="turned", transB=1),
        make_node("Gemm", ["x", "in_out"], ["d"], name="input turned", transA=1),
        make_node("MatMul", ["x", "stack"], ["e"], name="a weight of three axes"),
        make_node("MatMul", ["in_out", "x"], ["f"], name="the weight on the left"),
        make_node("MatMul", ["x", "a"], ["g"], name="no weight"),
    ]
    constants = {
        "in_out": np.ones((6, 4), np.float32),
        "out_in": np.ones((4, 6), np.float32),
        "stack": np.ones((1, 6, 4), np.float32),
    }
    found = graph.linears(float_graph(nodes, constants, (6,), outputs=tuple("abcdefg")))
    assert [(linear.name, linear.input, linear.weight, linear.axis) for linear in found] == [
        ("matmul", "x", "in_out", 1),
        ("gemm", "x", "in_out", 1),
        ("turned", "x", "out_in", 0),
    ]


# Changing things


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int64])
def test_a_constant_keeps_its_shape_and_dtype(shape: tuple[int, ...], dtype: type) -> None:
    model, array = chain(), np.ones(shape, dtype).T
    assert graph.put_constant(model, "new", array) == "new"
    stored = graph.constants(model)["new"]
    assert stored.shape == array.shape and stored.dtype == dtype


def test_a_constant_of_the_same_name_is_replaced() -> None:
    model = chain()
    graph.put_constant(model, "c", np.float32([5]))
    assert [tensor.name for tensor in model.graph.initializer] == ["c", "nobody"]
    np.testing.assert_allclose(run_graph(model, X)[0], -(np.maximum(X, 0) + 5))


def test_nodes_are_put_in_front_in_their_order() -> None:
    model = chain()
    new = [make_node("Abs", ["a"], ["p"]), make_node("Ceil", ["p"], ["q"])]
    graph.put_nodes(model, new, before=model.graph.node[1])
    assert operators(model) == ["Relu", "Abs", "Ceil", "Add", "Neg", "Exp", "Sqrt"]


def test_chosen_readers_are_rewired_and_others_not() -> None:
    model = chain()
    graph.rewire(model, "a", "x", [model.graph.node[3]])
    y, z = run_graph(model, X)
    np.testing.assert_allclose(y, -(np.maximum(X, 0) + 2))
    np.testing.assert_allclose(z, np.exp(X), rtol=1e-6)


def test_an_output_that_is_rewired_keeps_its_name_whoever_made_it_before() -> None:
    model = chain()
    graph.rewire(model, "y", "b")
    graph.prune(model)
    assert [output.name for output in model.graph.output] == ["y", "z"] and operators(model) == ["Relu", "Add", "Exp"]
    np.testing.assert_allclose(run_graph(model, X)[0], np.maximum(X, 0) + 2)


def test_an_output_can_be_rewired_to_another_output() -> None:
    model = chain()
    graph.rewire(model, "y", "z")
    graph.prune(model)
    y, z = run_graph(model, X)
    np.testing.assert_array_equal(y, z)


def test_renaming_a_constant_renames_it_for_its_readers_or_does_nothing() -> None:
    model = chain()
    graph.rename_constant(model, "c", "offset")
    assert model.graph.node[1].input[1] == "offset" and "offset" in graph.constants(model)
    before = model.SerializeToString()
    graph.rename_constant(model, "a", "other")  # no constant
    assert model.SerializeToString() == before


def test_prune_drops_what_leads_to_no_output() -> None:
    model = chain()
    before = run_graph(model, X)
    graph.prune(model)
    assert operators(model) == ["Relu", "Add", "Neg", "Exp"] and list(graph.constants(model)) == ["c"]
    np.testing.assert_array_equal(run_graph(model, X), before)


# Metadata

CARD = ModelCard(
    "m", "embed", Preprocess((8, 8), (0.5,), (0.5,), channels=1), 4, ("é",), (TensorSpec("patches", (None, 4, 16), "int8"),)
)


def test_card_variant_and_recipe_travel_in_the_metadata() -> None:
    model = chain()
    graph.set_metadata(model, card=CARD, variant="int8", recipe=Recipe(skip=("head",)))
    again = onnx.load_from_string(model.SerializeToString())
    assert graph.model_card(again) == CARD and graph.metadata(again)["vitedge.variant"] == "int8"
    graph.set_metadata(again, card=CARD, variant="fp32")
    assert set(graph.metadata(again)) == {"vitedge.card", "vitedge.variant"}


def test_a_foreign_onnx_file_has_no_card() -> None:
    with pytest.raises(ModelError, match="was not exported by vitedge"):
        graph.model_card(chain())


# Files


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_weight_that_is_not_a_number_is_named(bad: float, dtype: type, tmp_path: Path) -> None:
    model = chain()
    graph.put_constant(model, "blocks.7.fc1.weight", np.array([[1, bad], [bad, 2]], dtype))
    with pytest.raises(ModelError, match=r"here: the weight 'blocks.7.fc1.weight' holds 2 NaN or infinite values of 4"):
        graph.check_finite(model, "here")


def test_loading_a_file_checks_its_weights(tiny: Tiny, tmp_path: Path) -> None:
    model = graph.load(tiny.onnx)
    graph.put_constant(model, "head.bias", np.float32([1, 2, np.nan, 4, 5]))
    graph.save(model, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"bad.onnx: the weight 'head.bias' holds 1 NaN"):
        graph.load(tmp_path / "bad.onnx")


def test_a_file_cut_short_anywhere_is_one_sentence(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny.onnx.read_bytes()
    path = tmp_path / "cut.onnx"
    for length in sorted({0, 1, 2, 10, 100, *range(1000, len(whole), len(whole) // 40), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut.onnx is not a readable ONNX model") as caught:
            graph.load(path)
        assert "\n" not in str(caught.value) and caught.value.hint == "export it again"


def test_a_file_with_bytes_changed_is_loaded_or_one_sentence(tiny: Tiny, tmp_path: Path) -> None:
    whole, path, random = tiny.onnx.read_bytes(), tmp_path / "changed.onnx", np.random.default_rng(0)
    places = [*range(2000), *range(len(whole) - 2000, len(whole))]  # structure and metadata, not weights
    for _ in range(100):
        changed = bytearray(whole)
        changed[int(random.choice(places))] ^= int(random.integers(1, 256))
        path.write_bytes(bytes(changed))
        try:
            graph.model_card(graph.load(path))
        except VitEdgeError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"hello", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_no_onnx_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.onnx is not a readable ONNX model: \S"):
        graph.load(tmp_path / "model.onnx")


def test_no_file_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing.onnx does not exist"):
        graph.load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match=r"is not a readable ONNX model: .*directory"):
        graph.load(tmp_path)


def test_a_graph_with_an_unknown_operator_is_one_sentence(tmp_path: Path) -> None:
    model = float_graph([make_node("Frobnicate", ["x"], ["y"])], {}, (6,))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="is not a readable ONNX model"):
        graph.load(tmp_path / "model.onnx")


def test_a_model_too_large_for_a_file_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT", 100)  # in place of 2 GiB
    with pytest.raises(ModelError, match="an ONNX file holds 2 GiB at most"):
        graph.save(chain(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_loaded_again(tiny: Tiny, tmp_path: Path) -> None:
    model = graph.load(tiny.onnx)
    graph.save(model, tmp_path / "deep" / "copy.onnx")
    assert graph.load(tmp_path / "deep" / "copy.onnx") == model
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT8


# The weight and bias of a Linear


def linear_graph(form: str) -> ModelProto:
    """y = x w + b, as a Gemm, a Gemm with its weight the other way, or a MatMul with its bias on either side of an Add."""
    weight, bias = np.arange(12, dtype=np.float32).reshape(6, 2), np.float32([1, -1])
    if form.startswith("Gemm"):
        flipped = {"transB": 1} if form == "Gemm transB" else {}
        inputs = ["x", "w", *(["b"] if form != "Gemm without bias" else [])]
        nodes = [make_node("Gemm", inputs, ["y"], name="linear", **flipped)]
        return float_graph(nodes, {"w": weight.T if flipped else weight, "b": bias}, (6,))
    nodes = [make_node("MatMul", ["x", "w"], ["h" if "Add" in form else "y"], name="linear")]
    if "Add" in form:
        nodes.append(make_node("Add", ["b", "h"] if form == "MatMul and Add, turned" else ["h", "b"], ["y"]))
    return float_graph(nodes, {"w": weight, "b": bias}, (6,))


FORMS = ("Gemm", "Gemm transB", "Gemm without bias", "MatMul", "MatMul and Add", "MatMul and Add, turned")


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_is_read_and_written_in_every_form(form: str) -> None:
    model = linear_graph(form)
    (linear,) = graph.linears(model)
    bias = graph.linear_bias(model, linear)
    assert (bias is None) == (form in ("Gemm without bias", "MatMul")) and graph.linear_output(model, linear) == "y"
    expected = X @ graph.linear_weight(model, linear) + (0 if bias is None else bias)
    np.testing.assert_allclose(run_graph(model, X)[0], expected, rtol=1e-6)
    weight = np.cos(np.arange(12)).reshape(6, 2)
    graph.set_linear(model, linear, weight, np.array([5.0, 7.0]))
    np.testing.assert_allclose(run_graph(model, X)[0], X @ weight + [5, 7], rtol=1e-6)
    np.testing.assert_array_equal(graph.linear_weight(model, linear), weight.astype(np.float32))
    np.testing.assert_array_equal(graph.linear_bias(model, linear), [5, 7])
    assert graph.linear_output(model, linear) == "y"


def test_a_product_that_is_read_twice_has_no_bias_of_its_own() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        make_node("Add", ["h", "b"], ["y"]),
        make_node("Neg", ["h"], ["z"]),
    ]
    model = float_graph(nodes, {"w": np.eye(6, dtype=np.float32), "b": np.ones(6, np.float32)}, (6,), outputs=("y", "z"))
    (linear,) = graph.linears(model)
    assert graph.linear_bias(model, linear) is None
    graph.set_linear(model, linear, bias=np.full(6, 2.0))
    y, z = run_graph(model, X)
    np.testing.assert_array_equal(y, X + 3)
    np.testing.assert_array_equal(z, -X - 2)


def test_a_product_with_a_factor_is_no_linear() -> None:
    """Smoothing and bias correction take y = x w + b at its word."""
    model = linear_graph("Gemm")
    model.graph.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, f=2.0)
    assert graph.linears(model) == []
