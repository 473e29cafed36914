"""What Linux says of a camera, of which OpenCV tells only whether it worked.

    /dev/video0  ->  why it cannot be used; the pixel formats and sizes that it offers

Asked only where something went wrong. The calls are those of linux/videodev2.h, the same on all 64-bit machines.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST = 64  # formats of a camera, and sizes of a format, that are asked for
CAPTURE = 0x1 | 0x1000  # V4L2_CAP_VIDEO_CAPTURE, and that in several planes
VIDEO_CAPTURE, MMAP, DISCRETE = 1, 1, 1
READ, BOTH = 2, 3  # ways that the bytes of a call go
QUERYCAP, ENUM_FMT, REQBUFS, ENUM_FRAMESIZES = (READ, 0), (BOTH, 2), (BOTH, 8), (BOTH, 74)  # VIDIOC_...: way and number
DEVICES = Path("/dev")


def why_unusable(path: Path) -> tuple[str, str]:
    """A part of a sentence on why OpenCV gets no picture from a device, and a hint."""
    try:
        with _opened(path) as device:
            return _why_opened_is_unusable(path, device)
    except FileNotFoundError:
        return f"there is no {path}", f"the cameras here: {cameras()}"
    except PermissionError:
        return f"you are not allowed to use {path}", "sudo usermod -aG video $USER, then log in again"
    except OSError as error:
        if error.errno == errno.EBUSY:
            return _busy(path)
        return f"{path}: {error.strerror}", f"is it plugged in? The cameras here: {cameras()}"


def offered(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The sizes that a camera offers, by pixel format; empty where it does not say."""
    found: dict[str, list[tuple[int, int]]] = {}
    with suppress(OSError), _opened(path) as device:
        for index in range(MOST):
            answer = _ask(device, ENUM_FMT, struct.pack("<II56x", index, VIDEO_CAPTURE))
            if answer is None:
                break
            fourcc = answer[44:48]
            found[fourcc.decode("latin-1")] = list(_sizes(device, fourcc))
    return found


def cameras() -> str:
    """The devices that may be cameras, for a hint."""
    numbered = (path for path in DEVICES.glob("video*") if path.name[5:].isdigit())
    return ", ".join(map(str, sorted(numbered, key=lambda path: int(path.name[5:])))) or "none"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    device = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield device
    finally:
        os.close(device)


def _why_opened_is_unusable(path: Path, device: int) -> tuple[str, str]:
    answer = _ask(device, QUERYCAP, bytes(104))
    if answer is None:
        return f"{path} is no camera", f"the cameras here: {cameras()}"
    of_driver, of_device = struct.unpack_from("<II", answer, 84)
    if not (of_device or of_driver) & CAPTURE:
        return f"{path} takes no pictures", f"a camera has several devices, of which one does; here are {cameras()}"
    try:
        _ioctl(device, REQBUFS, struct.pack("<III8x", 0, VIDEO_CAPTURE, MMAP))  # asks for no buffers, which changes nothing
    except OSError as error:
        if error.errno == errno.EBUSY:
            return _busy(path)
    return "it gives no picture", "unplug it and plug it in again, or ask it for another size or pixel format"


def _busy(path: Path) -> tuple[str, str]:
    return f"{path} is busy", f"another program uses it, which fuser -v {path} names"


def _sizes(device: int, fourcc: bytes) -> Iterator[tuple[int, int]]:
    """The sizes of a pixel format; of one with a whole range the smallest and the largest."""
    for index in range(MOST):
        answer = _ask(device, ENUM_FRAMESIZES, struct.pack("<I4s36x", index, fourcc))
        if answer is None:
            return
        kind, *numbers = struct.unpack_from("<7I", answer, 8)
        if kind != DISCRETE:
            yield from ((numbers[0], numbers[3]), (numbers[1], numbers[4]))
            return
        yield numbers[0], numbers[1]


def _ask(device: int, call: tuple[int, int], question: bytes) -> bytes | None:
    """The answer of the driver; None where it has none."""
    try:
        return _ioctl(device, call, question)
    except OSError:
        return None


def _ioctl(device: int, call: tuple[int, int], question: bytes) -> bytes:
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "there is no V4L2")
    import fcntl  # which Windows lacks

    direction, number = call
    return fcntl.ioctl(device, direction << 30 | len(question) << 16 | ord("V") << 8 | number, question)
