"""Frames and their predictions in, a live page on http://host:port out.

    publish(frame, prediction)  ->  Figures   ->  /api/latest, /metrics, /healthz, the page's bars and timeline
                                ->  Pictures  ->  /stream/0, /snapshot/0.jpg, the page's pictures

The server has a thread and an event loop of its own; so have the pictures. `publish` leaves the newest frame for them and
returns. Knows nothing of sources or engines.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.runtime.opencv import load_cv2
from vitedge.runtime.source import without_secrets
from vitedge.runtime.vitals import Vitals
from vitedge.runtime.web_access import Access, is_loopback
from vitedge.runtime.web_figures import Figures
from vitedge.runtime.web_pictures import Pictures
from vitedge.specs import Frame, ModelCard, Prediction

ANY_ADDRESS = ("", "0.0.0.0", "::")
BACKLOG = 64  # connections that wait to be accepted
SEND_BUFFER = 128 * 1024  # bytes of a connection in the kernel: what is in it is old by the time a slow viewer reads it
VITALS_EVERY_S = 2.0
PATIENCE_S = 5.0  # how long `close` waits for a thread
MAKE_TOKEN = "python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one"


class WebView:
    """A live page for a whole run.

    cameras: their names, in the order of their numbers. card: of the model, which decides how its answers are drawn. title: of
    the page. port 0: any free one. token: what a viewer must know, needed for any address but loopback; `url` has it. It
    listens as soon as it is made. Raises VitEdgeError for a port in use, an address that this machine does not have or that
    others reach without a token, and MissingPackageError where the extra `live` is not installed.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        card: ModelCard,
        *,
        title: str,
        host: str = "127.0.0.1",
        port: int = 8080,
        token: str | None = None,
    ) -> None:
        _check(host, port, token)
        server = _load_server()
        load_cv2()
        listener = _listen(host, port)
        port = listener.getsockname()[1]
        self.url = _url(host, port, token)
        self._figures = Figures([without_secrets(name) for name in cameras], card, title)
        self._site = server.Site(listener, Access(host, port, token), self._figures, len(cameras))
        self._pictures = Pictures(len(cameras), card, self._site.deliver_soon, self._figures.remark)
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._site.serve, args=(self._pictures,), name="vitedge-web", daemon=True),
            threading.Thread(target=self._measure, name="vitedge-vitals", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def publish(self, frame: Frame, prediction: Prediction, *, camera: int, captured: int, dropped: int) -> None:
        """Show a frame of a camera and what the model said of it; its pixels must stay as they are.

        captured, dropped: frames of that camera so far. May be called from any thread, and blocks none: only the newest frame
        is kept.
        """
        self._figures.note(camera, frame, prediction, captured, dropped)
        self._pictures.offer(camera, frame, prediction)

    def tell(self, camera: int, state: str) -> None:
        """How a camera is: "" where all is well, else a sentence for the page and /healthz."""
        self._figures.tell(camera, without_secrets(state))

    def close(self) -> None:
        """Turn away who watches and end, within seconds; a second call does nothing."""
        if self._end.is_set():
            return
        self._end.set()
        self._site.close()
        self._pictures.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def __enter__(self) -> WebView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _measure(self) -> None:
        """Ask the sensors now and then, in a thread of its own: some take their time, and none shall make a viewer wait."""
        vitals = Vitals()
        while True:
            self._figures.measured(vitals.read())
            if self._end.wait(VITALS_EVERY_S):
                break
        vitals.close()


def _check(host: str, port: int, token: str | None) -> None:
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise VitEdgeError("a token is made of letters, digits and signs, without spaces", hint=MAKE_TOKEN)
    if token is None and not is_loopback(host):
        others = "all addresses of this machine" if host in ANY_ADDRESS else host
        raise VitEdgeError(f"a live view on {others} needs a token: others can reach it", hint=MAKE_TOKEN)
    if not 0 <= port <= 65535:
        raise VitEdgeError(f"a port is a number from 1 to 65535, or 0 for any free one, not {port}")


def _load_server() -> Any:
    """The module that needs Starlette and uvicorn."""
    try:
        return importlib.import_module("vitedge.runtime.web_server")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "vitedge":
            raise
        raise MissingPackageError(package, "live") from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Its connections inherit a small buffer, and find out when the other side is no more."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(error, host, port) from error
    return listener


def _cannot_listen(error: OSError, host: str, port: int) -> VitEdgeError:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return VitEdgeError(f"port {port} is in use: nothing else can listen on {where}", hint="give another port, or 0 for any")
    hints = {errno.EACCES: "ports below 1024 are for root", errno.EADDRNOTAVAIL: "it must be an address of this machine"}
    reason = "nobody knows that name" if isinstance(error, socket.gaierror) else error.strerror
    return VitEdgeError(f"cannot listen on {where}: {reason}", hint=hints.get(error.errno or 0))


def _url(host: str, port: int, token: str | None) -> str:
    name = _own_address() if host in ANY_ADDRESS else host
    place = f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
    return place if token is None else f"{place}?token={quote(token, safe='')}"


def _own_address() -> str:
    """The address by which others are likely to reach this machine, else its name. Nothing is sent to find it out."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737): the route to anywhere
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return socket.gethostname()
