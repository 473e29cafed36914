"""In place of TensorRT where none builds for the GPU at hand: an engine whose plan is one kernel, so that sessions can be tried.

    row of the input, int8[N, M]  ->  float32[2]: the sum of its values, and its first value

As strict as TensorRT: a run within a capture fails where none came before it at that batch size. Launched through cuda-bindings,
since what TensorRT gets of a stream is its handle.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vitedge.backends import cubin, cuda
from vitedge.backends.tensorrt_session import TensorRtSession
from vitedge.runtime.engine import Engine
from vitedge.specs import Manifest, ModelCard, Target

SOURCE = """
extern "C" __global__ void answer(const signed char* rows, float* answers, int size) {
    __shared__ int sums[256];
    const signed char* row = rows + (size_t)blockIdx.x * size;
    int sum = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) sum += row[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) answers[2 * blockIdx.x] = sums[0], answers[2 * blockIdx.x + 1] = row[0];
}
"""
TRT = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype, __version__="0")
LOG = SimpleNamespace(last_error=lambda: "")


class Context:
    """In place of TensorRT's IExecutionContext."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.addresses, self.count, self.ran = plan, dict[str, int](), 0, False

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.count, self.ran = shape[0], False
        return True

    def execute_async_v3(self, stream: int) -> bool:
        driver = self.plan.driver
        _, status = driver.cuStreamIsCapturing(stream)
        if int(status) and not self.ran:
            return False
        self.ran = True
        values = (self.addresses["patches"], self.addresses["answers"], self.plan.size)
        parameters = (values, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int))
        (failed,) = driver.cuLaunchKernel(self.plan.function, self.count, 1, 1, 256, 1, 1, 0, stream, parameters, 0)
        return not failed


class Plan:
    """In place of TensorRT's ICudaEngine."""

    num_io_tensors = 2

    def __init__(self, shape: tuple[int, ...]) -> None:
        from cuda.bindings import driver

        self.driver, self.shape, self.size = driver, shape, int(np.prod(shape))
        code = cubin.compiled(SOURCE, (), cuda.require_gpu().capability)
        with cuda.Device():
            failed, self.module = driver.cuModuleLoadData(code)
            assert not failed, failed
            failed, self.function = driver.cuModuleGetFunction(self.module, b"answer")
            assert not failed, failed

    def get_tensor_name(self, index: int) -> str:
        return ("patches", "answers")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"patches": "in", "answers": "out"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shape) if name == "patches" else (-1, 2)

    def get_tensor_dtype(self, name: str) -> Any:
        return np.int8 if name == "patches" else np.float32

    def create_execution_context(self) -> Context:
        return Context(self)


def open_stand_in(plan: Plan, card: ModelCard) -> Engine:
    """An engine of the stand-in for a card of which it takes the input."""
    target = Target("local", "tensorrt")
    manifest = Manifest(card, "stand-in", None, target, "fp32", "", "", "tensorrt", "0", "", "")
    return Engine(Path("stand-in"), manifest, TensorRtSession(TRT, plan, LOG, card, target))
