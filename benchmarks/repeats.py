"""The same benchmark again and again: do its intervals hold, and does its gate stop what it should and nothing else?

    vitedge bench, run after run, a process each  ->  pairs of runs within each other's interval of the ratio
    ... held against the first                    ->  false alarms, and of runs slowed down by a sleep, those caught

    python -m benchmarks.repeats ENGINE ENGINE --images DIR [--runs 10] [--seconds 5] [--slow 5] [--limit 2] [--output FILE]

The first engine is the reference, the second is slowed down.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitedge.bench.document import Document, Timed, load_document
from vitedge.bench.environment import environment
from vitedge.workspace import write_json

# In the process that measures: each call of the second contender takes so many percent longer, in a sleep but for its last
# part, since a sleep ends late.
CHILD = """
import sys, time
from vitedge.bench import run
from vitedge.cli import main

slow = float(sys.argv.pop(1)) / 100
lane = run._lane

def slowed(contender, batch, setting):
    made = lane(contender, batch, setting)
    if not slow or contender.name != names[1]:
        return made
    (call,) = made.calls
    usual = []
    def longer():
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        usual.append(taken)
        end = start + taken + slow * sorted(usual[-99:])[len(usual[-99:]) // 2]
        if (left := end - time.perf_counter() - 2e-4) > 0:
            time.sleep(left)
        while time.perf_counter() < end:
            pass
    return run.Lane(made.name, (longer,), batch)

benchmark = run._Timer.time

def timed(self):
    names[:] = [entry.name for entry in self._entries]
    return benchmark(self)

names = []
run._lane, run._Timer.time = slowed, timed
sys.argv[0] = "vitedge"
main()
"""


def main() -> None:
    """Measure, print what was found, and write it."""
    parser = argparse.ArgumentParser("python -m benchmarks.repeats", description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs=2)
    parser.add_argument("--images", required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--slow", type=float, default=5.0, help="percent")
    parser.add_argument("--limit", type=float, default=2.0, help="percent, of --max-slower")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(*(f"{name}: {value}" for name, value in found.items() if not isinstance(value, list)), sep="\n")
    if options.output:
        command = shlex.join(["python", "-m", "benchmarks.repeats", *sys.argv[1:]])
        write_json(options.output, {"environment": {**environment(), "command": command}, **found})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run after run; what is said of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.json"
        run(options, base, ())
        against = ("--baseline", base, "--max-slower", options.limit, "--max-drop", 100)
        same = [run(options, Path(folder) / f"{number}.json", against) for number in range(options.runs)]
        slow = [run(options, Path(folder) / f"slow{number}.json", against, options.slow) for number in range(options.runs)]
        timed = [ratio(load_document(base)), *(ratio(load_document(path)) for path, _ in same)]
    pairs = list(itertools.combinations(timed, 2))
    return {
        "runs": len(timed),
        "pairs within each other's interval": sum(holds(*pair) for pair in pairs) / len(pairs),
        "pairs one after the other": sum(map(holds, *zip(*itertools.pairwise(timed), strict=True))) / (len(timed) - 1),
        "false alarms": f"{sum(alarm for _, alarm in same)} of {len(same)}",
        "caught": f"{sum(alarm for _, alarm in slow)} of {len(slow)}",
        "ratios": [[one.speedup, one.speedup_interval.low, one.speedup_interval.high] for one in timed if one.speedup_interval],
        "disturbed": [one.disturbed / len(one.rounds_ms) for one in timed],
    }


def run(options: argparse.Namespace, path: Path, extra: tuple[object, ...], slow: float = 0.0) -> tuple[Path, bool]:
    """One run in a process of its own; the document, and whether the gate stopped it."""
    command = [sys.executable, "-c", CHILD, slow, "bench", *options.engines, "--images", options.images, "--no-memory"]
    command += ["--seconds", options.seconds, "--json", path, *extra]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    stopped = "that --max-slower allows" in done.stderr
    if done.returncode != int(stopped) or not path.is_file():
        sys.exit(done.stderr)
    sys.stderr.write(f"{path.name}: {'stopped' if stopped else 'passed'}\n")
    return path, stopped


def ratio(document: Document) -> Timed:
    """How the second engine did."""
    return document.candidates[1].timings[0]


def holds(one: Timed, other: Timed) -> bool:
    """Whether each ratio lies within the other's interval."""
    return all(
        b.speedup_interval is not None and b.speedup_interval.low <= (a.speedup or 0) <= b.speedup_interval.high
        for a, b in ((one, other), (other, one))
    )


if __name__ == "__main__":
    main()
