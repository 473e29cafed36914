"""A `Launch` and a picture in, what the kernel makes of it on a CPU out: patchify.cu unchanged, compiled by g++ with cuda_shim.h.

    Launch + uint8 picture  ->  run()          the row of the engine's input, by fibers in this process
                            ->  run_checked()  the same by a program of real threads under a sanitizer

Each source is compiled once for each set of defines. `text` is the kernel's source, for tests that change it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends.patchify import Launch, source

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
OPTIONS = ("-std=c++17", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # fibers; unrolling
PROT_NONE = 0


class Arguments(ctypes.Structure):
    """What `launch` of cuda_shim.cpp takes."""

    _fields_ = [("pointers", ctypes.c_void_p * 6), ("scalars", ctypes.c_int * 9)]


def run(launch: Launch, picture: NDArray[np.uint8], text: str | None = None) -> NDArray[np.uint8]:
    """uint8[launch.out_bytes]. Reading beyond the picture's last byte, or writing beyond the row, ends the process."""
    given = _before_a_guard(launch.picture_bytes, "picture")
    out = _before_a_guard(launch.out_bytes, "out")
    given[:] = picture.reshape(-1)[: launch.picture_bytes]
    out[:] = 0x5A
    addresses = [array.ctypes.data for array in (given, out, *launch.tables)]
    arguments = Arguments((ctypes.c_void_p * 6)(*addresses), (ctypes.c_int * 9)(*launch.scalars))
    grid, block = (ctypes.c_uint * 2)(*launch.grid), (ctypes.c_uint * 2)(*launch.block[:2])
    failed = _library(text or source(), launch.defines).launch(grid, block, ctypes.byref(arguments))
    assert not failed, "not all threads of a block came to a barrier"
    return out.copy()


def run_checked(launch: Launch, picture: NDArray[np.uint8], sanitizer: str, text: str | None = None) -> NDArray[np.uint8]:
    """uint8[launch.out_bytes], computed by a program built with -fsanitize=`sanitizer`; fails with what that found."""
    program, case, out = _program(text or source(), launch.defines, sanitizer), _path("case"), _path("out")
    blobs = (*launch.tables, picture.reshape(-1)[: launch.picture_bytes], np.zeros(launch.out_bytes, np.uint8))
    header = struct.pack("<5I9i", *launch.grid, *launch.block[:2], launch.shared_bytes, *launch.scalars)
    case.write_bytes(header + b"".join(struct.pack("<I", blob.nbytes) + blob.tobytes() for blob in blobs))
    done = subprocess.run([program, case, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return np.fromfile(out, np.uint8)


@functools.lru_cache(maxsize=16)
def _before_a_guard(count: int, purpose: str) -> NDArray[np.uint8]:
    """Memory for one purpose, whose last byte is followed by a page that nobody may touch."""
    whole = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    everything = np.frombuffer(mmap.mmap(-1, whole + mmap.PAGESIZE), np.uint8)  # which keeps the map alive
    guard, size = ctypes.c_void_p(everything.ctypes.data + whole), ctypes.c_size_t(mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, size, PROT_NONE) == 0, purpose
    return everything[whole - count : whole]


@functools.cache
def _library(text: str, defines: tuple[str, ...]) -> Any:
    path = _new_path(".so")
    _compile("-shared", "-fPIC", "-O2", *_kernel(text, defines), *_shim("-fPIC", "-O2"), "-o", str(path))
    return ctypes.CDLL(str(path))


@functools.cache
def _program(text: str, defines: tuple[str, ...], sanitizer: str) -> Path:
    path = _new_path("")
    options = ("-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread")
    _compile(*options, *_kernel(text, defines), *_shim(*options, "-DTHREADED"), "-o", str(path))
    return path


def _kernel(text: str, defines: tuple[str, ...]) -> tuple[str, ...]:
    path = _new_path(".cu")
    path.write_text(text, "utf-8")
    return ("-x", "c++", "-include", str(HERE / "cuda_shim.h"), *(f"-D{name}" for name in defines), str(path), "-x", "none")


@functools.cache
def _shim(*options: str) -> tuple[str]:
    """The object file of cuda_shim.cpp."""
    path = str(_new_path(".o"))
    _compile("-c", *options, str(HERE / "cuda_shim.cpp"), "-o", path)
    return (path,)


def _compile(*words: str) -> None:
    assert COMPILER, "there is no g++"
    done = subprocess.run([COMPILER, *OPTIONS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_COUNT = itertools.count()


def _new_path(suffix: str) -> Path:
    return _path(f"{next(_COUNT)}{suffix}")


def _path(name: str) -> Path:
    return Path(_folder().name, name)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the interpreter ends."""
    return tempfile.TemporaryDirectory(prefix="patchify-")
