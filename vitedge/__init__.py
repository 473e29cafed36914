"""vitedge: trained PyTorch Vision Transformers as INT8 engines on edge devices, with the cost and the gain measured.

    checkpoint ──export──▶ model.onnx ──calibrate──▶ scales.json ──quantize──▶ int8.onnx ──build──▶ engine/ ──run──▶ predictions
      (torch)              FP32          (real images)             explicit Q/DQ         (on the device)     ──bench─▶ report

Running an engine needs numpy, Pillow and one backend:

    from vitedge import Predictor, open_engine
    with open_engine("engines/fashion-vit/int8-0123456789ab") as engine:
        print(Predictor(engine)(frame).top)

A camera's newest frames, with OpenCV:

    from vitedge import stream
    for frame, prediction in stream("rtsp://camera/stream", "fashion-vit/int8"):
        print(frame.index, prediction.top)

Importing this package imports neither torch nor onnx nor cv2.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitedge.errors import VitEdgeError
from vitedge.specs import Frame, Manifest, ModelCard, Prediction, Preprocess, Recipe, ScaleTable, Target, TensorSpec, Timing

if TYPE_CHECKING:
    from vitedge.runtime.batcher import Batcher
    from vitedge.runtime.camera import CameraOptions
    from vitedge.runtime.engine import Engine, open_engine
    from vitedge.runtime.live import Stream, stream
    from vitedge.runtime.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "Batcher",
    "CameraOptions",
    "Engine",
    "Frame",
    "Manifest",
    "ModelCard",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "ScaleTable",
    "Stream",
    "Target",
    "TensorSpec",
    "Timing",
    "VitEdgeError",
    "open_engine",
    "stream",
]

_LATER = {
    "Batcher": "runtime.batcher",
    "CameraOptions": "runtime.camera",
    "Engine": "runtime.engine",
    "open_engine": "runtime.engine",
    "Predictor": "runtime.predictor",
    "Stream": "runtime.live",
    "stream": "runtime.live",
}


def __getattr__(name: str) -> Any:
    """Import what needs numpy and Pillow when it is first asked for."""
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
