"""Nothing in, one finding per backend out: does it build and run a real INT8 model here, and if not, what to do.

The model is doctor.onnx: `scores = DQ(patches) @ DQ(weight int8)`, two tensors with whole-number values, whose right
answer is known to the last bit. Knows nothing of the compiler, so it works on a device.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from vitedge.backends import BACKENDS, cuda_graph, load_backend
from vitedge.backends.build import build_engine
from vitedge.backends.cubin import compiler_version
from vitedge.backends.cuda import find_gpu, require_gpu
from vitedge.errors import EngineError, MissingPackageError, ModelError, VitEdgeError, first_line
from vitedge.runtime.engine import open_engine
from vitedge.specs import Target
from vitedge.workspace import sha256

MODEL = Path(__file__).with_name("doctor.onnx")
SHA256 = "2a605227c856a2ae4c6131e455123c59f0a56437e7a2a60d5c48302003e59bc1"  # no backend is blamed for a damaged file
ANY_GPU = "8.6"  # that TensorRT-RTX builds for
# the int8 patches that are put in, one image of 4 patches of 4 values; the weight in the file is [[4 * i + j]]
PATCHES = np.arange(16, dtype=np.int8).reshape(1, 4, 4)
SCORES = (PATCHES.astype(np.int32) @ np.arange(16, dtype=np.int32).reshape(4, 4)).astype(np.float32) * np.float32(2.0**-7)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What became of one backend. passed: True or False; None where it is not installed, which is no fault."""

    backend: str
    passed: bool | None
    text: str
    hint: str | None = None


def examine() -> list[Finding]:
    """Build and run the model with every backend."""
    return [_examine(name) for name in BACKENDS]


def _examine(name: str) -> Finding:
    backend, target = load_backend(name), Target("doctor", name, (1, 1, 2))
    try:
        version = backend.version()
        _check_model()
        with tempfile.TemporaryDirectory() as folder:
            if backend.TYPED and find_gpu() is None:
                return _without_gpu(name, version, Path(folder))
            with open_engine(build_engine(MODEL, target, Path(folder))) as engine:
                _check(engine(PATCHES), name)
        floats = " or ".join(backend.float_types(target))
        slower = _what_slows_a_gpu() if backend.TYPED else ""
        hint = "pip install 'cuda-bindings[all]'" if slower else None
        return Finding(name, True, f"{version} on {backend.device(target)}, floats in {floats}{slower}", hint)
    except MissingPackageError as error:
        return Finding(name, None, "not installed", error.hint)
    except (VitEdgeError, OSError, RuntimeError) as error:
        hint = getattr(error, "hint", None) or f"pip install --force-reinstall {backend.PACKAGE}"
        return Finding(name, False, first_line(error), hint)


def _what_slows_a_gpu() -> str:
    """What is missing that changes no answer, only how long it takes; "" where nothing is."""
    graphs = cuda_graph.missing()
    kernels = "" if compiler_version() else "pictures are prepared on the CPU, without NVRTC or nvcc"
    return "".join(f"; {note}" for note in (f"no CUDA graphs: {graphs}" if graphs else "", kernels) if note)


def _without_gpu(name: str, version: str, folder: Path) -> Finding:
    """What can be known of a GPU backend where no GPU is found."""
    if name != "tensorrt-rtx":
        try:
            require_gpu()
        except VitEdgeError as error:  # PyCUDA, the driver or the GPU is missing
            return Finding(name, None, f"{version}, but {error}", error.hint)
    build_engine(MODEL, Target("doctor", name, (1, 1, 2), capability=ANY_GPU), folder)
    return Finding(name, True, f"{version} builds engines; there is no NVIDIA GPU here to run one")


def _check_model() -> None:
    if not MODEL.is_file() or sha256(MODEL) != SHA256:
        raise ModelError(f"{MODEL} is missing or damaged", hint="install vitedge again")


def _check(scores: np.ndarray, name: str) -> None:
    if scores.shape != SCORES.shape:
        raise EngineError(f"{name} answers {list(scores.shape)} in place of {list(SCORES.shape)}", hint="update the package")
    worst = float(np.abs(scores - SCORES).max())
    if worst != 0:  # also when it is NaN
        raise EngineError(f"{name} computes wrongly: off by {worst:g} on a product of whole numbers", hint="update the package")
