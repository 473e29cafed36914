"""What the benchmark of the GPU's runtime does before it needs a GPU; tests/driver tries the rest on a driver without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_runtime import peaks_here, slug
from tests.engines import ROOT
from vitedge.backends import cuda

no_gpu = pytest.mark.skipif(cuda.find_gpu() is not None, reason="there is a GPU here")


@no_gpu
def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_runtime"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")


@no_gpu
def test_the_script_stops_before_the_tests_where_there_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "benchmarks" / "gpu_all.sh").write_bytes((ROOT / "benchmarks" / "gpu_all.sh").read_bytes())
    (tmp_path / "Makefile").write_text("gpu-ready:\n\t@echo ready\n", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MAKELEVEL": "1"}  # as below make test
    command = ["sh", str(tmp_path / "benchmarks" / "gpu_all.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "ready\n"
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_the_roofline_is_that_of_the_target_that_fits() -> None:
    peaks, which = peaks_here(cuda.Gpu("NVIDIA H100 80GB HBM3", "9.0", "13.0", 81559))
    assert peaks and peaks.tops["int8"] == 1979.0 and which == "those of the target h100"
    assert peaks_here(cuda.Gpu("Tesla T4", "7.5", "12.4", 15000))[0] is None
    assert slug("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"
