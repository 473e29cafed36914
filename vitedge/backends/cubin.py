"""CUDA source in, machine code for one GPU architecture out, compiled once and kept.

    source, options, "8.7"  ->  $XDG_CACHE_HOME/vitedge/kernels/<key>.cubin  ->  bytes

By NVRTC through cuda-bindings, which needs no GPU, or else by nvcc. The key is a hash of all that decides the result, the
compiler's version included. Behind the code stands its SHA-256, so that a file cut short is compiled again and not loaded;
tools that read ELF files look no further than the code. Knows nothing of what a kernel does.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from vitedge.backends import cuda
from vitedge.errors import EngineError, MissingPackageError, VitEdgeError, first_line, import_package
from vitedge.workspace import cache_folder, content_key, write_file

EXTRA, PACKAGE = "gpu", "cuda-bindings"
DIGEST = 32  # bytes of a SHA-256
INSTALL = "pip install 'cuda-bindings[all]', with the version of the driver's CUDA, or install the CUDA toolkit"


def compiled(source: str, options: tuple[str, ...], capability: str) -> bytes:
    """The machine code of `source` for the compute `capability`, e.g. "8.7". An EngineError says why there is none."""
    version = compiler_version()
    if not version:
        raise EngineError("there is neither NVRTC nor nvcc to compile a kernel with", hint=INSTALL)
    key = content_key(source, options, capability, version)
    path = cache_folder() / "kernels" / f"{key}.cubin"
    kept = path.read_bytes() if path.is_file() else b""
    if len(kept) > DIGEST and hashlib.sha256(kept[:-DIGEST]).digest() == kept[-DIGEST:]:
        return kept[:-DIGEST]
    by = compile_by_nvrtc if version.startswith("nvrtc") else cuda.compile_by_nvcc
    code = by(source, options, capability)
    try:
        write_file(path, code + hashlib.sha256(code).digest())
    except VitEdgeError:  # a disk that is full or read-only costs a second at every start, and nothing else
        return code
    return code


@functools.cache
def compiler_version() -> str:
    """What kernels are compiled with here, e.g. "nvrtc 13.5" or "nvcc 13.0.88"; "" where there is nothing."""
    version = nvrtc_version()
    if version:
        return f"nvrtc {version}"
    version = cuda.nvcc_version()
    return f"nvcc {version}" if version else ""


def nvrtc_version() -> str:
    """Of NVRTC, e.g. "13.5"; "" where it or cuda-bindings is missing."""
    try:
        status, major, minor = _nvrtc().nvrtcVersion()
    except (MissingPackageError, RuntimeError, OSError):  # the package is there, but the library that it looks for is not
        return ""
    return "" if status else f"{major}.{minor}"


def compile_by_nvrtc(source: str, options: tuple[str, ...], capability: str) -> bytes:
    """The machine code of CUDA source; an EngineError with the first error that the compiler names."""
    nvrtc = _nvrtc()
    program = _checked("nvrtcCreateProgram", source.encode(), b"kernel.cu", 0, [], [])
    try:
        arguments = [option.encode() for option in (f"--gpu-architecture=sm_{capability.replace('.', '')}", *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if status:
            raise EngineError(f"NVRTC does not compile the kernel for {capability}: {_first_error(program)}", hint=INSTALL)
        code = bytearray(int(_checked("nvrtcGetCUBINSize", program)))  # NVRTC writes into it, so not bytes, which are shared
        _checked("nvrtcGetCUBIN", program, code)
        return bytes(code)
    finally:
        _checked("nvrtcDestroyProgram", program)


def _first_error(program: Any) -> str:
    """The line of the compiler's log that names an error, or else its first."""
    log = bytearray(int(_checked("nvrtcGetProgramLogSize", program)))
    _checked("nvrtcGetProgramLog", program, log)
    lines = [line for line in log.decode(errors="replace").strip("\0 \n").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it does not say why")


def _checked(function: str, *arguments: Any) -> Any:
    """What a function of NVRTC gives beside its status; an EngineError where the status is one."""
    try:
        status, *given = getattr(_nvrtc(), function)(*arguments)
    except RuntimeError as error:
        raise EngineError(f"NVRTC does not start: {first_line(error)}", hint=INSTALL) from error
    if status:
        _, text = _nvrtc().nvrtcGetErrorString(status)
        raise EngineError(f"{function} failed: {text.decode()}", hint=INSTALL)
    return given[0] if given else None


def _nvrtc() -> Any:
    return import_package("cuda.bindings.nvrtc", EXTRA, PACKAGE)
