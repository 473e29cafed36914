"""Architectures of timm and torchvision export exactly, with random weights: the hubs' weights take a network.

`make test-families` runs this in an environment of its own, since timm and torchvision bring a build of torch of several GB.
"""

from collections import Counter
from pathlib import Path

import pytest

from vitedge.compiler.export import compare, convert
from vitedge.compiler.models import load_model
from vitedge.specs import TOLERANCE, Preprocess

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm", reason="timm is not installed: make test-families")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: make test-families")

PLAIN = {
    "DequantizeLinear",
    "MatMul",
    "Gemm",
    "Add",
    "Pad",
    "LayerNormalization",
    "Reshape",
    "Transpose",
    "Mul",
    "Softmax",
    "Gelu",
}
PICKING = {"Slice", "Squeeze", "Gather", "Unsqueeze"}
CASES = {  # name -> (side of the patches or None, task)
    "timm:vit_tiny_patch16_224": (16, "classify"),
    "timm:deit_tiny_distilled_patch16_224": (16, "classify"),
    "timm:vit_small_patch14_reg4_dinov2": (14, "embed"),
    "timm:vit_base_patch16_siglip_224": (16, "embed"),
    "timm:eva02_tiny_patch14_224": (14, "embed"),
    "timm:swin_tiny_patch4_window7_224": (4, "classify"),
    "timm:mobilevit_xs": (None, "classify"),
    "torchvision:vit_b_16": (16, "classify"),
}


def random_checkpoint(name: str, folder: Path) -> Path:
    """A state dict of the architecture with random weights, none of them zero (some heads start at zero)."""
    kind, _, rest = name.partition(":")
    module = timm.create_model(rest) if kind == "timm" else torchvision.models.get_model(rest)
    torch.manual_seed(0)
    state = {
        key: value + 0.02 * torch.randn_like(value) if value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }
    path = folder / "random.pth"
    torch.save({key: value.abs() if "running_var" in key else value for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_export_equals_torch(name: str, tmp_path: Path) -> None:
    patch, task = CASES[name]
    module, card = load_model(name, random_checkpoint(name, tmp_path))
    model, card = convert(module, card)
    assert (card.patch, card.task) == (patch, task)
    assert card.inputs[0].dtype == ("int8" if patch else "uint8")
    assert compare(module, model, card).random <= TOLERANCE


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_16"])
def test_plain_vits_keep_no_shape_arithmetic(name: str, tmp_path: Path) -> None:
    module, card = load_model(name, random_checkpoint(name, tmp_path))
    operators = Counter(node.op_type for node in convert(module, card)[0].graph.node)
    assert set(operators) <= PLAIN | PICKING
    assert (operators["LayerNormalization"], operators["Gelu"]) == (25, 12)


def test_preprocessing_comes_from_the_model(tmp_path: Path) -> None:
    _, card = load_model("timm:vit_tiny_patch16_224", random_checkpoint("timm:vit_tiny_patch16_224", tmp_path))
    assert card.preprocess == Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, "crop", 0.9, "bicubic")
    assert card.labels[1] == "goldfish, Carassius auratus"
    _, card = load_model("torchvision:vit_b_16", random_checkpoint("torchvision:vit_b_16", tmp_path))
    assert (card.preprocess.interpolation, card.preprocess.crop_pct, card.labels[1]) == ("bilinear", 224 / 256, "goldfish")


def test_resizing_equals_torchvision() -> None:
    import numpy as np
    from PIL import Image

    from vitedge.preprocess import resize

    pixels = np.random.default_rng(0).integers(0, 256, (333, 517, 3), np.uint8)
    transform = torchvision.models.get_model_weights("vit_b_16").DEFAULT.transforms()
    scaled = torchvision.transforms.functional.resize(
        Image.fromarray(pixels), transform.resize_size, transform.interpolation, antialias=True
    )
    expected = np.asarray(torchvision.transforms.functional.center_crop(scaled, transform.crop_size))
    spec = Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, "crop", 224 / 256, "bilinear")
    assert np.abs(resize(pixels, spec).astype(int) - expected).max() <= 1
