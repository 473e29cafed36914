"""Talks to driver.cpp within one process: what was called, what is to fail, and what TensorRT and a kernel would do.

To be imported where CUDA_DRIVER is the library that build.py made.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRIVER = ctypes.CDLL(os.environ["CUDA_DRIVER"], ctypes.RTLD_GLOBAL)
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.c_size_t)
WORK = ctypes.CFUNCTYPE(None, ctypes.c_long)
DRIVER.fake_call.restype = ctypes.c_char_p
DRIVER.fake_memory.argtypes = [ctypes.c_size_t]
DRIVER.fake_put.argtypes = [ctypes.c_void_p, WORK, ctypes.c_long]
DRIVER.cuStreamIsCapturing.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
DRIVER.fake_on_launch.argtypes = [KERNEL]
INTEGRATED = 18
OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 2, 700, 719
_kept: list[Any] = []  # callbacks that the driver holds


def calls() -> list[str]:
    """The driver's functions that were called since `forget`."""
    return [DRIVER.fake_call(index).decode() for index in range(DRIVER.fake_calls())]


def forget() -> None:
    """Forget what was called, and what is to fail."""
    DRIVER.fake_forget()


def fail(function: str, status: int, after: int = 0) -> None:
    """Let a function fail with a status, but for its next `after` calls."""
    DRIVER.fake_fail(function.encode(), after, status)


def fault(status: int) -> None:
    """Let everything fail with a status until `forget`, as after a fault within a kernel; what is given back is gone even so."""
    DRIVER.fake_fault(status)


def live() -> dict[str, int]:
    """How many of each kind there are that nobody has given back."""
    kinds = ("device", "pinned", "streams", "events", "modules", "graphs")
    return {kind: DRIVER.fake_live(index) for index, kind in enumerate(kinds)}


def at(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The memory at an address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def on_launch(call: Callable[[list[int], tuple[int, ...]], None]) -> None:
    """Call a function with the sizes and the arguments of each launch of the patchify kernel, when its turn comes."""

    def kernel(name: bytes, sizes: Any, parameters: int, size: int) -> None:
        if name == b"answer":  # of tests/gpu/stand_in.py
            given, out, values = struct.unpack("2Pi", ctypes.string_at(parameters, size))
            rows, answers = at(given, (sizes[0], values), np.int8), at(out, (sizes[0], 2), np.float32)
            answers[:, 0], answers[:, 1] = rows.astype(np.float32).sum(axis=1), rows[:, 0]
            return
        assert (name, size) == (b"patchify", struct.calcsize("6P9i"))
        call(sizes[:7], struct.unpack("6P9i", ctypes.string_at(parameters, size)))

    _kept.append(KERNEL(kernel))
    DRIVER.fake_on_launch(_kept[-1])


class Context:
    """In place of TensorRT's IExecutionContext: row -> (its sum, its first value), and as strict about captures."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.count, self.enqueued = engine, dict[str, int](), 0, False
        self.refuses_capture = engine.refuses_capture
        self._work = WORK(self._run)
        _kept.append(self._work)  # a graph outlives the context in a test that does it wrong

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.count, self.enqueued = shape[0], False
        return shape[0] <= self.engine.most

    def execute_async_v3(self, stream: int) -> bool:
        status = ctypes.c_int()
        DRIVER.cuStreamIsCapturing(stream, ctypes.byref(status))
        if status.value and (self.refuses_capture or not self.enqueued):
            return False
        self.enqueued = True
        assert DRIVER.fake_put(stream, self._work, self.count) == 0
        return True

    def _run(self, count: int) -> None:
        rows = at(self.addresses["patches"], (count, *self.engine.shape), np.int8).reshape(count, -1)
        out = at(self.addresses["answers"], (count, 2), np.float32)
        out[:, 0], out[:, 1] = rows.astype(np.float32).sum(axis=1), rows[:, 0]


class Engine:
    """In place of TensorRT's ICudaEngine. contexts: how many it gives before memory is out."""

    num_io_tensors = 2

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self.shape, self.most, self.contexts, self.made, self.refuses_capture = shape, most, 100, list[Context](), False

    def get_tensor_name(self, index: int) -> str:
        return ("patches", "answers")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"patches": "in", "answers": "out"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shape) if name == "patches" else (-1, 2)

    def get_tensor_dtype(self, name: str) -> type:
        return np.int8 if name == "patches" else np.float32

    def create_execution_context(self) -> Context | None:
        if len(self.made) == self.contexts:
            return None
        self.made.append(Context(self))
        return self.made[-1]


TRT = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype, IProfiler=object, __version__="0",
)  # fmt: skip
LOG = SimpleNamespace(last_error=lambda: "it said no")
