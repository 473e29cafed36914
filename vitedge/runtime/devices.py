"""Cameras and streams, opened by OpenCV for the least delay and checked against what was asked of them.

    "0", /dev/video0   V4L2                        csi://0, gst://PIPELINE   GStreamer, newest buffer only
    rtsp://, http://   FFmpeg with time-outs       synthetic                 no OpenCV at all

Each becomes a Feed for the reader thread of a LiveSource. Knows nothing of threads.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.runtime import synthetic, v4l2
from vitedge.runtime.files import rate_and_total
from vitedge.runtime.opencv import FFMPEG_OPTIONS, as_rgb, load_cv2
from vitedge.runtime.source import CameraOptions, without_secrets

CAMERA = re.compile(r"[0-9]{1,2}")  # from 100 on, OpenCV reads the number as the choice of a capture API
DEVICE = re.compile(r"/dev/(video[0-9]+|v4l/.+)")
CSI = re.compile(r"csi://([0-9]{1,2})")
PIPELINE = "gst://"
SYNTHETIC = "synthetic"
STREAMS = ("rtsp://", "rtsps://", "http://", "https://")
CSI_SIZE, CSI_FPS = (1280, 720), 30.0
APPSINK = "appsink drop=true max-buffers=1 sync=false"
ATTEMPTS = 10  # at a frame that may be only damaged, before the feed counts as lost
FPS_ERROR = 0.05  # by which a rate may differ from the one asked for, as 29.97 from 30
# No packets kept back while the stream is probed; no waiting for more of them than needed to know what it is.
LOW_DELAY = "fflags;nobuffer|flags;low_delay|analyzeduration;1000000"
THREADS = "OPENCV_FFMPEG_THREADS"  # by which a user may have it otherwise
MOTION_JPEG = int.from_bytes(b"MJPG", "little")
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
Image = NDArray[np.uint8]


class TestPatternFeed:
    """Frames 0, 1, 2 ... of the test pattern."""

    __test__ = False

    def __init__(self, options: CameraOptions) -> None:
        self.fps: float | None = options.fps or synthetic.DEFAULT_FPS
        self.pace: float | None = self.fps
        self.total: int | None = None
        self._draw = synthetic.TestPattern(options.size or synthetic.DEFAULT_SIZE)
        self._number = self.damaged = 0

    def read(self) -> tuple[Image, str]:
        """The next picture, at once: it is `pace` that holds it back."""
        self._number += 1
        return self._draw(self._number - 1), ""

    def close(self) -> None:
        """Nothing is open."""


class OpenCVFeed:
    """What an open cv2.VideoCapture reads, in RGB."""

    def __init__(self, capture: Any, timeout_s: float) -> None:
        self._cv2 = load_cv2()
        self._capture, self._timeout_s = capture, timeout_s
        self.fps, _ = rate_and_total(capture)
        self.total: int | None = None  # streams announce one, too, and begin again
        self.pace: float | None = None
        self.damaged = 0

    def read(self) -> tuple[Image, str] | None:
        """The next picture. OpenCV fails on a damaged one, on a time-out and on the end alike, so it is tried a few times."""
        begun = time.perf_counter()
        for attempt in range(ATTEMPTS):
            picture = self._read_once()
            if picture is not None:
                self.damaged += attempt
                return as_rgb(picture), ""
            if time.perf_counter() - begun > self._timeout_s / 2:
                break
        return None

    def close(self) -> None:
        """Give the device or connection back."""
        self._capture.release()

    def _read_once(self) -> NDArray[Any] | None:
        try:
            good, picture = self._capture.read()
        except self._cv2.error:  # of a picture that is too large, say
            return None
        return picture if good else None


class JPEGFeed(OpenCVFeed):
    """A stream of JPEGs, decoded here: FFmpeg would scale a picture of another size to that of the first."""

    def _read_once(self) -> NDArray[Any] | None:
        packet = super()._read_once()
        return None if packet is None else self._cv2.imdecode(packet, self._cv2.IMREAD_COLOR)


class CameraFeed(OpenCVFeed):
    """A V4L2 camera. That it is busy may come out only with the first picture."""

    def __init__(self, capture: Any, timeout_s: float, name: str, path: Path) -> None:
        super().__init__(capture, timeout_s)
        self._name, self._path = name, path
        self._begun = False

    def read(self) -> tuple[Image, str] | None:
        found = super().read()
        if found is None and not self._begun:
            self._capture.release()  # else it is busy with us
            raise _unusable(self._name, self._path)
        self._begun = True
        return found


def open_feed(address: str, options: CameraOptions) -> OpenCVFeed | TestPatternFeed:
    """Open a camera, stream or pipeline by its address; a VitEdgeError where that fails, or gives not what was asked for."""
    if address == SYNTHETIC:
        return TestPatternFeed(options)
    if match := CSI.fullmatch(address):
        return _open_pipeline(without_secrets(address), csi_pipeline(int(match[1]), options), options)
    if address.startswith(PIPELINE):
        return _open_pipeline(without_secrets(address), with_sink(address.removeprefix(PIPELINE)), options)
    if address.lower().startswith(STREAMS):
        return _open_stream(address, options)
    return _open_camera(address, options)


def csi_pipeline(sensor: int, options: CameraOptions) -> str:
    """The GStreamer pipeline of a Jetson's CSI camera."""
    (width, height), fps = options.size or CSI_SIZE, Fraction(options.fps or CSI_FPS).limit_denominator(1001)
    camera = f"nvarguscamerasrc sensor-id={sensor}"
    asked = f"video/x-raw(memory:NVMM), width={width}, height={height}, framerate={fps.numerator}/{fps.denominator}, format=NV12"
    return f"{camera} ! {asked} ! nvvidconv ! video/x-raw, format=BGRx ! videoconvert ! video/x-raw, format=BGR ! {APPSINK}"


def with_sink(pipeline: str) -> str:
    """A user's pipeline, ended with a sink that keeps only the newest frame where it has none."""
    if re.search(r"(^|!)\s*appsink\b", pipeline):
        return pipeline
    return f"{pipeline.strip().rstrip('!').strip()} ! videoconvert ! video/x-raw, format=BGR ! {APPSINK}"


def _open_pipeline(name: str, pipeline: str, options: CameraOptions) -> OpenCVFeed:
    cv2 = load_cv2()
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        hint = "PyPI's opencv is built without GStreamer; take the system's: JetPack's, or Debian's python3-opencv"
        raise VitEdgeError(f"{name} takes an OpenCV with GStreamer, which this one has not", hint=hint)
    capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        hint = f"gst-launch-1.0 says more; the pipeline is: {without_secrets(pipeline)}"
        raise VitEdgeError(f"{name} cannot be opened as a GStreamer pipeline", hint=hint)
    return OpenCVFeed(capture, options.timeout_s)


def _open_stream(url: str, options: CameraOptions) -> OpenCVFeed:
    cv2 = load_cv2()
    timeout_ms = max(1, int(options.timeout_s * 1000))
    settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
    if hasattr(cv2, "CAP_PROP_N_THREADS") and THREADS not in os.environ:
        # as many frames as there are threads, less one, would always be under way
        settings += [cv2.CAP_PROP_N_THREADS, 1]
    begun = time.perf_counter()
    with FFMPEG_OPTIONS.while_opening(f"rtsp_transport;{options.transport}|{LOW_DELAY}", 2 * options.timeout_s):
        capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, settings)
    if not capture.isOpened():
        hung = time.perf_counter() - begun > options.timeout_s * 0.9
        raise _unreachable(url, options.timeout_s, hung)
    if int(capture.get(cv2.CAP_PROP_FOURCC)) == MOTION_JPEG and capture.set(cv2.CAP_PROP_FORMAT, -1):
        return JPEGFeed(capture, options.timeout_s)
    feed = OpenCVFeed(capture, options.timeout_s)
    if url.lower().startswith("http") and rate_and_total(capture)[1]:
        feed.pace = feed.fps  # a file on a server, which would come as fast as the line allows
    return feed


def _unreachable(url: str, timeout_s: float, hung: bool) -> VitEdgeError:
    """Why a stream cannot be opened, which OpenCV does not say, as far as a connection tells."""
    name = without_secrets(url)
    if hung:
        return VitEdgeError(f"{name} gave no video within {timeout_s:g} s", hint="is it the right address, and does it send?")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme.lower()]
        socket.create_connection((host, port), timeout_s).close()
    except ValueError:
        return VitEdgeError(f"{name} is no address", hint="such as rtsp://user:password@192.168.0.10:554/stream")
    except socket.gaierror:
        return VitEdgeError(f"{name} cannot be opened: there is no host {host}", hint="is the name right? Try its number")
    except OSError as error:
        reason = error.strerror or "it does not answer"
        return VitEdgeError(f"{name} cannot be opened: {host}:{port}: {reason}", hint="is it switched on, and the port right?")
    hint = "are path, user and password right, and has this OpenCV a decoder for what it sends?"
    return VitEdgeError(f"{name} cannot be opened: {host}:{port} answers, but gives no video that can be decoded", hint=hint)


def _open_camera(address: str, options: CameraOptions) -> OpenCVFeed:
    """A camera by its number or device: by V4L2, or elsewhere than on Linux by whatever OpenCV takes."""
    cv2 = load_cv2()
    name = f"camera {address}"
    path = Path(f"/dev/video{address}" if CAMERA.fullmatch(address) else address)
    linux = sys.platform.startswith("linux")
    if linux and not path.exists():
        raise _unusable(name, path)
    if not linux and not CAMERA.fullmatch(address):
        raise VitEdgeError(f"there are no cameras like {address} here", hint="give the camera's number, such as 0")
    capture = cv2.VideoCapture(str(path), cv2.CAP_V4L2) if linux else cv2.VideoCapture(int(address))
    try:
        if not capture.isOpened():
            raise _unusable(name, path)
        _ask_camera(capture, options)
        _check_camera(capture, options, name, path)
    except VitEdgeError:
        capture.release()
        raise
    return CameraFeed(capture, options.timeout_s, name, path)


def _unusable(name: str, path: Path) -> VitEdgeError:
    if not sys.platform.startswith("linux"):
        hint = "is it plugged in, free, and are you allowed to use it?"
        return VitEdgeError(f"{name} cannot be opened or gives no picture", hint=hint)
    reason, hint = v4l2.why_unusable(path)
    return VitEdgeError(f"{name} cannot be opened: {reason}", hint=hint)


def _ask_camera(capture: Any, options: CameraOptions) -> None:
    """The pixel format first, since the sizes and rates depend on it."""
    cv2 = load_cv2()
    if options.pixel_format is not None:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*options.pixel_format))
    if options.size is not None:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, options.size[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, options.size[1])
    if options.fps is not None:
        capture.set(cv2.CAP_PROP_FPS, options.fps)


def _check_camera(capture: Any, options: CameraOptions, name: str, path: Path) -> None:
    """Refuse a camera that gives something else than it was asked for: drivers take what is nearest, and say nothing."""
    cv2 = load_cv2()
    width, height, fps = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS))
    code = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    fourcc = code.to_bytes(4, "little").decode("latin-1")
    if options.pixel_format not in (None, fourcc):
        offers = ", ".join(v4l2.offered(path)) or fourcc
        raise VitEdgeError(f"{name} does not give {options.pixel_format} but {fourcc}", hint=f"it offers {offers}")
    size = (int(width), int(height))
    if options.size is not None and options.size != size:
        offers = ", ".join(f"{wide}x{high}" for wide, high in v4l2.offered(path).get(fourcc) or [size])
        asked = f"{options.size[0]}x{options.size[1]}"
        raise VitEdgeError(f"{name} does not give {asked} in {fourcc}, it offers {offers}", hint="ask for one of these sizes")
    if options.fps is not None and fps > 0 and abs(fps - options.fps) > FPS_ERROR * options.fps:
        at = f"at {width:.0f}x{height:.0f} in {fourcc}"
        hint = "ask for that rate, for another size, or for another pixel format: MJPG is often faster than YUYV"
        raise VitEdgeError(f"{name} does not give {options.fps:g} frames a second {at} but {fps:g}", hint=hint)
