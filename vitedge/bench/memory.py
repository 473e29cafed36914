"""A contender in, the memory that it takes out: of a process of its own, at most, beyond one that opens nothing.

    Origin  ->  python -m vitedge.bench.memory  ->  VmHWM of that process  -  VmHWM of one without it  ->  MiB

The runtime's own libraries count, since a device has to hold them, the interpreter and numpy do not. What a GPU holds is not
seen. Linux alone tells.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vitedge
from vitedge.bench.contenders import Origin, open_contenders
from vitedge.errors import VitEdgeError, first_line
from vitedge.specs import from_dict, to_dict

STATUS = Path("/proc/self/status")
CALLS = 3  # by when what is allocated at first use is there
PATIENCE_S = 600.0  # torch.compile takes minutes


def peak_mib(origin: Origin | None, batch: int = 1) -> float | None:
    """The most memory, in MiB, of a process that opens `origin` and runs it at `batch`; None: one that opens nothing.

    None where the system does not tell. A VitEdgeError where the process fails.
    """
    if not STATUS.is_file():
        return None
    root = str(Path(vitedge.__file__).parents[1])  # this vitedge, wherever the process would find another
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    asked = json.dumps([to_dict(origin) if origin else None, batch])
    command = [sys.executable, "-m", "vitedge.bench.memory", asked]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise VitEdgeError(f"the process that tells its memory took longer than {PATIENCE_S:g} s") from error
    lines = done.stdout.split()
    if done.returncode or not lines:
        raise VitEdgeError(f"the process that tells its memory failed: {done.stderr.strip().rpartition(os.linesep)[2]}")
    return float(lines[-1])


def main() -> None:
    """In that process: open, run, and print what it took."""
    data, batch = json.loads(sys.argv[1])
    try:
        if data is not None:
            _run(from_dict(Origin, data), batch)
    except Exception as error:  # noqa: BLE001  a runtime may raise anything; the other process says it
        sys.exit(first_line(error))
    print(_high_water_mib())


def _run(origin: Origin, batch: int) -> None:
    checkpoint, preprocess = (Path(file) if file else None for file in (origin.checkpoint, origin.preprocess))
    name = f"{origin.given}@{origin.runtime}"
    with open_contenders([name], checkpoint, preprocess, max_batch=origin.max_batch) as (contender,):
        for _ in range(CALLS):
            contender.run(batch)


def _high_water_mib() -> float:
    """VmHWM: the most that this process had in memory, in MiB. (ru_maxrss would tell what its parent had, too.)"""
    (line,) = (line for line in STATUS.read_text("ascii", "replace").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
