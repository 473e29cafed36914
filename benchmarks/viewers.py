"""What viewers of the live page cost a camera: frames a second without any, with fifty bad ones, with a good one, with both.

    an engine and frames in memory  ->  rounds of turns, viewers in a process of their own  ->  results/viewers.json

    python -m benchmarks.viewers [--engine focus-vits14/int8] [--rounds 5] [--output results/viewers.json]

The camera is never late: frame after frame is predicted and published, so that whatever viewers take is missing from its rate.
Of the fifty, some never read, some say nothing or half a request, some send random bytes, huge headers, paths out of the
folder or come from other sites; whoever is cut off comes again within a second. They run on the same processor, so what they
themselves compute is in the rate too. The good one reads figures and pictures as the page does. `cores` is the processor time
of the threads that serve them, which other programs on the machine do not disturb as they do a rate.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from vitedge.bench.environment import environment
from vitedge.runtime.camera import open_source
from vitedge.runtime.engine import Engine, find_engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.runtime.web import WebView
from vitedge.specs import Frame
from vitedge.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "examples" / "focus" / ".cache" / "bikes.mp4"
BAD = 50
TURNS: dict[str, tuple[str, ...]] = {"none": (), "bad": ("bad",), "good": ("good",), "both": ("good", "bad")}
FRAMES = 100  # of the clip, in memory
SETTLE_S, TURN_S = 0.8, 2.0
AGAIN_S = 1.0  # after which one that was cut off comes again
HOST = "Host: localhost\r\n"
ATTACKS = (
    f"GET /stream/0 HTTP/1.1\r\n{HOST}\r\n".encode(),  # and never reads
    f"GET /live HTTP/1.1\r\n{HOST}\r\n".encode(),
    b"",
    b"GET / HTTP/1.1\r\nHost: loc",
    bytes(range(256)) * 16,
    f"GET / HTTP/1.1\r\n{HOST}X-Huge: ".encode() + b"h" * 500_000,
    f"GET /../../etc/passwd HTTP/1.1\r\n{HOST}\r\n".encode(),
    f"GET /stream/0 HTTP/1.1\r\n{HOST}Origin: https://evil.example\r\n\r\n".encode(),
    b"GET /live HTTP/1.1\r\nHost: evil.example\r\n\r\n",
)
err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """Frames a second, and how many cores were busy with viewers."""

    fps: float
    cores: float


def main() -> None:
    """Measure and write; or, started by itself, be viewers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, default=Path("focus-vits14/int8"))
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "viewers.json")
    parser.add_argument("--be", choices=("bad", "good"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be:
        view(arguments.be, urlsplit(arguments.url).port or 0)
        return
    with open_source(str(arguments.clip)) as source:
        frames = [frame for frame, _ in zip(source, range(FRAMES), strict=False)]
    with open_engine(find_engine(arguments.engine)) as engine:
        turns = in_turns(engine, frames, arguments.rounds)
        document = summary(turns, engine.manifest.card.name, engine.manifest.variant, frames[0])
    write_json(arguments.output, document)
    for name, turn in document["turns"].items():
        err.print(f"{name}: {turn['fps']:.1f} fps, {turn['ratio']:.3f} of none, {turn['cores']:.3f} cores for viewers")


def in_turns(engine: Engine, frames: Sequence[Frame], rounds: int) -> dict[str, list[Turn]]:
    """Each turn in each round."""
    predictor, endless = Predictor(engine), itertools.cycle(frames)
    turns: dict[str, list[Turn]] = {name: [] for name in TURNS}
    with WebView(["clip"], engine.manifest.card, title="benchmark", port=0) as page:
        run(predictor, page, endless, SETTLE_S)
        for number in range(rounds):
            order = list(TURNS.items())
            for name, kinds in order if number % 2 else order[::-1]:
                with contextlib.ExitStack() as stack:
                    for kind in kinds:
                        stack.enter_context(viewers(kind, page.url))
                    run(predictor, page, endless, SETTLE_S)
                    turns[name].append(run(predictor, page, endless, TURN_S))
    return turns


def run(predictor: Predictor, page: WebView, frames: Iterator[Frame], seconds: float) -> Turn:
    """Predict and publish for so long."""
    count, start, served_s = 0, time.perf_counter(), serving_s()
    while time.perf_counter() - start < seconds:
        frame = next(frames)
        frame = Frame(frame.image, frame.index, time.perf_counter_ns())
        page.publish(frame, predictor(frame), camera=0, captured=count, dropped=0)
        count += 1
    took_s = time.perf_counter() - start
    return Turn(count / took_s, (serving_s() - served_s) / took_s)


def serving_s() -> float:
    """Processor time that the threads of the live view have used."""
    serving = [thread.ident for thread in enumerate_threads() if thread.name.startswith("vitedge-")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in serving if ident)


def summary(turns: dict[str, list[Turn]], model: str, variant: str, frame: Frame) -> dict[str, Any]:
    """Medians; of each turn's rate over that without viewers in the same round also the least and the most."""
    told = {}
    for name, found in turns.items():
        ratios = [turn.fps / alone.fps for turn, alone in zip(found, turns["none"], strict=True)]
        told[name] = {
            "fps": median(turn.fps for turn in found), "cores": median(turn.cores for turn in found),
            "ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
        }  # fmt: skip
    command = shlex.join(["python", "-m", "benchmarks.viewers", *sys.argv[1:]])
    return {
        "environment": {**environment(), "command": command}, "model": model, "variant": variant, "rounds": len(turns["none"]),
        "frame": list(frame.image.shape[:2]), "bad_viewers": BAD, "turns": told,
    }  # fmt: skip


@contextlib.contextmanager
def viewers(kind: str, url: str) -> Iterator[None]:
    """A process of viewers while the block runs."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.viewers", "--be", kind, "--url", url], cwd=ROOT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def view(kind: str, port: int) -> None:
    """Be all viewers of a kind, until this process is ended."""
    threads = [Thread(target=attack, args=(port, ATTACKS[number % len(ATTACKS)])) for number in range(BAD)]
    for thread in threads if kind == "bad" else [Thread(target=watch, args=(port,))]:
        thread.start()


def attack(port: int, sent: bytes) -> None:
    """Send it, read nothing, and come again when cut off."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as opened:
            opened.sendall(sent)
            while opened.send(b"") == 0:  # what is in the way of reading is left there
                time.sleep(AGAIN_S)
                opened.sendall(b"\n")
        time.sleep(AGAIN_S)


def watch(port: int) -> None:
    """Read whatever comes, as quickly as it does."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as opened:
        opened.sendall(f"GET /live HTTP/1.1\r\n{HOST}\r\n".encode())
        while opened.recv(1 << 20):
            pass


if __name__ == "__main__":
    main()
