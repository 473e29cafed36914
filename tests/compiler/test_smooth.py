"""What can be smoothed is found in every family, smoothing changes no model's function, and what it would change is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.helper import make_node
from torch import Tensor, nn

from tests import models
from tests.compiler.conftest import Tiny
from tests.compiler.families import NAMES, OTHERS, Exported
from tests.engines import sqnr_db
from tests.models import DEPTH, PLAIN, WIDTH, engine_rows, float_graph, random_images, run_graph, tiny_vit
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import convert, export
from vitedge.compiler.graph import linears, load, model_card, producers
from vitedge.compiler.smooth import EXACT_DB, Site, prove, sites, smooth
from vitedge.errors import ModelError
from vitedge.specs import ModelCard, Recipe, Smoothing

FOUND = {  # norms, values and activation functions that Linears read
    "vit": (4, 2, 2),
    "deit": (2, 1, 1),
    "dinov2": (4, 2, 2),
    "beit": (3, 1, 1),
    "clip": (2, 1, 1),
    "siglip": (3, 2, 2),
    "swin": (4, 3, 3),  # its norms go to the windows first, and Linears read what was moved
    "fashion-mnist": (9, 4, 4),
    "mobilevit": (18, 9, 9),
    "eva02": (7, 2, 0),  # the norm in the SwiGLU is one; the product before it is no activation
}
SEEDS = st.integers(0, 2**32 - 1)


class FusedAttention(nn.Module):
    """Q, K and V by one Linear without bias, in another order than usual."""

    def __init__(self) -> None:
        super().__init__()
        self.vqk, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = self.vqk(x).unflatten(2, (3, models.HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ReadsValuesTwice(models.Attention):
    """Adds the values themselves to what attention makes of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.v(x)


class AsksByValues(models.Attention):
    """Has the values for queries as well."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = (linear(x).unflatten(2, (models.HEADS, -1)).transpose(1, 2) for linear in (self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(v, k, v).transpose(1, 2).flatten(2))


class FactoredProjection(models.Attention):
    """Has two Linears in a row, with one channel between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(super().forward(x)))


def tiny_with(attention: type[nn.Module]) -> tuple[nn.Module, ModelCard]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "Attention", attention)
        return tiny_vit()


def clone(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def at_random(model: ModelProto, seed: int, spread: float = 1.0) -> dict[str, Smoothing]:
    """A scale and a shift for every channel of all that can be smoothed."""
    random = np.random.default_rng(seed)
    by_name = {linear.name: linear for linear in linears(model)}
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    made = {}
    for site in sites(model):
        linear = by_name[site.linears[0]]
        channels = known[linear.weight][1 - linear.axis]
        scale, shift = np.exp(random.normal(0, spread, channels)), random.normal(0, spread, channels)
        made[site.tensor] = Smoothing(tuple(scale.tolist()), tuple(shift.tolist()))
    return made


def smoothed(model: ModelProto, seed: int = 0, spread: float = 1.0) -> ModelProto:
    copy = clone(model)
    smooth(copy, at_random(model, seed, spread))
    return copy


def rows_of(card: ModelCard) -> NDArray[Any]:
    return np.asarray(engine_rows(random_images(4, card.preprocess), card))


def by_how(found: list[Site]) -> tuple[int, int, int]:
    counts = Counter(site.how for site in found)
    return counts["norm"], counts["values"], counts["pointwise"]


# What is found


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
def test_norms_values_and_activations_are_found_in_every_family(family: Callable[[str], Exported], name: str) -> None:
    model = family(name).model
    found = sites(model)
    assert by_how(found) == FOUND[name]
    reading = [linear for site in found for linear in site.linears]
    assert len(set(reading)) == len(reading)
    makers = producers(model)
    for site in found:
        assert (makers[site.tensor].op_type == "LayerNormalization") == (site.how == "norm")
        assert (len(site.sources) > 0) == (site.how == "values")


def test_values_are_traced_to_the_outputs_that_make_them(tiny: Tiny) -> None:
    assert by_how(sites(load(tiny.onnx))) == (2 * DEPTH + 1, DEPTH, DEPTH)
    for site in sites(load(tiny.onnx)):
        if site.how == "values":
            ((name, channels),) = site.sources
            assert name == site.linears[0].replace("proj", "v")
            np.testing.assert_array_equal(channels, np.arange(WIDTH))
    fused = [site for site in sites(convert(*tiny_with(FusedAttention))[0]) if site.how == "values"]
    assert len(fused) == DEPTH
    for site in fused:
        ((name, channels),) = site.sources
        assert name.endswith("attention.vqk")
        np.testing.assert_array_equal(channels, [*range(WIDTH), *[-1] * (2 * WIDTH)])


@pytest.mark.parametrize("factors", [(1, 1), (0.5, 0.5), (2, 0)])
def test_sums_and_multiples_are_not_taken_for_the_values_of_another_linear(factors: tuple[float, float]) -> None:
    """A residual stream: the number of a channel is the sum of two, and that of a third channel."""
    constants: dict[str, NDArray[Any]] = {name: np.eye(32, dtype=np.float32) for name in ("a", "b", "c", "d")}
    constants |= {name: np.float32(factor) for name, factor in zip(("f", "g"), factors, strict=True)}
    nodes = [
        make_node("MatMul", ["x", "a"], ["xa"], name="one"),
        make_node("MatMul", ["x", "b"], ["xb"], name="two"),
        make_node("MatMul", ["x", "c"], ["z"], name="three"),
        make_node("Mul", ["xa", "f"], ["left"]),
        make_node("Mul", ["xb", "g"], ["right"]),
        make_node("Add", ["left", "right"], ["stream"]),
        make_node("MatMul", ["stream", "d"], ["y"], name="four"),
    ]
    assert sites(float_graph(nodes, constants, (3, 32), outputs=("y", "z"))) == []


def test_what_something_else_reads_too_or_is_an_output_is_left_alone() -> None:
    weights = {"w": np.eye(4, dtype=np.float32), "gain": np.ones(4, np.float32)}
    norm = make_node("LayerNormalization", ["x", "gain"], ["n"], name="norm")
    product = make_node("MatMul", ["n", "w"], ["y"], name="linear")
    assert by_how(sites(float_graph([norm, product], weights, (3, 4)))) == (1, 0, 0)
    assert sites(float_graph([norm, product], weights, (3, 4), outputs=("y", "n"))) == []
    assert sites(float_graph([norm, product, make_node("Neg", ["n"], ["z"])], weights, (3, 4), outputs=("y", "z"))) == []


# What is exact


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
def test_no_familys_function_changes(family: Callable[[str], Exported], name: str) -> None:
    made = family(name)
    changed = smoothed(made.model)
    rows = rows_of(made.card)
    for before, after in zip(run_graph(made.model, rows), run_graph(changed, rows), strict=True):
        assert EXACT_DB < sqnr_db(before, after) < 250
    prove(made.model, changed, rows)
    kept = {name for node in made.model.graph.node for name in node.output}
    gone = kept - {name for node in changed.graph.node for name in node.output}
    how = {site.tensor: site.how for site in sites(made.model)}
    assert {name for name, kind in how.items() if kind != "pointwise"} <= gone, "another meaning under the same name"


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS, spread=st.sampled_from([0.1, 1.0, 1.5]))
def test_random_scales_and_shifts_change_nothing(tiny: Tiny, seed: int, spread: float) -> None:
    model = load(tiny.onnx)
    rows = rows_of(ModelCard("tiny", "embed", models.tiny_preprocess(), patch=models.PATCH))
    assert sqnr_db(run_graph(model, rows)[0], run_graph(smoothed(model, seed, spread), rows)[0]) > EXACT_DB


def test_one_linear_for_all_three_and_linears_without_bias_are_no_obstacle() -> None:
    module, card = tiny_with(FusedAttention)
    model, card = convert(module, card)
    changed = smoothed(model)
    assert sqnr_db(run_graph(model, rows_of(card))[0], run_graph(changed, rows_of(card))[0]) > EXACT_DB
    names = {node.name for node in changed.graph.node}
    assert {"blocks.0.attention.vqk/bias", "blocks.0.attention.proj/bias"} <= names  # an Add that was not there


def test_a_weight_a_bias_and_a_gain_of_several_readers_stay_as_they_are_for_the_others() -> None:
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(4, 4)), "b": random.normal(size=4), "gain": random.normal(size=4)}
    nodes = [
        make_node("LayerNormalization", ["x", "gain", "b"], ["n"], name="norm"),
        make_node("MatMul", ["n", "w"], ["product"], name="first"),
        make_node("Add", ["b", "product"], ["h"], name="first/Add"),
        make_node("LayerNormalization", ["h", "gain"], ["m"], name="again"),
        make_node("Reshape", ["x", "rows"], ["flat"], name="flat"),
        make_node("Gelu", ["flat"], ["g"], name="gelu"),
        make_node("Gemm", ["g", "w", "b"], ["z"], transB=1, name="second"),
        make_node("MatMul", ["m", "w"], ["a"], name="third"),
        make_node("Mul", ["a", "w"], ["y"], name="another reader"),
    ]
    constants: dict[str, NDArray[Any]] = {name: array.astype(np.float32) for name, array in weights.items()}
    model = float_graph(nodes, {**constants, "rows": np.array([-1, 4])}, (4, 4), outputs=("y", "z"))
    assert by_how(sites(model)) == (2, 0, 1)
    x = random.normal(size=(2, 4, 4)).astype(np.float32)
    changed = smoothed(model)
    for before, after in zip(run_graph(model, x), run_graph(changed, x), strict=True):
        assert sqnr_db(before, after) > EXACT_DB


def test_the_smoothed_tensor_is_what_was_asked_for(tiny: Tiny) -> None:
    model = load(tiny.onnx)
    wanted = at_random(model, 0)
    rows = rows_of(ModelCard("tiny", "embed", models.tiny_preprocess(), patch=models.PATCH))
    # a tensor behind another site sees float32 noise of the rewrites before it, so to a thousandth of its range
    before = run_graph(model, rows, list(wanted))
    after = run_graph(smoothed(model), rows, [f"{name}.smooth" for name in wanted])
    for smoothing, old, new in zip(wanted.values(), before, after, strict=True):
        expected = (old - np.array(smoothing.shift)) / np.array(smoothing.scale)
        np.testing.assert_allclose(new, expected, atol=1e-3 * float(np.abs(expected).max()))


def test_nothing_to_smooth_changes_nothing(tiny: Tiny) -> None:
    model = load(tiny.onnx)
    before = clone(model)
    smooth(model, {})
    assert model.graph.node == before.graph.node


def test_values_that_something_else_reads_too_are_left_alone() -> None:
    model, _ = convert(*tiny_with(ReadsValuesTwice))
    assert not any(site.how == "values" for site in sites(model))
    prove(model, smoothed(model), rows_of(model_card(model)))


def test_a_linear_that_reads_another_is_smoothed_through_it() -> None:
    model, _ = convert(*tiny_with(FactoredProjection))
    assert sum(site.how == "values" for site in sites(model)) == 3 * DEPTH
    prove(model, smoothed(model), rows_of(model_card(model)))


# What is refused


@pytest.mark.parametrize("count", [0, 1, WIDTH - 1])
def test_a_smoothing_of_another_number_of_channels_is_named(tiny: Tiny, count: int) -> None:
    model = load(tiny.onnx)
    tensor = sites(model)[0].tensor
    with pytest.raises(ModelError, match=f"the smoothing of '{tensor}' is for {count} channels, but it has {WIDTH}"):
        smooth(model, {tensor: Smoothing((2.0,) * count, (0.0,) * count)})


def test_a_tensor_that_cannot_be_smoothed_is_named(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="'none' cannot be smoothed in this model"):
        smooth(load(tiny.onnx), {"none": Smoothing((1.0,), (0.0,))})


def test_a_model_that_smoothing_would_change_is_refused_and_calibrates_without(tiny: Tiny, tmp_path: Path) -> None:
    export(*tiny_with(AsksByValues), tmp_path / "fp32.onnx")
    with pytest.raises(ModelError, match=r"smoothing changes the output 'logits' of this model, which it must not") as caught:
        calibrate(tmp_path / "fp32.onnx", tiny.files, Recipe())
    assert 'smoothing = "none"' in str(caught.value.hint)
    assert calibrate(tmp_path / "fp32.onnx", tiny.files, PLAIN).table.smoothing == {}


@pytest.mark.parametrize("change", ["a ten-thousandth", "nan"])
def test_a_proof_sees_small_changes_and_no_numbers(tiny: Tiny, change: str) -> None:
    model = load(tiny.onnx)
    rows = rows_of(ModelCard("tiny", "embed", models.tiny_preprocess(), patch=models.PATCH))
    prove(model, clone(model), rows)
    other = clone(model)
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "head.bias")
    values = np.frombuffer(bias.raw_data, np.float32).copy()
    values += np.nan if change == "nan" else 3e-4 * float(np.abs(run_graph(model, rows)[0]).max())
    bias.raw_data = values.tobytes()
    with pytest.raises(ModelError, match="smoothing changes the output"):
        prove(model, other, rows)


def test_the_tests_own_models_differ_from_torch_in_nothing() -> None:
    for attention in (FusedAttention, ReadsValuesTwice):
        module, card = tiny_with(attention)
        images = random_images(2, card.preprocess)
        with torch.inference_mode():
            expected = module(models.torch_input(images, card.preprocess)).numpy()
        model, card = convert(module, card)
        assert sqnr_db(expected, run_graph(model, engine_rows(images, card))[0]) > EXACT_DB
