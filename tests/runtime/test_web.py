"""The live view over HTTP, by plain sockets: what it serves, whom it turns away, and how it ends."""

from __future__ import annotations

import io
import itertools
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from PIL import Image

from tests.engines import run_python
from tests.runtime.web import (
    Publisher,
    answer,
    ask,
    card_of,
    connect,
    frame_of,
    frames_of,
    port_of,
    publishing,
    request,
)
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.runtime.web import WebView
from vitedge.runtime.web_access import HEADERS
from vitedge.runtime.web_viewers import FIGURES

pytest.importorskip("cv2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

TOKEN = "s3cret-token"
PATHS = (
    "/",
    "/page.css",
    "/page.js",
    "/live",
    "/stream/0",
    "/snapshot/0.jpg",
    "/api/latest",
    "/api/events",
    "/metrics",
    "/healthz",
)


def open_view(*cameras: str, token: str | None = None, host: str = "127.0.0.1") -> WebView:
    return WebView(cameras or ("cam",), card_of(), title="tiny/int8", host=host, port=0, token=token)


@pytest.fixture(scope="module")
def view() -> Iterator[WebView]:
    """Two cameras, published all the time."""
    with open_view("cam", "other") as opened, publishing(opened, 2):
        yield opened


@pytest.fixture(scope="module")
def locked() -> Iterator[WebView]:
    """One that needs a token, on an address that is no loopback address to it."""
    with open_view(token=TOKEN, host="0.0.0.0") as opened, publishing(opened):
        yield opened


def size_of(jpeg: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(jpeg)) as image:
        image.load()
        assert image.format == "JPEG"
        return image.size


def test_the_page_and_its_parts_are_served_and_need_nothing_from_outside(view: WebView) -> None:
    page = ask(view, "/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    for path in re.findall(rb'(?:href|src)="([^"]+)"', page.body):
        if not path.startswith((b"data:", b"/stream/")):
            assert ask(view, path.decode()).status == 200
    for path in ("/", "/page.css", "/page.js"):
        text = ask(view, path).body.decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_every_answer_has_the_headers_that_keep_others_out(view: WebView, path: str) -> None:
    found = ask(view, path, "HEAD")
    assert found.body == b""
    for name, value in HEADERS.items():
        assert found.headers[name.lower()] == value
    assert "access-control-allow-origin" not in found.headers and "server" not in found.headers
    assert found.headers["connection"] == "close"


def test_latest_says_what_is_newest(view: WebView) -> None:
    found = ask(view, "/api/latest").json()
    assert [camera["name"] for camera in found["cameras"]] == ["cam", "other"]
    for camera in found["cameras"]:
        assert camera["captured"] == camera["processed"] + camera["dropped"]
        assert camera["top"][0] == {"label": "Ankle boot", "probability": 0.75}
    time.sleep(0.1)
    assert ask(view, "/api/latest").json()["cameras"][1]["index"] > found["cameras"][1]["index"]


def test_a_snapshot_is_the_newest_frame_with_what_the_model_says(view: WebView) -> None:
    found = ask(view, "/snapshot/1.jpg")
    assert found.status == 200 and found.headers["content-type"] == "image/jpeg"
    assert size_of(found.body) == (320, 240)


def test_a_stream_is_multipart_whose_pictures_change(view: WebView) -> None:
    with connect(view, request("/stream/0")) as stream:
        file = stream.makefile("rb")
        assert b"200" in file.readline()
        headers = b"".join(iter(file.readline, b"\r\n"))
        assert b"multipart/x-mixed-replace; boundary=picture" in headers
    connection = HTTPConnection("127.0.0.1", port_of(view), timeout=10)
    connection.request("GET", "/stream/0")
    found, pictures = connection.getresponse(), []
    assert found.readline() == b"--picture\r\n"
    for _ in range(3):
        head = b"".join(iter(found.readline, b"\r\n"))
        length = re.search(rb"Content-Type: image/jpeg\r\nContent-Length: (\d+)", head)
        assert length
        pictures.append(found.read(int(length[1])))
        assert (found.readline(), found.readline()) == (b"\r\n", b"--picture\r\n")
    connection.close()
    assert all(size_of(picture) == (320, 240) for picture in pictures) and len(set(pictures)) == 3


def test_live_has_figures_and_pictures_of_all_cameras_on_one_connection(view: WebView) -> None:
    kinds, numbers = dict.fromkeys((0, 1, FIGURES), 0), list[int]()
    for camera, data in itertools.islice(frames_of(view), 40):
        kinds[camera] += 1
        if camera == FIGURES:
            numbers += [sample[0] for sample in json.loads(data)["cameras"][0]["samples"]]
        else:
            assert size_of(data) == (320, 240)
    assert min(kinds.values()) > 2
    new = sorted(set(numbers))  # some come twice at the beginning
    assert new == list(range(new[0], new[0] + len(new)))  # none is missing


def test_live_gives_pictures_of_those_cameras_alone_that_are_asked_for(view: WebView) -> None:
    for query, expected in (("0", {0}), ("1,0", {0, 1}), ("", set()), ("1,1", {1})):
        seen = {camera for camera, _ in itertools.islice(frames_of(view, f"/live?pictures={query}"), 15)}
        assert seen == expected | {FIGURES}


NOWHERE = (
    "/live?pictures=2", "/live?pictures=0,x", "/live?pictures=-1", "/stream/2", "/stream/-1", "/stream/00",
    "/stream/" + "9" * 5000, "/snapshot/2.jpg", "/snapshot/0.png", "/snapshot/..%2f0.jpg",
    "/stream/../../etc/passwd", "/..%2f..%2fetc/passwd",
    "//etc/passwd", "/%00", "/page.css/", "/healthz/", "/api", "/favicon.ico", "/page.html", "/index.html", "*",
)  # fmt: skip
NO_REQUESTS = (
    b"\x00\xff" * 400 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET  /\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Name: 1\r\n\r\n", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("path", NOWHERE)
def test_what_is_not_there_is_not_found(view: WebView, path: str) -> None:
    found = ask(view, path)
    assert found.status == 404 and len(found.body) < 50


def test_events_are_server_sent(view: WebView) -> None:
    with connect(view, request("/api/events")) as stream:
        text = b""
        while text.count(b"\n\n") < 3:
            text += stream.recv(65536)
    assert b"text/event-stream" in text
    (event, *_) = re.findall(rb"data: (\{.*?\})\n\n", text)
    assert json.loads(event)["title"] == "tiny/int8"


def test_metrics_are_read_by_prometheus(view: WebView) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    found = ask(view, "/metrics")
    assert found.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in parser.text_string_to_metric_families(found.body.decode())}
    assert {sample.labels["source"] for sample in families["vitedge_frames_processed"].samples} == {"cam", "other"}


def test_health_is_bad_with_the_reason_while_a_camera_is_lost() -> None:
    with open_view("rtsp://user:secret/2@host/a", "cam") as view:
        assert (ask(view, "/healthz").status, ask(view, "/healthz").body) == (200, b"ok\n")
        view.tell(0, "rtsp://user:secret/2@host/a is lost, the next try is in 4 s")
        found = ask(view, "/healthz")
        assert found.status == 503 and found.body == b"rtsp://***@host/a: rtsp://***@host/a is lost, the next try is in 4 s\n"
        assert not any(b"secret" in ask(view, path).body for path in ("/api/latest", "/metrics", "/healthz"))
        view.tell(0, "")
        assert ask(view, "/healthz").status == 200


def test_without_a_frame_there_is_no_snapshot_and_a_stream_begins_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitedge.runtime import web_server

    monkeypatch.setattr(web_server, "SNAPSHOT_S", 0.2)
    with open_view() as view:
        assert ask(view, "/snapshot/0.jpg").status == 503
        stream = frames_of(view)
        assert next(stream)[0] == FIGURES
        view.publish(frame_of(0), answer(), camera=0, captured=1, dropped=0)
        assert any(camera == 0 for camera, _ in itertools.islice(stream, 30))
        assert ask(view, "/snapshot/0.jpg").status == 200
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_everything_is_refused(locked: WebView, path: str) -> None:
    for given in (path, f"{path}?token=", f"{path}?token={TOKEN}x"):
        found = ask(locked, given)
        assert found.status == 401 and found.headers["www-authenticate"] == "Bearer"
        assert TOKEN.encode() not in found.body
    assert ask(locked, path, "POST").status == ask(locked, path, Authorization="Bearer x").status == 401


def test_with_the_token_programs_are_answered_at_once(locked: WebView) -> None:
    for path in ("/", "/page.js", "/snapshot/0.jpg", "/api/latest", "/metrics", "/healthz"):
        assert ask(locked, path, Authorization=f"Bearer {TOKEN}").status == 200
        assert ask(locked, f"{path}?token={TOKEN}").status == 200


def test_a_browser_is_given_a_cookie_and_sent_to_the_address_without_the_token(locked: WebView) -> None:
    assert locked.url.endswith(f"/?token={TOKEN}")
    found = ask(locked, f"/?token={TOKEN}", Accept="text/html,*/*;q=0.8")
    assert found.status == 200 and found.headers["refresh"] == "0; url=/" and TOKEN.encode() not in found.body
    cookie = found.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert ask(locked, "/", Accept="text/html", Cookie=cookie.partition(";")[0]).status == 200
    assert ask(locked, f"//evil.example/?token={TOKEN}", Accept="text/html").headers["refresh"] == "0; url=/evil.example/"


def test_other_sites_and_foreign_names_are_refused(view: WebView) -> None:
    for path in PATHS:
        assert ask(view, path, Sec_Fetch_Site="cross-site").status == 403
        assert ask(view, path, Origin="https://evil.example").status == 403
        assert ask(view, path, Host=f"evil.example:{port_of(view)}").status == 403


def test_a_websocket_of_another_site_is_refused_and_one_of_this_site_is_none(view: WebView) -> None:
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13",
    )
    for origin, status in (
        ("https://evil.example", b"403"),
        (f"http://localhost:{port_of(view)}", b"403"),
        ("http://localhost", b"200"),
    ):
        with connect(view, request("/healthz", f"Origin: {origin}", *upgrade)) as opened:
            assert opened.recv(1000).split()[1] == status


def test_only_looking_is_possible(view: WebView) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        found = ask(view, "/", method)
        assert found.status == 405 and found.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("sent", NO_REQUESTS)
def test_what_is_no_request_is_refused_and_closed(view: WebView, sent: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with connect(view) as opened:
        try:
            opened.sendall(sent)
            opened.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: opened.recv(65536), b""))
        except OSError:
            said = b""
    assert said == b"" or re.match(rb"HTTP/1.1 (400|403|413) ", said), said[:100]
    assert ask(view, "/healthz").status == 200
    assert capfd.readouterr().err == ""


def test_a_second_request_on_a_connection_gets_no_answer(view: WebView) -> None:
    with connect(view, request("/healthz") * 3) as opened:
        assert b"".join(iter(lambda: opened.recv(65536), b"")).count(b"HTTP/1.1") == 1


def test_a_port_in_use_is_an_error_with_a_hint() -> None:
    with open_view() as view:
        port = port_of(view)
        with pytest.raises(VitEdgeError, match=f"port {port} is in use") as caught:
            WebView(["cam"], card_of(), title="t", port=port)
        assert "another port" in str(caught.value.hint)
    WebView(["cam"], card_of(), title="t", port=port).close()  # and once it is free, at once


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_another_address_needs_a_token(host: str) -> None:
    with pytest.raises(VitEdgeError, match="needs a token") as caught:
        open_view(host=host)
    assert "secrets.token_urlsafe" in str(caught.value.hint)


@pytest.mark.parametrize("token", ["", "two words", "ümlaut", "line\nbreak"])
def test_a_token_must_fit_into_an_address_and_a_header(token: str) -> None:
    with pytest.raises(VitEdgeError, match="a token is made of"):
        open_view(token=token)


def test_addresses_that_are_not_here_are_errors() -> None:
    with pytest.raises(VitEdgeError, match=r"cannot listen on 192\.0\.2\.1:\d+: "):
        WebView(["cam"], card_of(), title="t", host="192.0.2.1", port=0, token=TOKEN)
    with pytest.raises(VitEdgeError, match="nobody knows that name"):
        WebView(["cam"], card_of(), title="t", host="no-such-host.invalid", port=0, token=TOKEN)
    for port in (-1, 65536):
        with pytest.raises(VitEdgeError, match="a port is a number"):
            WebView(["cam"], card_of(), title="t", port=port)


def test_the_url_can_be_opened_as_it_is_printed() -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", open_and_close())
    assert re.fullmatch(r"http://localhost:\d+/\?token=a%26b%23c%2F", open_and_close(host="localhost", token="a&b#c/"))
    assert re.fullmatch(r"http://(?!0\.0\.0\.0)[\w.-]+:\d+/\?token=x", open_and_close(host="0.0.0.0", token="x"))
    if socket.has_ipv6 and has_loopback_6():
        assert re.fullmatch(r"http://\[::1\]:\d+/", open_and_close(host="::1"))


def open_and_close(host: str = "127.0.0.1", token: str | None = None) -> str:
    with open_view(host=host, token=token) as view:
        return view.url


def has_loopback_6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_without_its_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("vitedge.runtime.web_server", "vitedge.runtime.web_guard"))]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("starlette.routing", "uvicorn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingPackageError, match=f"'{module.partition('.')[0]}'") as caught:
                open_view()
            assert "[live]" in str(caught.value.hint)


def test_it_closes_with_viewers_of_every_kind_attached_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    view = open_view()
    publisher = Publisher(view)
    attached = [connect(view, request(path)) for path in ("/live", "/stream/0", "/api/events", "/live") for _ in range(3)]
    attached += [connect(view, b"GET / HT"), connect(view)]
    time.sleep(0.3)
    began = time.perf_counter()
    view.close()
    view.close()
    assert time.perf_counter() - began < 8
    publisher.close()  # publishing to a closed view does nothing
    assert set(threading.enumerate()) == before
    for opened in attached:
        with opened:
            try:
                while opened.recv(1 << 20):
                    pass
            except ConnectionError:
                pass
    with pytest.raises(ConnectionError):
        connect(view)


def test_it_can_be_closed_at_once_and_from_several_threads() -> None:
    for _ in range(5):
        view = open_view()
        threads = [threading.Thread(target=view.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_a_run_that_forgets_to_close_it_ends_all_the_same() -> None:
    code = """
from tests.runtime.web import answer, card_of, frame_of
from vitedge.runtime.web import WebView
view = WebView(["cam"], card_of(), title="t", port=0)
view.publish(frame_of(0), answer(), camera=0, captured=1, dropped=0)
print("ended")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_bug_in_an_answer_is_told_and_the_view_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_view() as view:
        monkeypatch.setattr(view._figures, "latest", lambda: 1 / 0)
        assert ask(view, "/api/latest").status == 500
        assert ask(view, "/healthz").status == 200
    assert "ZeroDivisionError" in caplog.text
