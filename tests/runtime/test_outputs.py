"""Answers become lines, recordings in real time, and what another program reads, whatever that does."""

from __future__ import annotations

import json
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from vitedge.errors import VitEdgeError
from vitedge.runtime import outputs
from vitedge.runtime.camera import Source, open_source
from vitedge.runtime.live import Counts
from vitedge.runtime.outputs import Recordings, ResultCommand, check_apart, record, recording_paths
from vitedge.runtime.overlay import open_recorder
from vitedge.specs import Frame, ModelCard, Prediction, Preprocess, Timing

pytest.importorskip("cv2")

TIMING = Timing(1.0, 2.0, 3.0, 0.5, 0.25)
PREDICTION = Prediction((("cat", 0.75), ("dog", 0.25)), np.array([1, 0], np.float32), TIMING)
CARD = ModelCard("tiny", "classify", Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3), labels=("cat", "dog"))
READ_ALL = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"


def frame(index: int, captured_ns: int = 1, size: int = 64) -> Frame:
    return Frame(np.full((size, size, 3), index % 256, np.uint8), index, captured_ns, source="camera")


class Camera(Source):
    """A live source as far as a recording looks at it."""

    live = True

    def __next__(self) -> Frame:
        raise StopIteration

    def close(self) -> None:
        pass


# lines


def test_a_record_has_what_a_machine_wants_to_know() -> None:
    now = time.perf_counter_ns()
    found = json.loads(json.dumps(record(frame(7, now), PREDICTION, Counts(12, 8, 4), 9.5)))
    assert (found["source"], found["index"], found["captured_ns"], found["latency_ms"]) == ("camera", 7, now, 9.5)
    assert (found["captured"], found["dropped"]) == (12, 4)
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(found["captured_at"])).total_seconds()) < 5
    assert found["timing"]["infer_ms"] == 3.0 and found["top"][0] == {"label": "cat", "probability": 0.75}


def test_a_record_of_an_array_has_its_shape_and_range() -> None:
    found = record(frame(0), Prediction((), np.array([[1, 2], [3, 5]], np.float32), TIMING), Counts(1, 1, 0), 1.0)
    assert (found["shape"], found["min"], found["max"]) == ([2, 2], 1.0, 5.0) and "top" not in found


# recordings


def test_several_sources_are_recorded_under_names_of_their_own(tmp_path: Path) -> None:
    assert recording_paths(Path("a/out.mp4"), 1) == [Path("a/out.mp4")]
    assert recording_paths(Path("a/out.mp4"), 2) == [Path("a/out-1.mp4"), Path("a/out-2.mp4")]
    assert recording_paths(tmp_path, 2) == [tmp_path / "1", tmp_path / "2"] == recording_paths(Path(tmp_path), 2)


def test_a_recording_of_a_camera_runs_as_time_does(tmp_path: Path) -> None:
    camera = Camera("camera", fps=20.0)
    with Recordings(tmp_path / "out.mp4", [camera], CARD) as saved:
        for index, ms in enumerate((0, 50, 60, 100, 500, 505, 1000)):  # 60 and 505 lie within the period of the one before
            saved.write(0, frame(index, 10**9 + ms * 10**6), PREDICTION)
        saved.write(0, frame(7, 10**12), PREDICTION)  # the camera was away for a quarter of an hour
        saved.write(0, frame(8, 10**12 + 50 * 10**6), PREDICTION)
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert source.fps == 20
        assert len(list(source)) == 21 + 2


def test_a_fast_camera_is_recorded_at_a_rate_that_can_be_kept(tmp_path: Path) -> None:
    with Recordings(tmp_path / "out.avi", [Camera("camera", fps=120.0)], CARD) as saved:
        for index in range(120):
            saved.write(0, frame(index, 10**9 + index * 10**9 // 120), PREDICTION)
    with open_source(str(tmp_path / "out.avi")) as source:
        assert source.fps == outputs.MAX_FPS
        assert len(list(source)) == 30


def test_several_sources_have_a_recording_each_of_their_own_pictures(tmp_path: Path) -> None:
    with Recordings(tmp_path / "out", [Camera("a"), Camera("b")], CARD) as saved:
        for index in range(5):
            saved.write(index % 2, frame(index, 1 + index), PREDICTION)
    assert [len(list((tmp_path / "out" / name).iterdir())) for name in ("1", "2")] == [3, 2]


def test_a_disk_that_is_nearly_full_ends_a_recording_which_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SPACE_EVERY_S", 0.0)
    for name in ("out.mp4", "folder"):
        monkeypatch.setattr(outputs, "RESERVE", 0)
        with (
            pytest.raises(VitEdgeError, match=r"MiB are free in .*, too little to go on recording") as caught,
            Recordings(tmp_path / name, [Camera("camera", fps=25.0)], CARD) as saved,
        ):
            for index in range(10):
                saved.write(0, frame(index, 10**9 + index * 40 * 10**6), PREDICTION)
            monkeypatch.setattr(outputs, "RESERVE", shutil.disk_usage(tmp_path).total + 1)
            saved.write(0, frame(10, 2 * 10**9), PREDICTION)
        assert caught.value.hint
        with open_source(str(tmp_path / name)) as source:
            assert len(list(source)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out.mp4"]


def test_a_recording_never_overwrites_its_source(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "clip.mp4", 10) as recorder:
        recorder.write(np.zeros((16, 16, 3), np.uint8))
    source = tmp_path / "clip.mp4"
    (tmp_path / "link.mp4").symlink_to(source)
    (tmp_path / "folder").mkdir()
    for save in (source, tmp_path / "folder" / ".." / "clip.mp4", tmp_path / "link.mp4"):
        for given, to in ((source, save), (save, source)):
            with pytest.raises(VitEdgeError, match="is the source") as caught:
                check_apart([str(given)], to)
            assert caught.value.hint and "\n" not in str(caught.value)
    shutil.copy(source, tmp_path / "all-2.mp4")
    with pytest.raises(VitEdgeError, match=r"all-2\.mp4 is the source"):
        check_apart([str(tmp_path / "all-2.mp4"), "0"], tmp_path / "all.mp4")
    check_apart([str(source)], tmp_path / "other.mp4")
    check_apart(["rtsp://camera/stream", "0", "synthetic"], tmp_path / "other.mp4")


def test_pictures_are_not_recorded_into_the_folder_they_come_from(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "Bag").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for save in (folder, folder / "Bag", folder / "new" / "deep", tmp_path / "link", tmp_path / "link" / "new"):
        for source in (folder, tmp_path / "link"):
            with pytest.raises(VitEdgeError, match=r"is the source|lies in the source folder") as caught:
                check_apart([str(source)], save)
            assert caught.value.hint
    for save in (tmp_path / "images-out", folder / "out.mp4"):  # a video is no image
        check_apart([str(folder)], save)


# a program that reads the results


def program(*arguments: object) -> str:
    return " ".join(f"'{argument}'" for argument in (sys.executable, *arguments))


def test_a_command_gets_every_line_in_order_and_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    command = ResultCommand(program("-c", READ_ALL.replace("'", '"'), tmp_path / "lines"), said.append)
    for index in range(50):
        command.send(json.dumps(index))
    command.close()
    command.close()
    assert (tmp_path / "lines").read_text() == "".join(f"{index}\n" for index in range(50))
    assert (said, command.lost) == ([], 0)


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("exit 3", "ended with status 3"),
        ("no-such-program-anywhere", "ended with status 127"),
        ("exec <&-; sleep 3", "closed its"),
    ],
)
def test_a_command_that_ends_is_said_once_and_what_it_missed_is_counted(line: str, how: str) -> None:
    said: list[str] = []
    command = ResultCommand(line, said.append)
    deadline = time.monotonic() + 20
    count = 0
    while not said and time.monotonic() < deadline:
        command.send("{}")
        count += 1
        time.sleep(0.01)
    for _ in range(100):
        command.send("{}")
    command.close()
    assert len(said) == 1 and how in said[0], said
    assert 100 <= command.lost <= count + 100


def test_a_command_that_hangs_slows_nobody_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LAST_LINES_S", 0.5)
    said: list[str] = []
    command = ResultCommand("sleep 1000 & sleep 1000; true", said.append)
    line = json.dumps("x" * 1000)
    slowest = 0.0
    for _ in range(2000):  # 2 MB: pipes hold 64 KiB
        began = time.perf_counter()
        command.send(line)
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 1
    assert len(command._lines) <= outputs.LINES
    began = time.perf_counter()
    command.close()
    assert time.perf_counter() - began < 10
    assert command._process.poll() is not None and not command._thread.is_alive()
    assert "does not keep up" in said[0] and "was killed" in said[1] and len(said) == 2
    assert 1800 < command.lost <= 2000
