"""A source in, frames out.

    "0", /dev/video0, csi://0, rtsp://..., http://..., gst://PIPELINE, "synthetic"   ─▶ the newest frame, from a reader thread
    clip.mp4, an image, a folder of images                                          ─▶ every frame, or in real time as above

Knows nothing of models or engines; OpenCV is loaded only where a video, a camera or a stream is opened, so that folders of
images need Pillow alone, and the test pattern nothing.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from vitedge.errors import VitEdgeError
from vitedge.images import SUFFIXES, list_images
from vitedge.runtime.capture import LiveSource
from vitedge.runtime.devices import CAMERA, CSI, DEVICE, PIPELINE, STREAMS, SYNTHETIC, open_feed
from vitedge.runtime.files import ImageSource, PacedFile, VideoSource
from vitedge.runtime.source import CameraOptions, Source, without_secrets
from vitedge.runtime.synthetic import burnt_in_number

__all__ = [
    "CameraOptions",
    "ImageSource",
    "LiveSource",
    "Source",
    "VideoSource",
    "burnt_in_number",
    "is_live",
    "open_source",
    "without_secrets",
]

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SOURCES = (
    "give a camera such as 0, /dev/video0 or csi://0, a stream (rtsp://, http://), gst://PIPELINE, "
    "a video file, an image, a folder of images, or synthetic"
)


def open_source(source: str, options: CameraOptions = CameraOptions()) -> Source:  # noqa: B008  frozen
    """Open a camera by its number, device or CSI connector, a stream, a pipeline, a video file, an image or a folder of images.

    A folder whose name is a number or "synthetic" is written "./0". Waits for the first frame of what is live. Raises
    VitEdgeError where nothing can be read from `source`, and MissingPackageError where that takes OpenCV and it is not
    installed.
    """
    if _is_camera(source):
        return LiveSource(source, lambda: open_feed(source, options), options, camera=True)
    if scheme := SCHEME.match(source):
        raise VitEdgeError(f"sources of the kind {scheme[0]} are not supported: {without_secrets(source)}", hint=SOURCES)
    file = _open_file(Path(source), options.loop)
    if not options.realtime:
        return file
    return LiveSource(source, lambda: PacedFile(file, options.fps), options, camera=False, skipped=file.skipped)


def is_live(source: str, options: CameraOptions = CameraOptions()) -> bool:  # noqa: B008
    """Whether a source, not yet open, is one of which only the newest frame counts."""
    return options.realtime or _is_camera(source)


def _is_camera(source: str) -> bool:
    """Whether something has no end of its own: all but files."""
    if CAMERA.fullmatch(source) or DEVICE.fullmatch(source) or CSI.fullmatch(source):
        return True
    return source == SYNTHETIC or source.startswith(PIPELINE) or source.lower().startswith(STREAMS)


def _open_file(path: Path, loop: bool) -> Source:
    _check_readable(path)
    pictures = path.is_dir() or path.suffix.lower() in SUFFIXES
    return ImageSource(list_images(path), str(path), loop) if pictures else VideoSource(path, loop)


def _check_readable(path: Path) -> None:
    """Name the reason where it is the file itself: OpenCV says only that it failed."""
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise VitEdgeError(f"{path} is empty", hint="was it copied completely?")
        if path.is_file():
            path.open("rb").close()
        if stat.S_ISFIFO(mode := path.stat().st_mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
            raise VitEdgeError(f"{path} is neither a file nor a folder", hint=SOURCES)
    except FileNotFoundError as error:
        raise VitEdgeError(f"there is no file or folder {path}", hint=SOURCES) from error
    except OSError as error:
        raise VitEdgeError(f"cannot read {path}: {error.strerror}") from error
