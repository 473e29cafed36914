"""A float ONNX model and calibration images in, ModelOpt's INT8 model out; runs in the environment that peers.py makes for it.

    float.onnx, calibration.npy  ->  modelopt.onnx.quantization.quantize  ->  model.onnx, and its cost as JSON on stdout

    python benchmarks/modelopt_peer.py float.onnx calibration.npy model.onnx '{"high_precision_dtype": "fp32"}'

The images are float32[N, C, H, W], normalised; the options are those of ModelOpt's quantize() beside its defaults. Imports
nothing of vitedge, which is not installed there.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from time import perf_counter


def main() -> None:
    """Quantize, and print seconds, peak_mib and before_mib."""
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize

    float_model, images, model, options = sys.argv[1:]
    name = onnx.load(float_model).graph.input[0].name
    data = {name: np.load(images)}
    before, started = peak_mib(), perf_counter()
    quantize(
        float_model, calibration_data=data, calibration_eps=["cpu"], output_path=model, log_level="ERROR", **json.loads(options)
    )
    cost = {"seconds": perf_counter() - started, "peak_mib": peak_mib(), "before_mib": before}
    print(json.dumps(cost))


def peak_mib() -> float:
    """The largest memory that this process has had, in MiB.

    Linux carries ru_maxrss over from the process that started this one, so it is asked only where there is no VmHWM.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
