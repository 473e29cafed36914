"""Many frames at a time: in order, with the answers of one at a time, and no more of them in memory than is said."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.engines import Made
from vitedge.errors import VitEdgeError
from vitedge.images import decode, list_images
from vitedge.runtime import throughput
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.runtime.throughput import open_batcher, predict_all
from vitedge.specs import Frame


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Engine]:
    with open_engine(made.engines["openvino", "fp32"], streams=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def frames(made: Made) -> list[Frame]:
    return [Frame(decode(file.path), index, 0, file.path.name) for index, file in enumerate(list_images(made.images))]


def test_frames_come_in_order_with_the_answers_that_they_get_one_at_a_time(engine: Engine, frames: list[Frame]) -> None:
    alone = Predictor(engine, top_k=3)
    with open_batcher(engine, top_k=3) as batcher:
        answered = list(predict_all(batcher, iter(frames)))
        assert batcher.counts().answered == len(frames) and batcher.counts().batches < len(frames)
    assert [frame for frame, _ in answered] == frames
    for frame, prediction in answered:
        wanted = alone(frame)
        assert [label for label, _ in prediction.top] == [label for label, _ in wanted.top]
        np.testing.assert_allclose(prediction.array, wanted.array, atol=1e-4)


def test_no_more_frames_are_taken_than_are_on_their_way(
    engine: Engine, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    def endless() -> Iterator[Frame]:
        nonlocal taken
        for taken, frame in enumerate(itertools.cycle(frames), 1):  # noqa: B007
            yield frame

    with open_batcher(engine) as batcher:
        answers = predict_all(batcher, endless())
        for given, _ in enumerate(itertools.islice(answers, 200), 1):
            assert taken - given <= batcher.capacity
        answers.close()
    monkeypatch.setattr(throughput, "MEMORY", 2 * frames[0].image.nbytes)
    with open_batcher(engine) as batcher:
        answers = predict_all(batcher, endless())
        for given, _ in enumerate(itertools.islice(answers, 50), 1):
            assert taken - given <= 2
        answers.close()


def test_what_is_wrong_with_a_frame_is_raised_in_its_turn(engine: Engine, frames: list[Frame]) -> None:
    wrong = replace(frames[5], image=np.zeros((2, 2), np.uint8))
    with open_batcher(engine) as batcher:
        answers = predict_all(batcher, [*frames[:5], wrong, *frames[6:]])
        assert [frame.index for frame, _ in itertools.islice(answers, 5)] == list(range(5))
        with pytest.raises(VitEdgeError, match="must be a non-empty"):
            next(answers)


def test_an_error_of_the_source_comes_behind_the_answers_to_what_it_gave(engine: Engine, frames: list[Frame]) -> None:
    def failing() -> Iterator[Frame]:
        yield from frames[:10]
        raise OSError("the camera is gone")

    answered = []
    with open_batcher(engine) as batcher, pytest.raises(OSError, match="the camera is gone"):
        list(predict_all(batcher, failing()))
    with open_batcher(engine) as batcher, pytest.raises(OSError, match="the camera is gone"):
        for frame, _ in predict_all(batcher, failing()):
            answered.append(frame)
    assert answered == frames[:10]


def test_no_frames_are_no_answers(engine: Engine) -> None:
    with open_batcher(engine) as batcher:
        assert list(predict_all(batcher, [])) == []
