"""A stream yields frames with their answers, the newest of cameras and all of files, and closes everything however it ends."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engines import IMAGES, ROOT, Made
from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.runtime import live
from vitedge.runtime.camera import CameraOptions, Source, burnt_in_number, open_source
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.live import Stream, distinct, stream
from vitedge.runtime.overlay import open_recorder
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Prediction

pytest.importorskip("openvino")
pytest.importorskip("torch")
pytest.importorskip("cv2")

FRAMES = 10
SMALL = CameraOptions(size=(160, 120), fps=60)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with open_recorder(path, 12.5) as recorder:
        for index in range(FRAMES):
            recorder.write(np.full((64, 96, 3), 20 * index, np.uint8))
    return path


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Engine]:
    with open_engine(made.engines["openvino", "int8"]) as opened:
        yield opened


class Opened:
    """The real engines and sources of a stream, kept to look at after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.things: list[Any] = []
        self.threads = set(threading.enumerate())
        for name in ("open_engine", "open_source"):
            monkeypatch.setattr(live, name, self._kept(getattr(live, name)))

    def _kept(self, opens: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*arguments: Any) -> Any:
            self.things.append(opens(*arguments))
            return self.things[-1]

        return keep

    def assert_all_closed(self) -> None:
        assert self.things
        for thing in self.things:
            if isinstance(thing, Engine):
                with pytest.raises(EngineError, match="is closed"):
                    thing.run(1)
            elif isinstance(thing, Source):
                assert list(thing) == []
                assert thing.captured == thing.given + thing.dropped
        left = [thread.name for thread in set(threading.enumerate()) - self.threads]
        assert not [name for name in left if name.startswith(("vitedge-source", "vitedge-batcher", "reader"))]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


class Failing:
    """An engine, or a fork of one, that fails from its `after`-th run on."""

    def __init__(self, engine: Engine, after: int) -> None:
        self._engine, self.left = engine, after
        self.manifest, self.max_batch, self.streams = engine.manifest, engine.max_batch, engine.streams
        self.write, self.close = engine.write, engine.close

    def run(self, count: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise EngineError("injected")
        return self._engine.run(count)

    def fork(self) -> Failing:
        return Failing(self._engine.fork(), self.left)


def start(made: Made, *sources: object, **options: Any) -> Stream:
    return stream([str(source) for source in sources], made.engines["openvino", "int8"], top_k=3, **options)


def by_source(answers: list[tuple[Frame, Prediction]]) -> dict[str, list[Frame]]:
    frames: dict[str, list[Frame]] = {}
    for frame, _ in answers:
        frames.setdefault(frame.source, []).append(frame)
    return frames


def assert_belongs(engine: Engine, frame: Frame, prediction: Prediction) -> None:
    """The answer is that of the frame's own picture; answers of test pictures differ by far more than this."""
    np.testing.assert_allclose(prediction.array, Predictor(engine)(frame).array, atol=0.05)


# one file or folder


def test_every_frame_comes_in_order_with_the_answer_a_predictor_gives(made: Made, engine: Engine, opened: Opened) -> None:
    answers = start(made, made.images)
    given = list(answers)
    opened.assert_all_closed()
    files = list_images(made.images)
    assert [(frame.index, frame.name) for frame, _ in given] == [(i, file.path.name) for i, file in enumerate(files)]
    assert len(files) == IMAGES and answers.notes == []
    assert {frame.source for frame, _ in given} == {str(made.images)} == set(answers.names)
    predictor = Predictor(engine, 3)
    for (_, prediction), file in itertools.islice(zip(given, files, strict=True), 8):
        expected = predictor(Frame(decode(file.path), 0, 0))
        np.testing.assert_array_equal(prediction.array, expected.array)
        assert prediction.top == expected.top and len(prediction.top) == 3


@pytest.mark.parametrize("limit", [0, 4])
def test_a_limit_ends_the_stream_there(made: Made, clip: Path, opened: Opened, limit: int) -> None:
    answers = start(made, clip, limit=limit)
    assert len(list(answers)) == limit == answers.counts(0).processed
    opened.assert_all_closed()
    counts = answers.counts(0)
    assert counts.captured == counts.processed + counts.dropped


@pytest.mark.parametrize("limit", [-1, 1.5, float("nan")])
def test_a_limit_that_is_never_met_is_refused(made: Made, clip: Path, limit: Any) -> None:
    with pytest.raises(VitEdgeError, match="a whole number from 0 on"):
        start(made, clip, limit=limit)


def test_a_source_may_be_a_path_and_not_be_blank(made: Made, clip: Path) -> None:
    engine = made.engines["openvino", "int8"]
    assert len(list(stream(clip, engine, limit=2))) == len(list(stream([clip], engine, limit=2))) == 2
    for blank in ("", " ", [], ["synthetic", ""]):
        with pytest.raises(VitEdgeError, match="no source was given"):
            stream(blank, engine)


def test_closed_early_it_closes_all_and_ends(made: Made, clip: Path, opened: Opened) -> None:
    answers = start(made, clip)
    for _ in range(3):
        next(answers)
    answers.close()
    answers.close()
    opened.assert_all_closed()
    assert list(answers) == []


@pytest.mark.parametrize("source", ["clip", "synthetic", "both"])
def test_forgotten_half_way_it_closes_all_too(made: Made, clip: Path, opened: Opened, source: str) -> None:
    sources = [str(clip), "synthetic"] if source == "both" else [str(clip) if source == "clip" else source]
    for index, _ in enumerate(start(made, *sources, options=SMALL)):
        if index == 1:
            break
    gc.collect()
    opened.assert_all_closed()


def test_an_error_of_who_reads_it_closes_all(made: Made, clip: Path, opened: Opened) -> None:
    with pytest.raises(KeyError), start(made, clip) as answers:
        for _ in answers:
            raise KeyError
    opened.assert_all_closed()


def test_a_callback_gets_each_answer_and_its_error_ends_the_stream(made: Made, clip: Path, opened: Opened) -> None:
    called: list[int] = []
    assert len(list(start(made, clip, on_result=lambda frame, _: called.append(frame.index)))) == FRAMES
    assert called == list(range(FRAMES))

    def stops(frame: Frame, prediction: Prediction) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(start(made, clip, on_result=stops))
    opened.assert_all_closed()


def test_an_engine_that_was_given_stays_open_and_one_by_its_name_is_found(
    made: Made, engine: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(stream(str(clip), engine))) == FRAMES
    assert engine.run(1).shape == (1, 10)
    monkeypatch.chdir(made.root)
    name = made.engines["openvino", "int8"].parent.name
    assert len(list(stream(str(clip), f"{name}/int8"))) == FRAMES


def test_what_does_not_open_is_an_error_and_closes_what_did(made: Made, tmp_path: Path, opened: Opened) -> None:
    for sources in (["none.mp4"], ["synthetic", str(tmp_path / "none.mp4"), "synthetic"]):
        with pytest.raises(VitEdgeError, match=r"no file or folder .*none\.mp4"):
            start(made, *sources, options=SMALL)
    with pytest.raises(VitEdgeError, match="no source was given"):
        stream([], made.engines["openvino", "int8"])
    with pytest.raises(VitEdgeError, match="limit must be"):
        start(made, "synthetic", limit=-1)
    opened.assert_all_closed()


def test_pictures_that_cannot_be_decoded_are_told(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.images, tmp_path / "images"))
    (folder / "Bag" / "broken.png").write_bytes(b"no picture")
    answers = start(made, folder)
    assert len(list(answers)) == IMAGES
    assert len(answers.notes) == 1 and "broken.png" in answers.notes[0]


def test_pictures_of_any_size_and_mode_go_through(made: Made, tmp_path: Path) -> None:
    for name, mode, size in (
        ("a.png", "L", (1, 1)),
        ("b.png", "RGBA", (500, 3)),
        ("c.jpg", "CMYK", (28, 28)),
        ("d.gif", "P", (29, 400)),
    ):
        Image.new(mode, size).save(tmp_path / name)
    answers = list(start(made, tmp_path))
    assert [frame.name for frame, _ in answers] == ["a.png", "b.png", "c.jpg", "d.gif"]
    assert all(sum(probability for _, probability in prediction.top) <= 1.0001 for _, prediction in answers)


# one camera


def measured(made: Made, *arguments: object) -> dict[str, Any]:
    """The figures of tests/soak/camera.py, in a process of its own."""
    command = [sys.executable, "-m", "tests.soak.camera", made.engines["openvino", "int8"], *arguments]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_a_slow_engine_gets_the_newest_frames_and_every_other_is_counted(made: Made) -> None:
    found = measured(made, "--frames", 120, "--seconds", 60, "--fps", 60, "--least-ms", 40)
    assert found["answers"] == found["processed"] == 120 and found["ascending"]
    assert found["behind_most"] <= 2, found
    assert found["captured"] == found["processed"] + found["dropped"] and found["dropped"] > 60
    assert found["dropped"] == found["gaps"] and found["dropped_by_source"] in (found["dropped"], found["dropped"] - 1)
    assert found["latency_apart"][0] <= 1, found


def test_closing_from_another_thread_ends_the_wait_for_a_frame(made: Made, opened: Opened) -> None:
    slow = CameraOptions(size=(160, 120), fps=0.05)
    for sources in (["synthetic"], ["synthetic", "synthetic"]):
        answers = start(made, *sources, options=slow)
        for _ in sources:
            next(answers)
        threading.Timer(0.3, answers.close).start()
        began = time.perf_counter()
        assert list(answers) == []
        assert time.perf_counter() - began < 15, "the next frame would have come after 20 s"
        answers.close()
    opened.assert_all_closed()


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_the_engine_is_raised_after_the_answers_before_it(engine: Engine, opened: Opened, count: int) -> None:
    failing = Failing(engine, 30)
    answers = stream(["synthetic"] * count, failing, options=SMALL)  # type: ignore[arg-type]
    given = []
    with pytest.raises(EngineError, match="injected"):
        for answer in answers:
            given.append(answer)  # noqa: PERF402  those before the error are to be kept
    opened.assert_all_closed()
    assert list(answers) == [] and len(given) == sum(answers.counts(number).processed for number in range(count))
    assert len(given) == 29 if count == 1 else given, "the first run was before any frame"


# several


def test_four_cameras_get_equal_shares_and_each_answer_is_that_of_its_frame(made: Made, engine: Engine, opened: Opened) -> None:
    answers = start(made, *["synthetic"] * 4, options=SMALL, limit=200)
    given = list(answers)
    opened.assert_all_closed()
    assert answers.names == ("synthetic", "synthetic #2", "synthetic #3", "synthetic #4")
    shares = np.array([answers.counts(number).processed for number in range(4)], float)
    assert shares.sum() ** 2 / (4 * np.square(shares).sum()) >= 0.95, shares
    for number, (name, frames) in enumerate(sorted(by_source(given).items())):
        numbers = [burnt_in_number(frame.image) for frame in frames]
        assert numbers == sorted(set(numbers)) == [frame.index for frame in frames]
        assert {answers.number(frame) for frame in frames} == {number} and name == answers.names[number]
        counts = answers.counts(number)
        assert counts.captured == counts.processed + counts.dropped and counts.processed == len(frames)
    for frame, prediction in given[::10]:
        assert_belongs(engine, frame, prediction)
    arrays = np.stack([prediction.array for _, prediction in given[::10]])
    assert np.ptp(arrays, axis=0).max() > 0.5, "else a mistaken answer would not show"


def test_several_folders_give_all_their_pictures_each_in_order(made: Made, engine: Engine, opened: Opened) -> None:
    folders = sorted(path for path in made.images.iterdir() if path.is_dir())[:4]
    answers = start(made, *folders)
    given = list(answers)
    opened.assert_all_closed()
    for folder in folders:
        names = [frame.name for frame in by_source(given)[str(folder)]]
        assert names == [file.path.name for file in list_images(folder)]
    for frame, prediction in given:
        assert_belongs(engine, frame, prediction)


def test_sources_that_end_leave_the_others_alone(made: Made, clip: Path, opened: Opened) -> None:
    answers = start(made, clip, "synthetic", options=SMALL, limit=60)
    frames = by_source(list(answers))
    opened.assert_all_closed()
    assert len(frames[str(clip)]) == FRAMES and len(frames["synthetic"]) == 60 - FRAMES
    assert answers.notes == []


def test_a_source_that_fails_for_good_ends_the_others_not_and_is_raised_at_their_end(
    made: Made, clip: Path, tmp_path: Path, opened: Opened
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    answers = start(made, tmp_path, clip)
    given = []
    with pytest.raises(VitEdgeError, match="none of 1 images could be decoded"):
        for answer in answers:
            given.append(answer)  # noqa: PERF402  those before the error are to be kept
    assert len(given) == FRAMES
    answers = start(made, tmp_path, "synthetic", options=SMALL, limit=30)
    assert len(list(answers)) == 30
    assert any("none of 1 images could be decoded" in note for note in answers.notes)
    with pytest.raises(VitEdgeError, match="none of 1 images"):
        next(start(made, tmp_path))
    opened.assert_all_closed()


def test_of_a_slow_consumer_each_source_has_one_answer_waiting_and_no_more(made: Made, opened: Opened) -> None:
    answers = start(made, "synthetic", "synthetic", options=SMALL)
    for _ in range(4):
        next(answers)
    time.sleep(1.0)
    for number, source in enumerate(answers.sources):
        assert source.given - answers.counts(number).processed <= 1
    captured = [source.captured for source in answers.sources]
    waited, fresh = [[next(answers)[0] for _ in answers.sources] for _ in range(2)]
    assert {frame.source for frame in waited} == {frame.source for frame in fresh} == set(answers.names)
    assert all(frame.index >= captured[answers.number(frame)] - 1 for frame in fresh), "the newest follows what waited"
    answers.close()
    opened.assert_all_closed()


def test_names_are_made_distinct() -> None:
    assert distinct(["a", "b", "a", "a"]) == ("a", "b", "a #2", "a #3")
    assert distinct([]) == ()


def test_a_video_in_real_time_ends_by_itself(made: Made, clip: Path, opened: Opened) -> None:
    answers = start(made, clip, options=CameraOptions(realtime=True))
    given = list(answers)
    opened.assert_all_closed()
    counts = answers.counts(0)
    assert counts.captured == FRAMES == counts.processed + counts.dropped and len(given) == counts.processed > 0
    with open_source(str(clip)) as source:
        assert len(list(source)) == FRAMES
