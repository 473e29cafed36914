"""One who watches: what is newest of all that it asked for, and how it is put on the wire.

    show(picture), tell(message)  ->  the newest of each camera, a few messages  ->  take: bytes to send

Belongs to one event loop. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence

from vitedge.runtime.web_pictures import Feed, Picture, Pictures

UNREAD_MESSAGES = 20  # kept for a viewer
FIGURES = 0xFFFFFFFF  # in place of a camera's number, before a message
BOUNDARY = b"--picture\r\n"
IDLE = float("inf")


class Viewer:
    """Who watches: the newest picture of each feed that it has not had, and messages.

    wrap: makes what is sent of a camera's picture, or of a message, whose camera is None. listens: whether it wants messages.
    busy_since: when what is being sent to it began to be.
    """

    def __init__(
        self, feeds: Sequence[Feed], wrap: Callable[[int | None, bytes], bytes] = lambda _, data: data, *, listens: bool = False
    ) -> None:
        self._feeds, self._wrap, self.listens = tuple(feeds), wrap, listens
        self.inbox: dict[Feed, Picture] = {}
        self._messages: deque[bytes] = deque(maxlen=UNREAD_MESSAGES)
        self.wake, self.leave = asyncio.Event(), asyncio.Event()
        self.busy_since = IDLE

    def ask(self, pictures: Pictures) -> None:
        """Begin with the newest frame of each feed."""
        for feed in self._feeds:
            made = pictures.ask(feed)
            if made is not None:
                self.show(feed, made)

    def show(self, feed: Feed, picture: Picture) -> None:
        """A picture, if it is of one of the feeds."""
        if feed in self._feeds:
            self.inbox[feed] = picture
            self.wake.set()

    def tell(self, message: bytes) -> None:
        """A message for the page."""
        self._messages.append(message)
        self.wake.set()

    def take(self) -> tuple[list[Feed], list[bytes]]:
        """What has come since the last time: the feeds that it is of, and what is to be sent."""
        self.wake.clear()
        taken, self.inbox = self.inbox, {}
        parts = [self._wrap(None, message) for message in self._messages]
        self._messages.clear()
        parts += [self._wrap(feed.camera, picture.jpeg) for feed, picture in taken.items() if picture.jpeg]
        return list(taken), parts


def as_part(camera: int | None, data: bytes) -> bytes:
    """A part of multipart/x-mixed-replace. The boundary after it comes along, without which some browsers show it one late."""
    return b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n%b" % (len(data), data, BOUNDARY)


def as_event(camera: int | None, data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % data


def as_frame(camera: int | None, data: bytes) -> bytes:
    """The camera's number or FIGURES and the length as 32 bits each, the highest first, then the data."""
    return struct.pack(">II", FIGURES if camera is None else camera, len(data)) + data
