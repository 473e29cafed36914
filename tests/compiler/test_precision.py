"""The 16-bit form of a graph: close to the FP32 form, of one type throughout but where FP16 cannot hold a number."""

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
from tests.models import PLAIN, engine_rows, float_graph, operators, random_images, run_graph
from vitedge.compiler import graph, precision
from vitedge.compiler.activations import read_inputs
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.precision import CHECKED_IMAGES, HALF, HEADROOM, LARGEST, convert, to_half
from vitedge.compiler.quantize import quantize
from vitedge.compiler.ranges import largest_values, tensor_types, worst_sqnr_db
from vitedge.errors import ModelError
from vitedge.specs import FloatType, ModelCard, Recipe

Load = Callable[[str], Exported]
SMALLEST = 2.0**-24
HALF_TYPES: tuple[FloatType, ...] = ("bf16", "fp16")


def halved(model: ModelProto) -> ModelProto:
    """The FP16 form of a copy."""
    return retyped(model)[0]


def retyped(
    model: ModelProto, float_type: FloatType = "fp16", largest: dict[str, float] | None = None
) -> tuple[ModelProto, list[str]]:
    """The 16-bit form of a copy, well-formed, and the nodes kept in FP32."""
    copy = graph.copy_of(model)
    kept = list(to_half(copy, float_type, largest))
    assert_well_formed(copy, kept, HALF[float_type])
    return copy, kept


def assert_well_formed(model: ModelProto, kept: list[str], half: int) -> None:
    """Every type is one that ONNX allows there; all floats are of 16 bits but around the kept nodes; no Cast is for nothing."""
    types, makers, casts = tensor_types(model), graph.producers(model), set()
    for node in model.graph.node:
        floats = {types[name] for name in (*node.input, *node.output) if types.get(name) in (TensorProto.FLOAT, half)}
        if node.op_type == "Cast" and {TensorProto.FLOAT, half} == floats:
            maker = makers.get(node.input[0])
            assert maker is None or maker.op_type not in ("Cast", "DequantizeLinear"), f"{node.name} casts what could be made so"
            assert (node.input[0], types[node.output[0]]) not in casts, f"{node.name} is the second one"
            casts.add((node.input[0], types[node.output[0]]))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(floats) == 1, node.name
            before = makers.get(node.input[0])
            assert before is None or before.op_type != "Cast", f"{node.name} could quantize what is cast"
        elif node.op_type != "Resize":
            wanted = {TensorProto.FLOAT} if kept and {node.name, node.output[0]} & set(kept) else {half}
            assert floats <= wanted, f"{node.name} ({node.op_type}) computes in {floats}"


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
def test_a_weight_out_of_range_keeps_its_node_in_fp32(worst: float) -> None:
    model = scaled(a=np.float32([1, worst]), b=np.float32(1e6))
    half, kept = retyped(model)
    assert kept == ["z", "y"]  # without names of their own: what they make; the other one divides by a million
    np.testing.assert_array_equal(run_graph(half, np.ones((1, 2), np.float32))[0], np.float32([[1, worst]]) / np.float32(1e6))


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
    nodes = [make_node("Relu", ["x"], ["r"]), make_node("QuantizeLinear", ["r", "s", "z"], ["q"])]
    nodes += [make_node("DequantizeLinear", ["q", "s", "z"], ["d"]), make_node("Relu", ["d"], ["y"])]
    half = halved(float_graph(nodes, {"s": scale, "z": np.int8(0)}, (2,)))
    assert float(graph.constants(half)["s"]) == SMALLEST
    np.testing.assert_array_equal(run_graph(half, np.zeros((1, 2), np.float32))[0], [[0, 0]])


# The range of FP16, measured

FC1 = ["blocks.0.fc1", "blocks.0.fc1/Add", "blocks.0/Gelu", "blocks.0.fc2"]  # all that touch what lies between FC1 and FC2


def large_activation(model: ModelProto, factor: float = 1e5) -> None:
    """Let the hidden activations of block 0 be larger, and FC2 make up for it."""
    known = graph.constants(model)
    weight, bias = known["blocks.0.fc1.weight"], known["blocks.0.fc1.bias"]
    graph.put_constant(model, "blocks.0.fc1.weight", np.float32(weight * factor))
    graph.put_constant(model, "blocks.0.fc1.bias", np.float32(bias * factor))
    graph.put_constant(model, "blocks.0.fc2.weight", np.float32(known["blocks.0.fc2.weight"] / factor))


def large_weight(model: ModelProto) -> None:
    """One weight of 1e5, for a channel that the norm before leaves at 1e-3."""
    known = graph.constants(model)
    for name, entry, value in (
        ("blocks.0.norm2.weight", 3, 0.0),
        ("blocks.0.norm2.bias", 3, 1e-3),
        ("blocks.0.fc1.weight", (3, 5), 1e5),
    ):
        changed = known[name].copy()
        changed[entry] = value
        graph.put_constant(model, name, changed)


def large_residual(model: ModelProto) -> None:
    """From the first attention on, one channel of the residual stream is 100,000."""
    bias = graph.constants(model)["blocks.0.attention.proj.bias"].copy()
    bias[7] = 1e5
    graph.put_constant(model, "blocks.0.attention.proj.bias", bias)


RESIDUAL = ["blocks.0.attention.proj/Add", "blocks.0/Add", "blocks.0.norm2/LayerNormalization", "blocks.0/Add.2"]
RESIDUAL += ["blocks.1.norm1/LayerNormalization", "blocks.1/Add", "blocks.1.norm2/LayerNormalization", "blocks.1/Add.2"]
RESIDUAL += ["/Gather", "norm/LayerNormalization"]
LARGE: dict[str, tuple[Callable[[ModelProto], None], list[str]]] = {
    "activation": (large_activation, FC1),
    "weight": (large_weight, ["blocks.0.fc1"]),
    "residual": (large_residual, RESIDUAL),
}
FORMS = ("float", "int8")


def write_large(kind: str, form: str, tiny: Tiny, folder: Path) -> Path:
    """The tiny model with one kind of number that FP16 does not hold, as a float or INT8 graph in FP32."""
    model, path = graph.load(tiny.onnx), folder / f"{kind}.onnx"
    LARGE[kind][0](model)
    graph.save(model, path)
    if form == "int8":
        quantize(path, calibrate(path, tiny.files, PLAIN).table, folder / f"{kind}.int8.onnx", tiny.files)
        return folder / f"{kind}.int8.onnx"
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LARGE)
def test_what_fp16_cannot_hold_stays_in_fp32_and_nothing_else(kind: str, form: str, tiny: Tiny, tmp_path: Path) -> None:
    source, path, told = write_large(kind, form, tiny, tmp_path), tmp_path / "half.onnx", []
    reasons = convert(source, "fp16", path, tiny.files, progress=lambda done, total: told.append((done, total)))
    kept = list(reasons)
    reference, half = graph.load(source), graph.load(path)
    assert kept == LARGE[kind][1] and set(reasons.values()) == {"too large for fp16"}
    assert_well_formed(half, kept, TensorProto.FLOAT16)
    assert told == [(done, 20) for done in range(1, 21)]
    counted = {"vitedge.work": graph.metadata(half)["vitedge.work"]}  # which test_work.py looks at
    assert graph.metadata(half) == {**graph.metadata(reference), **counted, "vitedge.float_type": "fp16"}
    assert (half.graph.input, half.graph.output) == (reference.graph.input, reference.graph.output)
    assert worst_sqnr_db(reference, half, read_inputs(reference, tiny.files, 8)) > (50 if form == "float" else 20)


@pytest.mark.parametrize("kind", ["activation", "residual"])
def test_without_the_measurement_it_would_overflow(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    reference = graph.load(write_large(kind, "float", tiny, tmp_path))
    assert not worst_sqnr_db(reference, halved(reference), read_inputs(reference, tiny.files, 4)) > 1


def test_the_kept_nodes_are_those_that_touch_a_number_within_the_headroom(tiny: Tiny, tmp_path: Path) -> None:
    reference = graph.load(tiny.onnx)
    large_activation(reference, 1.0)
    made = [name for node in reference.graph.node for name in node.output]
    values = run_graph(reference, read_inputs(reference, tiny.files, 20), made)
    hidden = max(float(np.abs(values[made.index(name)]).max()) for name in ("val_77", "linear_4"))
    assert max(float(np.abs(value).max()) for value in values) < 100  # so that the factor decides
    for part, kept in ((1.05, FC1), (0.95, [])):
        model = graph.copy_of(reference)
        large_activation(model, part * LARGEST / HEADROOM / hidden)
        graph.save(model, tmp_path / "some.onnx")
        found = convert(tmp_path / "some.onnx", "fp16", tmp_path / "half.onnx", tiny.files)
        assert set(found) <= set(FC1) and bool(found) == bool(kept)


def test_quantizers_of_kept_layers_have_fp32_scales_and_others_fp16(tiny: Tiny, tmp_path: Path) -> None:
    convert(write_large("activation", "int8", tiny, tmp_path), "fp16", tmp_path / "half.onnx", tiny.files)
    half = graph.load(tmp_path / "half.onnx")
    known, makers = graph.constants(half), graph.producers(half)
    for node in half.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("blocks.0.fc"):
            assert [known[makers[name].input[1]].dtype for name in node.input] == [np.float32] * 2  # straight from their DQ
    wide = {n.name for n in half.graph.node if n.op_type.endswith("Linear") and known[n.input[1]].dtype == np.float32}
    assert wide == {
        "layer_norm_1/DequantizeLinear",
        "blocks.0.fc1/weight",
        "gelu/QuantizeLinear",
        "gelu/DequantizeLinear",
        "blocks.0.fc2/weight",
    }
    (before,) = [node for node in half.graph.node if node.name == "layer_norm_1/QuantizeLinear"]
    assert known[before.input[1]].dtype == np.float16  # as the FP16 that it reads


def test_what_two_types_read_is_dequantized_into_both() -> None:
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("QuantizeLinear", ["r", "s", "zero"], ["q"]),
        make_node("DequantizeLinear", ["q", "s", "zero"], ["d"]),
        make_node("MatMul", ["d", "large"], ["a"]),
        make_node("MatMul", ["d", "small"], ["b"]),
        make_node("Add", ["a", "b"], ["c"]),
        make_node("Relu", ["c"], ["y"]),
    ]
    constants = {"s": np.float32(2**-7), "zero": np.int8(0), "large": np.float32([[1e5, 1]]), "small": np.float32([[1, 2]])}
    model = float_graph(nodes, constants, (1,))
    half, kept = retyped(model, "fp16", {"a": 1e5, "c": 1e5, "y": 1e5})
    assert kept == ["a", "c", "y"]
    assert operators(half) == [
        "Cast",
        "Relu",
        "QuantizeLinear",
        *["DequantizeLinear"] * 2,
        *["MatMul"] * 2,
        "Cast",
        "Add",
        "Relu",
    ]
    x = np.float32([[0.5], [0.25]])
    np.testing.assert_array_equal(run_graph(half, x)[0], run_graph(model, x)[0])


def test_a_tiny_scale_that_only_fp32_reads_stays() -> None:
    model = dequantized(np.int8([[127, -3]]), np.float32([1e-9, 1]), axis=1)
    half, kept = retyped(model, "fp16", {"y": 1e5})
    assert kept == ["y"]
    np.testing.assert_array_equal(graph.constants(half)["s"], np.float32([1e-9, 1]))


def test_a_decomposed_layernorm_is_kept_where_it_squares() -> None:
    """As in an exporter's FP16 ViT-B/16, whose residual of 1,418 made 19 % of 85 % top-1."""
    axes = np.int64([-1])
    nodes = [
        make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean"),
        make_node("Sub", ["x", "mean"], ["d"], name="subtract"),
        make_node("Pow", ["d", "two"], ["square"], name="square"),
        make_node("ReduceMean", ["square", "axes"], ["variance"], name="variance"),
        make_node("Add", ["variance", "epsilon"], ["shifted"], name="shift"),
        make_node("Sqrt", ["shifted"], ["deviation"], name="root"),
        make_node("Div", ["d", "deviation"], ["y"], name="divide"),
    ]
    model = float_graph(nodes, {"axes": axes, "two": np.float32(2), "epsilon": np.float32(1e-6)}, (64,))
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    x[:, 3] = 1418
    half, kept = retyped(model, "fp16", largest_of(model, x))
    assert kept == ["square", "variance", "shift", "root"]  # the variance itself is 31,000
    assert worst_sqnr_db(model, half, x) > 55
    assert not worst_sqnr_db(model, halved(model), x) > 1


def largest_of(model: ModelProto, rows: NDArray[np.generic]) -> dict[str, float]:
    """What `largest_values` finds, for rows in place of images."""
    names = [name for node in model.graph.node for name in node.output]
    return {name: float(np.abs(value).max()) for name, value in zip(names, run_graph(model, rows, names), strict=True)}


def test_a_norm_is_kept_where_its_squares_are_too_large() -> None:
    model = float_graph([make_node("ReduceL2", ["x"], ["n"], name="norm"), make_node("Relu", ["n"], ["y"])], {}, (4,))
    assert retyped(model, "fp16", {"n": 120.0})[1] == []
    assert retyped(model, "fp16", {"n": 140.0})[1] == ["norm"]  # 140 * 140 * HEADROOM > 65504
    assert retyped(model, "bf16", {"n": 140.0})[1] == []


def test_the_measurement_is_that_of_every_image_one_by_one(tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    names = [name for node in model.graph.node for name in node.output]
    found = largest_values(model, names, tiny.files)
    for name, value in zip(names, run_graph(model, read_inputs(model, tiny.files, 20), names), strict=True):
        assert found[name] == pytest.approx(float(np.abs(value).max()), rel=1e-5)


# What is refused


def test_an_overflow_shows_in_the_comparison_though_onnxruntime_hides_it() -> None:
    nodes = [make_node("Mul", ["x", "a"], ["z"]), make_node("Gelu", ["z"], ["g"]), make_node("Mul", ["g", "b"], ["y"])]
    model = float_graph(nodes, {"a": np.float32(1000), "b": np.float32(1e-3)}, (2,))
    x = np.float32([[100, 1]])
    assert np.isfinite(run_graph(halved(model), x)[0]).all()  # it computes FP16 in FP32 and forgets the Casts between
    assert np.isnan(worst_sqnr_db(model, halved(model), x))
    assert 50 < worst_sqnr_db(model, halved(model), x / 10) < 90


def test_the_worst_output_counts() -> None:
    nodes = [make_node("Mul", ["x", "one"], ["same"]), make_node("Mul", ["x", "third"], ["rounded"])]
    model = float_graph(nodes, {"one": np.float32(1), "third": np.float32(1 / 3)}, (2,), ("same", "rounded"))
    for outputs in (["same", "rounded"], ["rounded", "same"]):
        ordered = graph.copy_of(model)
        ordered.graph.output.sort(key=lambda output: outputs.index(output.name))
        assert 60 < worst_sqnr_db(ordered, halved(ordered), np.float32([[1, 2]])) < 90


def test_answers_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "HEADROOM", 0.0)  # as if the images had not shown what comes
    with pytest.raises(ModelError, match=r"activation\.onnx in FP16 are NaN or infinite") as caught:
        convert(write_large("activation", "float", tiny, tmp_path), "fp16", tmp_path / "half.onnx", tiny.files)
    assert "bf16" in str(caught.value.hint) and not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("float_type", HALF)
def test_answers_that_lose_their_digits_are_refused(form: str, float_type: FloatType, tiny: Tiny, tmp_path: Path) -> None:
    """All channels of the residual stream far from zero: within the range, but a norm subtracts what holds all the bits."""
    model, path = graph.load(tiny.onnx), tmp_path / "far.onnx"
    graph.put_constant(model, "cat.tokens", np.float32(graph.constants(model)["cat.tokens"] + 12000))
    graph.save(model, path)
    if form == "int8":
        quantize(path, calibrate(path, tiny.files, PLAIN).table, path, tiny.files)
    limit = precision.FLOOR_DB if form == "float" else precision.INT8_FLOOR_DB
    said = rf"far\.onnx in {float_type.upper()} keep -?\d+\.\d dB, less than {limit:g} dB"
    with pytest.raises(ModelError, match=said) as caught:
        convert(path, float_type, tmp_path / "half.onnx", tiny.files)
    assert ("bf16" in str(caught.value.hint)) == (float_type == "fp16") and not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("float_type", HALF)
def test_a_converted_graph_is_not_converted_again(float_type: FloatType, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    assert convert(tiny.onnx, float_type, path, tiny.files[:CHECKED_IMAGES]) == {}
    assert graph.metadata(graph.load(path))["vitedge.float_type"] == float_type
    before = path.read_bytes()
    with pytest.raises(ModelError, match=f"computes in {float_type} and cannot be converted to fp16") as caught:
        convert(path, "fp16", path, tiny.files)
    assert "made from" in str(caught.value.hint) and path.read_bytes() == before
    with pytest.raises(ModelError, match="cannot be converted to fp32"):
        convert(tiny.onnx, "fp32", path, tiny.files)


def test_a_graph_within_the_graph_is_refused_by_name() -> None:
    ends = [onnx.helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    branch = onnx.helper.make_graph([make_node("Relu", ["x"], ["b"])], "branch", [], ends)
    node = make_node("If", ["c"], ["y"], name="choose", then_branch=branch, else_branch=branch)
    with pytest.raises(ModelError, match=r"'choose' \(If\) holds a graph of its own"):
        to_half(float_graph([node], {"c": np.bool_(True)}, (2,)))


# BF16, and what a type is not defined for


@pytest.mark.parametrize("name", NAMES)
def test_the_bf16_form_is_the_fp16_form_in_another_type(name: str, family: Load) -> None:
    model = family(name).model
    (brain, kept), half = retyped(model, "bf16"), halved(model)
    assert kept == [] and operators(brain) == operators(half)
    given, known = graph.constants(brain), graph.constants(model)
    for tensor in (tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT):
        if given[tensor.name].dtype != np.float32:  # the factors of Resize
            np.testing.assert_allclose(given[tensor.name].astype(np.float32), known[tensor.name], rtol=2**-8)


def test_bf16_needs_no_images_and_keeps_what_fp16_cannot(tiny: Tiny, tmp_path: Path) -> None:
    for kind in LARGE:
        assert convert(write_large(kind, "int8", tiny, tmp_path), "bf16", tmp_path / "brain.onnx", ()) == {}
        assert_well_formed(graph.load(tmp_path / "brain.onnx"), [], TensorProto.BFLOAT16)


@pytest.mark.parametrize("name", NAMES)
def test_the_bf16_form_is_run_with_what_it_stores_rounded(name: str, family: Load) -> None:
    """ONNX Runtime does not compute in BF16, but casts to it; 8 bits of precision are 3 fewer than those of FP16."""
    model, patches = family(name).model, rows(family(name).card)
    brain, half = (worst_sqnr_db(model, retyped(model, kind)[0], patches) for kind in HALF_TYPES)
    assert 20 < brain < half - 6


def test_each_number_is_rounded_to_bf16_once() -> None:
    model = float_graph([make_node("Mul", ["x", "c"], ["y"])], {"c": np.float32([1 + 2**-8])}, (1,))
    brain = retyped(model, "bf16")[0]
    assert worst_sqnr_db(model, brain, np.float32([[1.0]])) == pytest.approx(-20 * np.log10(1 - 1 / (1 + 2**-8)))


def test_the_largest_fp32_is_not_infinite_in_bf16() -> None:
    limits = np.float32([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-42])
    model = float_graph([make_node("Add", ["x", "c"], ["y"])], {"c": limits}, (3,))
    given = graph.constants(retyped(model, "bf16")[0])["c"].astype(np.float32)
    assert np.isfinite(given).all() and (np.abs(given[:2]) > 3.38e38).all() and given[2] > 0


def test_the_opset_rises_as_far_as_the_type_needs() -> None:
    def opset(model: ModelProto) -> int:
        return int(model.opset_import[0].version)

    image = converted(OverlappingStem).model
    assert (opset(image), opset(retyped(image)[0]), opset(retyped(image, "bf16")[0])) == (20, 20, 22)  # a Conv
    old = float_graph([make_node("Relu", ["x"], ["y"])], {}, (2,))
    old.opset_import[0].version = 17
    assert (opset(retyped(old)[0]), opset(retyped(old, "bf16")[0])) == (20, 20)


@pytest.mark.parametrize("float_type", HALF)
def test_an_operator_that_a_type_is_not_defined_for_stays_in_fp32(float_type: FloatType) -> None:
    nodes = [
        make_node("Range", ["zero", "three", "one"], ["r"], name="count"),
        make_node("LayerNormalization", ["x", "r"], ["n", "", "deviation"], name="statistics"),
        make_node("Mul", ["n", "deviation"], ["y"], name="product"),
    ]
    model = float_graph(nodes, {"zero": np.float32(0), "three": np.float32(3), "one": np.float32(1)}, (3,))
    half, kept = retyped(model, float_type)
    assert kept == ["count", "statistics"]
    if float_type == "fp16":
        x = np.float32([[1, 2, 4]])
        np.testing.assert_allclose(run_graph(half, x)[0], run_graph(model, x)[0], rtol=2e-3)
