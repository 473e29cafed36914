"""One file a backend, each with build() and open(); nothing else in vitedge imports its package.

A backend is a module in this folder and one line in BACKENDS. It offers

    PACKAGE, EXTRA, PLAN          what to install, and the names of the plan's files, as the vendor's own tools open them
    version() -> str              of the installed package; MissingPackageError where there is none
    device() -> str               what it would run on
    float_types() -> tuple        the float types the device computes in natively, preferred first
    build(onnx, target, float_type, folder) -> None    write the plan's files into `folder`
    open(folder, card, target, float_type) -> Session
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.specs import FloatType, ModelCard, Target

BACKENDS = {
    "openvino": "vitedge.backends.openvino",
    "onnxruntime": "vitedge.backends.onnxruntime",
}


class Session(Protocol):
    """An open plan with its input buffer."""

    input: NDArray[Any]
    """[max batch, ...], int8 patches or uint8 pixels; owned by the session and written by preprocessing."""

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows of `input`, float32[count, ...]; valid until the next run."""

    def close(self) -> None:
        """Free what the backend holds; a second call does nothing."""


class BackendModule(Protocol):
    """What a backend's file offers."""

    PACKAGE: str
    EXTRA: str
    PLAN: tuple[str, ...]

    def version(self) -> str: ...
    def device(self) -> str: ...
    def float_types(self) -> tuple[FloatType, ...]: ...
    def build(self, onnx: Path, target: Target, float_type: FloatType, folder: Path) -> None: ...
    def open(self, folder: Path, card: ModelCard, target: Target, float_type: FloatType) -> Session: ...


def load_backend(name: str) -> BackendModule:
    """The module of the backend `name`; its package is imported only when one of its functions is called."""
    if name not in BACKENDS:
        raise VitEdgeError(f"there is no backend {name!r}", hint=f"known: {', '.join(BACKENDS)}")
    return cast(BackendModule, importlib.import_module(BACKENDS[name]))
