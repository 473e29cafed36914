"""The newest frame of each camera in, JPEGs of it out for whoever watches: drawn and encoded once for all of them.

    offer(frame, prediction)  ->  newest per camera  ->  drawn and encoded in a thread, as asked for  ->  ready(feed, picture)

Nothing is drawn that nobody asked for since the last one, so who does not take pictures costs nothing. Rate, width and the
thread's share of its time are bounded: who watches takes little from the cameras. Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError, first_line
from vitedge.pixels import to_rgb
from vitedge.runtime.opencv import load_cv2
from vitedge.runtime.overlay import draw
from vitedge.specs import Frame, ModelCard, Prediction

Look = Literal["plain", "labelled", "full"]
MAX_WIDTH = 1280  # of all looks but "full"
PERIOD_S = {"plain": 1 / 15, "labelled": 1 / 15, "full": 0.25}  # from one picture of a feed to the next, at least
QUALITY = {"plain": 80, "labelled": 80, "full": 92}
REST = 3.0  # times what a picture took the thread rests, so that it takes a quarter of one core at most
PATIENCE_S = 5.0  # how long `close` waits for the thread


@dataclass(frozen=True, slots=True)
class Feed:
    """Pictures of a camera. plain: without text, beside which a page has it; labelled: with it; full: likewise, of full size."""

    camera: int
    look: Look


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG of the frame that was offered as the `number`-th of its camera."""

    number: int
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class _Offer:
    number: int
    frame: Frame
    prediction: Prediction


class Pictures:
    """A thread that draws and encodes what is asked for.

    ready: called in that thread with each picture. remark: with a camera's number and why its picture lacks what the model
    said, "" where it does not.
    """

    def __init__(
        self, cameras: int, card: ModelCard, ready: Callable[[Feed, Picture], None], remark: Callable[[int, str], None]
    ) -> None:
        self._cv2 = load_cv2()
        self._card, self._ready, self._remark = card, ready, remark
        self._newest: list[_Offer | None] = [None] * cameras
        self._wanted: dict[Feed, None] = {}  # in the order in which they were asked for
        self._made: dict[Feed, Picture] = {}
        self._due: dict[Feed, float] = {}
        self._changed = threading.Condition()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="vitedge-pictures", daemon=True)
        self._thread.start()

    def offer(self, camera: int, frame: Frame, prediction: Prediction) -> None:
        """The newest frame of a camera, whose pixels must stay as they are; it waits for nobody."""
        with self._changed:
            last = self._newest[camera]
            self._newest[camera] = _Offer(last.number + 1 if last else 0, frame, prediction)
            if self._wanted:
                self._changed.notify()

    def ask(self, feed: Feed) -> Picture | None:
        """The picture of the newest frame, where it is there already; else the next one made is given to `ready`."""
        with self._changed:
            made, newest = self._made.get(feed), self._newest[feed.camera]
            if made is not None and newest is not None and made.number == newest.number:
                return made
            self._want(feed)
            return None

    def ask_next(self, feed: Feed) -> None:
        """One later than the last one made is given to `ready`, as soon as there is one."""
        with self._changed:
            self._want(feed)

    def close(self) -> None:
        """End the thread. It is left behind if it does not end soon."""
        with self._changed:
            self._end.set()
            self._changed.notify()
        self._thread.join(PATIENCE_S)

    def _want(self, feed: Feed) -> None:
        if feed not in self._wanted:
            self._wanted[feed] = None
            self._changed.notify()

    def _live(self) -> None:
        while (found := self._next()) is not None:
            feed, offer = found
            began = time.perf_counter()
            picture = Picture(offer.number, self._encoded(feed, offer))
            with self._changed:
                self._made[feed] = picture
                self._due[feed] = began + PERIOD_S[feed.look]
            self._ready(feed, picture)
            self._end.wait(REST * (time.perf_counter() - began))

    def _next(self) -> tuple[Feed, _Offer] | None:
        """The feed whose turn it is, with the frame for it, once there is one; None at the end."""
        with self._changed:
            while not self._end.is_set():
                now, patience = time.perf_counter(), None
                for feed in self._wanted:
                    offer, made, wait = self._newest[feed.camera], self._made.get(feed), self._due.get(feed, now) - now
                    if offer is None or (made is not None and made.number == offer.number):
                        continue
                    if wait <= 0:
                        del self._wanted[feed]
                        return feed, offer
                    patience = wait if patience is None else min(wait, patience)
                self._changed.wait(patience)
            return None

    def _encoded(self, feed: Feed, offer: _Offer) -> bytes:
        """The frame as a JPEG; empty where it cannot be one, as nobody shall wait for what never comes."""
        try:
            frame = replace(offer.frame, image=to_rgb(offer.frame.image, offer.frame.pixels), pixels="rgb")
            if feed.look != "full":
                frame = replace(frame, image=self._narrowed(frame.image))
            return self._jpeg(self._drawn(feed, frame, offer.prediction), QUALITY[feed.look])
        except Exception as error:  # noqa: BLE001  whatever is wrong with one frame is told, and the next one comes
            self._remark(feed.camera, f"no picture: {first_line(error)}")
            return b""

    def _drawn(self, feed: Feed, frame: Frame, prediction: Prediction) -> NDArray[np.uint8]:
        """The frame with what the model said, or alone where that cannot be drawn."""
        try:
            picture = draw(frame, prediction, self._card, text=feed.look != "plain")
        except VitEdgeError as error:
            self._remark(feed.camera, first_line(error))
            return frame.image
        self._remark(feed.camera, "")
        return picture

    def _narrowed(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        if width <= MAX_WIDTH:
            return image
        size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
        narrowed: NDArray[np.uint8] = self._cv2.resize(image, size, interpolation=self._cv2.INTER_AREA)
        return narrowed

    def _jpeg(self, picture: NDArray[np.uint8], quality: int) -> bytes:
        cv2: Any = self._cv2
        done, buffer = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not done:
            raise VitEdgeError(f"OpenCV cannot encode a picture of {picture.shape[1]} x {picture.shape[0]} pixels")
        return bytes(buffer)
