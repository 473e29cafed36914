"""What every source of frames is, and what may be asked of one.

Knows nothing of cameras, files or OpenCV.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, get_args

from vitedge.errors import VitEdgeError
from vitedge.specs import Frame

Transport = Literal["tcp", "udp"]
# up to the last @ before the path; or, where what follows a colon is no port, up to any: a password that had to be escaped
USER = re.compile(r"""(?<=://)([^/?#\s"']*@|[^/?#\s"':]+:(?!\d+([/?#]|$))[^\s"']*@)""")
SECRET = re.compile(
    r"""((?:[\w-]*(?:pass|pwd|pw|token|secret|key|auth|sig)[\w-]*)\s*=\s*)("[^"]*"|'[^']*'|[^&;?#!\s"']+)""", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class CameraOptions:
    """What may be asked of a source; None leaves it to the source.

    size: (width, height) to ask a camera for, and of the test pattern. fps: the rate to ask for; of `synthetic` and of folders
    in real time the pace. pixel_format: a FourCC such as MJPG or YUYV. transport: of rtsp://. timeout_s: without a frame for
    so long a source counts as lost. realtime: files and folders give frames at their own rate and only the newest, as a camera
    does. loop: files and folders begin again at their end. retry: cameras and streams that are lost are opened again, for ever.
    """

    size: tuple[int, int] | None = None
    fps: float | None = None
    pixel_format: str | None = None
    transport: Transport = "tcp"
    timeout_s: float = 5.0
    realtime: bool = False
    loop: bool = False
    retry: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and not (len(self.size) == 2 and all(0 < side < 2**15 for side in self.size)):
            raise VitEdgeError(f"a size is a width and a height of 1 to 32767 pixels, not {self.size}")
        for name, value in (("rate", self.fps), ("time-out", self.timeout_s)):
            if value is not None and not 0.001 <= value <= 10_000:
                raise VitEdgeError(f"a {name} of {value} makes no sense", hint="give a number from 0.001 to 10000")
        if self.pixel_format is not None and not re.fullmatch(r"[ -~]{4}", self.pixel_format):
            hint = "such as MJPG or YUYV; v4l2-ctl --list-formats lists those of a camera"
            raise VitEdgeError(f"a pixel format has four letters, which {self.pixel_format!r} has not", hint=hint)
        if self.transport not in get_args(Transport):
            raise VitEdgeError(f"a stream comes by {' or '.join(get_args(Transport))}, not by {self.transport!r}")


class Source(ABC):
    """Frames one after another, until they end or `close` is called.

    name: as it was given, without passwords. live: only the newest frame is kept for who is too slow, else every one is given.
    fps: frames a second, None where there is no such thing (images) or it is unknown. total: frames announced, None where
    unknown; a video's header may be wrong. skipped: one sentence for each picture, or end of a video, that was lost.
    captured: frames that have come, given: those handed out, dropped: those that a newer one replaced, or nobody took before
    the end; after `close` captured = given + dropped. state: empty where all is well, else a sentence of what is wrong.
    """

    live = False

    def __init__(self, name: str, fps: float | None = None, total: int | None = None) -> None:
        self.name = without_secrets(name)
        self.fps = fps
        self.total = total
        self.skipped: list[str] = []
        self.captured = self.given = self.dropped = 0

    @property
    def called(self) -> str:
        """The name as it stands in a sentence."""
        return f"camera {self.name}" if self.name.isdigit() else self.name

    @property
    def state(self) -> str:
        """What is wrong just now, in a sentence; empty where nothing is."""
        return ""

    def __iter__(self) -> Iterator[Frame]:
        return self

    @abstractmethod
    def __next__(self) -> Frame:
        """The next frame, uint8[H, W, 3] RGB; of a live source one that is newer than the last."""

    @abstractmethod
    def close(self) -> None:
        """End the stream and give the device or file back; calling it twice is safe, and so is another thread."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def without_secrets(text: str) -> str:
    """An address or pipeline without the user and password of its URLs, and without the value of what is called a secret."""
    return SECRET.sub(r"\1***", USER.sub("***@", text))
