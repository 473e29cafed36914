"""A `Launch` and a picture in, what the kernel makes of it on a CPU out: patchify.cu unchanged, compiled by g++ with cuda_shim.h.

    Launch + uint8 picture  ->  run()         the row of the engine's input, by fibers in this process
                            ->  run_checked() the same by a program of real threads under a sanitizer

Each set of defines is compiled once.
"""

from __future__ import annotations

import ctypes
import functools
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
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # of unrolling
PROT_NONE = 0


class Arguments(ctypes.Structure):
    """What `launch` of cuda_shim.cpp takes."""

    _fields_ = [("pointers", ctypes.c_void_p * 6), ("scalars", ctypes.c_int * 9)]


def run(launch: Launch, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8[launch.out_bytes]. Reading beyond the picture's last byte, or writing beyond the row, ends the process."""
    given = _before_a_guard(launch.picture_bytes, "picture").array
    out = _before_a_guard(launch.out_bytes, "out").array
    given[:] = picture.reshape(-1)[: launch.picture_bytes]
    out[:] = 0x5A
    addresses = [array.ctypes.data for array in (given, out, *launch.tables)]
    arguments = Arguments((ctypes.c_void_p * 6)(*addresses), (ctypes.c_int * 9)(*launch.scalars))
    grid, block = (ctypes.c_uint * 2)(*launch.grid), (ctypes.c_uint * 2)(*launch.block[:2])
    failed = _library(launch.defines).launch(grid, block, ctypes.byref(arguments))
    assert not failed, "not all threads of a block came to a barrier"
    return out.copy()


def run_checked(launch: Launch, picture: NDArray[np.uint8], sanitizer: str) -> NDArray[np.uint8]:
    """uint8[launch.out_bytes], computed by a program built with -fsanitize=`sanitizer`; fails with what that found."""
    program = _program(launch.defines, sanitizer)
    case, out = _path("case"), _path("out")
    blobs = (*launch.tables, picture.reshape(-1)[: launch.picture_bytes], np.zeros(launch.out_bytes, np.uint8))
    header = struct.pack("<5I", *launch.grid, *launch.block[:2], launch.shared_bytes) + struct.pack("<9i", *launch.scalars)
    case.write_bytes(header + b"".join(struct.pack("<I", blob.nbytes) + blob.tobytes() for blob in blobs))
    done = subprocess.run([program, case, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return np.fromfile(out, np.uint8)


class _Pages:
    """Memory whose last byte is followed by a page that nobody may touch."""

    def __init__(self, count: int) -> None:
        whole = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        everything = np.frombuffer(mmap.mmap(-1, whole + mmap.PAGESIZE), np.uint8)  # keeps the map alive
        guard, size = ctypes.c_void_p(everything.ctypes.data + whole), ctypes.c_size_t(mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(guard, size, PROT_NONE) == 0
        self.array = everything[whole - count : whole]


@functools.lru_cache(maxsize=16)
def _before_a_guard(count: int, purpose: str) -> _Pages:
    assert purpose  # so that a picture and a result of one size do not share their memory
    return _Pages(count)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """With the kernel's source; removed when the interpreter ends."""
    folder = tempfile.TemporaryDirectory(prefix="patchify-")
    Path(folder.name, "patchify.cu").write_text(source(), "utf-8")
    return folder


@functools.cache
def _library(defines: tuple[str, ...]) -> Any:
    path = _path(f"{'-'.join(defines)}.so")
    _compile("-shared", "-fPIC", "-O2", *_kernel(defines), *_shim("-fPIC", "-O2"), "-o", str(path))
    return ctypes.CDLL(str(path))


@functools.cache
def _program(defines: tuple[str, ...], sanitizer: str) -> Path:
    path = _path(f"{'-'.join(defines)}-{sanitizer}")
    options = ("-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread")
    _compile(*options, *_kernel(defines), *_shim(*options, "-DTHREADED"), "-o", str(path))
    return path


def _kernel(defines: tuple[str, ...]) -> tuple[str, ...]:
    names = [f"-D{name}" for name in defines]
    return ("-x", "c++", "-include", str(HERE / "cuda_shim.h"), *names, str(_path("patchify.cu")), "-x", "none")


@functools.cache
def _shim(*options: str) -> tuple[str]:
    """The object file of cuda_shim.cpp."""
    path = str(_path(f"{'-'.join(options)}.o".replace("=", "-")))
    _compile("-c", *options, str(HERE / "cuda_shim.cpp"), "-o", path)
    return (path,)


def _path(name: str) -> Path:
    return Path(_folder().name, name)


def _compile(*words: str) -> None:
    assert COMPILER, "there is no g++"
    done = subprocess.run([COMPILER, "-std=c++17", *WARNINGS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
