"""What TensorRT says while it works: kept, told as progress, and its errors turned into sentences with a hint.

Each class derives from one of TensorRT's, so it can be made only once that is imported: hence the functions around them.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vitedge.backends import Progress
from vitedge.errors import BuildError

HINTS = (  # what TensorRT says, and what to do about it
    (r"zero.?point", "TensorRT is symmetric: zero-points must be 0, as `vitedge quantize` writes them"),
    (r"same (input )?types?|type mismatch|strongly typed", "the graph mixes float types; `vitedge build --images` converts all"),
    (r"out of memory|OutOfMemory|MemoryAllocation", "close other programs, add swap, or set a smaller workspace_mib or batch"),
    (r"workspace", "set a larger workspace_mib in the target"),
    (r"[Cc]ould not find any implementation", "no kernel of this release fits that layer; a newer TensorRT may"),
    (
        r"no importer|Plugin not found|[Uu]nsupported|not supported",  # TensorRT looks for an unknown operator among plugins
        "a newer TensorRT may know that operator; or export the model without it",
    ),
)
OTHERWISE = "if the graph is vitedge's own, please report it"


def failure(what: str, log: Any) -> BuildError:
    """What TensorRT's last error says, in a sentence with a hint."""
    error = log.last_error()
    return BuildError(f"{what}: {sentence(error)}", hint=hint_for(error), log=log.text())


def sentence(message: str) -> str:
    """TensorRT's message without its source lines and codes."""
    if re.search(r"[Nn]o importer|Plugin not found", message):  # it looks for an operator among its plugins last
        return "that operator is unknown to it"
    text = re.sub(r"\[?[\w./]+\.(cpp|h)(::\w+)*(::\d+|:\d+)?\]?|Error Code:? \d+:?|In node -?\d+[^:]*:", "", message)
    text = re.sub(r"(?<=\(): ?\w+\] ?|\bIn \S+ at (?=\)|$)|\[: ?[\w:]+\]|\( *\)", " ", text)
    return re.sub(r"(?<=\() | (?=[).])", "", " ".join(text.split()))[:300] or "it does not say why"


def hint_for(message: str) -> str:
    """What to do about an error of TensorRT's."""
    return next((hint for pattern, hint in HINTS if re.search(pattern, message)), OTHERWISE)


def make_log(trt: Any) -> Any:
    """A logger for TensorRT."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says, with the second at which it says it."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []
            self.began = time.perf_counter()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                self.lines.append(f"{time.perf_counter() - self.began:8.2f}  {severity.name:<8}  {message.strip()}")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def note(self, message: str) -> None:
            """A remark of our own among TensorRT's."""
            self.log(trt.ILogger.WARNING, message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else ""

        def text(self) -> str:
            return "".join(f"{line}\n" for line in self.lines)

    return Log()


def make_monitor(trt: Any, progress: Progress) -> Any:
    """A monitor of a build that tells `progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns TensorRT's nested phases into one fraction, and an exception of `progress`, such as Ctrl-C, into a stop."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, list[float]] = {}  # by name, outermost first: steps in all, steps done
            self.most = 0.0
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [max(num_steps, 1), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][1] = step + 1
            try:
                progress(phase_name, self.fraction())
            except BaseException as error:  # noqa: BLE001  which must not pass through TensorRT's own frames
                self.error = self.error or error
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def fraction(self) -> float:
            """Each phase runs within one step of the phase around it; what was reached is never taken back."""
            done, width = 0.0, 1.0
            for steps, finished in self.phases.values():
                done += width * min(finished / steps, 1.0)
                width /= steps
            self.most = max(self.most, min(done, 1.0))
            return self.most

        def settle(self) -> None:
            """Raise what `progress` raised."""
            if self.error is not None:
                raise self.error

    return Monitor()


@contextmanager
def interruptible(monitor: Any) -> Iterator[None]:
    """While TensorRT builds, keep what Ctrl-C raises in `monitor`, which stops the build; None leaves Ctrl-C as it is.

    Ctrl-C raises where Python code runs, which may be the logger: TensorRT drops what that raises.
    """
    before = signal.getsignal(signal.SIGINT)
    if monitor is None or not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except BaseException as error:  # noqa: BLE001  KeyboardInterrupt, if nobody has changed that
            monitor.error = error

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def make_profiler(trt: Any) -> Any:
    """A profiler for an execution context."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Collects the milliseconds of each layer."""

        def __init__(self) -> None:
            super().__init__()
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()
