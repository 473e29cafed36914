"""Pictures are made of the newest frame, once for all who ask, and only while somebody does."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.runtime.web import answer, card_of, frame_of
from vitedge.runtime.web_pictures import MAX_WIDTH, PERIOD_S, Feed, Picture, Pictures
from vitedge.specs import Frame, PixelFormat, Prediction, Task

pytest.importorskip("cv2")


class Studio:
    """Pictures of one or two cameras, with all that was made and remarked."""

    def __init__(self, task: Task = "classify") -> None:
        self.made: queue.Queue[tuple[Feed, Picture]] = queue.Queue()
        self.remarks: list[str] = []
        self.pictures = Pictures(
            2, card_of(task), lambda feed, picture: self.made.put((feed, picture)), lambda _, note: self.remarks.append(note)
        )

    def next(self, feed: Feed) -> Picture:
        found, picture = self.made.get(timeout=10)
        assert found == feed
        return picture

    def idle(self) -> bool:
        time.sleep(0.3)
        return self.made.empty()


@pytest.fixture
def studio() -> Iterator[Studio]:
    opened = Studio()
    yield opened
    opened.pictures.close()


def opened(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture.jpeg))


PLAIN, LABELLED, FULL = Feed(0, "plain"), Feed(0, "labelled"), Feed(0, "full")


def test_nothing_is_drawn_unless_asked_for_and_then_of_the_newest_frame(studio: Studio) -> None:
    for index in range(5):
        studio.pictures.offer(0, frame_of(index), answer())
    assert studio.idle()
    assert studio.pictures.ask(PLAIN) is None
    assert studio.next(PLAIN).number == 4
    assert studio.idle()  # it was asked for once
    made = studio.pictures.ask(PLAIN)
    assert made is not None and made.number == 4  # of the newest frame there is one already
    studio.pictures.ask_next(PLAIN)
    assert studio.idle()
    studio.pictures.offer(0, frame_of(5), answer())
    assert studio.next(PLAIN).number == 5


def test_who_asks_before_there_is_a_frame_gets_the_first(studio: Studio) -> None:
    assert studio.pictures.ask(LABELLED) is None and studio.idle()
    studio.pictures.offer(1, frame_of(0), answer())
    assert studio.idle()
    studio.pictures.offer(0, frame_of(0), answer())
    assert studio.next(LABELLED).number == 0


def test_a_large_frame_is_narrowed_and_a_snapshot_is_not(studio: Studio) -> None:
    studio.pictures.offer(0, frame_of(0, 1080, 1920), answer())
    sizes = {}
    for feed in (PLAIN, LABELLED, FULL):
        studio.pictures.ask(feed)
        sizes[feed.look] = opened(studio.next(feed)).size
    assert sizes == {"plain": (MAX_WIDTH, 720), "labelled": (MAX_WIDTH, 720), "full": (1920, 1080)}


def test_only_the_plain_picture_is_without_text(studio: Studio) -> None:
    studio.pictures.offer(0, Frame(np.full((480, 640, 3), 90, np.uint8), 0, 0), answer())
    changed = {}
    for feed in (PLAIN, LABELLED, FULL):
        studio.pictures.ask(feed)
        changed[feed.look] = bool((abs(np.asarray(opened(studio.next(feed))).astype(int) - 90) > 8).any())
    assert changed == {"plain": False, "labelled": True, "full": True}


@pytest.mark.parametrize("look", ["plain", "labelled"])
def test_a_heat_map_is_on_all_pictures(look: str) -> None:
    studio = Studio("dense")
    studio.pictures.offer(
        0, Frame(np.full((300, 300, 3), 90, np.uint8), 0, 0), Prediction((), np.ones((1, 4, 4), np.float32), answer().timing)
    )
    feed = Feed(0, "plain" if look == "plain" else "labelled")
    studio.pictures.ask(feed)
    assert abs(np.asarray(opened(studio.next(feed)))[200, 150].astype(int) - 90).max() > 40
    studio.pictures.close()
    assert studio.remarks == [""]


@pytest.mark.parametrize(
    ("pixels", "image"),
    [
        ("bgr", np.full((48, 64, 3), (200, 60, 60), np.uint8)),
        ("grey", np.full((48, 64), 100, np.uint8)),
        ("yuyv", np.full((48, 64, 2), 128, np.uint8)),
        ("nv12", np.full((72, 64), 128, np.uint8)),
    ],
)
def test_frames_of_any_format_become_pictures(studio: Studio, pixels: PixelFormat, image: np.ndarray) -> None:  # type: ignore[type-arg]
    studio.pictures.offer(0, Frame(image, 0, 0, pixels=pixels), answer())
    studio.pictures.ask(PLAIN)
    picture = opened(studio.next(PLAIN))
    assert picture.size == (320, 240)  # small ones are enlarged
    if pixels == "bgr":
        np.testing.assert_allclose(np.asarray(picture)[100, 100], (60, 60, 200), atol=6)


def test_what_cannot_be_drawn_is_shown_as_it_came_with_a_remark() -> None:
    studio = Studio("dense")
    studio.pictures.offer(0, frame_of(0), Prediction((), np.zeros((3, 4, 4), np.float32), answer().timing))
    studio.pictures.ask(PLAIN)
    assert opened(studio.next(PLAIN)).size == (320, 240)
    assert "one channel" in studio.remarks[-1]
    studio.pictures.offer(
        0, Frame(np.zeros((2, 70_000, 3), np.uint8), 1, 0), Prediction((), np.zeros((1, 4, 4), np.float32), answer().timing)
    )
    studio.pictures.ask(FULL)
    assert studio.next(FULL).jpeg == b""  # no JPEG is so wide
    assert studio.remarks[-1].startswith("no picture")
    studio.pictures.offer(0, frame_of(2), Prediction((), np.zeros((1, 4, 4), np.float32), answer().timing))
    studio.pictures.ask(FULL)
    assert studio.next(FULL).jpeg and studio.remarks[-1] == ""
    studio.pictures.close()


def test_the_rate_is_limited_and_cameras_take_turns(studio: Studio) -> None:
    feeds = [Feed(camera, "plain") for camera in (0, 1)]
    end, counts = time.perf_counter() + 1.0, {0: 0, 1: 0}
    for feed in feeds:
        studio.pictures.ask(feed)
    index = 0
    while time.perf_counter() < end:
        for camera in (0, 1):
            studio.pictures.offer(camera, frame_of(index), answer())
        index += 1
        while not studio.made.empty():
            feed, _ = studio.made.get()
            counts[feed.camera] += 1
            studio.pictures.ask_next(feed)
        time.sleep(0.002)
    assert all(1 <= count <= 1 / PERIOD_S["plain"] + 1 for count in counts.values()), counts
    assert abs(counts[0] - counts[1]) <= 2


def test_close_ends_the_thread_also_while_it_waits_or_works() -> None:
    for wanted in (False, True):
        studio = Studio()
        if wanted:
            studio.pictures.ask(PLAIN)
            studio.pictures.offer(0, frame_of(0, 2000, 3000), answer())
        studio.pictures.close()
        studio.pictures.close()
        studio.pictures.offer(0, frame_of(1), answer())
    assert not [thread for thread in threading.enumerate() if thread.name == "vitedge-pictures"]
