#!/bin/sh
# Everything that needs a GPU, in one call: installs, runs tests/gpu, measures, and leaves JSON in results/.
#
#     sh benchmarks/gpu_all.sh                    WHEELS=folder: a folder of wheels, where there is no package index
#
# The tests' verdicts are in results/gpu_tests.xml. What fails does not keep the rest from running; the exit status tells of it.
cd "$(dirname "$0")/.." || exit 1
status=0
make --no-print-directory gpu-ready || exit 1
mkdir -p results
.venv/bin/python -c '
import sys
from vitedge.backends.cuda import require_gpu
from vitedge.errors import VitEdgeError
try:
    print(require_gpu())
except VitEdgeError as error:
    sys.exit(f"error: {error}\nhint: {error.hint}")
' || exit 1
.venv/bin/vitedge doctor || status=1
.venv/bin/python -m pytest tests/gpu --junitxml=results/gpu_tests.xml || status=1
.venv/bin/python -m benchmarks.gpu_runtime "$@" || status=1
exit $status
