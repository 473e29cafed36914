"""Streams over a real network, the loopback: HTTP from a small server, RTSP from GStreamer's, which is killed and comes back.

The RTSP server is Debian's (gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-{base,good,bad}), in the system's
Python. It serves bikes.mp4, which examples/focus/fetch.py downloads.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from tests.engines import ROOT
from vitedge.errors import VitEdgeError
from vitedge.runtime.camera import CameraOptions, Source, burnt_in_number, open_source
from vitedge.runtime.opencv import FFMPEG_OPTIONS, OPTIONS, load_cv2
from vitedge.runtime.synthetic import TestPattern

pytest.importorskip("cv2")
cv2 = load_cv2()

BIKES = ROOT / "examples" / "focus" / ".cache" / "bikes.mp4"
SERVER = Path(__file__).with_name("rtsp_server.py")
PYTHON = "/usr/bin/python3"  # the system's, for which Debian's bindings are
BINDINGS = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
FRAME_S = 0.02


class Camera(socketserver.ThreadingTCPServer):
    """An HTTP server whose answer is given by a function, until the viewer is gone; how many there were is counted."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer: Callable[[Camera, BaseHTTPRequestHandler], None], port: int = 0) -> None:
        self.answer, self.viewers = answer, 0
        self.made = -1
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/camera.mjpg"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Camera)
        self.server.viewers += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with suppress(OSError):  # the viewer is gone
            self.server.answer(self.server, self)

    def log_message(self, *arguments: object) -> None:
        pass


def send(viewer: BaseHTTPRequestHandler, data: bytes) -> None:
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
    viewer.wfile.write(head.encode() + data + b"\r\n")
    time.sleep(FRAME_S)


def jpeg(number: int, size: tuple[int, int] = (320, 240)) -> bytes:
    return bytes(cv2.imencode(".jpg", TestPattern(size)(number)[..., ::-1])[1].tobytes())


def numbers(camera: Camera, viewer: BaseHTTPRequestHandler) -> None:
    while True:
        camera.made += 1
        send(viewer, jpeg(camera.made))


@pytest.fixture
def serve() -> Iterator[Callable[..., Camera]]:
    cameras: list[Camera] = []

    def start(answer: Callable[[Camera, BaseHTTPRequestHandler], None], port: int = 0) -> Camera:
        cameras.append(Camera(answer, port))
        return cameras[-1]

    yield start
    for camera in cameras:
        camera.stop()


Serve = Callable[[Callable[[Camera, BaseHTTPRequestHandler], None]], Camera]


def balanced(source: Source) -> bool:
    return source.captured == source.given + source.dropped


def test_motion_jpeg_over_http_is_read_fresh(serve: Serve) -> None:
    camera = serve(numbers)
    with open_source(camera.url) as source:
        assert source.live and source.total is None
        behind = []
        for frame in source:
            behind.append(camera.made - burnt_in_number(frame.image))
            time.sleep(2.5 * FRAME_S)
            if len(behind) == 50:
                break
        assert frame.image.shape == (240, 320, 3) and frame.source == camera.url
    assert sorted(behind)[25] <= 2, behind
    assert balanced(source) and source.dropped > 20 and camera.viewers == 1


def test_a_size_that_changes_in_mid_stream_is_passed_on_as_it_is(serve: Serve) -> None:
    sizes = [(320, 240), (480, 360), (160, 120), (240, 320)]

    def change(camera: Camera, viewer: BaseHTTPRequestHandler) -> None:
        for number in range(10_000):
            send(viewer, jpeg(number, sizes[number // 15 % 4]))

    seen = set()
    with open_source(serve(change).url) as source:
        for frame in source:
            height, width = frame.image.shape[:2]
            assert sizes[burnt_in_number(frame.image) // 15 % 4] == (width, height)
            seen.add((width, height))
            if frame.index > 70:
                break
    assert seen == set(sizes) and source.skipped == []


def test_damaged_frames_of_a_stream_are_passed_over_and_grey_ones_become_rgb(serve: Serve) -> None:
    grey = bytes(cv2.imencode(".jpg", np.full((240, 320), 77, np.uint8))[1].tobytes())

    def stutter(camera: Camera, viewer: BaseHTTPRequestHandler) -> None:
        for number in range(10_000):
            whole = jpeg(number) if number % 2 else grey
            send(viewer, whole[: len(whole) // 3] if number % 10 == 5 else whole)

    with open_source(serve(stutter).url) as source:
        for frame in source:
            assert frame.image.shape == (240, 320, 3)
            assert frame.image.std() < 3 or burnt_in_number(frame.image) % 10 != 5
            if frame.index > 50:
                break
    (told,) = source.skipped
    assert told.endswith(f"damaged frames of {source.name} were passed over") and 2 <= int(told.split()[0]) <= 8


@pytest.mark.parametrize("sent", [b"", b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n\xff\xd8\xff"])
def test_a_url_that_hangs_after_its_header_times_out(serve: Serve, sent: bytes) -> None:
    forever = threading.Event()

    def hang(camera: Camera, viewer: BaseHTTPRequestHandler) -> None:
        viewer.wfile.write(sent)
        forever.wait(60)

    begun = time.perf_counter()
    with pytest.raises(VitEdgeError, match=r"gave no video within 1 s|gives no frame|gave no frame") as caught:
        open_source(serve(hang).url, CameraOptions(timeout_s=1))
    assert 0.8 < time.perf_counter() - begun < 15 and caught.value.hint
    forever.set()


def test_a_server_that_accepts_and_says_nothing_times_out_and_holds_nobody_up(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        errors: list[VitEdgeError] = []

        def hang(scheme: str) -> None:
            with pytest.raises(VitEdgeError) as caught:
                open_source(f"{scheme}://{address}/x", CameraOptions(timeout_s=4))
            errors.append(caught.value)

        threads = [threading.Thread(target=hang, args=(scheme,)) for scheme in ("http", "rtsp")]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        with open_source(serve(numbers).url) as source:  # while the others hang, by a lock that OpenCV would have
            next(source)
            assert all(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join(30)
    assert len(errors) == 2 and all("gave no video within 4 s" in str(error) and error.hint for error in errors)


def test_a_stream_that_falls_silent_is_lost_and_comes_back(serve: Serve) -> None:
    def pause(camera: Camera, viewer: BaseHTTPRequestHandler) -> None:
        for number in range(10 if camera.viewers == 1 else 10_000):
            send(viewer, jpeg(number))
        time.sleep(30)

    camera = serve(pause)
    with open_source(camera.url, CameraOptions(timeout_s=1)) as source:
        frames = []
        for frame in source:
            frames.append(frame)
            if camera.viewers == 2:
                break
        assert source.state == ""
    assert "was lost once" in source.skipped[0] and balanced(source)
    with open_source(camera.url, CameraOptions(timeout_s=1)) as source:
        next(source)
        begun = time.perf_counter()
        source.close()  # in the middle of a read
        assert time.perf_counter() - begun < 5


def test_what_answers_but_is_no_video_is_an_error(serve: Serve) -> None:
    page = serve(lambda camera, viewer: viewer.wfile.write(b"<html>no video</html>" * 100) and None)
    with pytest.raises(VitEdgeError, match=r"answers, but gives no video") as caught:
        open_source(page.url, CameraOptions(timeout_s=2))
    assert "password" in str(caught.value.hint)
    with pytest.raises(VitEdgeError, match=r"127\.0\.0\.1:1: Connection refused") as caught:
        open_source("http://127.0.0.1:1/x")
    assert caught.value.hint
    with pytest.raises(VitEdgeError, match=r"is no address"):
        open_source("rtsp://127.0.0.1:port/x")


def test_the_options_of_ffmpeg_do_not_stay_in_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPTIONS, raising=False)
    with open_source(serve(numbers).url):
        assert OPTIONS not in os.environ
    monkeypatch.setenv(OPTIONS, "rtsp_transport;udp")  # the user's, which stay
    with open_source(serve(numbers).url):
        assert os.environ[OPTIONS] == "rtsp_transport;udp"


def test_who_wants_other_options_of_ffmpeg_waits_and_who_wants_the_same_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPTIONS, raising=False)
    same, seen = threading.Event(), []

    def want(value: str | None) -> None:
        with FFMPEG_OPTIONS.while_opening(value, 30):
            seen.append((value, os.environ.get(OPTIONS)))
            same.set()

    with FFMPEG_OPTIONS.while_opening("a;1", 30):
        threads = [threading.Thread(target=want, args=(value,)) for value in ("b;2", None, "a;1")]
        for thread in threads:
            thread.start()
        assert same.wait(30) and seen == [("a;1", "a;1")]
        with pytest.raises(VitEdgeError, match="waited in vain"), FFMPEG_OPTIONS.while_opening("c;3", 0.01):
            pass
    for thread in threads:
        thread.join(30)
    assert set(seen) == {("a;1", "a;1"), ("b;2", "b;2"), (None, None)} and OPTIONS not in os.environ


# RTSP


class RTSPServer:
    """GStreamer's server as a process of its own, on the same port each time it is started."""

    def __init__(self, clip: Path, codec: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._command = [PYTHON, str(SERVER), str(self._port), str(clip), codec]
        self.url = f"rtsp://user:geheim@127.0.0.1:{self._port}/clip"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)
        until = time.monotonic() + 30
        while not self._listens():
            assert time.monotonic() < until and self._process.poll() is None, "the server does not start"
            time.sleep(0.05)

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def rtsp() -> Iterator[RTSPServer]:
    if shutil.which(PYTHON) is None or subprocess.run([PYTHON, "-c", BINDINGS], capture_output=True, check=False).returncode:
        pytest.skip("GStreamer's RTSP server is not installed: apt install gir1.2-gst-rtsp-server-1.0 python3-gi")
    if not BIKES.exists():
        pytest.skip("bikes.mp4 is not there: python examples/focus/fetch.py")
    server = RTSPServer(BIKES, "h264")
    yield server
    server.kill()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_rtsp_is_read_at_its_own_rate_over_tcp_and_udp(rtsp: RTSPServer, transport: str) -> None:
    with open_source(rtsp.url, CameraOptions(transport=transport)) as source:  # type: ignore[arg-type]
        assert source.name == rtsp.url.replace("user:geheim", "***") and source.fps == 25.0 and source.live
        frames = [next(source) for _ in range(40)]
        assert all(frame.image.shape == (272, 640, 3) for frame in frames)
        assert np.std([frame.image.mean() for frame in frames]) > 0
    seconds = (frames[-1].captured_ns - frames[0].captured_ns) / 1e9
    assert 0.5 < seconds / ((frames[-1].index - frames[0].index) / 25) < 2
    assert balanced(source)


def outages(server: RTSPServer, cycles: int, down_s: float) -> None:
    """Kill the server and start it again, so many times; nothing of the source may be left behind."""
    with open_source(server.url, CameraOptions(timeout_s=3)) as source:
        shapes = set()
        consumer = threading.Thread(target=lambda: shapes.update(frame.image.shape for frame in source))
        consumer.start()
        wait_for_frames(source, 5)
        before = (threading.active_count(), handles(), children())
        for _ in range(cycles):
            server.kill()
            time.sleep(down_s)
            state = source.state
            assert re.search(r"rtsp://\*\*\*@.*(the next try is in \d+ s|is being tried again)$", state), state
            server.start()
            wait_for_frames(source, 10)
            assert source.state == ""
        after = (threading.active_count(), handles(), children())
    consumer.join(10)
    assert shapes == {(272, 640, 3)} and balanced(source) and source.state == ""
    assert "was lost" in source.skipped[0] and "geheim" not in source.skipped[0]
    assert after == before, f"threads, handles and processes: {before} became {after}"


def wait_for_frames(source: Source, count: int) -> None:
    until, wanted = time.monotonic() + 40, source.captured + count
    while source.captured < wanted:
        assert time.monotonic() < until, f"it did not come back: {source.state}"
        time.sleep(0.05)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  of links, of which one is gone by the time one looks


def children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_an_rtsp_stream_resumes_by_itself_when_its_server_is_back(rtsp: RTSPServer) -> None:
    outages(rtsp, 1, 5.0)


@pytest.mark.soak
def test_an_rtsp_stream_survives_20_outages_without_a_leak(rtsp: RTSPServer) -> None:
    outages(rtsp, 20, 5.0)
