"""vitedge: trained PyTorch Vision Transformers as INT8 engines on edge devices, with the cost and the gain measured.

    checkpoint ──export──▶ model.onnx ──calibrate──▶ scales.json ──quantize──▶ int8.onnx ──build──▶ engine/ ──run──▶ predictions
      (torch)              FP32          (real images)             explicit Q/DQ         (on the device)     ──bench─▶ report

Running an engine needs numpy, Pillow and one backend:

    from vitedge import Predictor, open_engine
    with open_engine("engines/fashion-vit/int8-0123456789ab") as engine:
        print(Predictor(engine)(frame).top)

Importing this package imports neither torch nor onnx nor cv2.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitedge.errors import VitEdgeError
from vitedge.specs import Frame, Manifest, ModelCard, Prediction, Preprocess, Recipe, ScaleTable, Target, TensorSpec, Timing

if TYPE_CHECKING:
    from vitedge.runtime.batcher import Batcher
    from vitedge.runtime.engine import Engine, open_engine
    from vitedge.runtime.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "Batcher",
    "Engine",
    "Frame",
    "Manifest",
    "ModelCard",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "ScaleTable",
    "Target",
    "TensorSpec",
    "Timing",
    "VitEdgeError",
    "open_engine",
]

_LATER = {
    "Batcher": "runtime.batcher",
    "Engine": "runtime.engine",
    "open_engine": "runtime.engine",
    "Predictor": "runtime.predictor",
}


def __getattr__(name: str) -> Any:
    """Import what needs numpy and Pillow when it is first asked for."""
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
