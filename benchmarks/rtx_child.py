"""An ONNX file of vitedge in, TensorRT-RTX's engine for a GPU that need not be here out, in a process of its own.

    model.onnx, "8.6", folder  ->  vitedge.backends.build  ->  folder/MODEL/VARIANT-KEY/, and its cost as JSON on stdout

    python -m benchmarks.rtx_child model.onnx 8.6 folder

A process of its own, so that its peak of memory is that of one build: neither torch nor onnx is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, process_time

from benchmarks.modelopt_peer import peak_mib
from vitedge.backends.build import prepare_build, run_build
from vitedge.errors import VitEdgeError
from vitedge.specs import Target


def main() -> None:
    """Build, and print seconds, those of the processor, peak_mib, before_mib (with TensorRT-RTX loaded) and size_mib."""
    onnx, capability, folder = sys.argv[1:]
    target = Target(f"sm{capability.replace('.', '')}", "tensorrt-rtx", capability=capability)
    build = prepare_build(Path(onnx), target, Path(folder))
    before, started, busy = peak_mib(), perf_counter(), process_time()
    run_build(build)
    cost = {"seconds": perf_counter() - started, "cpu_seconds": process_time() - busy}
    size = sum((build.folder / name).stat().st_size for name in build.backend.PLAN)
    print(json.dumps({**cost, "peak_mib": peak_mib(), "before_mib": before, "size_mib": size / 2**20}))


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"{error}")
