"""Nothing in, one finding per backend out: does it build and run a real INT8 model here, and if not, what to do.

The model is doctor.onnx: `scores = DQ(patches) @ DQ(weight int8)`, two tensors with whole-number values, whose right
answer is known to the last bit. Knows nothing of the compiler, so it works on a device.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from vitedge.backends import BACKENDS, load_backend
from vitedge.backends.build import build_engine
from vitedge.errors import EngineError, MissingPackageError, VitEdgeError
from vitedge.runtime.engine import open_engine
from vitedge.specs import Target, from_dict

MODEL = Path(__file__).with_name("doctor.onnx")
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
    try:
        backend = load_backend(name)
        backend.version()
        target = from_dict(Target, {"name": "doctor", "backend": name, "batch": [1, 1, 2]})
        with tempfile.TemporaryDirectory() as folder, open_engine(build_engine(MODEL, target, Path(folder))) as engine:
            _check(engine(PATCHES), name)
        return Finding(name, True, f"{backend.version()} on {backend.device()}, floats in {' or '.join(backend.float_types())}")
    except MissingPackageError as error:
        return Finding(name, None, "not installed", error.hint)
    except (VitEdgeError, OSError, RuntimeError) as error:
        hint = getattr(error, "hint", None) or f"pip install --force-reinstall {name}"
        return Finding(name, False, str(error), hint)


def _check(scores: np.ndarray, name: str) -> None:
    if not np.array_equal(scores, SCORES):
        worst = float(np.abs(scores - SCORES).max())
        raise EngineError(f"{name} computes wrongly: off by {worst:g} on a product of whole numbers", hint="update the package")
