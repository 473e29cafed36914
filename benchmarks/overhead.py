"""A 1080p frame to its best labels through a Predictor, against the bare call of the same engine, in turns.

    benchmarks/classifiers.py  ->  ViT-S/14 in INT8  ->  rounds of turns  ->  results/overhead.json

    python -m benchmarks.overhead [--rounds 100] [--output results/overhead.json]

Batch 1, all cores. What is left between the two is preprocessing, the answer, and Python. Before each timed call of either a
frame is written to memory, as a camera's driver does, which is not timed. Memory is looked at after the timing, by tracemalloc
over further calls: what grows would show as bytes a call.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.classifiers import ROOT, vits
from benchmarks.cpu_latency import ratio_intervals
from vitedge.bench.environment import environment
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Timing, to_dict
from vitedge.workspace import write_json

HEIGHT, WIDTH = 1080, 1920
PICTURES = 4  # that a camera might deliver, one after the other
CALLS_A_TURN = 8
CALLS = 400  # whose memory is watched
STAGES = ("preprocess", "infer", "postprocess")
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
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "overhead.json")
    arguments = parser.parse_args()
    served, random = vits(), np.random.default_rng(0)
    pictures = [random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(PICTURES)]
    frame = Frame(pictures[0].copy(), 0, 0)
    with open_engine(served.engine) as engine:
        predictor = Predictor(engine)
        samples, timings = in_turns(engine, predictor, frame, pictures, arguments.rounds)
        memory = watched(predictor, frame)
    bare, whole = (float(np.median(times)) for times in samples)
    low, high = ratio_intervals(samples, 0)[1]
    stages = {name: float(np.median([getattr(timing, f"{name}_ms") for timing in timings])) for name in STAGES}
    document = {
        "environment": {**environment(), "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]])},
        "model": served.name, "frame": [HEIGHT, WIDTH], "rounds": arguments.rounds, "calls_per_round": CALLS_A_TURN,
        "engine_ms": bare, "frame_to_answer_ms": whole, "ratio": whole / bare, "ratio_low": low, "ratio_high": high,
        "stages_ms": stages, "memory": to_dict(memory),
    }  # fmt: skip
    write_json(arguments.output, document)
    err.print(
        f"engine {bare:.2f} ms, frame to answer {whole:.2f} ms: {whole / bare:.3f} ({low:.3f} - {high:.3f}); {stages}; {memory}"
    )


def in_turns(
    engine: Engine, predictor: Predictor, frame: Frame, pictures: Sequence[NDArray[np.uint8]], rounds: int
) -> tuple[NDArray[np.float64], list[Timing]]:
    """Milliseconds of the bare call and of the whole way, float64[2, rounds, CALLS_A_TURN], and the stages of the latter."""
    samples, timings = np.empty((2, rounds, CALLS_A_TURN)), list[Timing]()
    ways: list[Callable[[], object]] = [lambda: engine.run(1), lambda: timings.append(predictor(frame).timing)]
    for number in track(range(rounds), "timing", console=err, transient=True):
        for way in (0, 1) if number % 2 else (1, 0):
            for call in range(-1, CALLS_A_TURN):  # the first is not counted: whoever ran before had the caches
                np.copyto(frame.image, pictures[call % PICTURES])
                start = time.perf_counter_ns()
                ways[way]()
                samples[way, number, max(call, 0)] = (time.perf_counter_ns() - start) / 1e6
    return samples, timings


def watched(predictor: Predictor, frame: Frame) -> Memory:
    """What calls allocate and keep, after as many others: of what is filled once and has its bounds nothing is left to see."""
    gc.collect()
    tracemalloc.start()
    for _ in range(CALLS):
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
