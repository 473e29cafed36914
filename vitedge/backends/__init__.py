"""One file a backend, each with build() and open(); nothing else in vitedge imports its package.

A backend is a module in this folder, or an object in one, and one line in BACKENDS. It offers

    PACKAGE, EXTRA, PLAN          what to install, and the names of the plan's files, as the vendor's own tools open them
    TYPED                         whether floats compute in the type that the graph gives them, or in one chosen at opening
    version() -> str              of the installed package; MissingPackageError where there is none
    resolve(target) -> Target     with what only the device here can tell; EngineError where it cannot be built for
    device(target) -> str         what it would run on
    driver() -> str               the CUDA version of the driver, "" where none is needed or there
    runs_here(target) -> bool     whether a plan for the resolved `target` can be opened on this machine
    float_types(target) -> tuple  the float types that computes in natively, preferred first
    peaks(target) -> Peaks        what the device can do at most, as it says in the target or as measured; None where unknown
    build(onnx, target, float_type, folder, progress) -> str    write the plan's files into `folder`; the vendor's log
    check(manifest) -> None       EngineError where a plan does not fit this machine
    open(folder, card, target, float_type) -> Session
    layers(folder, card, target, float_type, rows, seconds) -> Profile    what runs in one call on `rows`, and how long
"""

from __future__ import annotations

import pkgutil
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitedge.backends.layers import Profile
from vitedge.errors import EngineError, VitEdgeError
from vitedge.specs import FloatType, Manifest, ModelCard, Peaks, PixelFormat, Target

Progress = Callable[[str, float], object]  # told the phase of a build, and how much of the whole is done, 0 to 1

BACKENDS = {  # name -> module, or module:object
    "openvino": "vitedge.backends.openvino",
    "onnxruntime": "vitedge.backends.onnxruntime",
    "tensorrt": "vitedge.backends.tensorrt:TENSORRT",
    "tensorrt-rtx": "vitedge.backends.tensorrt:TENSORRT_RTX",
}


class Session(Protocol):
    """An open plan with its input buffer."""

    @property
    def input(self) -> NDArray[Any]:
        """[max batch, ...], int8 patches or uint8 pixels; owned by the session.

        To be asked for anew after a `write`: what was written on a device is brought back, and until then nothing can be
        written into the array. Views that were taken of it before are not kept from it, and what they write is lost.
        """

    streams: int
    """How many sessions of the plan compute at a time; more of them wait for each other."""

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture (see `vitedge.pixels`) into a row of the input, which may lie on the device."""

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows of `input`, float32[count, ...]; valid until the next run."""

    def fork(self) -> Session:
        """Another session of the same plan, with an input of its own; the two may run at once, in a thread each."""

    def close(self) -> None:
        """Free what this session holds; a second call does nothing."""


class BackendModule(Protocol):
    """What a backend offers."""

    PACKAGE: str
    EXTRA: str
    PLAN: tuple[str, ...]
    TYPED: bool

    def version(self) -> str: ...
    def resolve(self, target: Target) -> Target: ...
    def device(self, target: Target) -> str: ...
    def driver(self) -> str: ...
    def runs_here(self, target: Target) -> bool: ...
    def float_types(self, target: Target) -> tuple[FloatType, ...]: ...
    def peaks(self, target: Target) -> Peaks | None: ...
    def build(self, onnx: Path, target: Target, float_type: FloatType, folder: Path, progress: Progress) -> str: ...
    def check(self, manifest: Manifest) -> None: ...
    def open(self, folder: Path, card: ModelCard, target: Target, float_type: FloatType) -> Session: ...
    def layers(
        self, folder: Path, card: ModelCard, target: Target, float_type: FloatType, rows: NDArray[Any], seconds: float
    ) -> Profile: ...


@runtime_checkable
class Refitting(Protocol):
    """What a backend offers that can put other weights into a plan."""

    def refit(self, engine: Path, target: Target, onnx: Path, folder: Path) -> str:
        """Write the plan in the directory `engine`, with the weights of `onnx`, into `folder`; the vendor's log."""

    def refits_again(self) -> bool:
        """Whether the weights of a plan that `refit` wrote can be replaced once more."""


def load_backend(name: str) -> BackendModule:
    """The backend `name`; its package is imported only when one of its functions is called."""
    if name not in BACKENDS:
        raise VitEdgeError(f"there is no backend {name!r}", hint=f"known: {', '.join(BACKENDS)}")
    return cast(BackendModule, pkgutil.resolve_name(BACKENDS[name]))


def this_platform() -> str:
    """Operating system and processor, e.g. "Linux aarch64": a GPU's plan is of one."""
    return f"{platform.system()} {platform.machine()}"


def refuse_newer(manifest: Manifest, package: str, installed: str) -> None:
    """Raise an EngineError where a plan is of a later release than the one installed."""
    if _release(manifest.backend_version) > _release(installed):
        raise EngineError(
            f"the engine was built with {manifest.backend} {manifest.backend_version}, but {installed} is installed",
            hint=f"pip install -U '{package}>={manifest.backend_version}', or build the engine again here",
        )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, e.g. (2026, 4, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
