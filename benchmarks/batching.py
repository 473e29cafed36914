"""Frames that arrive when they like, through a Batcher: throughput when flooded, latency under load, and every answer checked.

    benchmarks/classifiers.py  ->  engine and pictures  ->  static batches, a flood, Poisson arrivals  ->  results/batching.json

    python -m benchmarks.batching [--model fashion] [--seconds 6] [--output results/batching.json]

The static rate is that of batches of a fixed size, through as many predictors as the engine has streams: no queue, no
waiting, the same preprocessing and answers. Capacity is what the batcher answers when it is flooded, and the loads are parts
of that. Arrivals are open-loop: they do not wait for answers, and a latency counts from
the moment at which a frame was due, so that a stall is charged to all that it delays. Beside each 99th percentile stands that
of an ideal server with the same times for each batch size and the same arrivals, that costs nothing itself: the least that
queueing theory leaves. Memory is the process's resident set.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.classifiers import MODELS, ROOT, Served
from vitedge.bench.environment import environment
from vitedge.errors import QueueFullError
from vitedge.runtime.batcher import Batcher
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Prediction
from vitedge.workspace import write_json

SIZES = (1, 2, 4, 8, 16)
ROUNDS = 4  # of static batches and floods, in turns
STREAMS = (1, 4, 16)
LOADS = (0.2, 0.5, 0.7, 0.9, 1.2)
DELAY_MS = 2.0
QUEUE = 64
LEAD_IN_S = 0.5  # of a flood, in which lanes and queue fill
BATCH_S = 0.005  # within which the answers of one batch come
STATM = Path("/proc/self/statm")
err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Bench:
    """An open engine, the frames that are sent, and the answers that they get one at a time, float32[frames, ...]."""

    engine: Engine
    frames: list[Frame]
    answers: NDArray[np.float32]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--seconds", type=float, default=6.0, help="of arrivals at each load")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "batching.json")
    arguments = parser.parse_args()
    models = [measure(MODELS[name](), arguments.seconds) for name in arguments.model or MODELS]
    command = shlex.join(["python", "-m", "benchmarks.batching", *sys.argv[1:]])
    document = {"environment": {**environment(), "command": command}, "max_delay_ms": DELAY_MS, "queue": QUEUE, "models": models}
    write_json(arguments.output, document)
    err.print(f"{arguments.output}: written")


def measure(served: Served, seconds: float) -> dict[str, Any]:
    """All figures of one model."""
    with open_engine(served.engine, streams=0) as engine:
        bench = prepare(engine, served)
        gc.collect()
        gc.freeze()  # torch, which made the model and serves nobody, would make each collection a pause of 50 ms
        static, flooded = in_turns(bench, seconds / 2)
        best = max(static, key=lambda size: static[size])
        capacity = flooded
        times = batch_times(bench)
        unloaded = unloaded_latency(bench)
        err.print(f"{served.name}: {engine.streams} streams, static {static}, flooded {flooded:.1f}, unloaded {unloaded}")
        loads = [loaded(bench, streams, load, capacity, seconds, times) for streams in STREAMS for load in LOADS]
    return {
        "model": served.name, "streams": engine.streams, "static_per_s": {str(size): rate for size, rate in static.items()},
        "capacity_per_s": flooded, "best_batch": best, "capacity_of_static": flooded / static[best],
        "unloaded_p50_ms": unloaded[0], "unloaded_p99_ms": unloaded[1],
        "batch_ms": {str(size): float(ms) for size, ms in times.items()}, "loads": loads,
    }  # fmt: skip


def prepare(engine: Engine, served: Served) -> Bench:
    """The frames, and what each is answered alone."""
    frames = [Frame(picture, index, 0) for index, picture in enumerate(served.pictures)]
    predictor = Predictor(engine)
    return Bench(engine, frames, np.stack([predictor(frame).array for frame in frames]))


def in_turns(bench: Bench, seconds: float) -> tuple[dict[int, float], float]:
    """Images a second of static batches of each size, and of a flooded batcher: medians of ROUNDS turns."""
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    flooded: list[float] = []
    forks = [bench.engine.fork() for _ in range(bench.engine.streams)]
    with Batcher(bench.engine, max_delay_ms=DELAY_MS, queue=QUEUE) as batcher:
        for _ in range(ROUNDS):
            for size in SIZES:
                rates[size].append(static_rate([Predictor(fork) for fork in forks], bench.frames[:size], seconds))
            flooded.append(flood_rate(batcher, bench.frames, seconds))
    for fork in forks:
        fork.close()
    return {size: float(np.median(found)) for size, found in rates.items()}, float(np.median(flooded))


def static_rate(predictors: Sequence[Predictor], frames: list[Frame], seconds: float) -> float:
    """Images a second of predictors that each take the same batch over and over, in a thread of its own."""
    done: list[float] = []

    def work(predictor: Predictor) -> None:
        predictor.predict_batch(frames)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            predictor.predict_batch(frames)
            count += len(frames)
        done.append(count / (time.perf_counter() - start))

    threads = [threading.Thread(target=work, args=(predictor,)) for predictor in predictors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def flood_rate(batcher: Batcher, frames: list[Frame], seconds: float) -> float:
    """Images a second of a batcher whose queue is never empty: from answer to answer, without how it fills and empties."""
    start, answered = time.perf_counter(), list[float]()
    futures = []
    while time.perf_counter() - start < LEAD_IN_S + seconds:
        future = batcher.submit(frames[len(futures) % len(frames)])
        future.add_done_callback(lambda _: answered.append(time.perf_counter()))
        futures.append(future)
    end = time.perf_counter()
    for future in futures:
        future.result()
    steady = [moment for moment in sorted(answered) if start + LEAD_IN_S <= moment <= end]
    return sum(moment > steady[0] + BATCH_S for moment in steady) / (steady[-1] - steady[0])


def batch_times(bench: Bench) -> dict[int, float]:
    """Milliseconds of a batch of each size, preprocessing and answers included, while all streams are busy."""
    forks = [bench.engine.fork() for _ in range(bench.engine.streams)]
    predictors = [Predictor(fork) for fork in forks]
    rates = {size: static_rate(predictors, bench.frames[:size], 0.5) for size in range(1, max(SIZES) + 1)}
    for fork in forks:
        fork.close()
    return {size: 1000 * size * len(forks) / rate for size, rate in rates.items()}


def unloaded_latency(bench: Bench, calls: int = 200) -> tuple[float, float]:
    """Milliseconds from submitting to the answer, one request after the other, with no delay: median and 99th percentile."""
    times = []
    with Batcher(bench.engine) as batcher:
        for call in range(calls):
            start = time.perf_counter()
            batcher.submit(bench.frames[call % len(bench.frames)]).result()
            times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times)), float(np.percentile(times, 99))


def loaded(
    bench: Bench, streams: int, load: float, capacity: float, seconds: float, times: Mapping[int, float]
) -> dict[str, Any]:
    """What becomes of Poisson arrivals of so many streams at a part of capacity."""
    arrivals = [poisson(load * capacity / streams, seconds, seed=streams * 100 + number) for number in range(streams)]
    before = resident_mib()
    with Batcher(bench.engine, max_delay_ms=DELAY_MS, queue=QUEUE, policy="reject") as batcher:
        start = time.perf_counter() + 0.05
        clients = [Client(number, batcher, bench, start, due) for number, due in enumerate(arrivals)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        grown = resident_mib() - before
    for client in clients:  # now that the batcher's threads have ended, all that it said has been noted
        client.check()
    counts = batcher.counts()
    latencies = np.array([latency for client in clients for latency in client.latencies_ms])
    offered = sum(map(len, arrivals))
    wrong = sum(client.wrong for client in clients)
    lost = offered - counts.rejected - len(latencies) - wrong
    low, middle, high = np.percentile(latencies, [50, 90, 99])
    ideal = ideal_latencies(np.sort(np.concatenate(arrivals)), times, bench.engine.streams)
    row = {
        "callers": streams, "load": load, "offered": offered, "answered": len(latencies), "rejected": counts.rejected,
        "wrong": wrong, "lost": lost, "p50_ms": float(low), "p90_ms": float(middle), "p99_ms": float(high),
        "ideal_p99_ms": float(np.percentile(ideal, 99)), "batch": counts.rows / max(counts.batches, 1),
        "rate_per_s": len(latencies) / seconds, "grown_mib": grown,
        "shares": jain([len(client.latencies_ms) / max(len(due), 1) for client, due in zip(clients, arrivals, strict=True)]),
    }  # fmt: skip
    err.print({key: round(value, 3) for key, value in row.items()})
    return row


class Client(threading.Thread):
    """One stream of frames: sends each when it is due, whatever became of those before."""

    def __init__(self, number: int, batcher: Batcher, bench: Bench, start: float, due: NDArray[np.float64]) -> None:
        super().__init__()
        self.number, self.batcher, self.bench, self.begin, self.due = number, batcher, bench, start, due
        self.latencies_ms: list[float] = []
        self.wrong = 0
        self.answers: list[tuple[int, float, Prediction]] = []

    def run(self) -> None:
        futures = []
        for index, offset in enumerate(self.due):
            moment = self.begin + offset
            if (wait := moment - time.perf_counter()) > 0:
                time.sleep(wait)
            frame = self.bench.frames[(index * 7 + self.number) % len(self.bench.frames)]
            try:
                future = self.batcher.submit(frame, stream=self.number)
            except QueueFullError:
                continue
            future.add_done_callback(lambda done, frame=frame, moment=moment: self.note(frame.index, moment, done.result()))
            futures.append(future)
        for future in futures:
            future.result()

    def note(self, index: int, moment: float, prediction: Prediction) -> None:
        self.answers.append((index, (time.perf_counter() - moment) * 1000, prediction))

    def check(self) -> None:
        """Each answer must be nearer to that of its own frame than to any other."""
        for index, latency, prediction in self.answers:
            distances = np.square(self.bench.answers - prediction.array).sum(axis=1)
            if distances.argmin() == index:
                self.latencies_ms.append(latency)
            else:
                self.wrong += 1


def poisson(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """The times of arrivals, float64[arrivals] in seconds from the start."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, int(rate * seconds * 2) + 20)
    times = np.cumsum(gaps)
    return times[times < seconds]


def ideal_latencies(due: NDArray[np.float64], times: Mapping[int, float], servers: int) -> NDArray[np.float64]:
    """Milliseconds of each arrival at servers that take all that wait, up to the largest batch, as soon as one is free."""
    free, latencies, first = [0.0] * servers, np.empty(len(due)), 0
    while first < len(due):
        begin = max(heapq.heappop(free), due[first])
        count = min(int(np.searchsorted(due, begin, side="right")) - first, max(times))
        end = begin + times[count] / 1000
        latencies[first : first + count] = (end - due[first : first + count]) * 1000
        heapq.heappush(free, end)
        first += count
    return latencies


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all streams get the same share of what they sent."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def resident_mib() -> float:
    """Memory of this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
