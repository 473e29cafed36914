"""Whether `vitedge bench` can be trusted on this machine: runs of the real command in, how often it was right out.

    vitedge bench, again and again  ->  ratios against their intervals, verdicts of the gate, clocks  ->  results/trust.json

    python -m benchmarks.trust [--engines focus-vits14/fp32 focus-vits14/int8] [--images DIR] [--runs 20] [--slow 10]

Runs without a change and runs of an engine that a sleep makes 5 % slower take turns, each in a process of its own and each held
against one baseline of before. Two neighbouring runs without a change are a pair. `outside` times a loop of calls by the clock
of another process; `independent` counts right answers with nothing of vitedge but the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
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
LOOP = """
import sys
from vitedge.runtime.engine import open_engine
with open_engine(sys.argv[1]) as engine:
    for line in sys.stdin:
        for _ in range(int(line)):
            engine.run(1)
        print("done", flush=True)
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
    parser.add_argument("--engines", nargs=2, default=["focus-vits14/fp32", "focus-vits14/int8"], help="a reference and another")
    parser.add_argument("--images", type=Path, default=FOCUS / "judge")
    parser.add_argument("--runs", type=int, default=20, help="without a change")
    parser.add_argument("--slow", type=int, default=10, help="with an engine that is 5 %% slower")
    parser.add_argument("--seconds", default="3")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "trust.json")
    arguments = parser.parse_args()
    reference, folder = (find_engine(Path(name)) for name in arguments.engines)
    bench = ["bench", *map(str, (reference, folder)), "--images", str(arguments.images), "--no-memory"]
    bench += ["--seconds", arguments.seconds]
    with tempfile.TemporaryDirectory() as scratch:
        runs, slow = _gated(bench, folder, arguments.runs, arguments.slow, Path(scratch))
    found: dict[str, Any] = {
        "environment": environment(),
        "command": shlex.join(["vitedge", "bench", *arguments.engines, *bench[3:]]),
        "pairs": _pairs(runs),
        "false_alarms": {"runs": len(runs), "alarms": sum(one["status"] == 1 for one in runs)},
        "slowed": {"percent": 100 * SLOWER, "runs": len(slow), "caught": sum(one["status"] == 1 for one in slow)},
        "outside": [_outside(one) for one in (folder, find_engine(Path("fashion-vit/int8")))],
        "independent": _independent(),
    }
    write_json(arguments.output, found)
    console.print_json(json.dumps({key: value for key, value in found.items() if key != "environment"}))


def _gated(bench: Sequence[str], folder: Path, runs: int, slow: int, scratch: Path) -> tuple[list[Any], list[Any]]:
    """Runs without and with a slow-down in turns, against one baseline."""
    baseline = scratch / "base.json"
    document = _run(bench, baseline)["document"]
    pause_s = SLOWER * _timed(document).p50_ms / 1000
    gate = ["--baseline", str(baseline), "--max-slower", "2%"]
    found: tuple[list[Any], list[Any]] = [], []
    for number in range(runs + slow):
        slowed = number * slow // (runs + slow) != (number + 1) * slow // (runs + slow)
        sleep = [str(folder), str(pause_s)] if slowed else []
        one = _run([*bench, *gate], scratch / f"{number}.json", sleep)
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
        "each_in_the_other's": inside,
        "speedups": [ratio for ratio, _ in ratios],
        "interval_percent": median(widths),
    }


def _outside(folder: Path, rounds: int = 8, seconds: float = 1.0) -> dict[str, Any]:
    """The mean time of a call by `vitedge bench`, and by a clock around the loop of another process, in turns."""
    ratios = []
    with subprocess.Popen(
        [sys.executable, "-c", LOOP, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as loop:
        _loop_ms(loop, 50)
        count = max(20, int(seconds * 1000 / _loop_ms(loop, 50)))
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as scratch:
                arguments = ["bench", str(folder), "--images", str(FOCUS / "judge"), "--no-memory", "--seconds", str(seconds)]
                timed = _run(arguments, Path(scratch) / "one.json")["document"].candidates[0].timings[0]
            ratios.append(1000 / timed.images_per_s / _loop_ms(loop, count))
        loop.communicate()
    return {"engine": folder.name, "model": folder.parent.name, "bench_to_outside": median(ratios), "all": ratios}


def _loop_ms(loop: subprocess.Popen[str], count: int) -> float:
    assert loop.stdin and loop.stdout
    start = time.monotonic()
    print(count, file=loop.stdin, flush=True)
    loop.stdout.readline()
    return 1000 * (time.monotonic() - start) / count


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
