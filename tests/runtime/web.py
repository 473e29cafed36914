"""What the tests of the live view share: frames, a view on loopback, and clients made of plain sockets."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vitedge.runtime.web import WebView
from vitedge.specs import Frame, ModelCard, Prediction, Preprocess, Task, Timing

TIMING = Timing(capture_ms=3.0, preprocess_ms=1.25, infer_ms=20.0, postprocess_ms=0.25, queue_ms=0.5)
TOP = (("Ankle boot", 0.75), ("Bär <b>", 0.25))


def card_of(task: Task = "classify") -> ModelCard:
    return ModelCard("tiny", task, Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3), 7)


def frame_of(index: int, height: int = 240, width: int = 320) -> Frame:
    """A picture with a bright block whose place tells frames apart."""
    image = np.full((height, width, 3), 40, np.uint8)
    left = 16 * index % (width - 64)
    image[64:128, left : left + 64] = (250, 180, 20)
    return Frame(image, index, time.perf_counter_ns(), f"{index}.png")


def answer(top: tuple[tuple[str, float], ...] = TOP, shape: tuple[int, ...] = (10,)) -> Prediction:
    return Prediction(top, np.zeros(shape, np.float32), TIMING)


class Publisher:
    """Threads that publish `rate` frames a second of each camera, until closed. longest_s: a call of `publish` took."""

    def __init__(self, view: WebView, cameras: int = 1, rate: float = 50.0) -> None:
        self.view, self.rate = view, rate
        self.counts, self.longest_s = [0] * cameras, 0.0
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(camera,), daemon=True) for camera in range(cameras)]
        for thread in self._threads:
            thread.start()

    def _run(self, camera: int) -> None:
        while not self._end.wait(1 / self.rate):
            count = self.counts[camera] + 1
            frame = frame_of(count)
            began = time.perf_counter()
            self.view.publish(frame, answer(), camera=camera, captured=2 * count, dropped=count)
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            self.counts[camera] = count

    def close(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def publishing(view: WebView, cameras: int = 1, rate: float = 50.0) -> Iterator[Publisher]:
    publisher = Publisher(view, cameras, rate)
    try:
        yield publisher
    finally:
        publisher.close()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def port_of(view: WebView) -> int:
    port = urlsplit(view.url).port
    assert port
    return port


def ask(view: WebView, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request; an underscore in a header's name stands for a hyphen."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(view), timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        found = connection.getresponse()
        return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
    finally:
        connection.close()


def connect(view: WebView, sent: bytes = b"") -> socket.socket:
    """A socket on which something was sent."""
    opened = socket.create_connection(("127.0.0.1", port_of(view)), timeout=10)
    opened.sendall(sent)
    return opened


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", "")).encode("latin-1")


def frames_of(view: WebView, path: str = "/live") -> Iterator[tuple[int, bytes]]:
    """The frames of `/live`: a camera's number, or FIGURES, and the data."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(view), timeout=10)
    try:
        connection.request("GET", path)
        found = connection.getresponse()
        assert found.status == 200, found.read()
        while head := found.read(8):
            camera, length = struct.unpack(">II", head)
            yield camera, found.read(length)
    finally:
        connection.close()
