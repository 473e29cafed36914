"""A ViT-S/16 that merges tokens becomes a TensorRT-RTX engine in INT8 with FP16: `make test-rtx`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install '.[rtx]'", exc_type=ImportError)

from benchmarks.token_merging import vit_s16
from tests.compiler.test_tensorrt_rtx import build
from tests.models import write_noise
from vitedge.compiler import graph
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import convert, reduce
from vitedge.compiler.precision import convert as to_type
from vitedge.compiler.quantize import quantize
from vitedge.images import list_images
from vitedge.specs import ModelCard, Preprocess, Reduction
from vitedge.workspace import BUILTIN_RECIPES

pytestmark = pytest.mark.rtx


@pytest.mark.parametrize("recipe", ["int8-fast", "int8-attention"])
def test_a_merged_vit_is_built(recipe: str, tmp_path: Path) -> None:
    card = ModelCard("vit-s16", "embed", Preprocess((224, 224), (0.5,) * 3, (0.25,) * 3))
    model, card = convert(vit_s16().eval(), card)
    reduce(model, card, Reduction(merge_tokens=(24, 0, 0)))
    graph.save(model, tmp_path / "fp32.onnx")
    files = list_images(write_noise(tmp_path / "images", 16, (224, 224)))
    table = calibrate(tmp_path / "fp32.onnx", files, BUILTIN_RECIPES[recipe]).table
    quantize(tmp_path / "fp32.onnx", table, tmp_path / "int8.onnx", files)
    assert to_type(tmp_path / "int8.onnx", "fp16", tmp_path / "half.onnx", files) == {}
    plan = build(tmp_path / "half.onnx")
    assert 20 < len(plan) / 2**20 < 40
