"""A `Launch` and a picture in, what the kernel makes of it on a CPU out: patchify.cu unchanged, compiled by g++ with cuda_shim.h.

    Launch + uint8 picture  ->  run()         the row of the engine's input, by fibers in this process
                            ->  run_checked() the same by a program of real threads under a sanitizer

Each set of defines is compiled once.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
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


class Arguments(ctypes.Structure):
    """What `launch` of cuda_shim.cpp takes."""

    _fields_ = [("pointers", ctypes.c_void_p * 6), ("scalars", ctypes.c_int * 9)]  # noqa: RUF012


def run(launch: Launch, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8[launch.out_bytes]. Reading beyond the picture's last byte, or writing beyond the row, ends the process."""
    pages = (_before_a_guard(launch.picture_bytes), _before_a_guard(launch.out_bytes))
    given, out = (page.array for page in pages)
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
    case = program.parent / "case"
    blobs = (*launch.tables, picture.reshape(-1)[: launch.picture_bytes], np.zeros(launch.out_bytes, np.uint8))
    header = struct.pack("<5I", *launch.grid, *launch.block[:2], launch.shared_bytes) + struct.pack("<9i", *launch.scalars)
    case.write_bytes(header + b"".join(struct.pack("<I", blob.nbytes) + blob.tobytes() for blob in blobs))
    done = subprocess.run([program, case], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return np.fromfile(f"{case}.out", np.uint8)


class _Pages:
    """Memory whose last byte is followed by a page that nobody may touch."""

    def __init__(self, count: int) -> None:
        whole = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, whole + mmap.PAGESIZE)
        everything = np.frombuffer(self._map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        guard = ctypes.c_void_p(everything.ctypes.data + whole)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        self.array = everything[whole - count : whole]


@functools.lru_cache(maxsize=64)
def _before_a_guard(count: int) -> _Pages:
    return _Pages(count)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="patchify-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "patchify.cu").write_text(source(), "utf-8")
    return folder


@functools.cache
def _library(defines: tuple[str, ...]) -> Any:
    path = _folder() / f"{'-'.join(defines)}.so"
    shim = _object(())
    _compile("-shared", "-fPIC", "-O2", *_kernel(defines), "-x", "none", shim, "-o", path)
    return ctypes.CDLL(str(path))


@functools.cache
def _program(defines: tuple[str, ...], sanitizer: str) -> Path:
    path = _folder() / f"{'-'.join(defines)}-{sanitizer}" / "program"
    path.parent.mkdir()
    options = ("-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread")
    _compile(*options, *_kernel(defines), "-x", "none", _object((*options, "-DTHREADED")), "-o", path)
    return path


@functools.cache
def _object(options: tuple[str, ...]) -> Path:
    path = _folder() / f"shim-{len(options)}-{abs(hash(options))}.o"
    _compile("-c", "-fPIC", "-O2", *options, HERE / "cuda_shim.cpp", "-o", path)
    return path


def _kernel(defines: tuple[str, ...]) -> tuple[str | Path, ...]:
    return ("-x", "c++", "-include", HERE / "cuda_shim.h", *(f"-D{name}" for name in defines), _folder() / "patchify.cu")


def _compile(*words: str | os.PathLike[str]) -> None:
    assert COMPILER
    command = [COMPILER, "-std=c++17", *WARNINGS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
