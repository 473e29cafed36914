"""The GPU through PyCUDA: what is there, its primary context, a stream, and buffers with a pinned host side.

The only file that imports pycuda. The primary context is the one that torch and CUDA's runtime share, so memory of theirs can
be used as it is; pycuda.autoinit would make another. Every call of PyCUDA checks its return code and raises.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import EngineError, MissingPackageError, first_line, import_package

EXTRA = "gpu"


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU. capability: e.g. "8.7". driver: the CUDA version that its driver is for, e.g. "12.6"."""

    name: str
    capability: str
    driver: str
    memory_mib: int


@functools.cache
def find_gpu() -> Gpu | None:
    """The GPU here; None without one, without a driver, or without PyCUDA."""
    with suppress(EngineError, MissingPackageError):
        return require_gpu()
    return None


def require_gpu() -> Gpu:
    """The GPU here; an error says what is missing."""
    driver = _driver()
    device = driver.Device(0)
    version = driver.get_driver_version()  # 12060 is 12.6
    major, minor = device.compute_capability()
    return Gpu(
        device.name(), f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}", int(device.total_memory() // 2**20)
    )


class Device:
    """The primary context of the first GPU, current within a `with` block, in whichever thread."""

    def __init__(self) -> None:
        self._context: Any = _driver().Device(0).retain_primary_context()

    def __enter__(self) -> Device:
        self._context.push()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._context.pop()


class Stream:
    """A CUDA stream. handle: its address, as TensorRT takes it."""

    def __init__(self) -> None:
        self._stream: Any = _driver().Stream()
        self.handle = int(self._stream.handle)

    def synchronize(self) -> None:
        """Wait until all that was put into the stream is done."""
        self._stream.synchronize()

    def close(self) -> None:
        """Give the stream back."""
        self._stream = None


class Buffer:
    """Memory on the GPU and its pinned twin on the host.

    host: an array of `shape` and `dtype`. address: of the memory on the GPU.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        driver = _driver()
        try:
            self.host: NDArray[Any] = driver.pagelocked_empty(shape, dtype)
            self._memory: Any = driver.mem_alloc(max(self.host.nbytes, 1))
        except driver.MemoryError as error:
            what = f"there is no GPU memory left for a buffer of {dtype}{list(shape)}"
            raise EngineError(what, hint="close other programs on the GPU, or build with a smaller batch") from error
        self.host[...] = 0
        self.address = int(self._memory)

    def upload(self, count: int, stream: Stream) -> None:
        """Begin to copy the first `count` rows to the GPU."""
        _driver().memcpy_htod_async(self.address, self.host[:count], stream._stream)

    def download(self, count: int, stream: Stream) -> NDArray[Any]:
        """Begin to copy the first `count` rows to the host, and return them: they hold once the stream is synchronized."""
        rows = self.host[:count]
        _driver().memcpy_dtoh_async(rows, self.address, stream._stream)
        return rows

    def close(self) -> None:
        """Free the memory on the GPU; a second call does nothing."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None


@functools.cache
def _driver() -> Any:
    """PyCUDA's driver API, initialized; an EngineError where there is no GPU or no driver."""
    import_package("pycuda", EXTRA)
    try:
        driver = importlib.import_module("pycuda.driver")
        driver.init()
        count = driver.Device.count()
    except Exception as error:  # an ImportError where libcuda is missing, else pycuda's own types
        raise EngineError(f"CUDA does not start: {first_line(error)}", hint="install the NVIDIA driver") from error
    if not count:
        raise EngineError("there is no NVIDIA GPU here", hint="run this on the device that the engine was built for")
    return driver
