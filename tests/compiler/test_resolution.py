"""A graph changed to another size of images answers as the module does that is built for that size."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.compiler.families import Exported
from tests.compiler.test_export import OverlappingStem
from tests.engines import CHECKPOINT, FASHION, MODEL, Silent
from tests.models import engine_rows, random_images, run_graph, tiny_preprocess, tiny_vit, torch_input
from vitedge import pipeline
from vitedge.backends.build import read_source
from vitedge.compiler import graph
from vitedge.compiler.export import convert, reduce
from vitedge.compiler.models import load_model
from vitedge.compiler.resolution import resize_input
from vitedge.errors import ModelError
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Reduction, Target

FOCUS = FASHION.parent / "focus"


def example(folder: Path, **sizes: int) -> Any:
    """The model.py of an example, with some of its sizes replaced."""
    sys.path.insert(0, str(folder))  # its neighbours, as load_model does
    try:
        spec = importlib.util.spec_from_file_location("sized_model", folder / "model.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    vars(module).update(sizes)
    return module


def on_grid(positions: Tensor, old: int, new: int) -> Tensor:
    """A table [1, 1 + old * old, C] resampled as timm does."""
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def check(module: nn.Module, model: ModelProto, card: ModelCard) -> None:
    images = random_images(3, card.preprocess)
    with torch.inference_mode():
        expected = module(torch_input(images, card.preprocess)).numpy()
    (given,) = run_graph(model, engine_rows(images, card))
    assert given.shape == expected.shape == (3, *card.outputs[0].shape[1:])
    assert np.abs(given - expected).max() < 1e-4 * np.ptp(expected)


@pytest.fixture(scope="module")
def fashion() -> tuple[ModelProto, ModelCard]:
    module, card = load_model(MODEL, CHECKPOINT)
    return convert(module.eval(), card)


@pytest.mark.parametrize("size", [20, 28, 36])
def test_a_classifier_equals_the_module_of_that_size(size: int, fashion: tuple[ModelProto, ModelCard]) -> None:
    module = example(FASHION, SIZE=size).ViT().eval()
    weights = load_file(CHECKPOINT)
    module.load_state_dict(weights | {"positions": on_grid(weights["positions"], 7, size // 4)})
    model = graph.copy_of(fashion[0])
    card = resize_input(model, fashion[1], (size, size))
    assert card.preprocess.size == (size, size) and card.inputs[0].shape == (None, (size // 4) ** 2, 16)
    check(module, model, card)


def test_a_decoder_goes_along() -> None:
    """140 x 140 to 112 x 112: positions, the patches sliced off the tokens, their grid, and a map of the image's size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        large = example(FOCUS, SIZE=140, GRID=10, DEPTH=1).FocusViT().eval().requires_grad_(False)
        nn.init.normal_(large.positions)
    _, card = example(FOCUS, SIZE=140).focus()
    model, card = convert(large, card)
    small = example(FOCUS, SIZE=112, GRID=8, DEPTH=1).FocusViT().eval()
    small.load_state_dict(large.state_dict() | {"positions": on_grid(large.positions, 10, 8)})
    card = resize_input(model, card, (112, 112))
    assert card.outputs[0].shape == (None, 1, 112, 112)
    check(small, model, card)


def test_sides_may_differ() -> None:
    """32 x 24 to 24 x 40: rows and columns are not mixed up, which constant positions along one of them show."""
    module, card = tiny_vit()
    ramp = torch.arange(4.0)[:, None, None].expand(4, 3, module.positions.shape[2]).reshape(1, 12, -1)
    module.positions[:, 1:] = ramp
    model, card = convert(module, card)
    card = resize_input(model, card, (24, 40))
    table = graph.constants(model)["cat.tokens.resized"]
    rows = table[0, 1:, 0].reshape(3, 5)
    assert np.abs(rows - rows[:, :1]).max() < 1e-5 and (np.diff(rows[:, 0]) > 0.5).all()
    assert run_graph(model, engine_rows(random_images(2, card.preprocess), card))[0].shape == (2, 5)


def test_the_smaller_one_merges_tokens_too(fashion: tuple[ModelProto, ModelCard]) -> None:
    model = graph.copy_of(fashion[0])
    card = reduce(model, fashion[1], Reduction((20, 20), 5))
    assert (card.merged, card.preprocess.size) == ((5, 5, 5, 5), (20, 20))
    assert graph.metadata(model)["vitedge.variant"] == "fp32.20.merge5"
    assert run_graph(model, engine_rows(random_images(2, card.preprocess), card))[0].shape == (2, 10)


def test_the_pipeline_exports_it_and_an_engine_runs_it(tmp_path: Path) -> None:
    source = pipeline.ModelSource(MODEL, CHECKPOINT, size=20)
    path = pipeline.export_step(source, (), tmp_path, Silent())
    assert path.name.startswith("fp32.20-") and read_source(path).card.preprocess.size == (20, 20)
    with open_engine(pipeline.build_step(path, Target("reference", "onnxruntime"), tmp_path, Silent())) as engine:
        assert engine.input.shape[1:] == (25, 16) and engine.run(1).shape == (1, 10)


def test_a_size_that_the_patches_do_not_fill(fashion: tuple[ModelProto, ModelCard]) -> None:
    with pytest.raises(ModelError, match="30 x 20 is no multiple of the patches of 4 x 4") as caught:
        resize_input(graph.copy_of(fashion[0]), fashion[1], (30, 20))
    assert "28 x 20" in str(caught.value.hint)
    with pytest.raises(ModelError, match="2 x 2 is no multiple") as caught:
        resize_input(graph.copy_of(fashion[0]), fashion[1], (2, 2))
    assert "smallest one is 4 x 4" in str(caught.value.hint)


def test_more_patches_than_memory_holds(fashion: tuple[ModelProto, ModelCard]) -> None:
    with pytest.raises(ModelError, match="cut into 625000000 patches, and 65536 are the most"):
        resize_input(graph.copy_of(fashion[0]), fashion[1], (100_000, 100_000))


class FirstRow(nn.Module):
    """What it picks is a row of one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.patch_embed(images).flatten(2).transpose(1, 2)[:, :3]).mean(1)


class Mixing(FirstRow):
    """A Linear along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        tokens = nn.functional.relu(self.patch_embed(images).flatten(2).transpose(1, 2))
        return self.head(self.mix(tokens.transpose(1, 2)).mean(2))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (FirstRow, r"\(Slice\) picks tokens by their numbers"),
        (Mixing, r"'mix' \(MatMul\) is made for one number of tokens"),
        (OverlappingStem, "does not cut its images into square patches"),
    ],
)
def test_what_depends_on_the_number_of_patches(module: Callable[[], nn.Module], words: str) -> None:
    model, card = convert(module().eval(), ModelCard("toy", "embed", tiny_preprocess()))
    with pytest.raises(ModelError, match=words):
        resize_input(model, card, (16, 16))


def test_rotary_positions_are_refused(family: Callable[[str], Exported]) -> None:
    found = family("eva02")
    with pytest.raises(ModelError, match=r"\(Mul\) is made for one number of tokens|\(Slice\)"):
        resize_input(graph.copy_of(found.model), found.card, (16, 16))
