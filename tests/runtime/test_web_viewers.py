"""Fifty viewers that are slow, dead or malicious get nothing they should not, cost nothing that lasts, and harm no other."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.web import Publisher, answer, ask, card_of, connect, frame_of, frames_of, publishing, request
from vitedge.runtime import web_server
from vitedge.runtime.web import WebView
from vitedge.runtime.web_viewers import FIGURES

pytest.importorskip("cv2")
web_guard = pytest.importorskip("vitedge.runtime.web_guard")

LARGE = (720, 1280)  # of frames, so that a few pictures fill the buffers of a viewer that does not read


def never_reads(view: WebView) -> socket.socket:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(10)
    opened.connect(("127.0.0.1", int(view.url.rpartition(":")[2].rstrip("/"))))
    opened.sendall(request("/stream/0"))
    return opened


def never_reads_and_babbles(view: WebView) -> socket.socket:
    opened = never_reads(view)
    opened.sendall(b"x" * 2000)
    return opened


SENT: tuple[bytes, ...] = (
    b"",  # half-open
    b"GET /live HTTP/1.1\r\nHost: localh",
    bytes(range(256)) * 8,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Huge: " + b"h" * 1_000_000,
    request("/../../../../etc/passwd"),
    request("/stream/..%2f..%2fetc%2fpasswd"),
    request("/stream/0", "Origin: https://evil.example"),
    request("/live", "Sec-Fetch-Site: cross-site"),
    request("/live").replace(b"localhost", b"evil.example"),
)
ALLOWED = (b"400", b"403", b"404")


def attack(view: WebView, number: int) -> socket.socket:
    """The `number`-th of them, by turns of every kind."""
    kinds: list[Callable[[WebView], socket.socket]] = [never_reads, never_reads_and_babbles, never_reads]
    choice = number % (len(kinds) + len(SENT))
    if choice < len(kinds):
        return kinds[choice](view)
    opened = connect(view)
    with contextlib.suppress(ConnectionError):  # some are cut off while they send
        opened.sendall(SENT[choice - len(kinds)])
    return opened


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  pathlib opens one more


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def view() -> Iterator[WebView]:
    with WebView(["cam"], card_of(), title="t", port=0) as opened:
        yield opened


class LargePublisher(Publisher):
    """Frames of LARGE, each of noise, which makes large pictures."""

    def _run(self, camera: int) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (8, *LARGE, 3), np.uint8)
        while not self._end.wait(1 / self.rate):
            count = self.counts[camera] + 1
            frame = frame_of(count)
            frame = type(frame)(noise[count % 8], frame.index, frame.captured_ns)
            began = time.perf_counter()
            self.view.publish(frame, answer(), camera=camera, captured=count, dropped=0)
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            self.counts[camera] = count


@pytest.mark.skipif(sys.platform != "linux", reason="counts handles and memory as Linux tells them")
def test_fifty_bad_viewers_get_nothing_and_leave_nothing(
    view: WebView, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web_guard, "SEND_S", 2.0)
    monkeypatch.setattr(web_guard, "REQUEST_S", 2.0)
    publisher = LargePublisher(view)
    good = frames_of(view)
    assert any(camera == 0 for camera, _ in itertools.islice(good, 20))  # what is needed once is loaded
    time.sleep(0.5)
    threads, before_handles, before_mib = threading.active_count(), handles(), resident_mib()
    bad = [attack(view, number) for number in range(50)]
    end, pictures = time.perf_counter() + 3.0, 0
    while time.perf_counter() < end:
        camera, _ = next(good)
        pictures += camera != FIGURES
        assert threading.active_count() <= threads, threading.enumerate()
    assert pictures >= 5  # a good viewer goes on, and another is let in
    assert ask(view, "/api/latest").json()["cameras"][0]["processed"] > 20
    newcomer = frames_of(view)
    assert any(camera == 0 for camera, _ in itertools.islice(newcomer, 30))
    assert publisher.longest_s < 1.0  # nobody waits for a viewer
    said = [all_of(opened) for opened in bad]
    for text in said:
        heads = [part.split(b" ")[0] for part in text.split(b"HTTP/1.1 ")[1:]]
        assert b"root:" not in text
        assert all(head in (*ALLOWED, b"200", b"503") for head in heads), heads
        if b"200" in heads:
            assert b"multipart/x-mixed-replace" in text
    assert sum(b" 403 " in text for text in said) >= 9 and sum(b" 404 " in text for text in said) >= 6
    for stream in (newcomer, good):
        stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: ask(view, "/metrics").body.rstrip().endswith(b"vitedge_viewers 0"))
    wait_until(lambda: handles() <= before_handles)
    assert resident_mib() < before_mib + 64
    publisher.close()
    assert capfd.readouterr().err == ""


def all_of(opened: socket.socket) -> bytes:
    """What a viewer was sent until it was cut off; it must have been."""
    opened.settimeout(15)
    parts = []
    with opened, contextlib.suppress(ConnectionError):
        while part := opened.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not holds():
        assert time.perf_counter() < end, "it did not come about"
        time.sleep(0.1)


def test_who_asks_nothing_or_slowly_is_cut_off(view: WebView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "REQUEST_S", 0.6)
    silent, slow = connect(view), connect(view)
    began = time.perf_counter()
    with silent, slow, contextlib.suppress(ConnectionError):
        while time.perf_counter() < began + 5:
            slow.sendall(b"X")  # a letter now and then gains no time
            time.sleep(0.1)
    assert time.perf_counter() - began < 3


def test_who_does_not_read_is_dropped_also_after_a_short_answer(view: WebView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "SEND_S", 0.8)
    with publishing(view):
        dead = [never_reads(view) for _ in range(3)]
        wait_until(lambda: b"vitedge_viewers 3" in ask(view, "/metrics").body)
        for _ in range(60):
            frame = frame_of(0, *LARGE)
            view.publish(frame, answer(), camera=0, captured=1, dropped=0)
            time.sleep(0.03)
        wait_until(lambda: b"vitedge_viewers 0" in ask(view, "/metrics").body)
    for opened in dead:
        opened.close()


def test_pictures_are_not_made_for_who_does_not_take_them(view: WebView) -> None:
    publisher = LargePublisher(view)
    dead = [never_reads(view) for _ in range(3)]
    wait_until(lambda: b"vitedge_viewers 3" in ask(view, "/metrics").body)
    time.sleep(2.5)  # their buffers are full by now
    made: list[object] = []
    encoded = view._pictures._encoded
    view._pictures._encoded = lambda feed, offer: made.append(feed) or encoded(feed, offer)  # type: ignore[method-assign, func-returns-value]
    time.sleep(1.0)
    assert len(made) <= 2
    publisher.close()
    for opened in dead:
        opened.close()


def test_one_more_viewer_than_there_is_room_for_is_told_so_unless_another_sleeps(
    view: WebView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "MOST_VIEWERS", 2)
    monkeypatch.setattr(web_server, "STALLED_S", 0.3)
    publisher = LargePublisher(view)
    good, dead = frames_of(view), never_reads(view)
    next(good)
    found = ask(view, "/live")
    assert found.status == 503 and found.headers["retry-after"] == "5"
    time.sleep(2.0)
    another = frames_of(view)  # in place of the one that does not read
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        next(another)
        next(good)
    publisher.close()
    dead.close()
    for stream in (good, another):
        stream.close()  # type: ignore[attr-defined]


def test_idle_connections_give_way_to_new_ones(view: WebView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "MOST_CONNECTIONS", 8)
    idle = [connect(view) for _ in range(30)]
    assert ask(view, "/healthz").status == 200
    open_ones = len(view._site._server.server_state.connections)
    assert open_ones <= 8
    for opened in idle:
        opened.close()


def test_a_flood_of_requests_waits_for_its_turn(view: WebView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "BURST", 5)
    monkeypatch.setattr(web_guard, "REQUESTS_PER_S", 20)
    time.sleep(0.5)
    began = time.perf_counter()
    flood = [connect(view, request("/healthz")) for _ in range(25)]
    for opened in flood:
        with opened:
            assert opened.recv(100).startswith(b"HTTP/1.1 200")
    assert time.perf_counter() - began >= 0.8  # twenty of them at twenty a second


def test_a_slow_viewer_is_shown_what_is_newest_and_not_what_it_missed(view: WebView) -> None:
    """It reads nothing for two seconds, then finds a few old pictures in its buffers, and after those the present."""
    publisher = LargePublisher(view, rate=40)
    slow = frames_of(view)
    for _ in range(5):
        next(slow)
    time.sleep(2.0)
    lags = []
    for camera, data in itertools.islice(slow, 60):
        if camera == FIGURES:
            lags.append(publisher.counts[0] - json.loads(data)["cameras"][0]["processed"])
    assert lags[-1] <= 20
    publisher.close()
    slow.close()  # type: ignore[attr-defined]
