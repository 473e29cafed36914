"""The GPU through PyCUDA: what is there, its primary context, streams, events, buffers with a pinned host side, kernels.

    with Device():                                   in whichever thread, around everything below
        stream, frames = Stream(), Buffer((rows, bytes), np.dtype(np.uint8))
        frames.host[0] = ...
        frames.upload(1, stream)
        stream.synchronize()

The only file that imports pycuda. The primary context is the one that torch and CUDA's runtime share, so memory of theirs can
be used as it is; pycuda.autoinit would make another. PyCUDA checks every return code and raises; `Device` turns that into an
EngineError. Whoever makes something closes it: twice is safe, and what is closed says so. Knows nothing of engines.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import struct
import threading
import weakref
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import EngineError, MissingPackageError, first_line, import_package

EXTRA = "gpu"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for what others, such as torch, put into the default stream
NO_MEMORY_HINT = "close other programs on the GPU, or build with a smaller batch"
FAULT_HINT = "start the program again; if that does not help, update the NVIDIA driver"


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU. capability: e.g. "8.7". driver: the CUDA version that its driver is for, e.g. "12.6".

    integrated: it shares its memory with the processor, as on a Jetson. processors: how many multiprocessors it has.
    """

    name: str
    capability: str
    driver: str
    memory_mib: int
    integrated: bool = False
    processors: int = 0


@functools.cache
def find_gpu() -> Gpu | None:
    """The GPU here; None without one, without a driver, or without PyCUDA."""
    with suppress(EngineError, MissingPackageError):
        return require_gpu()
    return None


def require_gpu() -> Gpu:
    """The GPU here; an error says what is missing."""
    driver = _driver()
    device, attributes = driver.Device(0), driver.device_attribute
    version = driver.get_driver_version()  # 12060 is 12.6
    major, minor = device.compute_capability()
    return Gpu(
        device.name(), f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}", int(device.total_memory() // 2**20),
        bool(device.get_attribute(attributes.INTEGRATED)), int(device.get_attribute(attributes.MULTIPROCESSOR_COUNT)),
    )  # fmt: skip


class Device:
    """The primary context of the first GPU, current within a `with` block, in whichever thread.

    What PyCUDA raises in the block leaves it as an EngineError.
    """

    def __init__(self) -> None:
        self._context: Any = _primary_context()

    def __enter__(self) -> Device:
        self._context.push()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._context.pop()
        if error is not None and is_failure(error):
            raise failure(error) from error

    def free_mib(self) -> float:
        """Memory of the GPU that nobody has, in MiB."""
        with self:
            return float(_driver().mem_get_info()[0]) / 2**20


def is_failure(error: BaseException) -> bool:
    """Whether PyCUDA raised it because CUDA failed."""
    return isinstance(error, _driver().Error)


def failure(error: BaseException) -> EngineError:
    """What PyCUDA raised as a sentence with a hint."""
    if isinstance(error, _driver().MemoryError):
        return EngineError(f"there is no GPU memory left: {first_line(error)}", hint=NO_MEMORY_HINT)
    return EngineError(f"CUDA failed: {first_line(error)}", hint=FAULT_HINT)


class Stream:
    """A CUDA stream of its own, which does not wait for the default stream."""

    def __init__(self) -> None:
        self._stream: Any = _driver().Stream(NON_BLOCKING)
        self._handle = int(self._stream.handle)

    @property
    def handle(self) -> int:
        """Its address, as TensorRT and cuda-bindings take it."""
        _check_open(self._stream, "stream")
        return self._handle

    @property
    def raw(self) -> Any:
        """PyCUDA's stream."""
        _check_open(self._stream, "stream")
        return self._stream

    def synchronize(self) -> None:
        """Wait until all that was put into the stream is done."""
        self.raw.synchronize()

    def close(self) -> None:
        """Give the stream back, once it is done; a second call does nothing."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.synchronize()
            finally:
                del stream  # here, where the context is current, and not with the traceback of a fault


class Event:
    """A mark in a stream that one can wait for, and with `timed` measure time between."""

    def __init__(self, *, timed: bool = False) -> None:
        flags = _driver().event_flags
        self._event: Any = _driver().Event(flags.DEFAULT if timed else flags.DISABLE_TIMING)

    def record(self, stream: Stream) -> None:
        """Put the mark behind all that is in the stream now."""
        _check_open(self._event, "event")
        self._event.record(stream.raw)

    def synchronize(self) -> None:
        """Wait until the stream has come to the mark; at once where it was never put into one."""
        _check_open(self._event, "event")
        self._event.synchronize()

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds from another event to this one; both timed, and passed."""
        _check_open(self._event, "event")
        return float(self._event.time_since(earlier._event))

    def close(self) -> None:
        """Give the event back; a second call does nothing."""
        self._event = None


class Buffer:
    """Memory on the GPU and its pinned twin on the host, zeros at first; with `mapped` the two are one and nothing is copied.

    Arrays that others took from `host` stay valid after `close`, and hold on to the pinned memory until they are gone.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, mapped: bool = False) -> None:
        driver = _driver()
        flags = driver.host_alloc_flags.DEVICEMAP if mapped else 0
        try:
            host: Any = driver.pagelocked_empty(shape, dtype, mem_flags=flags)
            pinned = host.base
            # PyCUDA frees only where the context is current, and the last to hold the array may be in any thread
            weakref.finalize(host, _free_pinned, pinned).atexit = False
            self._memory: Any = None if mapped else driver.mem_alloc(host.nbytes)
        except driver.MemoryError as error:
            what = f"there is no GPU memory left for a buffer of {dtype}{list(shape)}"
            raise EngineError(what, hint=NO_MEMORY_HINT) from error
        host[...] = 0
        address: Any = pinned.get_device_pointer() if mapped else self._memory
        self._address, self._row_bytes = int(address), int(host.nbytes) // shape[0]
        self._host: NDArray[Any] | None = host
        self.mapped = mapped

    @property
    def host(self) -> NDArray[Any]:
        """The array of `shape` and `dtype` on the host."""
        if self._host is None:
            raise EngineError("the buffer is closed")
        return self._host

    @property
    def address(self) -> int:
        """Of the memory as the GPU sees it."""
        _check_open(self._host, "buffer")
        return self._address

    def row_address(self, row: int) -> int:
        """Of one row, as the GPU sees it."""
        return self.address + row * self._row_bytes

    def upload(self, count: int, stream: Stream) -> None:
        """Begin to copy the first `count` rows to the GPU."""
        rows = self.host[:count]
        if not self.mapped:
            _driver().memcpy_htod_async(self._address, rows, stream.raw)

    def download(self, count: int, stream: Stream) -> NDArray[Any]:
        """Begin to copy the first `count` rows to the host, and return them: they hold once the stream is synchronized."""
        rows = self.host[:count]
        if not self.mapped:
            _driver().memcpy_dtoh_async(rows, self._address, stream.raw)
        return rows

    def close(self) -> None:
        """Free the memory on the GPU and let go of the pinned one; nothing may be copying. A second call does nothing."""
        memory, self._memory, self._host = self._memory, None, None
        if memory is not None:
            memory.free()


class Kernel:
    """A function of compiled CUDA code. parameters: their types in turn, as struct's letters, "P" for an address."""

    def __init__(self, cubin: bytes, name: str, parameters: str) -> None:
        self._parameters = struct.Struct(parameters)  # in the native layout, which is that of a kernel's parameters
        try:
            self._module: Any = _driver().module_from_buffer(cubin)
            self._function: Any = self._module.get_function(name)
        except _driver().MemoryError:  # says nothing about the code
            raise
        except _driver().Error as error:
            what = f"the driver does not load the kernel {name!r}: {first_line(error)}"
            raise EngineError(what, hint="install the NVRTC of the CUDA version that the driver is for") from error

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, int, int],
        stream: Stream,
        arguments: tuple[int | float, ...],
        shared: int = 0,
    ) -> None:
        """Begin to run it behind what is in the stream. shared: bytes of shared memory a block."""
        _check_open(self._function, "kernel")
        # what PyCUDA offers above this sets the block's shape in a call of its own, which CUDA has deprecated
        self._function._launch_kernel(grid, block, self._parameters.pack(*arguments), shared, stream.raw)

    def close(self) -> None:
        """Unload the code; a second call does nothing."""
        self._function = self._module = None


def compile_by_nvcc(source: str, options: tuple[str, ...], capability: str) -> bytes:
    """The machine code of CUDA source for one architecture, by the nvcc of a CUDA toolkit; an EngineError with what it says."""
    compiler = importlib.import_module("pycuda.compiler")
    arch = f"sm_{capability.replace('.', '')}"
    try:
        cubin = compiler.compile(source, options=list(options), arch=arch, no_extern_c=True, cache_dir=False)
    except (OSError, _driver().Error) as error:
        raise EngineError(f"nvcc does not compile the kernel: {first_line(error)}", hint="install the CUDA toolkit") from error
    return bytes(cubin)


def nvcc_version() -> str:
    """Of the nvcc that PyCUDA calls, e.g. "13.0.88"; "" where there is none."""
    try:
        compiler = importlib.import_module("pycuda.compiler")
        said = str(compiler.get_nvcc_version("nvcc"))
    except (ImportError, OSError, RuntimeError):  # no PyCUDA, no nvcc, or one that does not start
        return ""
    return next((word.rstrip(",")[1:] for word in said.split() if word[:1] == "V" and word[1:2].isdigit()), said.strip())


def _check_open(thing: object, what: str) -> None:
    if thing is None:
        raise EngineError(f"the {what} is closed")


def _free_pinned(pinned: Any) -> None:
    """Give pinned memory back, from whichever thread."""
    with Device():
        pinned.free()


_ONE_CONTEXT = threading.RLock()  # whoever holds it may have to free pinned memory in between, as a finalizer


def _primary_context() -> Any:
    """The one object of PyCUDA's for the primary context: what belongs to another, even of the same context, it does not free."""
    with _ONE_CONTEXT:
        return _retained()


@functools.cache
def _retained() -> Any:
    context = _driver().Device(0).retain_primary_context()
    atexit.register(context.detach)  # its destructor would call what is for other contexts, and complain
    return context


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
