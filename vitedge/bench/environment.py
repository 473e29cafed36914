"""This machine in, what a reader of its numbers has to know out.

    environment()  ->  {"machine": ..., "cores": ..., "clock": ..., "gpu": ..., ..., "commit": ..., "date": ..., "command": ...}

Names no host, user or build of a system: what it gives may be published. Knows nothing of engines or measurements.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from vitedge.runtime.vitals import gpus_here

PACKAGES = (
    "vitedge", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-bindings", "torch", "pycuda", "cuda-bindings", "numba",
    "numpy",
)  # fmt: skip
INT8_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)  # what INT8 speed hangs on, x86 and Arm
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
GIT_S = 5.0


def environment() -> dict[str, str]:
    """Where and with what this process measures: machine, clock, GPUs, system, versions, commit, date in UTC, command line.

    clock: what Linux lets the first processor run at, and by which governor. commit: of the repository that the current folder
    lies in. What cannot be known is left out.
    """
    flags = _cpu_info("flags", "Features").split()
    facts = {
        "machine": _device_tree_model() or _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": str(_usable_cores()),
        "clock": _clock(),
        "gpu": "; ".join(gpus_here()),
        "int8": " ".join(flag for flag in INT8_FLAGS if flag in flags),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).encode(errors="replace").decode(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _cpu_info(*keys: str) -> str:
    """The first value of one of `keys` in /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def _device_tree_model() -> str:
    """The name of an Arm board ("NVIDIA Jetson Orin Nano ..."), whose /proc/cpuinfo has none."""
    path = Path("/proc/device-tree/model")
    return path.read_text("utf-8", "replace").strip("\0\n ") if path.is_file() else ""


def _clock() -> str:
    """ "up to 2900 MHz, schedutil"; "" where cpufreq does not tell, as in most virtual machines."""
    try:
        highest, governor = ((CPUFREQ / name).read_text("ascii").strip() for name in ("scaling_max_freq", "scaling_governor"))
        return f"up to {int(highest) // 1000} MHz, {governor}"
    except (OSError, ValueError):
        return ""


def _commit() -> str:
    """Of the repository of the current folder, with a + where files in it were changed since; "" outside of one."""
    git = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false")
    with suppress(OSError, subprocess.SubprocessError):
        told = [
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=GIT_S, check=True).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
        return f"{told[0]}{'+' if told[1] else ''}"
    return ""


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
