"""A picture in any pixel format in, one row of an engine's input out, in a tenth of Pillow's time and bit for bit the same.

    (height, width) + format + Preprocess  ->  a share of the work for each thread, kept  ->  patches or image

The loops are in resample_kernels.py, for which numba has to be installed (`.[cpu]`); it takes a quarter of a second to
load them when the first picture comes, and seconds to compile them where that was never done.
Rows of the result are shared out to a few threads that wait without spinning, so that an engine's own threads have the
cores to themselves afterwards. After the first picture of its size a call allocates no buffer. Knows nothing of cards,
files or engines.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitedge.pixels import frame_size
from vitedge.resampling import Taps, resampling, scaled_size
from vitedge.specs import PixelFormat, Preprocess

if TYPE_CHECKING:
    from vitedge.resample_kernels import Part

MAX_THREADS = 4  # more wait for memory, not for each other
SHARES_A_THREAD = 2  # so that whoever is done early takes another
PIXELS_A_THREAD = 100_000  # read or written; to wake a thread for less takes longer than the work


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Weights in quads: int32[out] first quad of each pixel, int32[out * quads * 4] two pairs of high and two of low halves."""

    first: NDArray[np.int32]
    weights: NDArray[np.int32]
    quads: int


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A part of the result that one thread makes. room: the elements of scratch that any part of this picture needs."""

    part: Part
    across: Table
    down: Table
    room: tuple[int, int, int, int]


class _Scratch(threading.local):
    """The memory that a thread works in, which grows to what its largest picture needs."""

    def __init__(self) -> None:
        self.strip = np.empty(0, np.uint8)
        self.quads = self.narrow = self.row = np.empty(0, np.int32)

    def fit(self, room: tuple[int, int, int, int]) -> None:
        """Make room for so many elements of each."""
        self.strip, self.quads = _at_least(self.strip, room[0]), _at_least(self.quads, room[1])
        self.narrow, self.row = _at_least(self.narrow, room[2]), _at_least(self.row, room[3])


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled loops; None where numba is missing, of no use with this numpy, or switched off."""
    try:
        from numba import config

        if config.DISABLE_JIT or sys.byteorder != "little":
            return None
        from vitedge import resample_kernels
    except (ImportError, OSError):  # or LLVM's library is
        return None
    return resample_kernels


def _loops() -> Any:
    """The compiled loops, where it is known that they are there."""
    return kernels()


def write_patches(
    picture: NDArray[np.uint8], pixels: PixelFormat, spec: Preprocess, patch: int | None, out: NDArray[Any]
) -> bool:
    """Resize and crop `picture` into `out`, C-contiguous patches or image as of `vitedge.preprocess`; False where it cannot.

    It can where numba is, but for copies of RGB, which numpy makes faster. A VitEdgeError where a picture is none of its format.
    """
    height, width = frame_size(picture, pixels)
    picture, pixels = _forward(picture, pixels)
    shares = _plan(height, width, pixels, spec, patch) if kernels() is not None else ()
    if not shares:
        return False
    rows = picture.reshape(picture.shape[0], -1)  # a view, unless pixels do not lie side by side
    if rows.strides[1] != 1:
        rows = np.ascontiguousarray(rows)
    target = out.view(np.uint8).reshape(-1, out.shape[-1] if patch else out.shape[1] * out.shape[2])
    offered = [(_offered(rows, share, target), share) for share in shares[1:]]
    _run(rows, shares[0], target)
    for future, share in reversed(offered):  # on a busy machine nobody may have come for them yet
        if future is None or future.cancel():
            _run(rows, share, target)
        else:
            future.result()
    return True


def _forward(picture: NDArray[np.uint8], pixels: PixelFormat) -> tuple[NDArray[np.uint8], PixelFormat]:
    """A picture whose channels are read backwards, as `bgr[..., ::-1]` are, in the order in which they lie."""
    if pixels in ("rgb", "bgr") and picture.strides[2] == -1:
        return picture[..., ::-1], "bgr" if pixels == "rgb" else "rgb"
    return picture, pixels


@functools.lru_cache(maxsize=16)
def _plan(height: int, width: int, pixels: PixelFormat, spec: Preprocess, patch: int | None) -> tuple[Share, ...]:
    """How the threads share the work on pictures of one size; none where numpy makes it."""
    if pixels == "rgb" and spec.channels == 3 and scaled_size((height, width), spec) == (height, width):
        return ()
    found = resampling(height, width, spec)
    left, columns = _reach(found.across, slice(None), limit=width)
    across = _table(found.across, slice(None), left)
    rows_read = _reach(found.down, slice(None))[1]
    sections = _sections(spec.size[0], max(rows_read * columns, spec.size[0] * spec.size[1]))
    downs = [_table(found.down, section, _reach(found.down, section)[0]) for section in sections]
    parts = [
        _part(section, (across, down), found.down, (left, columns), pixels, spec, patch)
        for section, down in zip(sections, downs, strict=True)
    ]
    room = _room(parts)
    return tuple(Share(part, across, down, room) for part, down in zip(parts, downs, strict=True))


def _room(parts: list[Part]) -> tuple[int, int, int, int]:
    """The elements of scratch for whichever of the parts is the largest, as any thread may come to make it."""
    lanes, part = _loops().LANES, parts[0]
    narrow = max(part.lanes * (_whole(part.rows, lanes) // 4 + part.down) for part in parts)
    strip = lanes * part.pitch + 4 * part.columns
    return strip, lanes * part.channels * part.quads, narrow, part.lanes // 4


def _sections(height: int, work: int) -> list[slice]:
    """The rows of the result, shared out to as many threads as `work` pixels are worth."""
    threads = max(1, min(MAX_THREADS, _cores(), height, work // PIXELS_A_THREAD))
    shares = min(height, threads * SHARES_A_THREAD) if threads > 1 else 1
    edges = [height * number // shares for number in range(shares + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(
    section: slice, tables: tuple[Table, Table], down: Taps, read: tuple[int, int], pixels: PixelFormat, spec: Preprocess,
    patch: int | None,
) -> Part:  # fmt: skip
    """What makes the rows `section` of the result; read: the first column and how many are read of the source."""
    loops, grey_picture = _loops(), pixels == "grey"
    channels = 1 if grey_picture else spec.channels
    top, rows = _reach(down, section)
    across = tables[0]
    quads = _whole(max(-(-read[1] // 4), int(across.first.max()) + across.quads), 4)  # four at a time are cut from a plane
    wide = (patch or spec.size[1]) * spec.channels
    part: Part = loops.Part(
        layout=loops.LAYOUTS.get(pixels, loops.PACKED), wide=1 if grey_picture else 3, bgr=int(pixels == "bgr"),
        luma=int(spec.channels == 1 and not grey_picture), channels=channels, repeat=spec.channels // channels,
        top=top, rows=rows, left=read[0], columns=read[1], quads=quads, pitch=3 * (4 * quads + loops.LANES),
        across=across.quads, down=tables[1].quads, lanes=_whole(channels * spec.size[1], loops.LANES), first_row=section.start,
        patch=patch or 1, patch_wide=wide, across_patches=spec.size[1] * spec.channels // wide, flip=0x80 if patch else 0,
    )  # fmt: skip
    return part


def _reach(taps: Taps, section: slice, limit: int | None = None) -> tuple[int, int]:
    """The first source pixel that a section of the result reads, and how many; with a limit whole pairs, which share a colour."""
    first, width = taps.first[section], taps.weights.shape[1]
    low, high = int(first.min()), int(first.max()) + width
    if limit is not None:
        low, high = low - low % 2, min(high + high % 2, limit)
    return low, high - low


def _table(taps: Taps, section: slice, origin: int) -> Table:
    """The weights of a section by quads, of which the first begins at `origin`."""
    first, weights = taps.first[section] - np.int32(origin), taps.weights[section]
    count, width = weights.shape
    quads = -(-(int((first % 4).max()) + width) // 4)
    low_bits = _loops().LOW_BITS
    padded = np.zeros((count, 4 * quads), np.int32)
    np.put_along_axis(padded, first[:, None] % 4 + np.arange(width), weights, axis=1)
    high = (padded + (1 << (low_bits - 1))) >> low_bits
    halves = np.stack((high, padded - (high << low_bits)), axis=1).astype(np.int16)
    # of a quad a, b, c, d the loops take a, c together, then b, d
    pairs = halves.reshape(count, 2, quads, 2, 2).transpose(0, 2, 1, 4, 3)
    return Table(first // 4, np.ascontiguousarray(pairs).view(np.int32).ravel(), quads)


def _offered(picture: NDArray[np.uint8], share: Share, out: NDArray[np.uint8]) -> Future[None] | None:
    """A share that another thread may take; None where none can be started, as when the interpreter is on its way out."""
    try:
        return _pool().submit(_run, picture, share, out)
    except RuntimeError:
        return None


def _run(picture: NDArray[np.uint8], share: Share, out: NDArray[np.uint8]) -> None:
    """Let the calling thread do its share."""
    loops, scratch = _loops(), _SCRATCH
    scratch.fit(share.room)
    loops.resample(
        picture, share.part, share.across.first, share.across.weights, share.down.first, share.down.weights, out,
        scratch.strip, scratch.quads, scratch.narrow, scratch.row,
    )  # fmt: skip


def _whole(count: int, step: int) -> int:
    """`count`, rounded up to a multiple of `step`."""
    return -(-count // step) * step


def _at_least(array: NDArray[Any], size: int) -> NDArray[Any]:
    return array if array.size >= size else np.empty(size, array.dtype)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads that help the calling one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
    return ThreadPoolExecutor(max(1, min(MAX_THREADS, _cores()) - 1), "vitedge-resample")


_SCRATCH = _Scratch()
