"""A float model and calibration images in, an INT8 model and what it cost out: one function a quantizer.

    Inputs  ->  in a process of its own: vitedge | ONNX Runtime | NNCF | ModelOpt  ->  FOLDER/model.onnx or model.xml, and a Cost

Every quantizer gets the same images and is set as a careful user would. Its packages are imported and its float model is
written before the clock starts; reading the images belongs to its time. Knows nothing of how good the results are.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
from torch import nn

from benchmarks import cpu_latency
from benchmarks.cpu_latency import calibration_inputs, quantize_nncf, quantize_static, quiet
from benchmarks.modelopt_peer import peak_mib
from vitedge.errors import VitEdgeError, first_line
from vitedge.images import ImageFile
from vitedge.specs import ModelCard, Recipe

MODELOPT = ("nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0")
MODELOPT_VENV = cpu_latency.ROOT / ".cache" / "quantizers" / "modelopt"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every quantizer is given; plain data, since it is sent to another process.

    folder: holds the float model as vitedge (fp32.onnx), torch (float.onnx) and OpenVINO (openvino/) write it.
    """

    card: ModelCard
    calibration: tuple[ImageFile, ...]
    folder: Path


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of the wall clock, and the largest memory that the process had by its end and, of that, before it began."""

    seconds: float
    peak_mib: float
    before_mib: float


class Quantizer(Protocol):
    """Writes model.onnx or model.xml into a folder that is there."""

    def __call__(self, inputs: Inputs, folder: Path) -> Cost: ...


def run_alone(quantizer: Quantizer, inputs: Inputs, folder: Path) -> Cost:
    """Quantize in a process of its own, so that its memory is its own; a VitEdgeError says why it could not."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, one_sentence():
        return pool.submit(quantizer, inputs, folder).result()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn whatever stops a quantizer into a VitEdgeError: each package raises its own types, and the others must go on."""
    try:
        yield
    except VitEdgeError:
        raise
    except BrokenProcessPool as error:
        raise VitEdgeError("its process was killed, most likely for want of memory") from error
    except ModuleNotFoundError as error:
        raise VitEdgeError(f"the package {error.name!r} is not installed") from error
    except Exception as error:
        raise VitEdgeError(f"{type(error).__name__}: {first_line(error)}") from error


def vitedge(inputs: Inputs, folder: Path, recipe: Recipe) -> Cost:
    """Calibrate and quantize as `vitedge make` does."""
    from vitedge.compiler.calibrate import calibrate
    from vitedge.compiler.quantize import quantize

    clock, graph = Clock(), inputs.folder / "fp32.onnx"
    table = calibrate(graph, inputs.calibration, recipe).table
    quantize(graph, table, folder / "model.onnx", inputs.calibration)
    return clock.read()


def onnx_runtime(inputs: Inputs, folder: Path, method: str) -> Cost:
    """ONNX Runtime's quant_pre_process and quantize_static: Q/DQ, S8S8, per channel."""
    importlib.import_module("onnxruntime.quantization")
    clock = Clock()
    with quiet():
        quantize_static(subject(inputs), folder / "model.onnx", method)
    return clock.read()


def nncf(inputs: Inputs, folder: Path) -> Cost:
    """NNCF with its defaults for a transformer."""
    with quiet():
        importlib.import_module("nncf")
        clock = Clock()
        quantize_nncf(subject(inputs), folder)
    return clock.read()


def modelopt(inputs: Inputs, folder: Path, options: dict[str, object]) -> Cost:
    """NVIDIA's ModelOpt in an environment of its own, whose packages do not go with ours; `options` beside its defaults."""
    python = modelopt_python()
    images = folder / "calibration.npy"
    np.save(images, np.concatenate(list(calibration_inputs(subject(inputs)))))
    command = [python, Path(__file__).with_name("modelopt_peer.py"), inputs.folder / "float.onnx", images, folder / "model.onnx"]
    cost = json.loads(checked([*map(str, command), json.dumps(options)]).splitlines()[-1])
    images.unlink()
    return Cost(**cost)


METHODS = {"ONNX Runtime minmax": "MinMax", "ONNX Runtime percentile": "Percentile", "ONNX Runtime entropy": "Entropy"}
PEERS: dict[str, Quantizer] = {
    "NNCF": nncf,
    **{name: partial(onnx_runtime, method=method) for name, method in METHODS.items()},
    "ModelOpt": partial(modelopt, options={}),
    "ModelOpt, float rest in fp32": partial(modelopt, options={"high_precision_dtype": "fp32"}),
}


class Clock:
    """Runs from its making, when everything is imported and nothing is done yet."""

    def __init__(self) -> None:
        self.before_mib, self.started = peak_mib(), perf_counter()

    def read(self) -> Cost:
        """The cost since then."""
        return Cost(perf_counter() - self.started, peak_mib(), self.before_mib)


def subject(inputs: Inputs) -> cpu_latency.Subject:
    """What the peers of cpu_latency.py take; their float models are written already, so none of them asks for the module."""
    images = np.zeros((1, inputs.card.preprocess.channels, *inputs.card.preprocess.size), np.float32)
    return cpu_latency.Subject(nn.Identity(), inputs.card, inputs.calibration, (), inputs.folder, images)


def modelopt_python() -> Path:
    """The interpreter of ModelOpt's environment, which is made where it is not there yet: 2 GB."""
    python, ready = MODELOPT_VENV / "bin" / "python", MODELOPT_VENV / "ready"
    if not ready.is_file() or ready.read_text() != str(MODELOPT):
        checked([sys.executable, "-m", "venv", "--clear", str(MODELOPT_VENV)])
        checked([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *MODELOPT])
        ready.write_text(str(MODELOPT))
    return python


def checked(command: list[str]) -> str:
    """The standard output of a command; where it fails, the last line it had to say is the VitEdgeError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise VitEdgeError(said[-1][:200])
    return done.stdout
