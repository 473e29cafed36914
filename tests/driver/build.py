"""PyCUDA and cuda-bindings as they are, on driver.cpp in place of NVIDIA's driver: built and fetched once, run in processes.

    PyPI: pycuda (source), cuda-bindings, NVRTC, CUDA's headers  ->  .cache/cuda-driver-<key>/
    driver.cpp, and a function that fails for all that it lacks   ->  libcuda.so.1

PyCUDA is compiled against the real headers, so its calls have the real types. NVRTC is the real compiler, which needs no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.engines import ROOT
from vitedge.workspace import content_key

PYCUDA = "2026.1"
BINDINGS = {"12": "cuda-bindings==12.9.5", "13": "cuda-bindings==13.5.0"}  # CUDA's major release -> what is installed
BESIDE = ("cuda-pathfinder", "pytools", "platformdirs", "siphash24", "typing_extensions", "mako", "markupsafe")
HEADERS = ("nvidia-cuda-runtime==13.*", "nvidia-cuda-profiler-api==13.*", "nvidia-cuda-nvrtc==13.*")
KEY = content_key(PYCUDA, BINDINGS, BESIDE, HEADERS, sys.version)
CACHE = ROOT / ".cache" / f"cuda-driver-{KEY}"
DRIVER = Path(__file__).with_name("driver.cpp")
NVIDIA = CACHE / "site" / "nvidia" / "cu13"
SITECONF = """
BOOST_INC_DIR = BOOST_LIB_DIR = CUDART_LIB_DIR = CURAND_LIB_DIR = CURAND_LIBNAME = LDFLAGS = []
BOOST_COMPILER, BOOST_PYTHON_LIBNAME, BOOST_THREAD_LIBNAME = "gcc43", ["boost_python"], ["boost_thread"]
USE_SHIPPED_BOOST, CUDA_TRACE, CUDA_ENABLE_GL, CUDA_ENABLE_CURAND = True, False, False, False
CUDA_ROOT, CUDA_INC_DIR = {root!r}, [{root!r} + "/include"]
CUDADRV_LIB_DIR, CUDADRV_LIBNAME, CUDART_LIBNAME = [{driver!r}], ["cuda"], ["cudart"]
CXXFLAGS = ["-O0", "-g0", "-w"]
"""


class Unavailable(Exception):  # noqa: N818
    """Something is missing that another machine may have: a network, a compiler, Python's headers."""


def prepare() -> None:
    """Fetch and build what is not there yet."""
    if not shutil.which("g++"):
        raise Unavailable("there is no g++")
    site = CACHE / "site"
    if not (CACHE / "fetched").is_file():
        _pip("install", "--target", site, "--no-deps", "--only-binary=:all:", *HEADERS, *BESIDE)
        for major, package in BINDINGS.items():
            _pip("install", "--target", CACHE / f"bindings-{major}", "--no-deps", "--only-binary=:all:", package)
        (CACHE / "fetched").touch()
    _compile_driver()
    if not (CACHE / "built").is_file():
        _build_pycuda(site)
        (CACHE / "built").touch()


def run(major: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process with PyCUDA, the cuda-bindings of a major release of CUDA, and the driver that has no GPU."""
    added = {
        "PYTHONPATH": os.pathsep.join(map(str, (CACHE / f"bindings-{major}", CACHE / "site", ROOT))),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, (CACHE / "lib", *([NVIDIA / "lib"] if major == "13" else [])))),
        "CUDA_DRIVER": str(CACHE / "lib" / "libcuda.so.1"),
        **environment,
    }
    command = [sys.executable, "-X", "faulthandler", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | added, capture_output=True, text=True, check=False, timeout=300)


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments[:1]), "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *map(str, arguments[1:])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pip cannot {arguments[0]} {arguments[-1]}: {done.stderr.strip().splitlines()[-1]}")


def _compile_driver() -> None:
    """libcuda.so.1: driver.cpp, and every other function of cuda.h, which says that it is not supported."""
    folder = CACHE / "lib"
    folder.mkdir(exist_ok=True)
    done = CACHE / f"driver-{content_key(DRIVER.read_text('utf-8'))}"
    if done.is_file():
        return
    (folder / "all.h").write_text("#include <cuda.h>\n#include <cudaProfiler.h>\n", "utf-8")
    declared = _compiler("gcc", "-E", f"-I{NVIDIA / 'include'}", folder / "all.h")
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", declared)))
    lines = [f"__attribute__((weak)) int {name}(void) {{ return 801; }}\n" for name in names]
    (folder / "others.c").write_text("".join(lines), "utf-8")
    _compiler("gcc", "-w", "-fPIC", "-c", folder / "others.c", "-o", folder / "others.o")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")
    _compiler("g++", *flags, DRIVER, folder / "others.o", "-o", folder / "libcuda.so.1", "-ldl", "-lpthread")
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    done.touch()


def _build_pycuda(site: Path) -> None:
    source = CACHE / f"pycuda-{PYCUDA}"
    _pip("download", "--no-deps", "--no-binary=pycuda", "-d", CACHE, f"pycuda=={PYCUDA}")
    shutil.unpack_archive(CACHE / f"pycuda-{PYCUDA}.tar.gz", CACHE)
    (source / "siteconf.py").write_text(SITECONF.format(root=str(NVIDIA), driver=str(CACHE / "lib")), "utf-8")
    _pip("install", "--target", site, "--no-deps", source)


def _compiler(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
