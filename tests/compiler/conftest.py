"""One small exported model and its calibration images, made once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from tests.compiler.families import Exported, export_family
from tests.models import TinyViT, tiny_vit, write_noise
from vitedge.compiler.export import export
from vitedge.images import ImageFile, list_images


@dataclasses.dataclass(frozen=True, slots=True)
class Tiny:
    """A TinyViT, its ONNX file and 20 images; tests do not change them."""

    module: TinyViT
    onnx: Path
    files: list[ImageFile]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    module, card = tiny_vit()
    export(module, card, folder / "fp32.onnx")
    return Tiny(module, folder / "fp32.onnx", list_images(write_noise(folder / "images", 20)))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A model family by name, exported when it is first asked for."""
    return cache(lambda name: export_family(name, tmp_path_factory.mktemp(name)))
