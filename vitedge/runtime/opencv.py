"""OpenCV, loaded late and quiet, with what it lacks: FFmpeg's options for one capture, and RGB of whatever a camera gives.

Knows nothing of sources.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.pixels import described

OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
QUIET = {  # read once, when OpenCV and its FFmpeg are loaded
    "OPENCV_LOG_LEVEL": "SILENT",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # AV_LOG_QUIET
    "OPENCV_FFMPEG_IS_THREAD_SAFE": "1",  # as FFmpeg is since version 4: else one URL that hangs holds up all others
    "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": "5",  # seconds that a camera may take for a picture; by default 10
}


def load_cv2() -> Any:
    """The module cv2, without its remarks on stderr: what goes wrong is said by our own errors.

    Raises MissingPackageError. OPENCV_LOG_LEVEL and OPENCV_FFMPEG_LOGLEVEL in the environment bring the remarks back.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import cv2
    except ImportError as error:
        raise MissingPackageError("opencv-python-headless", "camera") from error
    return cv2


def as_rgb(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture as OpenCV read it as uint8[H, W, 3] RGB: grey of 8 and 16 bits, BGR, or BGR with a fourth channel."""
    cv2 = load_cv2()
    if picture.dtype == np.uint16:
        picture = np.asarray((picture.astype(np.uint32) + 128) // 257, np.uint8)  # 65535 = 255 * 257
    channels = picture.shape[2] if picture.ndim == 3 else 1
    conversions = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in conversions:
        hint = "ask it for another pixel format, such as MJPG or YUYV"
        raise VitEdgeError(f"pictures that are {described(picture)} cannot be converted to RGB", hint=hint)
    converted: NDArray[np.uint8] = cv2.cvtColor(picture, conversions[channels])
    return converted


class _FFmpegOptions:
    """OpenCV takes FFmpeg's options from a variable of the environment alone, which it reads whenever something is opened.

    So those that want the same value may open at once, and others wait. What the user has put there stays.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._value: str | None = None
        self._users = 0

    @contextmanager
    def while_opening(self, value: str | None, patience_s: float) -> Iterator[None]:
        """Have `value` in the environment, None for none; a VitEdgeError where others hold it for too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._users or self._value == self._wanted(value), patience_s):
                raise VitEdgeError(f"other sources were being opened for {patience_s:g} s, so this one waited in vain")
            wanted = self._wanted(value)
            if wanted is not None and not self._users:
                os.environ[OPTIONS] = wanted
            self._value = wanted
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users and self._value is not None:
                    del os.environ[OPTIONS]
                    self._value = None
                self._changed.notify_all()

    def _wanted(self, value: str | None) -> str | None:
        """What to put into the environment: nothing, where the user has put something."""
        theirs = self._value is None and OPTIONS in os.environ
        return None if theirs else value


FFMPEG_OPTIONS = _FFmpegOptions()
