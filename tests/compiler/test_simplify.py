"""Every pass leaves the function as it is, does its work where its pattern is, and leaves what only looks like it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor

from tests.models import float_graph, operators, run_graph
from vitedge.compiler.graph import constants
from vitedge.compiler.simplify import (
    drop_no_ops,
    fold_constants,
    merge_transposes,
    move_scale_to_queries,
    scale_resizes,
    simplify,
)

Arrays = dict[str, NDArray[Any]]
N, D = 6, 4  # tokens and features


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def longs(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def assert_same(change: Callable[[ModelProto], None], model: ModelProto, *shape: int, tolerance: float = 1e-6) -> list[str]:
    """Apply `change`, check that all outputs are as they were at three batch sizes, and return the operators left."""
    inputs = [floats(batch, *shape) for batch in (1, 2, 7)]
    before = [run_graph(model, x) for x in inputs]
    change(model)
    for x, expected in zip(inputs, before, strict=True):
        for a, b in zip(run_graph(model, x), expected, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return operators(model)


def batch_of(name: str) -> list[Any]:
    """Nodes that make `name`, int64[1], the batch size of x."""
    return [make_node("Shape", ["x"], [name], start=0, end=1)]


# fold_constants


def test_a_shape_that_holds_the_batch_becomes_a_constant_with_minus_one() -> None:
    nodes = [
        *batch_of("b"),
        make_node("Concat", ["b", "rest"], ["s"], axis=0),
        make_node("Reshape", ["x", "s"], ["y"], allowzero=1),
    ]
    model = float_graph(nodes, {"rest": longs(N // 2, 2 * D)}, (N, D))
    assert assert_same(fold_constants, model, N, D) == ["Reshape"]
    assert [list(array) for array in constants(model).values()] == [[-1, N // 2, 2 * D]]
    assert not model.graph.node[0].attribute  # allowzero


def test_a_product_with_the_batch_becomes_minus_one_too() -> None:
    nodes = [*batch_of("b"), make_node("Mul", ["b", "n"], ["bn"]), make_node("Concat", ["bn", "d"], ["s"], axis=0)]
    model = float_graph([*nodes, make_node("Reshape", ["x", "s"], ["y"])], {"n": longs(N), "d": longs(D)}, (N, D))
    assert assert_same(fold_constants, model, N, D) == ["Reshape"]


def test_arithmetic_that_no_pixel_enters_is_done_once() -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"]),
        make_node("Gather", ["s", "last"], ["d"]),
        make_node("Cast", ["d"], ["f"], to=TensorProto.FLOAT),
        make_node("Sqrt", ["f"], ["root"]),
        make_node("Div", ["x", "root"], ["y"]),
    ]
    model = float_graph(nodes, {"last": np.array(2, np.int64)}, (N, D))
    assert assert_same(fold_constants, model, N, D) == ["Div"]
    assert [array.shape for array in constants(model).values()] == [()]


def test_a_folded_scalar_stays_a_scalar() -> None:
    nodes = [make_node("Add", ["one", "one"], ["two"]), make_node("Gather", ["x", "two"], ["y"], axis=1)]
    model = float_graph(nodes, {"one": np.array(1, np.int64)}, (N, D))
    assert assert_same(fold_constants, model, N, D) == ["Gather"]  # of shape [batch, D]: an index vector would give [batch, 1, D]


def prefix_nodes(parts: list[str], axis: int = 1) -> list[Any]:
    """x between tokens that are expanded to the batch."""
    nodes = [*batch_of("b")]
    for part in parts:
        if part != "x":
            nodes += [
                make_node("Concat", ["b", f"{part}_rest"], [f"{part}_shape"], axis=0),
                make_node("Expand", [part, f"{part}_shape"], [f"{part}_rows"]),
            ]
    return [*nodes, make_node("Concat", [p if p == "x" else f"{p}_rows" for p in parts], ["joined"], axis=axis)]


def token(name: str, count: int) -> Arrays:
    return {name: floats(1, count, D), f"{name}_rest": longs(count, D)}


@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("parts", [["cls", "x"], ["x", "cls"], ["cls", "reg", "x"], ["cls", "x", "reg"]], ids="-".join)
@pytest.mark.parametrize("positions", ["all", "one", "none"])
def test_expanded_tokens_become_padding_and_a_constant(parts: list[str], positions: str, axis: int) -> None:
    known = {key: value for name, count in (("cls", 1), ("reg", 3)) if name in parts for key, value in token(name, count).items()}
    total = N + sum(len(known[name][0]) for name in ("cls", "reg") if name in parts)
    last = "joined"
    nodes = prefix_nodes(parts, axis)
    if positions != "none":
        known["positions"] = floats(1, total, D) if positions == "all" else floats(D)
        nodes.append(make_node("Add", ["joined", "positions"], ["placed"]))
        last = "placed"
    model = float_graph([*nodes, make_node("Relu", [last], ["y"])], known, (N, D))
    assert assert_same(fold_constants, model, N, D) == ["Pad", "Add", "Relu"]


def test_tokens_read_by_more_than_the_positions_are_padded_all_the_same() -> None:
    known = {**token("cls", 1), "positions": floats(1, 1 + N, D)}
    nodes = [
        *prefix_nodes(["cls", "x"]),
        make_node("Add", ["joined", "positions"], ["a"]),
        make_node("Mul", ["joined", "a"], ["y"]),
    ]
    assert assert_same(fold_constants, float_graph(nodes, known, (N, D)), N, D) == ["Pad", "Add", "Add", "Mul"]


def test_tokens_that_are_an_output_besides_keep_their_values() -> None:
    known = {**token("cls", 1), "positions": floats(1, 1 + N, D)}
    nodes = [*prefix_nodes(["cls", "x"]), make_node("Add", ["joined", "positions"], ["y"])]
    model = float_graph(nodes, known, (N, D), outputs=("y", "joined"))
    assert assert_same(fold_constants, model, N, D) == ["Pad", "Add", "Add"]


def test_a_constant_that_is_an_output_besides_stays_computed() -> None:
    nodes = [make_node("Exp", ["w"], ["e"]), make_node("Mul", ["x", "e"], ["y"])]
    assert assert_same(fold_constants, float_graph(nodes, {"w": floats(D)}, (N, D), ("y", "e")), N, D) == ["Exp", "Mul"]


def test_a_row_for_every_image_that_is_only_added_broadcasts() -> None:
    nodes = [*prefix_nodes(["cls", "x"])[:-1], make_node("Add", ["x", "cls_rows"], ["y"])]
    assert assert_same(fold_constants, float_graph(nodes, token("cls", N), (N, D)), N, D) == ["Add"]


def test_two_tensors_of_pixels_stay_concatenated() -> None:
    nodes = [make_node("Relu", ["x"], ["a"]), make_node("Neg", ["x"], ["n"]), make_node("Concat", ["a", "n"], ["y"], axis=1)]
    assert assert_same(fold_constants, float_graph(nodes, {}, (N, D)), N, D) == ["Relu", "Neg", "Concat"]
    both = [*prefix_nodes(["cls", "x"])[:-1], make_node("Concat", ["cls_rows", "x", "x"], ["y"], axis=1)]
    assert "Concat" in assert_same(fold_constants, float_graph(both, token("cls", 1), (N, D)), N, D)


def test_tokens_joined_along_features_or_channels_are_left_alone() -> None:
    nodes = [*prefix_nodes(["cls", "x"])[:-1], make_node("Concat", ["cls_rows", "x"], ["y"], axis=2)]
    assert "Pad" not in assert_same(fold_constants, float_graph(nodes, token("cls", N), (N, D)), N, D)
    known = {"cls": floats(1, 2, 5, 5), "cls_rest": longs(2, 5, 5)}
    model = float_graph([*prefix_nodes(["cls", "x"]), make_node("Relu", ["joined"], ["y"])], known, (3, 5, 5))
    assert "Pad" not in assert_same(fold_constants, model, 3, 5, 5)


def test_what_differs_from_image_to_image_is_computed_as_before() -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"]),
        make_node("Gather", ["s", "zero"], ["b"]),
        make_node("Range", ["zero", "b", "one"], ["numbers"]),
        make_node("Cast", ["numbers"], ["floats"], to=TensorProto.FLOAT),
        make_node("Unsqueeze", ["floats", "axes"], ["column"]),
        make_node("Add", ["x", "column"], ["y"]),
    ]
    known = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64), "axes": longs(1, 2)}
    assert "Range" in assert_same(fold_constants, float_graph(nodes, known, (N, D)), N, D)


# scale_resizes


@settings(deadline=None, max_examples=60)
@given(
    before=st.tuples(*[st.integers(1, 40)] * 2),
    after=st.tuples(*[st.integers(1, 90)] * 2),
    mode=st.sampled_from(["linear", "nearest"]),
)
def test_resizes_by_a_factor_make_the_same_size(before: tuple[int, int], after: tuple[int, int], mode: str) -> None:
    nodes = [
        *batch_of("b"),
        make_node("Concat", ["b", "rest"], ["s"], axis=0),
        make_node("Resize", ["x", "", "", "s"], ["y"], mode=mode),
    ]
    model = float_graph(nodes, {"rest": longs(1, *after)}, (1, *before))
    if mode == "nearest":  # a tie may fall to either side
        expected = run_graph(model, floats(2, 1, *before))[0].shape
        scale_resizes(model)
        assert run_graph(model, floats(2, 1, *before))[0].shape == expected
    else:
        assert_same(scale_resizes, model, 1, *before, tolerance=1e-4)
    assert operators(model) == ["Resize"]


def test_the_factor_is_never_one_pixel_short() -> None:
    """31 / 7 in float32 is a little less than 31 / 7, so that floor(7 * factor) would be 30."""
    assert np.floor(np.float32(7) * (np.float32(31) / np.float32(7))) == 30
    nodes = [
        *batch_of("b"),
        make_node("Concat", ["b", "rest"], ["s"], axis=0),
        make_node("Resize", ["x", "", "", "s"], ["y"], mode="linear"),
    ]
    model = float_graph(nodes, {"rest": longs(1, 31, 62)}, (1, 7, 7))
    assert_same(scale_resizes, model, 1, 7, 7, tolerance=1e-5)
    factors = constants(model)[model.graph.node[0].input[2]].astype(np.float64)
    assert (np.floor(factors * [1, 1, 7, 7]) == [1, 1, 31, 62]).all()


def test_resizes_by_a_constant_are_left_alone() -> None:
    model = float_graph(
        [make_node("Resize", ["x", "", "two"], ["y"], mode="linear")], {"two": np.float32([1, 1, 2, 2])}, (1, 3, 4)
    )
    untouched = model.SerializeToString()
    scale_resizes(model)
    assert model.SerializeToString() == untouched


# drop_no_ops


def guarded(test: str, kept: str, maker: str = "Softmax") -> list[Any]:
    return [
        make_node(maker, ["x"], ["p"]),
        make_node("IsNaN", [test], ["bad"]),
        make_node("Where", ["bad", "zero", kept], ["y"]),
    ]


ZERO: Arrays = {"zero": np.array(0, np.float32)}


def test_the_guard_of_a_softmax_is_dropped() -> None:
    assert assert_same(drop_no_ops, float_graph(guarded("p", "p"), ZERO, (N, D)), N, D) == ["Softmax"]


@pytest.mark.parametrize(
    "nodes",
    [guarded("p", "p", maker="Log"), guarded("x", "p"), guarded("p", "x"), guarded("x", "x")],
    ids=["no softmax", "another test", "another value", "the input"],
)
def test_other_choices_of_numbers_over_nans_are_left_alone(nodes: list[Any]) -> None:
    assert "Where" in assert_same(drop_no_ops, float_graph(nodes, ZERO, (N, D)), N, D)


def test_a_choice_by_another_condition_is_left_alone() -> None:
    nodes = [
        make_node("Softmax", ["x"], ["p"]),
        make_node("Less", ["p", "half"], ["low"]),
        make_node("Where", ["low", "zero", "p"], ["y"]),
    ]
    model = float_graph(nodes, {**ZERO, "half": np.array(0.5, np.float32)}, (N, D))
    assert assert_same(drop_no_ops, model, N, D) == ["Softmax", "Less", "Where"]


def test_a_mask_of_zeros_is_dropped() -> None:
    nodes = [make_node("Relu", ["x"], ["a"]), make_node("Add", ["a", "mask"], ["m"]), make_node("Neg", ["m"], ["y"])]
    model = float_graph(nodes, {"mask": np.zeros((1, N, D), np.float32)}, (N, D))
    assert assert_same(drop_no_ops, model, N, D) == ["Relu", "Neg"]


MASKS: dict[str, NDArray[np.float32]] = {
    "one value is not zero": np.float32([[[0] * D] * (N - 1) + [[0] * (D - 1) + [1e-3]]]),
    "it repeats the other input": np.zeros((1, 3, 1, D), np.float32),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_that_does_something_is_left_alone(mask: NDArray[np.float32]) -> None:
    shape = (N, D) if mask.ndim == 3 else (1, N, D)
    nodes = [make_node("Relu", ["x"], ["a"]), make_node("Add", ["a", "mask"], ["y"])]
    assert assert_same(drop_no_ops, float_graph(nodes, {"mask": mask}, shape), *shape) == ["Relu", "Add"]


def test_zeros_added_to_the_input_itself_are_harmless() -> None:
    nodes = [make_node("Add", ["x", "mask"], ["y"])]
    assert assert_same(drop_no_ops, float_graph(nodes, {"mask": np.zeros((1, N, D), np.float32)}, (N, D)), N, D) == ["Add"]


def test_identities_and_dropouts_are_dropped_and_outputs_keep_their_names() -> None:
    nodes = [
        make_node("Relu", ["x"], ["a"]),
        make_node("Identity", ["a"], ["b"]),
        make_node("Dropout", ["b"], ["c"]),
        make_node("Neg", ["c"], ["d"]),
        make_node("Identity", ["d"], ["y"]),
        make_node("Exp", ["d"], ["z"]),
    ]
    model = float_graph(nodes, {}, (N, D), outputs=("y", "z"))
    assert assert_same(drop_no_ops, model, N, D) == ["Relu", "Neg", "Exp"]
    assert [output.name for output in model.graph.output] == ["y", "z"]


def test_an_identity_between_two_outputs_or_from_the_input_stays() -> None:
    nodes = [make_node("Relu", ["x"], ["y"]), make_node("Identity", ["y"], ["z"]), make_node("Identity", ["x"], ["w"])]
    model = float_graph(nodes, {}, (N, D), outputs=("y", "z", "w"))
    assert sorted(assert_same(drop_no_ops, model, N, D)) == ["Identity", "Identity", "Relu"]


def test_a_node_without_inputs_does_no_harm() -> None:
    nodes = [
        make_node("Constant", [], ["c"], value=make_tensor("c", TensorProto.FLOAT, [1], [2.0])),
        make_node("Mul", ["x", "c"], ["y"]),
    ]
    assert assert_same(simplify, float_graph(nodes, {}, (N, D)), N, D) == ["Mul"]


# merge_transposes


def reshaped(first: tuple[int, ...], last: tuple[int, ...], perm: list[int]) -> tuple[list[Any], Arrays]:
    nodes = [
        make_node("Reshape", ["x", "first"], ["flat"]),
        make_node("Transpose", ["flat"], ["turned"], perm=perm),
        make_node("Reshape", ["turned", "last"], ["y"]),
    ]
    return nodes, {"first": longs(*first), "last": longs(*last)}


def test_a_transpose_between_reshapes_becomes_one() -> None:
    nodes, known = reshaped((-1, N, D), (-1, 3, D, N), [0, 2, 1])
    model = float_graph(nodes, known, (3, N, D))
    assert assert_same(merge_transposes, model, 3, N, D) == ["Transpose"]
    assert list(model.graph.node[0].attribute[0].ints) == [0, 1, 3, 2]


LOOKALIKES = {
    "heads and tokens are merged": ((-1, 3 * N, D), (-1, 3, D, N), [0, 2, 1]),
    "heads and features are merged": ((-1, N, 3 * D), (-1, 3, D, N), [0, 2, 1]),
    "the batch is turned": ((-1, N, D), (-1, 3, D, N), [2, 1, 0]),
    "the shape is kept": ((-1, N, D), (-1, 3, N, D), [0, 2, 1]),
    "the heads stay merged": ((-1, N, D), (-1, D, N), [0, 2, 1]),
}


@pytest.mark.parametrize("case", LOOKALIKES.values(), ids=LOOKALIKES.keys())
def test_other_reshapes_around_a_transpose_are_left_alone(case: tuple[Any, Any, list[int]]) -> None:
    nodes, known = reshaped(*case)
    assert assert_same(merge_transposes, float_graph(nodes, known, (3, N, D)), 3, N, D) == ["Reshape", "Transpose", "Reshape"]


def test_a_turned_tensor_that_something_else_reads_stays_besides() -> None:
    nodes, known = reshaped((-1, N, D), (-1, 3, D, N), [0, 2, 1])
    model = float_graph([*nodes, make_node("Exp", ["turned"], ["z"])], known, (3, N, D), outputs=("y", "z"))
    assert sorted(assert_same(merge_transposes, model, 3, N, D)) == ["Exp", "Reshape", "Transpose", "Transpose"]


# move_scale_to_queries

SCALED = [
    make_node("Mul", ["x", "s"], ["q"]),
    make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
    make_node("Mul", ["turned", "t"], ["k"]),
]
PRODUCT = make_node("MatMul", ["q", "k"], ["y"])


def scales(s: Any = 0.25, t: Any = 0.5) -> Arrays:
    return {"s": np.asarray(s, np.float32), "t": np.asarray(t, np.float32)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_two_scales_become_one_on_the_queries(shape: tuple[int, ...]) -> None:
    known = {name: value.reshape(shape) for name, value in scales().items()}
    model = float_graph([*SCALED, PRODUCT], known, (N, D))
    assert assert_same(move_scale_to_queries, model, N, D) == ["Mul", "Transpose", "MatMul"]
    assert [float(array.item()) for array in constants(model).values()] == [0.125]


def test_keys_that_something_else_reads_stay_scaled_for_it() -> None:
    model = float_graph([*SCALED, PRODUCT, make_node("Exp", ["k"], ["z"])], scales(), (N, D), outputs=("y", "z"))
    assert sorted(assert_same(move_scale_to_queries, model, N, D)) == ["Exp", "MatMul", "Mul", "Mul", "Transpose"]


UNSUITED: dict[str, tuple[list[Any], Arrays]] = {
    "a scale a feature on the queries": ([*SCALED, PRODUCT], scales(s=[1, 2, 3, 4])),
    "a scale a token on the keys": ([*SCALED, PRODUCT], scales(t=[1, 2, 3, 4, 5, 6])),
    "queries that something else reads": ([*SCALED, PRODUCT, make_node("Exp", ["q"], ["z"])], scales()),
    "queries of two products": ([*SCALED, PRODUCT, make_node("MatMul", ["q", "k"], ["z"])], scales()),
    "keys without a scale": ([*SCALED[:2], make_node("MatMul", ["q", "turned"], ["y"])], {"s": scales()["s"]}),
    "a scale of pixels": (
        [make_node("ReduceMean", ["x"], ["t"]), *SCALED, PRODUCT],
        {"s": scales()["s"]},
    ),
}


@pytest.mark.parametrize(("nodes", "known"), UNSUITED.values(), ids=UNSUITED.keys())
def test_other_products_are_left_alone(nodes: list[Any], known: Arrays) -> None:
    outputs = ("y", "z") if any("z" in node.output for node in nodes) else ("y",)
    model = float_graph(nodes, known, (N, D), outputs)
    assert assert_same(move_scale_to_queries, model, N, D, tolerance=1e-5) == [node.op_type for node in nodes]


def test_queries_that_are_an_output_besides_are_left_alone() -> None:
    nodes = [*SCALED, PRODUCT]
    model = float_graph(nodes, scales(), (N, D), outputs=("y", "q"))
    assert assert_same(move_scale_to_queries, model, N, D, tolerance=1e-5) == [node.op_type for node in nodes]


def test_a_square_of_one_scaled_tensor_is_left_alone() -> None:
    model = float_graph([SCALED[0], make_node("MatMul", ["q", "q"], ["y"])], {"s": scales()["s"]}, (D, D))
    assert assert_same(move_scale_to_queries, model, D, D) == ["Mul", "MatMul"]


# All of them


def test_what_is_simple_already_is_left_as_it_is() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["a"]),
        make_node("Gelu", ["a"], ["b"]),
        make_node("Concat", ["b", "x"], ["y"], axis=2),
    ]
    model = float_graph(nodes, {"w": floats(D, D)}, (N, D))
    untouched = model.SerializeToString()
    simplify(model)
    assert model.SerializeToString() == untouched
