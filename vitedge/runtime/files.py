"""A video file, an image or a folder of images in, every frame out; or, paced, what a camera would have made of it.

Damaged pictures are passed over and told in `Source.skipped`. A video takes OpenCV, images need Pillow alone.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, stream
from vitedge.runtime.opencv import FFMPEG_OPTIONS, as_rgb, load_cv2
from vitedge.runtime.source import Source
from vitedge.specs import Frame

MAX_FPS = 1000  # a container without a rate reports its clock instead: 1000, 90000, ...
MAX_FRAMES = 2**40  # one without a count reports -1, 0 or its longest possible duration
MAX_DAMAGED = 1000  # undecodable frames in a row after which a file is given up
OPENING_S = 30.0  # that others, which are opening streams, may hold up a file
CLOSING_S = 2.0  # that another thread gets to come back from a read
DEFAULT_FPS = 25.0  # in real time, of what has no rate of its own
# What containers call the codec of a video: MP4 and MOV after the box `stsd`, AVI after `strhvids`, Matroska and WebM plainly.
CODEC = re.compile(rb"stsd.{12}([ -~]{4})|strh.{4}vids([ -~]{4})|(V_[A-Z0-9/_]{3,24})", re.DOTALL)
HEADER = 2**20  # bytes at either end of a file in which that stands


class ImageSource(Source):
    """Image files in the order given, the next few decoded in advance; raises at its end if none of them could be."""

    def __init__(self, files: Sequence[ImageFile], name: str, loop: bool = False) -> None:
        super().__init__(name, total=None if loop else len(files))
        self._files, self._loop = files, loop
        self._images = stream(files, self.skipped)

    def __next__(self) -> Frame:
        try:
            file, image = next(self._images)
        except StopIteration:
            if not (self._loop and self.given):
                raise
            self._images = stream(self._files, [])  # what is damaged has been told in the first round
            file, image = next(self._images)
        self.captured += 1
        self.given += 1
        return Frame(image, self.given - 1, time.perf_counter_ns(), file.path.name, source=self.name)

    def close(self) -> None:
        """End the stream; pictures that are being decoded are let go."""
        self._images = iter(())  # the stream before it ends with its last reference
        self._loop = False


class VideoSource(Source):
    """The frames of a video file, as fast as they are asked for.

    The first frame is read on opening, so that a file without any raises VitEdgeError there and not in the middle of a run.
    Damaged frames are passed over. If fewer came than it announces, the end is a normal one and `skipped` tells.
    """

    def __init__(self, path: Path, loop: bool = False) -> None:
        super().__init__(str(path))
        self._path, self._loop = path, loop
        self._reading = threading.Lock()
        self._closed = False
        self._capture = _open_file(path)
        self.fps, self._announced = rate_and_total(self._capture)
        self.total = None if loop else self._announced
        self._tried = self._decoded = 0  # in this round
        self._ahead: Frame | None = None
        self._ahead = self._read()
        if self._ahead is None:
            opened = self._capture.isOpened()
            self.close()
            raise _unreadable(path, opened)

    def __next__(self) -> Frame:
        frame = self._read()
        if frame is None and self._loop and self._decoded and not self._closed:
            self._rewind()
            frame = self._read()
        if frame is None:
            self._end()
            raise StopIteration
        self.given += 1
        return frame

    def close(self) -> None:
        """End the stream and close the file."""
        self._closed = True  # which the thread that reads sees, where it takes longer than can be waited for
        if self._reading.acquire(timeout=CLOSING_S):
            self.dropped += self._ahead is not None
            self._ahead = None
            self._capture.release()
            self._reading.release()

    def _read(self) -> Frame | None:
        """The next frame that decodes. OpenCV fails on each damaged one, and on the end; which it is only the total tells."""
        attempts = 1 if self._announced is None else max(1, min(self._announced - self._tried, MAX_DAMAGED))
        with self._reading:
            frame, self._ahead = self._ahead, None
            while frame is None and attempts and not self._closed:
                attempts -= 1
                self._tried += 1
                decoded, picture = self._capture.read()
                if decoded:
                    frame = Frame(as_rgb(picture), self.captured, time.perf_counter_ns(), source=self.name)
                    self._decoded += 1
                    self.captured += 1
            if self._closed:  # by another thread, which may not have waited so long
                self._capture.release()
            return frame

    def _rewind(self) -> None:
        """Begin again, by opening the file anew: seeking is off by some frames in many."""
        self._tell_end()
        with self._reading:
            self._capture.release()
            self._capture = _open_file(self._path)
            self._tried = self._decoded = 0

    def _end(self) -> None:
        """Close, and record an end that came too early; after `close` none does."""
        if not self._closed:
            self._tell_end()
            self.close()

    def _tell_end(self) -> None:
        if self._announced is None or self._decoded >= self._announced:
            return
        sentence = f"{self._path} announces {self._announced} frames, only {self._decoded} could be decoded"
        if sentence not in self.skipped:  # as it would be in each round
            self.skipped.append(sentence)


class PacedFile:
    """A file or folder as a feed for the reader thread of a live source: held back to the rate it was taken at."""

    def __init__(self, source: Source, fps: float | None) -> None:
        self._source = source
        self.fps: float | None = source.fps or fps or DEFAULT_FPS
        self.pace: float | None = self.fps
        self.total = source.total
        self.damaged = 0  # the source tells itself

    def read(self) -> tuple[NDArray[np.uint8], str] | None:
        """The next frame of the file, as of `Feed`."""
        frame = next(self._source, None)
        return None if frame is None else (frame.image, frame.name)

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def _open_file(path: Path) -> Any:
    cv2 = load_cv2()
    with FFMPEG_OPTIONS.while_opening(None, OPENING_S):
        return cv2.VideoCapture(str(path))


def rate_and_total(capture: Any) -> tuple[float | None, int | None]:
    """Frames a second and in all, as far as they are known."""
    cv2 = load_cv2()
    fps, total = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
    return (fps if 0 < fps < MAX_FPS else None, int(total) if 0 < total < MAX_FRAMES else None)


def _unreadable(path: Path, opened: bool) -> VitEdgeError:
    """What is wrong with a file that gives no frame; OpenCV says only whether it could open it."""
    codec = None if opened else _codec(path)
    if codec:
        hint = "convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        return VitEdgeError(f"{path} is coded as {codec}, for which this OpenCV has no decoder", hint=hint)
    return VitEdgeError(f"{path} holds no frame that can be decoded", hint="is it a video, and was it copied completely?")


def _codec(path: Path) -> str | None:
    """What a video says that it is coded as."""
    with path.open("rb") as file:
        head = file.read(HEADER)
        file.seek(max(HEADER, path.stat().st_size - HEADER))  # MP4 has it in front or at the end
        found = CODEC.search(head) or CODEC.search(file.read())
    return next(name for name in found.groups() if name).decode("ascii").strip() if found else None
