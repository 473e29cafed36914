"""A 1080p frame to its best labels through a Predictor, against the bare call of the same engine, in turns.

    benchmarks/classifiers.py  ->  ViT-S/14 in INT8  ->  rounds of turns  ->  results/overhead.json

    python -m benchmarks.overhead [--rounds 60] [--output results/overhead.json]

Batch 1, all cores. What is left between the two is preprocessing, the answer, and Python. Memory is looked at after the
timing, by tracemalloc over further calls: what grows would show as bytes a call.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.classifiers import ROOT, vits
from benchmarks.cpu_latency import ratio_intervals, time_in_turns
from vitedge.bench.environment import environment
from vitedge.runtime.engine import open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, to_dict
from vitedge.workspace import write_json

HEIGHT, WIDTH = 1080, 1920
FRAMES = 4
CALLS = 400  # whose memory is watched
err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """What further calls leave allocated, in bytes a call, and the most that they hold at any moment."""

    kept_bytes_per_call: float
    peak_bytes: int
    calls: int = CALLS


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "overhead.json")
    arguments = parser.parse_args()
    served = vits()
    random = np.random.default_rng(0)
    # in turns, as a camera's do not lie in a cache either
    frames = itertools.cycle([Frame(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), 0, 0) for _ in range(FRAMES)])
    with open_engine(served.engine) as engine:
        predictor = Predictor(engine)
        samples, again = time_in_turns([lambda: engine.run(1), lambda: predictor(next(frames))], arguments.rounds)
        bare, whole = (float(np.median(times)) for times in samples)
        low, high = ratio_intervals(samples, 0)[1]
        stages = [predictor(next(frames)).timing for _ in track(range(100), "stages", console=err, transient=True)]
        memory = watched(predictor, next(frames))
    middle = {
        name: float(np.median([getattr(stage, f"{name}_ms") for stage in stages]))
        for name in ("preprocess", "infer", "postprocess")
    }
    document = {
        "environment": {**environment(), "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]])},
        "model": served.name, "frame": [HEIGHT, WIDTH], "rounds": arguments.rounds, "turns_taken_again": again,
        "engine_ms": bare, "frame_to_answer_ms": whole, "ratio": whole / bare, "ratio_low": low, "ratio_high": high,
        "stages_ms": middle, "memory": to_dict(memory),
    }  # fmt: skip
    write_json(arguments.output, document)
    err.print(
        f"engine {bare:.2f} ms, frame to answer {whole:.2f} ms: {whole / bare:.3f} ({low:.3f} - {high:.3f}); {middle}; {memory}"
    )


def watched(predictor: Predictor, frame: Frame) -> Memory:
    """What further calls allocate and keep."""
    gc.collect()
    tracemalloc.start()
    for _ in range(20):
        predictor(frame)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for _ in range(CALLS):
        predictor(frame)
    _, peak = tracemalloc.get_traced_memory()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Memory((after - before) / CALLS, peak - before)


if __name__ == "__main__":
    main()
