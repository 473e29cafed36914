"""Whether `vitedge bench` can be trusted on this machine: runs of the real command in, how often it was right out.

    vitedge bench, again and again  ->  ratios against their intervals, verdicts of the gate, clocks  ->  results/trust.json

    python -m benchmarks.trust [--engines focus-vits14/bf16 focus-vits14/int8] [--images DIR] [--runs 20] [--slow 10]

Runs of a copy of an engine take turns, as it is and made 5 % slower by a sleep, each in a process of its own and held against the
engine itself. Two neighbouring runs of two engines are a pair. `outside` times the same calls by another clock; `independent`
counts right answers with nothing of vitedge but the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from vitedge.bench.document import Document, Timed, load_document
from vitedge.bench.environment import environment
from vitedge.runtime.engine import find_engine
from vitedge.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
FOCUS, FASHION = (ROOT / "examples" / name / ".cache" for name in ("focus", "fashion_mnist"))
SLOWER = 0.05
COMMAND = "from vitedge.cli import main; main()"
SLEEPY = """
import sys, time
from vitedge.bench.contenders import Contender
own = Contender.run
folder, pause_s = sys.argv.pop(1), float(sys.argv.pop(1))

def run(self, count):
    answer = own(self, count)
    if str(self.folder) == folder:
        time.sleep(pause_s)
    return answer

Contender.run = run
"""
STAMPED = """
import sys, time
from vitedge.bench.latency import take_turn
from vitedge.runtime.engine import open_engine

taken_ms = []

def stamped():
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    engine.run(1)
    taken_ms.append((time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - start) / 1e6)

with open_engine(sys.argv[1]) as engine:
    samples_ms = take_turn((stamped,), 3.0).samples_ms
    counted = taken_ms[-len(samples_ms):]
    print(samples_ms.mean() / (sum(counted) / len(counted)))
"""
COUNT = """
import sys, numpy, openvino, pathlib
from PIL import Image
folder, images, labels = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3].split("|")
core = openvino.Core()
hints = {"INFERENCE_PRECISION_HINT": sys.argv[4], "PERFORMANCE_HINT": "LATENCY"}
plan, right, count = core.compile_model(core.read_model(folder / "model.xml"), "CPU", hints), 0, 0
for path in sorted(images.glob("*/*.png")):
    grey = numpy.asarray(Image.open(path).convert("L")) ^ 128
    patches = grey.reshape(7, 4, 7, 4).transpose(0, 2, 1, 3).reshape(1, 49, 16).view(numpy.int8)
    right, count = right + (labels[plan(patches)[0][0].argmax()] == path.parent.name), count + 1
print(100 * right / count)
"""
console = Console(stderr=True)


def main() -> None:
    """Run everything, and write what was found."""
    parser = argparse.ArgumentParser("python -m benchmarks.trust", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs=2, default=["focus-vits14/bf16", "focus-vits14/int8"], help="a reference and another")
    parser.add_argument("--images", type=Path, default=FOCUS / "judge")
    parser.add_argument("--runs", type=int, default=20, help="without a change")
    parser.add_argument("--slow", type=int, default=10, help="with an engine that is 5 %% slower")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", default="3")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "trust.json")
    arguments = parser.parse_args()
    reference, folder = (find_engine(Path(name)) for name in arguments.engines)
    options = ["--images", str(arguments.images), "--no-memory", "--seconds", arguments.seconds]
    with tempfile.TemporaryDirectory() as scratch:
        runs, slow = _gated(folder, options, arguments.runs, arguments.slow, Path(scratch))
        pairs = [
            _run(["bench", str(reference), str(folder), *options], Path(scratch) / f"pair{number}.json")
            for number in range(2 * arguments.pairs)
        ]
    found: dict[str, Any] = {
        "environment": environment(),
        "command": shlex.join(["vitedge", "bench", *arguments.engines, *options]),
        "pairs": _pairs(pairs),
        "false_alarms": {"runs": len(runs), "alarms": sum(one["status"] == 1 for one in runs)},
        "slowed": {"percent": 100 * SLOWER, "runs": len(slow), "caught": sum(one["status"] == 1 for one in slow)},
        "outside": [_outside(one) for one in (folder, find_engine(Path("fashion-vit/int8")))],
        "independent": _independent(),
    }
    write_json(arguments.output, found)
    console.print_json(json.dumps({key: value for key, value in found.items() if key != "environment"}))


def _gated(folder: Path, options: Sequence[str], runs: int, slow: int, scratch: Path) -> tuple[list[Any], list[Any]]:
    """Runs of a copy of an engine without and with a slow-down, in turns, against the engine."""
    copy = Path(shutil.copytree(folder, scratch / f"{folder.name}.copy"))
    gate = ["bench", str(copy), *options, "--baseline", str(folder), "--max-slower", "2%"]
    pause_s = SLOWER * _timed(_run([*gate[:-4], str(folder)], scratch / "first.json")["document"]).p50_ms / 1000
    found: tuple[list[Any], list[Any]] = [], []
    for number in range(runs + slow):
        slowed = number * slow // (runs + slow) != (number + 1) * slow // (runs + slow)
        one = _run(gate, scratch / f"{number}.json", [str(copy), str(pause_s)] if slowed else [])
        found[slowed].append(one)
        console.print(f"{number + 1:3} {'slowed' if slowed else 'same  '} {one['said']}", soft_wrap=True)
    return found


def _run(arguments: Sequence[str], output: Path, sleep: Sequence[str] = ()) -> dict[str, Any]:
    """The command in a process of its own: its exit status, what the gate said, and the document."""
    code = f"{SLEEPY}{COMMAND}" if sleep else COMMAND
    command = [sys.executable, "-c", code, *sleep, *arguments, "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, 1) or not output.exists():
        raise RuntimeError(done.stderr)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "slower than" in line]
    return {"status": done.returncode, "said": " ".join(said), "document": load_document(output)}


def _timed(document: Document) -> Timed:
    """Of the candidate that is not the reference."""
    return next(one for one in document.candidates if one.name != document.reference).timings[0]


def _pairs(runs: Sequence[Any]) -> dict[str, Any]:
    """How often the speed-up of a run lies in the interval of the one before it, and the other way round."""
    timed = [_timed(one["document"]) for one in runs]
    ratios = [(one.speedup, one.speedup_interval) for one in timed]
    pairs = list(zip(ratios[::2], ratios[1::2], strict=False))
    inside = sum(one[1].low <= two[0] <= one[1].high and two[1].low <= one[0] <= two[1].high for one, two in pairs)
    widths = [100 * math.sqrt(interval.high / interval.low) - 100 for _, interval in ratios]
    return {
        "pairs": len(pairs),
        "held": inside,
        "speedups": [ratio for ratio, _ in ratios],
        "interval_percent": median(widths),
    }


def _outside(folder: Path) -> dict[str, Any]:
    """The time of a call as a turn measures it, over that by the hardware's own clock, which nobody adjusts, around the call."""
    command = [sys.executable, "-c", STAMPED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {"engine": f"{folder.parent.name}/{folder.name.rpartition('-')[0]}", "bench_to_outside": float(done.stdout)}


def _independent() -> list[dict[str, Any]]:
    """Top-1 of the Fashion-MNIST engines by `vitedge bench`, and by OpenVINO and Pillow alone."""
    folders = [find_engine(Path(f"fashion-vit/{variant}")) for variant in ("fp32", "int8")]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["bench", *map(str, folders), "--images", str(FASHION / "test"), "--no-memory", "--seconds", "0.5"]
        document = _run(arguments, Path(scratch) / "one.json")["document"]
    found = []
    for folder, candidate in zip(folders, document.candidates, strict=True):
        hint = {"fp32": "f32", "bf16": "bf16"}[candidate.float_type]
        command = [sys.executable, "-c", COUNT, str(folder), str(FASHION / "test"), "|".join(document.labels), hint]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert candidate.judged is not None
        found.append({"engine": candidate.name, "bench": candidate.judged.top1, "script": float(done.stdout)})
    return found


if __name__ == "__main__":
    main()
