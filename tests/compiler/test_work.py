"""What a graph asks of a device is what its shapes say, whatever form the graph has, and it travels with the file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.compiler.conftest import Tiny
from tests.compiler.families import NAMES, Exported
from tests.models import DEPTH, PLAIN, TOKENS, WIDTH
from vitedge.backends.build import read_source
from vitedge.compiler import graph, precision
from vitedge.compiler.activations import run_once
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.quantize import leave_float, quantize
from vitedge.compiler.work import PRODUCTS, LayerWork, count_work, save_counted, total
from vitedge.errors import ModelError
from vitedge.specs import Recipe, Work

OPSET = [helper.make_opsetid("", 21)]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_counted_as_its_tensors_are_when_it_runs(name: str, family: Callable[[str], Exported]) -> None:
    """Against numpy: the shapes of a real run, and of each product the definition of what it is."""
    exported = family(name)
    counted = {layer.name: layer for layer in count_work(exported.model)}
    expected = run_macs(exported)
    assert {name: layer.macs for name, layer in counted.items()} == expected and all(expected.values())
    assert {layer.type for layer in counted.values()} == {"fp32"}


def run_macs(exported: Exported) -> dict[str, int]:
    """Multiply-adds of each product for one image, by the shapes that ONNX Runtime gives."""
    model = exported.model
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    constants = graph.constants(model)
    names = {str(name) for node in products for name in (*node.input[:2], node.output[0])} - constants.keys()
    shapes = {name: array.shape for name, array in {**constants, **run_once(model, sorted(names))}.items()}
    result = {}
    for node in products:
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        filters = math.prod(right[1:]) * math.prod(left if node.op_type == "ConvTranspose" else out)
        result[node.name] = filters if "Conv" in node.op_type else math.prod(out) * left[-1]
    return result


def vit(tokens: int, width: int, heads: int, depth: int, *, attention: bool = False) -> ModelProto:
    """The products of a ViT's encoder on int8 patches of 48 values, Linears in INT8 and `attention` so if asked for."""
    constants, nodes = [numpy_helper.from_array(np.float32(0.1), "scale")], []

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def rounded(name: str) -> str:
        return node("DequantizeLinear", [node("QuantizeLinear", [name, "scale"], f"{name}.q"), "scale"], f"{name}.dq")

    def linear(name: str, entry: str, inputs: int, outputs: int) -> str:
        constants.append(numpy_helper.from_array(np.zeros((inputs, outputs), np.int8), f"{name}.w"))
        return node("MatMul", [entry, node("DequantizeLinear", [f"{name}.w", "scale"], f"{name}.w.dq")], name)

    def heads_of(name: str, order: list[int]) -> str:
        return node("Transpose", [node("Reshape", [name, "split"], f"{name}.split")], f"{name}.heads", perm=order)

    constants.append(numpy_helper.from_array(np.array([0, tokens, heads, width // heads]), "split"))
    constants.append(numpy_helper.from_array(np.array([0, tokens, width]), "join"))
    pair = rounded if attention else str
    x = linear("patch", node("DequantizeLinear", ["patches", "scale"], "pixels"), 48, width)
    for block in range(depth):
        shared = rounded(x)
        q, k, v = (linear(f"{block}.{part}", shared, width, width) for part in "qkv")
        scores = node("MatMul", [pair(heads_of(q, [0, 2, 1, 3])), pair(heads_of(k, [0, 2, 3, 1]))], f"{block}.scores")
        weights = node("Softmax", [scores], f"{block}.softmax")
        context = node("MatMul", [pair(weights), pair(heads_of(v, [0, 2, 1, 3]))], f"{block}.context")
        joined = node("Reshape", [node("Transpose", [context], f"{block}.t", perm=[0, 2, 1, 3]), "join"], f"{block}.joined")
        hidden = linear(f"{block}.fc1", rounded(linear(f"{block}.proj", rounded(joined), width, width)), width, 4 * width)
        x = linear(f"{block}.fc2", rounded(node("Gelu", [hidden], f"{block}.gelu")), 4 * width, width)
    entry = helper.make_tensor_value_info("patches", TensorProto.INT8, ["batch", tokens, 48])
    out = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", tokens, width])
    return helper.make_model(helper.make_graph(nodes, "vit", [entry], [out], constants), opset_imports=OPSET)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans())
def test_a_vit_takes_what_its_formula_says(tokens: int, size: int, heads: int, depth: int, attention: bool) -> None:
    width = size * heads
    work = total(count_work(vit(tokens, width, heads, depth, attention=attention)))
    linears, products = 48 * tokens * width + 12 * depth * tokens * width**2, 2 * depth * tokens**2 * width
    expected = {"int8": linears + products} if attention else {"int8": linears, "fp32": products}
    assert work == Work(expected, {"int8": 48 * width + 12 * depth * width**2})


@pytest.mark.parametrize(
    ("tokens", "width", "depth", "patch", "classes", "gmac", "millions"),
    [(197, 192, 12, 16, 1000, 1.25, 5.7), (197, 384, 12, 16, 1000, 4.6, 22.1), (197, 768, 12, 16, 1000, 17.56, 86.6)],
    ids=["ViT-T/16", "ViT-S/16", "ViT-B/16"],
)
def test_published_models_come_out(
    tokens: int, width: int, depth: int, patch: int, classes: int, gmac: float, millions: float
) -> None:
    """Next to the patches and the head, which this graph has otherwise: 4,800 multiply-adds a token and 1,000 outputs."""
    work = total(count_work(vit(tokens, width, width // 64, depth)))
    others = (3 * patch**2 - 48) * tokens * width + classes * width
    assert (sum(work.macs.values()) + others) / 1e9 == pytest.approx(gmac, rel=0.01)
    assert (work.weight_bytes + others // tokens) / 1e6 == pytest.approx(millions, rel=0.05)


def one_layer(op: str, left: tuple[Any, ...], right: tuple[int, ...], **attributes: Any) -> LayerWork:
    weight = numpy_helper.from_array(np.zeros(right, np.float32), "w")
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *left])
    body = helper.make_graph([node], "one", [entry], [helper.make_empty_tensor_value_info("y")], [weight])
    (layer,) = count_work(helper.make_model(body, opset_imports=OPSET))
    return layer


def test_convolutions_and_gemms_by_hand() -> None:
    conv = one_layer("Conv", (6, 8, 8), (4, 3, 3, 3), group=2, pads=[1, 1, 1, 1])
    assert conv == LayerWork("layer", "fp32", 4 * 8 * 8 * 3 * 9, "w", 108, "fp32", 4 * 6 * 64, 4 * 4 * 64)
    up = one_layer("ConvTranspose", (6, 8, 8), (6, 4, 2, 2), strides=[2, 2])
    assert (up.macs, up.out_bytes) == (6 * 8 * 8 * 4 * 4, 4 * 4 * 16 * 16)
    gemm = one_layer("Gemm", (5,), (7, 5), transB=1)
    assert (gemm.macs, gemm.weight_bytes) == (35, 140)
    assert one_layer("MatMul", (3, 5), (5, 7)).macs == 105


def test_a_weight_that_two_products_read_is_read_once() -> None:
    model = vit(4, 8, 2, 1)
    for node in model.graph.node:
        if node.name == "0.k":
            node.input[1] = "0.q.w.dq"
    assert total(count_work(model)).weight_bytes == 48 * 8 + 11 * 64


def test_activations_are_counted_as_they_are_stored() -> None:
    layers = {layer.name: layer for layer in count_work(vit(10, 8, 2, 1, attention=True))}
    assert (layers["0.fc1"].in_bytes, layers["0.fc1"].out_bytes) == (10 * 8, 4 * 10 * 32)
    assert layers["0.scores"].in_bytes == 2 * 10 * 8 and layers["0.scores"].weight is None
    assert {layer.name: layer for layer in count_work(vit(10, 8, 2, 1))}["0.scores"].in_bytes == 4 * 2 * 10 * 8


def test_a_graph_of_unknown_shapes_is_saved_without_its_work(tmp_path: Path, tiny: Tiny) -> None:
    model = graph.load(tiny.onnx)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    with pytest.raises(ModelError, match="no shape is known"):
        count_work(model)
    save_counted(model, tmp_path / "m.onnx")
    assert read_source(tmp_path / "m.onnx").work is None, "and not with what the metadata said before"


def reshaped(nodes: list[Any], source: str, entry: ValueInfoProto) -> ModelProto:
    """Some nodes on x, and a product of the INT8 tensor `source` as two rows of four."""
    nodes = [*nodes, helper.make_node("DequantizeLinear", [source, "scale"], ["d"])]
    nodes += [helper.make_node("Reshape", ["d", "rows"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"], name="p")]
    values = {"rows": np.int64([2, 4]), "w": np.ones((4, 3), np.float32), "scale": np.float32(1)}
    constants = [numpy_helper.from_array(array, name) for name, array in values.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    return helper.make_model(helper.make_graph(nodes, "g", [entry], [output], constants), opset_imports=OPSET, ir_version=10)


def test_behind_a_reshape_a_tensor_of_unknown_shape_is_looked_at_or_told() -> None:
    """The Reshape says how many numbers there are, and hides that nobody has said so of what they are stored in."""
    made = [helper.make_node("Not", ["x"], ["n"]), helper.make_node("NonZero", ["n"], ["i"])]
    made.append(helper.make_node("Cast", ["i"], ["q"], to=TensorProto.INT8))
    (layer,) = count_work(reshaped(made, "q", helper.make_tensor_value_info("x", TensorProto.BOOL, [1, 4])))
    assert (layer.macs, layer.in_bytes) == (2 * 4 * 3, 8)  # NonZero gives as many columns as it finds: of a blank image, 4
    with pytest.raises(ModelError, match="no shape is known of"):
        count_work(reshaped([], "x", helper.make_tensor_value_info("x", TensorProto.INT8, [1, "any"])))


# Every verb that writes a file tells of the graph as it is written


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    folder = tmp_path_factory.mktemp("work")

    def make(recipe: Recipe) -> Path:
        path = folder / f"{recipe.name}.onnx"
        quantize(tiny.onnx, calibrate(tiny.onnx, tiny.files, recipe).table, path, tiny.files)
        return path

    return make


def told(path: Path) -> Work:
    """The work in the metadata, which must be that of the graph."""
    work = read_source(path).work
    assert work is not None and work == total(count_work(graph.load(path)))
    return work


def test_export_and_a_recipe_that_quantizes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    floats = told(tiny.onnx)
    assert floats.macs.keys() == floats.weights.keys() == {"fp32"}
    leave_float(tiny.onnx, Recipe(name="bf16", method="none", float_type="bf16"), tmp_path / "bf16.onnx")
    assert told(tmp_path / "bf16.onnx") == floats


def test_int8_moves_the_linears(tiny: Tiny, quantized: Callable[[Recipe], Path]) -> None:
    plain = told(quantized(PLAIN))
    assert set(plain.macs) == {"int8", "fp32"} and set(plain.weights) == {"int8"}
    assert plain.floats_in("fp32").macs["fp32"] == 2 * DEPTH * (TOKENS + 1) ** 2 * WIDTH
    assert sum(plain.macs.values()) == told(tiny.onnx).macs["fp32"]


def test_int8_attention_moves_the_rest(family: Callable[[str], Exported], tiny: Tiny, tmp_path: Path) -> None:
    path, recipe = tmp_path / "fp32.onnx", dataclasses.replace(PLAIN, attention=True)
    save_counted(family("vit").model, path)
    quantize(path, calibrate(path, tiny.files, recipe).table, tmp_path / "int8.onnx", tiny.files)
    floats = told(path)
    assert told(tmp_path / "int8.onnx") == Work({"int8": floats.macs["fp32"]}, {"int8": floats.weights["fp32"]})


def test_four_bits_halve_the_weights_and_freed_linears_are_float_again(quantized: Callable[[Recipe], Path]) -> None:
    plain = told(quantized(PLAIN))
    small = told(quantized(dataclasses.replace(PLAIN, name="w4", int4=("*fc*",))))
    assert small.macs == plain.macs and small.weights["int4"] == DEPTH * 4 * WIDTH**2
    assert small.weight_bytes == plain.weight_bytes - DEPTH * 2 * WIDTH**2
    bounded = quantized(dataclasses.replace(PLAIN, name="bounded", min_sqnr_db=45.0))
    freed = len((read_source(bounded).recipe or Recipe()).skip)
    assert freed and told(bounded).weights["fp32"] and sum(told(bounded).macs.values()) == sum(plain.macs.values())


def test_fp16_is_counted_as_fp16(tiny: Tiny, quantized: Callable[[Recipe], Path], tmp_path: Path) -> None:
    plain = quantized(PLAIN)
    assert precision.convert(plain, "fp16", tmp_path / "half.onnx", tiny.files) == {}
    assert told(tmp_path / "half.onnx") == told(plain).floats_in("fp16")
