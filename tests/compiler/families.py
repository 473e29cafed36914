"""The model families of Hugging Face transformers, tiny and with random weights, as folders that save_pretrained wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import nn

from tests.engines import CHECKPOINT, MODEL
from vitedge.compiler.export import convert
from vitedge.compiler.models import load_model
from vitedge.specs import ModelCard

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ONE = {**SMALL, "num_hidden_layers": 1}
TEXT = {**ONE, "vocab_size": 50}
PLAIN = {"DequantizeLinear", "MatMul", "Add", "Pad", "LayerNormalization", "Reshape", "Transpose", "Mul", "Softmax", "Gelu"}
SQUASHED: dict[str, Any] = {"size": {"height": 32, "width": 32}}
CROPPED: dict[str, Any] = {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """How to make one, the image processor that its kind comes with, and what its graph must consist of.

    operators: None where the graph is not that of a plain ViT.
    """

    make: Callable[[Any], nn.Module]
    processor: str
    sizes: dict[str, Any]
    task: str
    patch: int | None
    norms: int
    gelus: int
    operators: set[str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A family loaded and converted."""

    module: nn.Module
    model: ModelProto
    card: ModelCard


def _vit(t: Any) -> nn.Module:
    return t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, num_labels=7, **SMALL))


def _deit(t: Any) -> nn.Module:
    return t.DeiTForImageClassification(t.DeiTConfig(image_size=32, patch_size=8, num_labels=7, **ONE))


def _dinov2(t: Any) -> nn.Module:
    sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    return t.Dinov2Model(t.Dinov2Config(image_size=48, patch_size=8, **sizes))  # 48: its positions are resampled for 32


def _beit(t: Any) -> nn.Module:
    config = t.BeitConfig(image_size=32, patch_size=8, num_labels=7, use_relative_position_bias=True, **ONE)
    return t.BeitForImageClassification(config)


def _swin(t: Any) -> nn.Module:
    config = t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=7)
    return t.SwinForImageClassification(config)


def _mobilevit(t: Any) -> nn.Module:
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 24], "num_attention_heads": 2}
    return t.MobileViTForImageClassification(t.MobileViTConfig(image_size=64, num_labels=7, **sizes))


def _clip(t: Any) -> nn.Module:
    return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config={"image_size": 32, "patch_size": 8, **ONE}))


def _siglip(t: Any) -> nn.Module:
    return t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config={"image_size": 32, "patch_size": 8, **ONE}))


FAMILIES = {
    "vit": Family(_vit, "ViTImageProcessor", SQUASHED, "classify", 8, 5, 2, PLAIN | {"Gather", "Gemm"}),
    "deit": Family(_deit, "DeiTImageProcessor", CROPPED, "classify", 8, 3, 1, PLAIN | {"Gather", "Gemm"}),
    "dinov2": Family(_dinov2, "BitImageProcessor", CROPPED, "embed", 8, 5, 2, PLAIN | {"Gather"}),
    "beit": Family(_beit, "BeitImageProcessor", SQUASHED, "classify", 8, 3, 1, PLAIN | {"Slice", "ReduceMean", "Gemm"}),
    "clip": Family(_clip, "CLIPImageProcessor", CROPPED, "embed", 8, 4, 0, (PLAIN - {"Gelu"}) | {"Sigmoid", "Gather"}),
    "siglip": Family(_siglip, "SiglipImageProcessor", SQUASHED, "embed", 8, 4, 2, None),
    "swin": Family(_swin, "ViTImageProcessor", SQUASHED, "classify", 2, 9, 3, None),
}
NAMES = (*FAMILIES, "fashion-mnist")
STEMMED = {  # whose first convolution overlaps, so that the graph takes the image itself
    "mobilevit": Family(
        _mobilevit,
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}},
        "classify",
        None,
        norms=21,
        gelus=0,
        operators=None,
    )
}
OTHERS = (*STEMMED, "eva02")  # not the plain ViT that most tests are about: another stem; rotary positions and a SwiGLU
EVA02 = Path(__file__).with_name("eva02.py")


def save_family(name: str, folder: Path, **settings: Any) -> Path:
    """Write a family with random weights; `settings` go to its processor."""
    chosen = {**FAMILIES, **STEMMED}[name]
    return save_random(chosen.make, folder, {"image_processor_type": chosen.processor, **chosen.sizes, **settings}, 0.1)


def save_random(make: Callable[[Any], nn.Module], folder: Path, processor: dict[str, Any], spread: float) -> Path:
    """Write what `make` makes of transformers with all of its weights random: those that start at zero, too."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(transformers)
        for parameter in module.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        settle_norms(module, int(getattr(module.config, "image_size", 0)))
    module.save_pretrained(folder)
    write_processor(folder, processor)
    return folder


def settle_norms(module: nn.Module, size: int) -> None:
    """Give batch norms the statistics of noise, as training would: without, random convolutions fade away to a constant."""
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            module.train()(torch.randn(8, 3, size, size))
        module.eval()


def write_processor(folder: Path, settings: dict[str, Any]) -> None:
    """preprocessor_config.json as image processors write it."""
    usual: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    usual |= {"resample": 3, "image_mean": MEAN, "image_std": STD}
    data = {key: value for key, value in {**usual, **settings}.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(data))


def export_family(name: str, folder: Path) -> Exported:
    """Load a family by its folder, or the trained example and EVA-02 by their files, and convert it."""
    if name == "fashion-mnist":
        module, card = load_model(MODEL, CHECKPOINT if CHECKPOINT.exists() else None)
    elif name == "eva02":
        module, card = load_model(f"{EVA02}:tiny")
    else:
        module, card = load_model(f"hf:{save_family(name, folder)}")
    return Exported(module, *convert(module, card))
