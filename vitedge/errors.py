"""Every error that a user can cause or mend, each one sentence and a hint.

VitEdgeError              anything below; the command line prints `error:` and `hint:` and exits 1
├─ MissingPackageError    a package of an optional extra is not installed
├─ ImageError             one image or frame cannot be decoded; streams skip it and count
├─ ModelError             a model or ONNX file cannot be exported, calibrated or quantized
├─ QueueError             a request was not answered, though nothing is wrong with it
│  ├─ QueueFullError      there was no room for it, or a newer one took its place
│  └─ DeadlineError       its time had passed before its turn came
└─ EngineError            an engine directory cannot be built, opened or fed
   ├─ AbsentDeviceError   only the device that will run the engine can build it, and it is not this machine
   └─ BuildError          a vendor's builder gave up; it has its log
"""

from __future__ import annotations

import importlib
from typing import Any


class VitEdgeError(Exception):
    """What went wrong, with the values that disagree, and in `hint` what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class MissingPackageError(VitEdgeError):
    """`package` is needed and comes with the extra `extra` of vitedge."""

    def __init__(self, package: str, extra: str) -> None:
        hint = f"pip install {package}; or, in a clone of vitedge, all that goes with it: pip install '.[{extra}]'"
        super().__init__(f"the package {package!r} is not installed", hint=hint)


class ImageError(VitEdgeError):
    """An image or video frame that cannot be decoded."""


class ModelError(VitEdgeError):
    """A checkpoint, module or ONNX graph that does not fit what was asked of it."""


class QueueError(VitEdgeError):
    """A request that was not answered, though nothing is wrong with it."""


class QueueFullError(QueueError):
    """There was no room for a request, or a newer one took its place."""


class DeadlineError(QueueError):
    """The time of a request had passed before its turn came."""


class EngineError(VitEdgeError):
    """An engine that cannot be built, opened or fed."""


class AbsentDeviceError(EngineError):
    """Only the device that will run the engine can build it, and it is not this machine."""


class BuildError(EngineError):
    """A vendor's builder gave up; `log` is all that it said."""

    def __init__(self, message: str, *, hint: str, log: str) -> None:
        super().__init__(message, hint=hint)
        self.log = log


def import_package(name: str, extra: str, package: str | None = None) -> Any:
    """The module `name`, or a MissingPackageError that says which package (`name` itself by default) and extra has it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(package or name, extra) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
