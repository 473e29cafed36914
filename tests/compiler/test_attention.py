"""Attention is found by its structure, its factors move and change nothing, and Q/DQ stands where TensorRT wants it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.helper import make_node
from torch import Tensor

from tests import models
from tests.compiler.families import Exported
from tests.engines import sqnr_db
from tests.models import DEPTH, PLAIN, engine_rows, float_graph, operators, random_images, run_graph, tiny_preprocess, tiny_vit
from vitedge.compiler.attention import attention_tensors, attentions, quantize_attention, scale_queries
from vitedge.compiler.export import convert
from vitedge.compiler.graph import constants, consumers, producers
from vitedge.compiler.quantize import quantize_linears
from vitedge.compiler.select import quantized_activations
from vitedge.errors import ModelError
from vitedge.specs import ModelCard, Recipe, ScaleTable

Forward = Callable[[Any, Tensor], Tensor]
Factors = Sequence[tuple[str, float]]  # operator and constant
HEADS, SIZE, TOKENS = 2, 16, 6
WIDTH = HEADS * SIZE


def clone(model: ModelProto) -> ModelProto:
    """Shared models stay as they are."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def export_tiny(forward: Forward | None = None, heads: int = 2) -> tuple[ModelProto, ModelCard]:
    """A TinyViT, with 2 heads of 16 unless told otherwise, whose attention may compute in another way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "HEADS", heads)
        if forward is not None:
            patch.setattr(models.Attention, "forward", forward)
        return convert(*tiny_vit())


@pytest.fixture(scope="module")
def tiny16() -> ModelProto:
    return export_tiny()[0]


def rows(count: int = 12) -> NDArray[np.int8]:
    """Random images as patches of TinyViT."""
    card = ModelCard("tiny", "embed", tiny_preprocess(), patch=models.PATCH)
    return np.asarray(engine_rows(random_images(count, tiny_preprocess()), card))


def ranges(model: ModelProto, inputs: NDArray[Any], recipe: Recipe) -> dict[str, float]:
    """The largest magnitude of each tensor that a scale is wanted for."""
    names = list(dict.fromkeys([*quantized_activations(model, recipe), *attention_tensors(model)]))
    return {name: float(np.abs(array).max()) for name, array in zip(names, run_graph(model, inputs, names), strict=True)}


def quantized(model: ModelProto, inputs: NDArray[Any], recipe: Recipe | None = None) -> ModelProto:
    """A copy with INT8 Linears and INT8 attention."""
    recipe, model = recipe or PLAIN, clone(model)
    amax = ranges(model, inputs, recipe)
    quantize_linears(model, ScaleTable(recipe, "", "", len(inputs), amax))
    quantize_attention(model, amax)
    assert_sorted(model)
    return model


def assert_sorted(model: ModelProto) -> None:
    """Every node comes behind those that it reads from, which onnxruntime would not insist on."""
    made = {entry.name for entry in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        assert made.issuperset(node.input), node.name
        made.update(node.output)


@pytest.fixture(scope="module")
def int8(tiny16: ModelProto) -> ModelProto:
    return quantized(tiny16, rows())


# A graph of one attention with factors wherever a model may have them


def factor_chain(start: str, factors: Factors, prefix: str) -> tuple[list[NodeProto], dict[str, NDArray[Any]], str]:
    """Nodes that scale the tensor `start`, their constants, and the tensor that comes out."""
    nodes, known, tensor = [], {}, start
    for index, (operator, value) in enumerate(factors):
        known[f"{prefix}{index}"] = np.asarray(value, np.float32).reshape((1,) if index % 2 else ())
        swapped = operator == "Mul" and index % 2 == 1
        inputs = [f"{prefix}{index}", tensor] if swapped else [tensor, f"{prefix}{index}"]
        tensor = f"{prefix}{index}_out"
        nodes.append(make_node(operator, inputs, [tensor]))
    return nodes, known, tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Factored:
    """Where an attention has its factors; early: in front of the Transpose of the keys."""

    query: Factors = ()
    early: Factors = ()
    key: Factors = ()
    scores: Factors = ()


def attention_graph(
    factors: Factored | None = None,
    *,
    extra: Sequence[NodeProto] = (),
    softmax: str | None = None,
    axis: int = -1,
    tokens: int = TOKENS,
    value_size: int = SIZE,
    outputs: tuple[str, ...] = ("y",),
) -> ModelProto:
    """float32[B, tokens, 32] -> one attention -> the same. extra: more nodes in front of the softmax, which reads `softmax`."""
    factors = factors or Factored()
    random = np.random.default_rng(0)
    sizes = {"q": SIZE, "k": SIZE, "v": value_size}
    known: dict[str, NDArray[Any]] = {
        **{f"w{n}": random.normal(0, 0.3, (WIDTH, HEADS * size)).astype(np.float32) for n, size in sizes.items()},
        **{f"{n}_shape": np.array([-1, tokens, HEADS, size], np.int64) for n, size in sizes.items()},
        "wo": random.normal(0, 0.3, (HEADS * value_size, WIDTH)).astype(np.float32),
        "joined_shape": np.array([-1, tokens, HEADS * value_size], np.int64),
        "mask": random.normal(size=(tokens, tokens)).astype(np.float32),
    }
    nodes: list[NodeProto] = []
    for name in sizes:
        nodes += [
            make_node("MatMul", ["x", f"w{name}"], [f"{name}_rows"], name=f"attn.{name}"),
            make_node("Reshape", [f"{name}_rows", f"{name}_shape"], [f"{name}_split"]),
            make_node("Transpose", [f"{name}_split"], [name], perm=[0, 2, 1, 3]),
        ]

    def add(start: str, chosen: Factors, prefix: str) -> str:
        made, values, end = factor_chain(start, chosen, prefix)
        nodes.extend(made)
        known.update(values)
        return end

    query, early = add("q", factors.query, "fq"), add("k", factors.early, "fe")
    nodes.append(make_node("Transpose", [early], ["turned"], perm=[0, 1, 3, 2]))
    key = add("turned", factors.key, "fk")
    nodes.append(make_node("MatMul", [query, key], ["scores"], name="attn"))
    weighed = add("scores", factors.scores, "fs")
    nodes += [
        *extra,
        make_node("Softmax", [softmax or weighed], ["weights"], name="attn/Softmax", axis=axis),
        make_node("MatMul", ["weights", "v"], ["context"], name="attn.2"),
        make_node("Transpose", ["context"], ["heads"], perm=[0, 2, 1, 3]),
        make_node("Reshape", ["heads", "joined_shape"], ["joined"]),
        make_node("MatMul", ["joined", "wo"], ["y"], name="attn.proj"),
    ]
    return float_graph(nodes, known, (tokens, WIDTH), outputs)


def inputs_of(tokens: int = TOKENS) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(3, tokens, WIDTH)).astype(np.float32)


# Found


@pytest.mark.parametrize(
    ("name", "modules", "size", "tokens"),
    [
        ("vit", ["model.vit.layers.0.attention", "model.vit.layers.1.attention"], 16, 17),
        ("deit", ["model.deit.layers.0.attention"], 16, 18),
        ("dinov2", ["model.encoder.layer.0.attention", "model.encoder.layer.1.attention"], 16, 17),
        ("clip", ["model.encoder.layers.0.self_attn"], 16, 17),
        ("siglip", ["model.encoder.layers.0.self_attn", "model.head.attention"], 16, 16),
        ("fashion-mnist", [f"blocks.{block}.attention" for block in range(4)], 32, 50),
    ],
)
def test_families_with_plain_attention(
    family: Callable[[str], Exported], name: str, modules: list[str], size: int, tokens: int
) -> None:
    model = family(name).model
    found = attentions(model)
    assert [attention.name for attention in found] == modules
    assert {(attention.head_size, attention.tokens) for attention in found} == {(size, tokens)}
    makers, readers = producers(model), consumers(model)
    for attention in found:
        assert list(attention.scores.input) == [attention.query, attention.key]
        assert list(attention.context.input) == [attention.softmax.output[0], attention.value]
        assert attention.softmax.input[0] == attention.scores.output[0]
        assert makers[attention.result].op_type == "Reshape"
        assert [node.op_type for node in readers[attention.result]] in (["MatMul"], ["Gemm"])


def test_the_result_has_the_name_of_the_projections_input(tiny16: ModelProto) -> None:
    linears = {node.name: node.input[0] for node in tiny16.graph.node}
    for block, attention in enumerate(attentions(tiny16)):
        assert attention.result == linears[f"blocks.{block}.attention.proj"]
    assert set(quantized_activations(tiny16, PLAIN)) >= {attention.result for attention in attentions(tiny16)}


def test_tensors_to_calibrate_come_in_order_and_leave_the_softmax_out(tiny16: ModelProto) -> None:
    found = attentions(tiny16)
    assert attention_tensors(tiny16) == [name for a in found for name in (a.query, a.key, a.value, a.result)]


# scale_queries


def assert_scaled(model: ModelProto, inputs: NDArray[Any], db: float = 100) -> None:
    """scale_queries keeps the function and leaves no factor on the keys or between BMM1 and softmax."""
    before = run_graph(model, inputs)[0]
    scale_queries(model, attentions(model))
    assert sqnr_db(before, run_graph(model, inputs)[0]) > db
    known, makers = constants(model), producers(model)
    for attention in attentions(model):
        assert attention.softmax.input[0] == attention.scores.output[0]
        node = makers[attention.key]
        while node.op_type != "MatMul" and node.input[0] in makers:
            assert node.op_type not in ("Mul", "Div"), "a factor on the keys"
            node = makers[node.input[0]]
        assert makers[attention.query].op_type in ("Mul", "Div")
        assert any(known[name].size == 1 for name in makers[attention.query].input if name in known)


def by_hand(order: str) -> Forward:
    """Self-attention written out, its scale in one of the places where models have it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (models.HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scale = q.shape[-1] ** -0.5
        scores = {
            "times scale": lambda: q @ k.transpose(-2, -1) * scale,
            "by root": lambda: q @ k.transpose(-2, -1) / scale**-1,
            "scaled keys": lambda: q @ (k * scale).transpose(-2, -1),
            "scaled queries": lambda: (q * scale) @ k.transpose(-2, -1),
        }[order]()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("order", ["times scale", "by root", "scaled keys", "scaled queries"])
def test_every_way_to_write_attention_ends_with_the_scale_on_the_queries(order: str) -> None:
    model, _ = export_tiny(by_hand(order))
    assert [attention.name for attention in attentions(model)] == [f"blocks.{block}.attention" for block in range(DEPTH)]
    assert_scaled(model, rows())


def test_what_export_has_scaled_already_stays_byte_for_byte(tiny16: ModelProto) -> None:
    model = clone(tiny16)
    scale_queries(model, attentions(model))
    assert model.SerializeToString() == tiny16.SerializeToString()


FACTOR = st.tuples(st.sampled_from(["Mul", "Div"]), st.sampled_from([-1.5, 0.3, 0.7071, 1.0, 1.3]))
SOME = st.lists(FACTOR, max_size=2)


@settings(deadline=None, max_examples=30)
@given(query=st.lists(FACTOR, min_size=1, max_size=2), early=SOME, key=SOME, scores=SOME)
def test_factors_anywhere_move_to_the_queries(query: Factors, early: Factors, key: Factors, scores: Factors) -> None:
    model = attention_graph(Factored(query, early, key, scores))
    assert_scaled(model, inputs_of())
    settled = model.SerializeToString()
    scale_queries(model, attentions(model))
    assert model.SerializeToString() == settled


def test_queries_without_a_factor_get_one() -> None:
    model = attention_graph(Factored(scores=[("Div", 4.0)]))
    assert_scaled(model, inputs_of())
    assert Counter(operators(model))["Mul"] == 1 and Counter(operators(model))["Div"] == 0


def test_scaled_queries_and_keys_that_something_else_reads_stay_scaled_for_it() -> None:
    factors = Factored(query=[("Mul", 0.5)], key=[("Mul", 0.25)])
    others = [make_node("Exp", ["fq0_out"], ["other_q"]), make_node("Exp", ["fk0_out"], ["other_k"])]
    model = attention_graph(factors, extra=others, outputs=("y", "other_q", "other_k"))
    before = run_graph(model, inputs_of())
    scale_queries(model, attentions(model))
    for old, new in zip(before, run_graph(model, inputs_of()), strict=True):
        assert sqnr_db(old, new) > 100
    scale = producers(model)[attentions(model)[0].query].input[1]
    assert float(constants(model)[scale]) == 0.125


def test_a_factor_behind_a_shared_transpose_stays() -> None:
    other = make_node("Exp", ["turned"], ["other"])
    model = attention_graph(Factored(early=[("Mul", 0.25)]), extra=[other], outputs=("y", "other"))
    before = [node.SerializeToString() for node in model.graph.node]
    scale_queries(model, attentions(model))
    assert [node.SerializeToString() for node in model.graph.node] == before


# quantize_attention


def quantizer_of(model: ModelProto, tensor: str) -> NodeProto:
    """The QuantizeLinear of the pair that ends in `tensor`."""
    makers = producers(model)
    assert makers[tensor].op_type == "DequantizeLinear"
    quantizer = makers[makers[tensor].input[0]]
    assert quantizer.op_type == "QuantizeLinear" and quantizer.input[1] == makers[tensor].input[1]
    return quantizer


def named(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def operands(before: ModelProto, after: ModelProto) -> dict[str, str]:
    """For each operand of a product of attention in the float graph, what the product reads in the INT8 graph."""
    nodes = [node for attention in attentions(before) for node in (attention.scores, attention.context)]
    return {old: new for node in nodes for old, new in zip(node.input, named(after, node.name).input, strict=True)}


def test_every_operand_of_both_products_is_quantized(tiny16: ModelProto, int8: ModelProto) -> None:
    changed = operands(tiny16, int8)
    assert len(changed) == 4 * DEPTH
    assert {old: quantizer_of(int8, new).input[0] for old, new in changed.items()} == {old: old for old in changed}


def test_the_result_has_one_pair_and_the_projection_reads_it(tiny16: ModelProto, int8: ModelProto) -> None:
    readers = consumers(int8)
    for block, attention in enumerate(attentions(tiny16)):
        (quantize,) = readers[attention.result]
        (projection,) = readers[f"{attention.result}.dq"]
        assert quantize.op_type == "QuantizeLinear" and projection.name == f"blocks.{block}.attention.proj"
        assert [node.op_type for node in readers[attention.context.output[0]]] == ["Transpose"]


def test_there_is_no_other_pair(tiny16: ModelProto, int8: ModelProto) -> None:
    wanted = {*quantized_activations(tiny16, PLAIN), *attention_tensors(tiny16)}
    wanted |= {attention.softmax.output[0] for attention in attentions(tiny16)}
    quantizers = [node.input[0] for node in int8.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(set(quantizers)) and set(quantizers) == wanted
    dequantized = {node.output[0] for node in int8.graph.node if node.op_type == "DequantizeLinear"}
    assert {n.op_type for n in int8.graph.node if dequantized.intersection(n.input)} == {"MatMul", "Gemm"}


def test_the_softmax_has_a_fixed_scale_and_the_others_that_of_their_range(tiny16: ModelProto, int8: ModelProto) -> None:
    amax, known = ranges(tiny16, rows(), PLAIN), constants(int8)
    weights = {attention.softmax.output[0]: 1.0 for attention in attentions(tiny16)}
    for old, new in operands(tiny16, int8).items():
        _, scale, zero = quantizer_of(int8, new).input
        assert known[scale] == np.float32({**amax, **weights}[old] / 127)
        assert known[zero].dtype == np.int8 and not known[zero].any()


def test_the_factor_of_the_queries_is_what_it_was(tiny16: ModelProto, int8: ModelProto) -> None:
    for attention in attentions(tiny16):
        scale = producers(int8)[attention.query]
        assert scale.op_type == "Mul" and float(constants(int8)[scale.input[1]].item()) == pytest.approx(SIZE**-0.5)


def test_the_scores_equal_integer_arithmetic_in_numpy(int8: ModelProto) -> None:
    product, makers, known = named(int8, "blocks.0.attention"), producers(int8), constants(int8)
    q, k = (makers[name] for name in product.input)
    left, right, scores = run_graph(int8, rows(), [q.input[0], k.input[0], product.output[0]])
    assert left.dtype == right.dtype == np.int8 and max(np.abs(left.astype(int)).max(), np.abs(right.astype(int)).max()) == 127
    expected = (left.astype(np.int64) @ right) * (known[q.input[1]].astype(np.float64) * known[k.input[1]])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_quantized_model_is_close_to_the_float_model(tiny16: ModelProto, int8: ModelProto) -> None:
    reference = run_graph(tiny16, rows())[0]
    assert 15 < sqnr_db(reference, run_graph(int8, rows())[0]) < 60
    alone = clone(tiny16)
    assert quantize_attention(alone, ranges(tiny16, rows(), PLAIN)) == DEPTH
    assert 20 < sqnr_db(reference, run_graph(alone, rows())[0]) < 80


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_families_quantized(family: Callable[[str], Exported], name: str) -> None:
    made = family(name)
    inputs = np.asarray(engine_rows(random_images(4, made.card.preprocess), made.card))
    model = quantized(made.model, inputs)
    assert sqnr_db(run_graph(made.model, inputs)[0], run_graph(model, inputs)[0]) > 10


def test_a_projection_in_floating_point_gets_its_pair_all_the_same(tiny16: ModelProto) -> None:
    model = quantized(tiny16, rows(), dataclasses.replace(PLAIN, skip=("*.proj",)))
    for block, attention in enumerate(attentions(tiny16)):
        projection = named(model, f"blocks.{block}.attention.proj")
        assert quantizer_of(model, projection.input[0]).input[0] == attention.result
        assert constants(model)[projection.input[1]].dtype == np.float32


def test_a_value_that_a_linear_reads_too_has_one_pair() -> None:
    """One head, and values that are the input itself."""
    weights = {name: np.random.default_rng(3).normal(size=(SIZE, SIZE)).astype(np.float32) for name in ("wq", "wk", "wo")}
    nodes = [
        make_node("MatMul", ["x", "one"], ["tokens"], name="embed"),
        make_node("MatMul", ["tokens", "wq"], ["q"], name="q"),
        make_node("MatMul", ["tokens", "wk"], ["k"], name="k"),
        make_node("Transpose", ["k"], ["turned"], perm=[0, 2, 1]),
        make_node("MatMul", ["q", "turned"], ["scores"], name="scores"),
        make_node("Softmax", ["scores"], ["weights"], name="softmax"),
        make_node("MatMul", ["weights", "tokens"], ["context"], name="context"),
        make_node("MatMul", ["context", "wo"], ["y"], name="out"),
    ]
    model = float_graph(nodes, {**weights, "one": np.eye(SIZE, dtype=np.float32)}, (TOKENS, SIZE))
    x = inputs_of()[..., :SIZE]
    (attention,) = attentions(model)
    assert (attention.name, attention.value, attention.result) == ("scores", "tokens", "context")
    changed = quantized(model, x)
    assert sum(node.input[0] == "tokens" for node in changed.graph.node if node.op_type == "QuantizeLinear") == 1
    assert named(changed, "context").input[1] == "tokens.dq"
    assert run_graph(changed, x)[0].shape == x.shape


# Refused


@pytest.mark.parametrize("name", ["beit", "swin"])
def test_a_bias_on_the_scores_is_refused(family: Callable[[str], Exported], name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"the attention 'model\.{name}.*attention' has a bias or mask \(Add\) between"
    ) as caught:
        attentions(family(name).model)
    assert "such as int8" in str(caught.value.hint)


def test_other_head_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'blocks.0.attention' has the head size 8, but INT8 attention takes 16, 32, 64 alone"):
        attentions(export_tiny(heads=4)[0])


def test_more_than_512_tokens_are_refused() -> None:
    assert attentions(attention_graph(tokens=512))[0].tokens == 512
    with pytest.raises(ModelError, match="the attention 'attn' has 513 tokens, but INT8 attention takes 512 at most"):
        attentions(attention_graph(tokens=513))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mask": ({"extra": [make_node("Add", ["scores", "mask"], ["masked"])], "softmax": "masked"}, r"a bias or mask \(Add\)"),
    "a soft cap": ({"extra": [make_node("Tanh", ["scores"], ["capped"])], "softmax": "capped"}, "the operator Tanh between"),
    "a factor a query": ({"extra": [make_node("Mul", ["scores", "mask"], ["m"])], "softmax": "m"}, "the operator Mul between"),
    "a softmax over queries": ({"axis": 2}, "a softmax that does not run over its last axis"),
    "values of another size": ({"value_size": 32}, "the head size 16, but values of size 32"),
    "scores as an output": ({"outputs": ("y", "scores")}, "scores or weights that something else reads too"),
    "weights as an output": ({"outputs": ("y", "weights")}, "scores or weights that something else reads too"),
    "a result as the output": ({"outputs": ("context",)}, "a result that nothing reads but an output"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    model = attention_graph(**changes)
    if changes.get("outputs") == ("context",):
        del model.graph.node[-3:]
    with pytest.raises(ModelError, match=f"the attention 'attn' has {reason}"):
        attention_tensors(model)


def test_the_last_axis_may_be_counted_from_the_front() -> None:
    assert len(attentions(attention_graph(axis=3))) == 1


@pytest.mark.parametrize(
    "nodes",
    [
        [make_node("Relu", ["x"], ["y"])],
        [make_node("MatMul", ["x", "w"], ["a"]), make_node("Softmax", ["a"], ["y"])],
        [make_node("Softmax", ["x"], ["a"]), make_node("MatMul", ["a", "w"], ["y"])],
        [
            make_node("MatMul", ["x", "w"], ["a"]),
            make_node("Softmax", ["a"], ["b"]),
            make_node("Relu", ["x"], ["c"]),
            make_node("MatMul", ["b", "c"], ["y"]),
        ],
    ],
    ids=["none", "a classifier's softmax", "weights that are constants", "scores of a Linear"],
)
def test_a_model_without_attention_is_refused(nodes: list[NodeProto]) -> None:
    model = float_graph(nodes, {"w": np.eye(4, dtype=np.float32)}, (4, 4))
    with pytest.raises(ModelError, match="the model has no attention to quantize"):
        quantize_attention(model, {})


def test_a_missing_range_names_its_tensor(tiny16: ModelProto) -> None:
    amax = ranges(tiny16, rows(), PLAIN)
    missing = attentions(tiny16)[1].key
    del amax[missing]
    with pytest.raises(ModelError, match=f"the scale table has no range for '{missing}'"):
        quantize_attention(clone(tiny16), amax)
