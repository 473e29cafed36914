"""TensorRT-RTX's own parser and builder take every graph that vitedge makes, in FP32, FP16 and BF16, strongly typed.

    module -> fp32.onnx [-> int8.onnx] [-> FP16 or BF16] -> the backend tensorrt-rtx -> a plan for compute capability 8.6

It needs no GPU and no driver; to run a plan does. So this says nothing of speed or accuracy. The models here are tiny; those
of real size, and MobileViT, are built in tests/rtx.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from tests.compiler.conftest import Tiny
from tests.compiler.families import NAMES, Exported
from tests.compiler.test_export import OverlappingStem, Upsampled, converted
from tests.compiler.test_precision import FORMS, LARGE, write_large
from tests.engines import Silent
from tests.models import PLAIN
from vitedge import pipeline
from vitedge.backends.build import prepare_build, read_source
from vitedge.backends.tensorrt import TENSORRT_RTX, Release
from vitedge.backends.tensorrt_log import make_log
from vitedge.compiler import graph
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.precision import convert, to_half
from vitedge.compiler.quantize import leave_float, quantize
from vitedge.errors import BuildError, EngineError
from vitedge.specs import FloatType, Recipe, Target
from vitedge.workspace import BUILTIN_RECIPES

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install '.[rtx]'", exc_type=ImportError)
RECIPES = {
    "float": Recipe(name="float", method="none"),
    "int8": Recipe(),
    "int8-fast": BUILTIN_RECIPES["int8-fast"],
    "int8-attention": BUILTIN_RECIPES["int8-attention"],
    "int4": Recipe(name="int4", int4=("*",)),
    "one scale": Recipe(name="coarse", per_channel=False, method="auto", skip=("*q_proj",)),
}
TYPES: tuple[FloatType, ...] = ("fp32", "fp16", "bf16")
MODULES = {"image-stem": OverlappingStem, "resize": Upsampled}
FUSED = ("vit", "deit", "dinov2", "clip", "siglip", "fashion-mnist")  # whose attention qualifies for INT8
CASES = [
    *((name, recipe) for recipe in ("float", "int8") for name in (*NAMES, "eva02", *MODULES)),
    *((name, "int8-attention") for name in FUSED),
    *(("vit", recipe) for recipe in RECIPES if recipe not in ("float", "int8", "int8-attention")),
    *((name, "int4") for name in NAMES),
]
ELSEWHERE = [("vit", "8.9"), ("vit", "12.0"), ("eva02", "8.9"), ("eva02", "12.0")]
BATCH = (1, 2, 4)
Make = Callable[[str, str], Path]


def build(path: Path, capability: str = "8.6") -> bytes:
    """The plan of an ONNX file, for any batch up to the largest, on a GPU that need not be there."""
    target = Target("no-gpu", "tensorrt-rtx", BATCH, capability=capability)
    TENSORRT_RTX.build(path, target, read_source(path).float_type, path.parent, lambda phase, fraction: None)
    return (path.parent / TENSORRT_RTX.PLAN[0]).read_bytes()


@pytest.fixture(scope="module")
def make(family: Callable[[str], Exported], tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The path of a model's graph under a recipe, in FP32."""
    folder = tmp_path_factory.mktemp("graphs")

    def model(name: str) -> ModelProto:
        return converted(MODULES[name]).model if name in MODULES else family(name).model

    def made(name: str, recipe: str) -> Path:
        source, path = folder / f"{name}.onnx", folder / f"{name}.{recipe}.onnx"
        graph.save(model(name), source)
        if RECIPES[recipe].method == "none":
            leave_float(source, RECIPES[recipe], path)
        else:
            quantize(source, calibrate(source, tiny.files, RECIPES[recipe]).table, path, tiny.files)
        return path

    return cache(made)


def in_type(path: Path, kind: FloatType) -> Path:
    """The graph itself, or its FP16 or BF16 form beside it."""
    if kind == "fp32":
        return path
    model = graph.load(path)
    assert to_half(model, kind) == {}  # nothing stays in FP32
    graph.save(model, path.with_suffix(f".{kind}.onnx"))
    return path.with_suffix(f".{kind}.onnx")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_every_graph_is_parsed_and_built(name: str, recipe: str, kind: FloatType, make: Make) -> None:
    assert len(build(in_type(make(name, recipe), kind))) > 0


@pytest.mark.parametrize(("name", "capability"), ELSEWHERE)
def test_later_gpus_are_built_for_too(name: str, capability: str, make: Make) -> None:
    assert len(build(in_type(make(name, "int8"), "fp16"), capability)) > 0


def test_weights_lie_in_the_plan_in_one_byte_each(make: Make) -> None:
    path = in_type(make("eva02", "int8"), "fp16")
    weights = [value for value in graph.constants(graph.load(path)).values() if value.dtype == np.int8 and value.ndim == 2]
    plan = build(path)
    assert len(weights) == 2 * 7 + 2  # of the blocks, of patches and classes
    # row by row, as those of Q, K and V may have become one
    whole = [any(all(row.tobytes() in plan for row in rows) for rows in (weight, weight.T)) for weight in weights]
    assert whole == [True] * len(weights)


def test_what_tensorrt_refuses_fails_with_its_own_words(make: Make, tmp_path: Path) -> None:
    model = graph.load(in_type(make("vit", "int8"), "fp16"))
    quantizer = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    graph.put_constant(model, quantizer.input[1], np.float32(0.1))  # a scale of another type than the data
    (tmp_path / "mixed.onnx").write_bytes(model.SerializeToString())
    words = r"does not take the node '.*attention\.q_proj' \(MatMul\) of .*mixed\.onnx: (.|\n)*must have same input types"
    with pytest.raises(BuildError, match=words):
        build(tmp_path / "mixed.onnx")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LARGE)
def test_a_graph_with_layers_kept_in_fp32_is_parsed_and_built(kind: str, form: str, tiny: Tiny, tmp_path: Path) -> None:
    kept = convert(write_large(kind, form, tiny, tmp_path), "fp16", tmp_path / "half.onnx", tiny.files)
    assert kept and build(tmp_path / "half.onnx")
    found = layer_types(tmp_path / "half.onnx")
    assert {found[name] for name in kept if name in found} == {"FLOAT"}
    assert found["blocks.1.fc1"] == found["blocks.0.attention.q"] == "HALF"


def layer_types(path: Path) -> dict[str, str]:
    """The type that TensorRT gives the output of each layer, by the name of its node."""
    trt = importlib.import_module("tensorrt_rtx_bindings")
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(Release(trt).creation_flags())
    parser = trt.OnnxParser(network, log)
    assert parser.parse(path.read_bytes())
    return {network.get_layer(i).name: network.get_layer(i).get_output(0).dtype.name for i in range(network.num_layers)}


def test_the_pipeline_converts_once_and_builds_only_what_is_converted(tiny: Tiny, tmp_path: Path) -> None:
    recipe, target = dataclasses.replace(PLAIN, name="int8"), Target("rtx30", "tensorrt-rtx", capability="8.6")
    int8 = pipeline.quantize_step(Path(shutil.copy(tiny.onnx, tmp_path)), tiny.files, recipe, tmp_path, Silent())
    path = pipeline.precision_step(int8, target, tiny.files, watcher := Silent())
    assert path.parent == int8.parent and re.fullmatch(r"int8\.fp16-[0-9a-f]{12}\.onnx", path.name)
    assert watcher.lines[-1].endswith(f"{path.name}: floats in fp16")
    made_at = path.stat().st_mtime_ns
    assert pipeline.precision_step(int8, target, tiny.files, watcher := Silent()) == path
    assert watcher.lines[-1].endswith(" is fresh") and path.stat().st_mtime_ns == made_at
    assert pipeline.precision_step(int8, target, tiny.files[:10], Silent()) != path  # other ranges
    assert pipeline.precision_step(int8, Target(backend="onnxruntime"), tiny.files, Silent()) == int8
    assert prepare_build(path, target, tmp_path).float_type == "fp16"
    with pytest.raises(EngineError, match="the types of the graph, which are fp32, but the recipe wants fp16") as caught:
        prepare_build(int8, target, tmp_path)
    assert "--images" in str(caught.value.hint)
