"""Pictures on the host in, rows of an engine's input on the GPU out: uploads what the patchify kernel needs, and launches it.

    pictures = Pictures(card, gpu)
    layout = pictures.layout(picture, "nv12", stream)
    pictures.write(picture, layout, address, stream)     returns before the GPU is done, and no longer needs `picture`

A picture goes through pinned memory, two in turns, so that one is filled while the other is read; on a GPU that shares its
memory with the processor the kernel reads it there. What a layout needs is made at its first picture: code from the cache of
`cubin`, tables of weights; from then on nothing is allocated. The context must be current (see `cuda.Device`), and the stream
always the same. Knows nothing of engines.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import cuda, patchify
from vitedge.backends.cubin import compiled
from vitedge.errors import EngineError
from vitedge.pixels import frame_size
from vitedge.specs import ModelCard, PixelFormat

LAYOUTS = 8  # that are kept; a camera has one
PARAMETERS = "P" * 6 + "i" * 9  # of the kernel
BYTE, WORD = np.dtype(np.uint8), np.dtype(np.int32)
OPTIONS = ("--std=c++17",)


class KernelError(EngineError):
    """The kernel cannot be compiled or loaded, for this picture or any other."""


class Slot:
    """Pinned memory that pictures wait in, its twin on the GPU, and a mark in the stream from which on it is free again."""

    def __init__(self, mapped: bool) -> None:
        self._mapped, self._room = mapped, 1
        self.buffer, self.free = cuda.Buffer((1,), BYTE, mapped=mapped), cuda.Event()

    def filled(self, picture: NDArray[np.uint8]) -> cuda.Buffer:
        """The buffer with a copy of `picture`, once the picture that was in it before is used up."""
        self.free.synchronize()
        if self._room < picture.nbytes:
            self._room = 0  # until there is more: an attempt that found no memory can be made again
            self.buffer.close()
            self.buffer = cuda.Buffer((picture.nbytes,), BYTE, mapped=self._mapped)
            self._room = picture.nbytes
        np.copyto(self.buffer.host[: picture.nbytes].reshape(picture.shape), picture)
        return self.buffer

    def close(self) -> None:
        """Free the memory; a second call does nothing."""
        with ExitStack() as stack:
            stack.callback(self.free.close)
            stack.callback(self.buffer.close)


@dataclass(frozen=True, slots=True)
class Layout:
    """What pictures of one size and format need: how the kernel is launched, its code, and the tables' memory."""

    launch: patchify.Launch
    kernel: cuda.Kernel
    tables: cuda.Buffer
    arguments: tuple[int, ...]  # that follow the two addresses


class Pictures:
    """Writes pictures for one model. Each session has its own, since pictures of two streams would get into one slot."""

    def __init__(self, card: ModelCard, gpu: cuda.Gpu) -> None:
        self._card, self._gpu = card, gpu
        self._kernels: dict[tuple[str, ...], cuda.Kernel] = {}
        self._layouts: dict[tuple[Any, ...], Layout] = {}  # the one that was used last is the last
        self._slots = [Slot(gpu.integrated), Slot(gpu.integrated)]

    def layout(self, picture: NDArray[np.uint8], pixels: PixelFormat, stream: cuda.Stream) -> Layout:
        """What pictures of this size and format need.

        A VitEdgeError where the picture is none of its format, or so large that the kernel cannot resize it; a KernelError
        where the kernel cannot be compiled or loaded; another EngineError where there is no GPU memory at the moment.
        """
        key = picture.shape, pixels
        layout = self._layouts.pop(key, None) or self._new_layout(picture, pixels, stream)
        self._layouts[key] = layout
        return layout

    def write(self, picture: NDArray[np.uint8], layout: Layout, address: int, stream: cuda.Stream) -> None:
        """Begin to make the row of the input at `address` from a picture of that layout."""
        slot, launch = self._slots[0], layout.launch
        buffer = slot.filled(picture)
        buffer.upload(picture.nbytes, stream)
        arguments = (buffer.address, address, *layout.arguments)
        layout.kernel.launch(launch.grid, launch.block, stream, arguments, launch.shared_bytes)
        slot.free.record(stream)
        self._slots.reverse()

    def close(self) -> None:
        """Free all memory and code, once the stream is done, whatever fails; a second call does nothing."""
        with ExitStack() as stack:
            for slot in self._slots:
                stack.callback(slot.close)
            for kernel in self._kernels.values():
                stack.callback(kernel.close)
            for layout in self._layouts.values():
                stack.callback(layout.tables.close)
            self._layouts.clear()
            self._kernels.clear()

    def _new_layout(self, picture: NDArray[np.uint8], pixels: PixelFormat, stream: cuda.Stream) -> Layout:
        height, width = frame_size(picture, pixels)
        launch = patchify.launch(height, width, picture.nbytes // len(picture), pixels, self._card)
        kernel = self._kernels.get(launch.defines) or self._new_kernel(launch.defines)
        tables = _uploaded(launch.tables, stream)
        starts = np.cumsum([0, *(table.size for table in launch.tables)])[:-1]
        addresses = [tables.row_address(int(start)) for start in starts]
        layout = Layout(launch, kernel, tables, (*addresses, *(int(value) for value in launch.scalars)))
        if len(self._layouts) == LAYOUTS:  # the one that was not used for longest makes room
            stream.synchronize()
            self._layouts.pop(next(iter(self._layouts))).tables.close()
        return layout

    def _new_kernel(self, defines: tuple[str, ...]) -> cuda.Kernel:
        options = (*OPTIONS, *(f"-D{define}" for define in defines))
        try:
            kernel = cuda.Kernel(compiled(patchify.source(), options, self._gpu.capability), patchify.FUNCTION, PARAMETERS)
        except EngineError as error:
            raise KernelError(str(error), hint=error.hint) from error
        self._kernels[defines] = kernel
        return kernel


def _uploaded(tables: tuple[NDArray[np.int32], ...], stream: cuda.Stream) -> cuda.Buffer:
    """All tables behind one another."""
    buffer = cuda.Buffer((sum(table.size for table in tables),), WORD)
    np.concatenate([table.reshape(-1) for table in tables], out=buffer.host)
    buffer.upload(len(buffer.host), stream)
    return buffer
