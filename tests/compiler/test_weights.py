"""Rounded weights of a whole model: closer to it than rounding to nearest, the same at every call, and of 4 bits where asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from tests.compiler.conftest import Tiny
from tests.engines import sqnr_db
from tests.models import PLAIN, engine_rows, run_graph, tiny_preprocess, tiny_vit, write_noise
from vitedge.compiler import graph, weights
from vitedge.compiler.calibrate import calibrate, save_table
from vitedge.compiler.export import export
from vitedge.compiler.quantize import quantize
from vitedge.errors import ModelError
from vitedge.images import ImageFile, decode, list_images, sample
from vitedge.preprocess import resize
from vitedge.specs import ModelCard, Recipe, Rounding

RECIPE = Recipe(min_images=1)


def rows(files: list[ImageFile]) -> NDArray[np.int8]:
    images = np.stack([resize(decode(file.path), tiny_preprocess()) for file in files])
    return np.asarray(engine_rows(images, ModelCard("tiny", "embed", tiny_preprocess(), patch=8)))


def made(source: Path, files: list[ImageFile], recipe: Recipe, path: Path) -> Path:
    quantize(source, calibrate(source, files, recipe).table, path, files)
    return path


def unseen(folder: Path) -> list[ImageFile]:
    """Images of the same kind that no calibration has seen: the last of more."""
    return list_images(write_noise(folder / "unseen", 60))[30:]


def quality(source: Path, files: list[ImageFile], judges: list[ImageFile], recipe: Recipe, folder: Path) -> float:
    """SQNR in dB at the logits of images that were not calibrated on."""
    path = made(source, files, recipe, folder / f"{recipe.name}.onnx")
    return sqnr_db(*(run_graph(graph.load(model), rows(judges))[0] for model in (source, path)))


# Better


def test_the_default_beats_plain_ranges_by_far_where_channels_stand_out(tiny: Tiny, tmp_path: Path) -> None:
    """Norms whose gains reach 20 to 50 times further in some channels, undone in the Linears behind, as real ViTs have them."""
    module, card = tiny_vit()
    random = np.random.default_rng(0)
    for block in module.blocks:
        for norm, readers in (
            (block.norm1, (block.attention.q, block.attention.k, block.attention.v)),
            (block.norm2, (block.fc1,)),
        ):
            factor = torch.ones(len(norm.weight))
            factor[random.choice(len(factor), 3, replace=False)] = torch.tensor(random.uniform(20, 50, 3), dtype=torch.float32)
            norm.weight.data *= factor
            norm.bias.data *= factor
            for linear in readers:
                linear.weight.data /= factor
    export(module, card, tmp_path / "fp32.onnx")
    judges = unseen(tmp_path)
    same = sqnr_db(*(run_graph(graph.load(path), rows(judges))[0] for path in (tiny.onnx, tmp_path / "fp32.onnx")))
    assert same > 80, "the outliers must change nothing in floating point"
    plain = quality(tmp_path / "fp32.onnx", tiny.files, judges, PLAIN, tmp_path)
    assert quality(tmp_path / "fp32.onnx", tiny.files, judges, RECIPE, tmp_path) > plain + 6
    fast = Recipe(name="fast", smoothing="fixed", rounding="nearest", bias_correction=False)
    assert quality(tmp_path / "fp32.onnx", tiny.files, judges, fast, tmp_path) > plain + 4


def test_rounding_by_covariance_is_worth_most_at_4_bits(tiny: Tiny, tmp_path: Path) -> None:
    judges = unseen(tmp_path)
    coarse = dataclasses.replace(RECIPE, name="gptq", int4=("blocks.*",))
    nearest = dataclasses.replace(coarse, name="nearest", rounding="nearest")
    assert (
        quality(tiny.onnx, tiny.files, judges, coarse, tmp_path) > quality(tiny.onnx, tiny.files, judges, nearest, tmp_path) + 1
    )


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_a_corrected_bias_takes_the_mean_error_out_of_a_linear(rounding: Rounding, tiny: Tiny, tmp_path: Path) -> None:
    """For inputs in floating point, as the statistics are; 4 bits, so that there is an error to speak of."""
    recipe = Recipe(smoothing="none", rounding=rounding, int4=("*",))
    model = graph.load(tiny.onnx)
    table = calibrate(tiny.onnx, tiny.files, recipe).table
    chosen = [linear for linear in graph.linears(model) if linear.name in ("blocks.0.fc2", "head", "patch_embed")]
    assert len(chosen) == 3
    inputs = dict(zip((c.name for c in chosen), run_graph(model, rows(tiny.files), [c.input for c in chosen]), strict=True))
    off = {}
    for corrected in (True, False):
        settled = dataclasses.replace(table, recipe=dataclasses.replace(recipe, bias_correction=corrected))
        rounded = weights.round_weights(model, settled, tiny.files, lambda done, total: None)
        for linear in chosen:
            x, found = inputs[linear.name].reshape(-1, inputs[linear.name].shape[-1]).astype(np.float64), rounded[linear.name]
            bias = graph.linear_bias(model, linear)
            before = x @ graph.linear_weight(model, linear) + (0 if bias is None else bias)
            after = x @ (found.integers * found.scales) + (0 if found.bias is None else found.bias)
            off[linear.name, corrected] = float(np.abs((after - before).mean(axis=0)).max())
    for linear in chosen:
        assert off[linear.name, True] < 1e-3 * off[linear.name, False]


# The same


def test_the_order_of_the_list_of_files_changes_no_byte(tiny: Tiny, tmp_path: Path) -> None:
    orders = [tiny.files, tiny.files[::-1], [tiny.files[i] for i in np.random.default_rng(0).permutation(len(tiny.files))]]
    recipe = dataclasses.replace(RECIPE, method="auto", images=12, int4=("*fc1",))
    tables, graphs = set(), set()
    for files in orders:
        table = calibrate(tiny.onnx, files, recipe).table
        save_table(table, tmp_path / "scales.json")
        quantize(tiny.onnx, table, tmp_path / "int8.onnx", files)
        tables.add((tmp_path / "scales.json").read_bytes())
        graphs.add((tmp_path / "int8.onnx").read_bytes())
    assert len(tables) == len(graphs) == 1
    other = calibrate(tiny.onnx, tiny.files, dataclasses.replace(recipe, seed=1)).table
    assert other.smoothing != table.smoothing


def test_covariances_in_several_passes_are_those_of_one(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    table = calibrate(tiny.onnx, tiny.files[:4], RECIPE).table
    quantize(tiny.onnx, table, tmp_path / "one.onnx", tiny.files[:4], progress=lambda *step: told.append(step))
    assert told == [(done, 4) for done in range(1, 5)]
    monkeypatch.setattr(weights, "MOMENTS_BYTES", 1)
    quantize(tiny.onnx, table, tmp_path / "many.onnx", tiny.files[:4], progress=lambda *step: told.append(step))
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "many.onnx").read_bytes()
    assert told[-1] == (40, 40)  # 10 tensors that Linears read


# 4 bits


def test_4_bits_are_stored_as_4_and_run(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, name="int4", int4=("blocks.*.fc?",))
    path = made(tiny.onnx, tiny.files, recipe, tmp_path / "int4.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    few = {
        name.removesuffix(".weight.int4")
        for name, kind in kinds.items()
        if name.endswith(".weight.int4") and kind == TensorProto.INT4
    }
    assert few == {f"blocks.{block}.fc{n}" for block in (0, 1) for n in (1, 2)}
    assert kinds["head.weight.int8"] == TensorProto.INT8
    assert model.opset_import[0].version >= 21
    eight = made(tiny.onnx, tiny.files, RECIPE, tmp_path / "int8.onnx")
    saved = 2 * 2 * 32 * 64 / 2  # two Linears a block, half a byte a weight
    assert path.stat().st_size < eight.stat().st_size - 0.9 * saved
    reference, coarse, fine = (run_graph(graph.load(p), rows(tiny.files))[0] for p in (tiny.onnx, path, eight))
    assert 8 < sqnr_db(reference, coarse) < sqnr_db(reference, fine)
    assert graph.load(eight).opset_import[0].version == 20


def test_a_4_bit_pattern_that_fits_no_linear_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"the recipe gives 4 bits to 'mlp', but no Linear has such a name") as caught:
        calibrate(tiny.onnx, tiny.files, dataclasses.replace(RECIPE, int4=("blocks.*", "mlp")))
    assert "The 14 names go from patch_embed to head" in str(caught.value.hint)


# What is refused


def test_other_images_than_the_tables_are_refused_and_nothing_is_written(tiny: Tiny, tmp_path: Path) -> None:
    table = calibrate(tiny.onnx, tiny.files, RECIPE).table
    target = tmp_path / "int8.onnx"
    with pytest.raises(ModelError, match="these are other images than the scales were calibrated on") as caught:
        quantize(tiny.onnx, table, target, tiny.files[1:])
    assert caught.value.hint == "give the same folder, or calibrate again"
    with pytest.raises(ModelError, match="the recipe 'int8' looks at the calibration images once more") as caught:
        quantize(tiny.onnx, table, target)
    assert caught.value.hint == "give the folder of the calibration images with --images"
    assert not target.exists()


def test_a_recipe_that_needs_no_images_asks_for_none(tiny: Tiny, tmp_path: Path) -> None:
    for changes in ({}, {"smoothing": "fixed"}, {"int4": ("*",)}):
        recipe: Any = dataclasses.replace(PLAIN, **changes)
        table = calibrate(tiny.onnx, tiny.files, recipe).table
        quantize(tiny.onnx, table, tmp_path / "a.onnx")
        quantize(tiny.onnx, table, tmp_path / "b.onnx", tiny.files)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_one_image_is_enough_where_the_recipe_says_so(tiny: Tiny, tmp_path: Path) -> None:
    path = made(tiny.onnx, tiny.files[:1], RECIPE, tmp_path / "int8.onnx")
    assert sqnr_db(*(run_graph(graph.load(p), rows(tiny.files[:1]))[0] for p in (tiny.onnx, path))) > 15


def test_damaged_images_are_passed_over_in_every_pass(tiny: Tiny, tmp_path: Path) -> None:
    """The first ones of the sample among them, on which the rewritten model would be held against the original."""
    files = list_images(write_noise(tmp_path / "images", 12))
    recipe = dataclasses.replace(RECIPE, method="auto")
    for file in sample(files, recipe.images, recipe.seed)[:5]:
        file.path.write_bytes(file.path.read_bytes()[:60])
    calibration = calibrate(tiny.onnx, files, recipe)
    assert (calibration.table.images, len(calibration.skipped)) == (7, 5)
    quantize(tiny.onnx, calibration.table, tmp_path / "int8.onnx", files)
    assert sqnr_db(*(run_graph(graph.load(p), rows(tiny.files))[0] for p in (tiny.onnx, tmp_path / "int8.onnx"))) > 15


def test_weights_of_nothing_stay_finite(tmp_path: Path, tiny: Tiny) -> None:
    """A Linear of zeros, and a norm that gives the same to every token."""
    module, card = tiny_vit()
    module.blocks[0].fc1.weight.zero_()
    nn.init.zeros_(module.blocks[1].norm2.weight)
    export(module, card, tmp_path / "fp32.onnx")
    path = made(tmp_path / "fp32.onnx", tiny.files, RECIPE, tmp_path / "int8.onnx")
    assert sqnr_db(*(run_graph(graph.load(p), rows(tiny.files))[0] for p in (tmp_path / "fp32.onnx", path))) > 15
