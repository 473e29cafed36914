"""A source in, frames out.

    "0" (a camera), clip.mp4, a folder of images, an image  ->  Source: an iterator of Frame, closed by who opened it

Damaged pictures are skipped and told in `Source.skipped`. Knows nothing of models or engines; OpenCV is loaded only where
a video or a camera is opened, so that folders of images need Pillow alone.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import SUFFIXES, ImageFile, list_images, stream
from vitedge.specs import Frame

CAMERA = re.compile(r"[0-9]{1,2}")  # from 100 on, OpenCV reads the number as the choice of a capture API
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SOURCES = "give a camera number such as 0, a video file, an image or a folder of images"
MAX_FPS = 1000  # a container without a rate reports its clock instead: 1000, 90000, ...
MAX_FRAMES = 2**40  # one without a count reports -1, 0 or its longest possible duration
MAX_DAMAGED = 1000  # undecodable frames in a row after which a file is given up


def open_source(source: str) -> Source:
    """Open a camera by its number ("0"), a video file, an image file or a folder of images.

    A folder whose name is a number is written "./0". Raises VitEdgeError where nothing can be read from `source`, and
    MissingPackageError where that takes OpenCV and it is not installed.
    """
    if scheme := SCHEME.match(source):
        raise VitEdgeError(f"sources of the kind {scheme[0]} are not supported: {source}", hint=SOURCES)
    if CAMERA.fullmatch(source):
        return VideoSource(int(source))
    path = Path(source)
    _check_readable(path)
    pictures = path.is_dir() or path.suffix.lower() in SUFFIXES
    return ImageSource(list_images(path)) if pictures else VideoSource(path)


def _check_readable(path: Path) -> None:
    """Name the reason where it is the file itself: OpenCV says only that it failed. Devices are left to OpenCV."""
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise VitEdgeError(f"{path} is empty", hint="was it copied completely?")
        if path.is_file():
            path.open("rb").close()
        path.stat()
    except FileNotFoundError as error:
        raise VitEdgeError(f"there is no file or folder {path}", hint=SOURCES) from error
    except OSError as error:
        raise VitEdgeError(f"cannot read {path}: {error.strerror}") from error


class Source(ABC):
    """Frames one after another, until they end or `close` is called.

    fps: frames a second, None where there is no such thing (images) or it is unknown. total: frames announced, None where
    unknown; a video's header may be wrong. skipped: one sentence for each picture, or end of a video, that was lost.
    """

    def __init__(self, fps: float | None, total: int | None) -> None:
        self.fps = fps
        self.total = total
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Frame]:
        return self

    @abstractmethod
    def __next__(self) -> Frame:
        """The next frame, uint8[H, W, 3] RGB."""

    @abstractmethod
    def close(self) -> None:
        """End the stream and give the device or file back; calling it twice is safe."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ImageSource(Source):
    """Image files in the order given, the next few decoded in advance; raises at its end if none of them could be."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        super().__init__(fps=None, total=len(files))
        self._images = stream(files, self.skipped)
        self._count = 0

    def __next__(self) -> Frame:
        file, image = next(self._images)
        self._count += 1
        return Frame(image, self._count - 1, time.perf_counter_ns(), file.path.name)

    def close(self) -> None:
        self._images = iter(())  # the stream before it ends with its last reference


class VideoSource(Source):
    """The frames of a video file, or of a camera given by its number, as fast as they are asked for.

    The first frame is read on opening, so that a source without any raises VitEdgeError there and not in the middle of a
    run. Damaged frames of a file are passed over. If fewer frames came than it announces, or a camera stopped, the end is
    a normal one and `skipped` tells. A picture of a camera may have waited in its driver before it was read; `captured_ns`,
    and so `Timing.capture_ms`, does not count that.
    """

    def __init__(self, source: Path | int) -> None:
        cv2 = load_cv2()
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        fps, total = (self._capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        super().__init__(fps if 0 < fps < MAX_FPS else None, int(total) if 0 < total < MAX_FRAMES else None)
        self._convert, self._to_rgb = cv2.cvtColor, cv2.COLOR_BGR2RGB
        self._source = source
        self._given = self._tried = 0
        self._ahead = self._read()
        if self._ahead is None:
            self.close()
            raise _unreadable(source)

    def __next__(self) -> Frame:
        frame, self._ahead = self._ahead or self._read(), None
        if frame is None:
            self._end()
            raise StopIteration
        return frame

    def close(self) -> None:
        self._ahead = None
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _read(self) -> Frame | None:
        """The next frame that decodes. OpenCV fails on each damaged one, and on the end; which it is only `total` tells."""
        attempts = 1 if self.total is None else max(1, min(self.total - self._tried, MAX_DAMAGED))
        for _ in range(attempts if self._capture is not None else 0):
            self._tried += 1
            decoded, picture = self._capture.read()
            if decoded:
                captured_ns = time.perf_counter_ns()
                self._given += 1
                return Frame(self._convert(picture, self._to_rgb), self._given - 1, captured_ns)
        return None

    def _end(self) -> None:
        """Close, and record an end that came too early; after `close` none does."""
        if self._capture is None:
            return
        if isinstance(self._source, int):
            self.skipped.append(f"camera {self._source} stopped after {self._given} frames")
        elif self.total is not None and self._given < self.total:
            self.skipped.append(f"{self._source} announces {self.total} frames, only {self._given} could be decoded")
        self.close()


def _unreadable(source: Path | int) -> VitEdgeError:
    if isinstance(source, int):
        hint = "is it plugged in, free, and are you allowed to use it? On Linux, ls -l /dev/video* lists the cameras"
        return VitEdgeError(f"camera {source} cannot be opened or gives no picture", hint=hint)
    return VitEdgeError(f"{source} holds no frame that can be decoded", hint="is it a video, and was it copied completely?")


def load_cv2() -> Any:
    """The module cv2, without its remarks on stderr: what goes wrong is said by our own errors.

    Raises MissingPackageError. OPENCV_LOG_LEVEL and OPENCV_FFMPEG_LOGLEVEL in the environment bring the remarks back.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # both are read once, when OpenCV and its FFmpeg are loaded
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    try:
        import cv2
    except ImportError as error:
        raise MissingPackageError("opencv-python-headless", "camera") from error
    return cv2
