"""What a stream that runs for weeks needs around it: a clean end on SIGINT and SIGTERM, a watchdog, word of its health.

    signals, states of the sources, the time since the last frame  ->  Guard  ->  Stream.close, sentences, systemd

A thread looks after it, which signals reach also while the main thread is inside an engine. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from vitedge.runtime.live import Stream

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TICK_S = 0.25
NOTIFY_S = 1.0
ENDING_S, PER_SOURCE_S = 10.0, 2.5  # for a frame that is in the engine, and sources that hang; then the process is ended as it is
STARVED = 3  # the exit status of the watchdog
STUCK = "it does not end, and is ended as it is: an unfinished recording is lost"


class Guard:
    """Looks after a stream while the block of `with` takes its answers, in the main thread where signals are to be heard.

    On SIGINT or SIGTERM, or when no frame was `seen` for `watchdog_s`, the stream is closed, so the block ends by itself;
    `signal` and `starved` then say why. A second signal, or some seconds in vain, ends the process at once. say: is told that
    a source is lost and that it is back. tell: is told (number of the source, its state) whenever that changes.
    """

    def __init__(
        self,
        stream: Stream,
        watchdog_s: float | None = None,
        *,
        say: Callable[[str], None] = lambda _: None,
        tell: Callable[[int, str], None] = lambda *_: None,
    ) -> None:
        self.signal: int | None = None
        self.starved = False
        self._stream, self._watchdog_s, self._say, self._tell = stream, watchdog_s, say, tell
        self._states = [""] * len(stream.sources)
        self._lost_ns = [0] * len(stream.sources)
        self._seen_ns = self._told_ns = time.perf_counter_ns()
        self._ending_ns = 0
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._look, name="vitedge-guard", daemon=True)

    def seen(self) -> None:
        """A frame was answered."""
        self._seen_ns = time.perf_counter_ns()

    def __enter__(self) -> Guard:
        self._waker.setblocking(False)
        if threading.current_thread() is threading.main_thread():  # nobody else hears signals
            self._handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        notify("READY=1")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._waker.send(b"\0")
        self._thread.join()
        self._woken.close()
        self._waker.close()
        notify("STOPPING=1")

    def _look(self) -> None:
        """Wait for signals, and look around in between."""
        while True:
            heard = self._woken.recv(64) if select.select([self._woken], [], [], TICK_S)[0] else b""
            if 0 in heard:
                return
            for number in heard:
                self._hear(number)
            self._look_at_sources()
            self._look_at_clock()

    def _hear(self, number: int) -> None:
        if self._ending_ns:
            self._exit("a second signal came")
        self.signal = number
        self._end()

    def _look_at_sources(self) -> None:
        """Tell what changed."""
        for number, source in enumerate(self._stream.sources):
            state, before = source.state, self._states[number]
            if state == before:
                continue
            self._states[number] = state
            self._tell(number, state)
            if not before:
                self._lost_ns[number] = time.perf_counter_ns()
                self._say(state)
            elif not state and not self._ending_ns:
                lost_s = (time.perf_counter_ns() - self._lost_ns[number]) / 1e9
                self._say(f"{source.called} is back after {lost_s:.0f} s")

    def _look_at_clock(self) -> None:
        now = time.perf_counter_ns()
        if self._ending_ns:
            if now - self._ending_ns > (ENDING_S + PER_SOURCE_S * len(self._states)) * 1e9:
                self._exit("the engine or a source hangs")
            return
        if self._watchdog_s is not None and now - self._seen_ns > self._watchdog_s * 1e9:
            self.starved = True
            self._say(f"no frame was seen for {self._watchdog_s:g} s")
            self._end()
        elif now - self._told_ns > NOTIFY_S * 1e9 and (self._seen_ns > self._told_ns or any(self._states)):
            self._told_ns = now  # a source that says that it is lost is looked after; one that hangs says nothing
            notify("WATCHDOG=1")

    def _end(self) -> None:
        self._ending_ns = time.perf_counter_ns()
        threading.Thread(target=self._stream.close, name="vitedge-end", daemon=True).start()

    def _exit(self, why: str) -> None:
        self._say(f"{why}: {STUCK}")
        os._exit(STARVED if self.starved else 128 + (self.signal or 0))


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Have SIGINT end the process without a word, as SIGTERM does: Python's own handler waits for code that may hang."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def notify(message: str) -> None:
    """Tell systemd, where it started this process as a service of Type=notify (sd_notify(3)); nothing elsewhere."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages:
        messages.sendto(message.encode(), f"\0{path[1:]}" if path.startswith("@") else path)


def _nothing(number: int, frame: FrameType | None) -> None:
    """What the interpreter does on a signal; the byte that it writes besides is what is heard."""
