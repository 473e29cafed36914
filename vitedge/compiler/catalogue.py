"""Nothing in, the ways to name a model out, and the names that installed packages know."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way to name a model."""

    example: str
    text: str
    needs: str


FORMS = (
    Form("path/file.py:factory", "any torch module; the factory returns (module, ModelCard)", ".[compile]"),
    Form(
        "hf:facebook/dinov2-small",
        "ViT, DeiT, DINOv2, BEiT, Swin, CLIP, SigLIP, ... or a save_pretrained folder",
        ".[hf]",
    ),
    Form("timm:vit_small_patch16_224", "PyTorch Image Models", ".[timm]"),
    Form("torchvision:vit_b_16", "torchvision", ".[torchvision]"),
)


def known_names(pattern: str) -> dict[str, list[str]]:
    """The model names containing `pattern` that timm and torchvision list, where they are installed."""
    found = {}
    timm, torchvision = _installed("timm"), _installed("torchvision.models")
    if timm:
        found["timm"] = [name for name in timm.list_models() if pattern in name]
    if torchvision:
        found["torchvision"] = [name for name in torchvision.list_models(module=torchvision) if pattern in name]
    return found


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None
