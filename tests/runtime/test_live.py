"""A live run yields frames with their answers, records on the way, and closes everything however it ends."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engines import IMAGES, Made
from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.runtime import live
from vitedge.runtime.camera import Source, open_source
from vitedge.runtime.engine import Engine, open_engine
from vitedge.runtime.overlay import Recorder, open_recorder
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Prediction

pytest.importorskip("openvino")
pytest.importorskip("torch")
pytest.importorskip("cv2")

FRAMES = 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with open_recorder(path, 12.5) as recorder:
        for index in range(FRAMES):
            recorder.write(np.full((64, 96, 3), 20 * index, np.uint8))
    return path


class Opened:
    """The real engine, source and recorder of a run, kept to look at after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.things: list[Any] = []
        self.saved: list[Path] = []
        for name in ("open_engine", "open_source", "open_recorder"):
            monkeypatch.setattr(live, name, self._kept(getattr(live, name)))

    def _kept(self, opens: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*arguments: Any) -> Any:
            self.things.append(opens(*arguments))
            if isinstance(self.things[-1], Recorder):
                self.saved.append(arguments[0])
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
        for path in self.saved:  # a finished video is one that can be read, too: the tests do
            assert path.exists() and not list(path.parent.glob(".*.partial*"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


def start(
    made: Made, source: Path, save: Path | None = None, limit: int | None = None, notes: list[str] | None = None
) -> Iterator[tuple[Frame, Prediction]]:
    engine = made.engines["openvino", "int8"]
    return live.run(engine, str(source), save=save, top_k=3, limit=limit, notes=[] if notes is None else notes)


def frames_in(video: Path) -> int:
    with open_source(str(video)) as source:
        return len(list(source))


def test_every_frame_comes_in_order_with_the_answer_a_predictor_gives(made: Made, opened: Opened) -> None:
    notes: list[str] = []
    answers = list(start(made, made.images, notes=notes))
    opened.assert_all_closed()
    files = list_images(made.images)
    assert [(frame.index, frame.name) for frame, _ in answers] == [(i, file.path.name) for i, file in enumerate(files)]
    assert len(files) == IMAGES and notes == []
    with open_engine(made.engines["openvino", "int8"]) as engine:
        predictor = Predictor(engine, 3)
        for (_, given), file in itertools.islice(zip(answers, files, strict=True), 8):
            expected = predictor(Frame(decode(file.path), 0, 0))
            np.testing.assert_array_equal(given.array, expected.array)
            assert given.top == expected.top and len(given.top) == 3


def test_a_recording_has_the_frames_and_the_rate_of_its_source(made: Made, clip: Path, tmp_path: Path, opened: Opened) -> None:
    assert len(list(start(made, clip, tmp_path / "out.mp4"))) == FRAMES
    opened.assert_all_closed()
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert source.fps == 12.5
        assert len(list(source)) == FRAMES


def test_pictures_are_recorded_at_a_rate_of_their_own(made: Made, tmp_path: Path) -> None:
    list(start(made, made.images, tmp_path / "out.avi", limit=4))
    with open_source(str(tmp_path / "out.avi")) as source:
        assert source.fps == live.DEFAULT_FPS
        assert len(list(source)) == 4


def test_a_limit_ends_the_run_there(made: Made, clip: Path, opened: Opened) -> None:
    assert len(list(start(made, clip, limit=4))) == 4
    opened.assert_all_closed()


def test_abandoned_early_it_closes_all_and_keeps_what_was_recorded(
    made: Made, clip: Path, tmp_path: Path, opened: Opened
) -> None:
    answers = start(made, clip, tmp_path / "out.mp4")
    for _ in range(3):
        next(answers)
    answers.close()  # type: ignore[attr-defined]
    opened.assert_all_closed()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert frames_in(tmp_path / "out.mp4") == 3


def test_forgotten_half_way_it_closes_all_too(made: Made, clip: Path, tmp_path: Path, opened: Opened) -> None:
    for index, _ in enumerate(start(made, clip, tmp_path / "out.mp4")):
        if index == 1:
            break
    opened.assert_all_closed()
    assert frames_in(tmp_path / "out.mp4") == 2


def test_an_error_of_who_reads_it_closes_all(made: Made, clip: Path, tmp_path: Path, opened: Opened) -> None:
    answers = start(made, clip, tmp_path / "out.mp4")
    next(answers)
    with pytest.raises(KeyError):
        answers.throw(KeyError())  # type: ignore[attr-defined]
    opened.assert_all_closed()
    assert frames_in(tmp_path / "out.mp4") == 1


def test_a_source_or_a_place_to_save_that_does_not_open_closes_what_did(
    made: Made, clip: Path, tmp_path: Path, opened: Opened
) -> None:
    for source, save in ((tmp_path / "none.mp4", None), (clip, tmp_path / "out.gif")):
        with pytest.raises(VitEdgeError):
            list(start(made, source, save))
    opened.assert_all_closed()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_opened_before_the_first_frame_is_asked_for(made: Made, clip: Path, opened: Opened) -> None:
    answers = start(made, clip)
    assert opened.things == []
    next(answers)
    assert len(opened.things) == 2
    answers.close()  # type: ignore[attr-defined]


def test_pictures_that_cannot_be_decoded_are_told_at_the_end(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.images, tmp_path / "images"))
    (folder / "Bag" / "broken.png").write_bytes(b"no picture")
    notes: list[str] = []
    assert len(list(start(made, folder, notes=notes))) == IMAGES
    assert len(notes) == 1 and "broken.png" in notes[0]


def test_pictures_of_any_size_and_mode_go_through(made: Made, tmp_path: Path) -> None:
    for name, mode, size in (
        ("a.png", "L", (1, 1)),
        ("b.png", "RGBA", (500, 3)),
        ("c.jpg", "CMYK", (28, 28)),
        ("d.gif", "P", (29, 400)),
    ):
        Image.new(mode, size).save(tmp_path / name)
    answers = list(start(made, tmp_path, tmp_path.with_name(f"{tmp_path.name}-out")))
    assert [frame.name for frame, _ in answers] == ["a.png", "b.png", "c.jpg", "d.gif"]
    assert all(sum(probability for _, probability in prediction.top) <= 1.0001 for _, prediction in answers)
    assert len(list(tmp_path.with_name(f"{tmp_path.name}-out").iterdir())) == 4


def test_a_recording_never_overwrites_its_source(made: Made, clip: Path, tmp_path: Path, opened: Opened) -> None:
    source = Path(shutil.copy(clip, tmp_path / "clip.mp4"))
    (tmp_path / "link.mp4").symlink_to(source)
    (tmp_path / "folder").mkdir()
    before = source.read_bytes()
    for save in (source, tmp_path / "folder" / ".." / "clip.mp4", tmp_path / "link.mp4"):
        for given, to in ((source, save), (save, source)):
            with pytest.raises(VitEdgeError, match="is the source") as caught:
                list(start(made, given, to))
            assert caught.value.hint and "\n" not in str(caught.value)
    assert opened.things == [] and source.read_bytes() == before
    assert len(list(start(made, source, tmp_path / "other.mp4"))) == FRAMES


def test_pictures_are_not_recorded_into_the_folder_they_come_from(made: Made, tmp_path: Path, opened: Opened) -> None:
    folder = Path(shutil.copytree(made.images, tmp_path / "images"))
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    for save in (folder, folder / "Bag", folder / "new" / "deep", tmp_path / "link", tmp_path / "link" / "new"):
        for source in (folder, tmp_path / "link"):
            with pytest.raises(VitEdgeError, match=r"is the source|lies in the source folder") as caught:
                list(start(made, source, save))
            assert caught.value.hint
    assert opened.things == [] and sorted(folder.rglob("*")) == before
    for save in (tmp_path / "images-out", folder / "out.mp4"):  # a video is no image
        assert len(list(start(made, folder, save, limit=2))) == 2
