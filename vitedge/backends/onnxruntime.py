"""ONNX Runtime on a CPU: the reference for what a Q/DQ graph means.

The plan is the ONNX file itself. Graph optimizations stay below the level at which Q/DQ pairs are fused into integer
kernels, so every rounding happens exactly where the graph says; that makes it slow for INT8 and right. `open_fast` is for
comparing with ONNX Runtime as people use it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import Progress, refuse_newer
from vitedge.backends.layers import Profile
from vitedge.errors import EngineError, first_line, import_package
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.specs import FloatType, Manifest, ModelCard, Peaks, PixelFormat, Target

PACKAGE, EXTRA = "onnxruntime", "compile"
PLAN = ("model.onnx",)
TYPED = False


def version() -> str:
    """The release of the installed ONNX Runtime, e.g. "1.32.0"."""
    return str(_onnxruntime().__version__)


def resolve(target: Target) -> Target:
    """The target itself: a CPU engine is compiled again wherever it is opened."""
    return target


def device(target: Target) -> str:
    """The execution provider."""
    return "CPUExecutionProvider"


def driver() -> str:
    """None is needed."""
    return ""


def runs_here(target: Target) -> bool:
    """Every CPU will do."""
    return True


def float_types(target: Target) -> tuple[FloatType, ...]:
    """FP32 alone: the CPU provider has no bf16 kernels."""
    return ("fp32",)


def peaks(target: Target) -> Peaks | None:
    """Unknown: this is the reference for what is right, not for what is fast."""
    return target.peaks


def build(onnx: Path, target: Target, float_type: FloatType, folder: Path, progress: Progress) -> str:
    """Check that a session can be made of `onnx` and copy it into `folder`."""
    _session(onnx, target)
    shutil.copyfile(onnx, folder / PLAN[0])
    return ""


def check(manifest: Manifest) -> None:
    """Raise an EngineError where the plan is of a later release than the one installed."""
    refuse_newer(manifest, PACKAGE, version())


def open(folder: Path, card: ModelCard, target: Target, float_type: FloatType) -> OnnxRuntimeSession:  # noqa: A001
    """Make a session of the plan in `folder`."""
    return _opened(_session(folder / PLAN[0], target), folder, card, target)


def open_fast(onnx: Path, card: ModelCard, target: Target) -> OnnxRuntimeSession:
    """Make a session of an ONNX file with all optimizations that ONNX Runtime has, which is its default; not exact."""
    return _opened(_session(onnx, target, exact=False), onnx, card, target)


def _opened(session: Any, path: Path, card: ModelCard, target: Target) -> OnnxRuntimeSession:
    entry, dtype, shape = session.get_inputs()[0], input_dtype(card), list(input_shape(card))
    if (entry.type, entry.shape[1:]) != (f"tensor({dtype})", shape):
        given = f"{entry.type}{entry.shape[1:]}"
        what = f"{path} takes {given} but its {'manifest' if path.is_dir() else 'metadata'} says {dtype}{shape}"
        raise EngineError(what, hint="build the engine again")
    return OnnxRuntimeSession(session, card, target)


def layers(folder: Path, card: ModelCard, target: Target, float_type: FloatType, rows: NDArray[Any], seconds: float) -> Profile:
    """There is nothing to explain: what makes this the reference is that it fuses next to nothing."""
    raise EngineError(
        f"{folder} is an engine of the reference, which computes every node of the graph as it stands and is not timed by layer",
        hint="explain an engine of a backend that is meant to be fast: vitedge build the same ONNX file --target cpu",
    )


class OnnxRuntimeSession:
    """An ONNX Runtime session with an input buffer."""

    def __init__(self, session: Any, card: ModelCard, target: Target) -> None:
        self.input: NDArray[Any] = np.zeros((target.batch[2], *input_shape(card)), input_dtype(card))
        self._session, self._card, self._target = session, card, target
        self.streams = max(1, target.streams)  # each run of ONNX Runtime takes the threads of all, so more than one gains little
        self._names = [session.get_outputs()[0].name], session.get_inputs()[0].name

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of `input`."""
        write_input(picture, self._card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows, float32[count, ...]."""
        outputs, name = self._names
        result: NDArray[np.float32] = self._session.run(outputs, {name: self.input[:count]})[0]
        return result

    def fork(self) -> OnnxRuntimeSession:
        """The same session, which threads may share, with an input buffer of its own."""
        return OnnxRuntimeSession(self._session, self._card, self._target)

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _session(onnx: Path, target: Target, *, exact: bool = True) -> Any:
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if exact else levels.ORT_ENABLE_ALL
    if target.threads:
        options.intra_op_num_threads = target.threads
    try:
        return runtime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception types live in a private module
        raise EngineError(f"ONNX Runtime cannot open {onnx}: {first_line(error)}", hint="export the model again") from error


def _onnxruntime() -> Any:
    return import_package(PACKAGE, EXTRA)
