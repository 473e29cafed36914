import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.runtime.camera import CameraOptions, open_source

cv2 = pytest.importorskip("cv2")

COUNT, HEIGHT, WIDTH = 20, 48, 64


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short videos whose frames are a red that brightens: clip.mp4, clip.avi."""
    folder = tmp_path_factory.mktemp("clips")
    for name, codec in (("clip.mp4", "mp4v"), ("clip.avi", "MJPG")):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter_fourcc(*codec), 25, (WIDTH, HEIGHT))
        assert writer.isOpened()
        for i in range(COUNT):
            writer.write(np.full((HEIGHT, WIDTH, 3), (0, 0, 50 + 10 * i), np.uint8))
        writer.release()
    return folder


def save_image(path: Path, value: int = 100) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_a_video_gives_all_its_frames_in_rgb(clips: Path, name: str) -> None:
    before = time.perf_counter_ns()
    with open_source(str(clips / name)) as source:
        assert (source.fps, source.total) == (25.0, COUNT)
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(COUNT))
    assert all(frame.image.shape == (HEIGHT, WIDTH, 3) and frame.image.dtype == np.uint8 for frame in frames)
    for frame in frames:
        red, green, blue = frame.image.reshape(-1, 3).mean(axis=0)
        assert red == pytest.approx(50 + 10 * frame.index, abs=6)
        assert max(green, blue) < 12
    times = [before, *(frame.captured_ns for frame in frames), time.perf_counter_ns()]
    assert times == sorted(times)
    assert source.skipped == [] and frames[0].name == ""


@pytest.mark.parametrize("tail", [b"", bytes(range(256)) * 8], ids=["truncated", "garbage"])
def test_a_video_with_a_broken_end_gives_what_decodes_and_says_so(clips: Path, tmp_path: Path, tail: bytes) -> None:
    data = (clips / "clip.avi").read_bytes()
    broken = tmp_path / "broken.avi"
    broken.write_bytes(data[: len(data) * 4 // 5] + tail)
    with open_source(str(broken)) as source:
        frames = list(source)
        assert 0 < len(frames) < COUNT == source.total
        assert source.skipped == [f"{broken} announces {COUNT} frames, only {len(frames)} could be decoded"]
        assert list(source) == [] and len(source.skipped) == 1


@pytest.mark.parametrize("dented", [0, 1, 10])
def test_damaged_frames_of_a_video_are_passed_over(clips: Path, tmp_path: Path, dented: int) -> None:
    data = bytearray((clips / "clip.avi").read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]  # of each frame, a JPEG
    length = starts[dented + 1] - starts[dented] - 16  # keeps the header of the next frame
    data[starts[dented] : starts[dented] + length] = bytes(length)
    (tmp_path / "dent.avi").write_bytes(data)
    with open_source(str(tmp_path / "dent.avi")) as source:
        reds = [round((float(frame.image[..., 0].mean()) - 50) / 10) for frame in source]
    assert reds == [i for i in range(COUNT) if i != dented]
    assert len(source.skipped) == 1 and f"{COUNT} frames, only {COUNT - 1}" in source.skipped[0]


def test_what_is_no_video_is_an_error(clips: Path, tmp_path: Path) -> None:
    video = (clips / "clip.mp4").read_bytes()
    contents = {"cut.mp4": video[: len(video) // 2], "text.mp4": b"not a video " * 100, "note.txt": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VitEdgeError, match=f"{name} holds no frame") as caught:
            open_source(str(tmp_path / name))
        assert caught.value.hint
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VitEdgeError, match=r"empty\.mp4 is empty"):
        open_source(str(tmp_path / "empty.mp4"))


def test_missing_paths_and_unknown_schemes_are_errors_with_a_hint(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.mp4"), str(tmp_path / "none"), "ftp://camera/1", "csi://x", "x" * 300):
        with pytest.raises(VitEdgeError, match=r"no file|not supported|cannot read") as caught:
            open_source(source)
        assert caught.value.hint or "cannot read" in str(caught.value)


def test_a_codec_that_opencv_lacks_is_named(clips: Path, tmp_path: Path) -> None:
    for suffix in (".mp4", ".avi", ".mkv"):
        name = f"clip{suffix}"
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*"mp4v"), 25, (WIDTH, HEIGHT))
        for _ in range(5):
            writer.write(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        writer.release()
        data = (tmp_path / name).read_bytes()
        for known, unknown in ((b"mp4v", b"Zz9x"), (b"esds", b"Zz9x"), (b"V_MPEG4/ISO/ASP", b"V_MPEG9/ISO/ASP")):
            data = data.replace(known, unknown)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            VitEdgeError, match=rf"{name} is coded as (Zz9x|V_MPEG9\S*), for which this OpenCV has no decoder"
        ) as caught:
            open_source(str(tmp_path / name))
        assert "ffmpeg" in str(caught.value.hint)


def test_a_camera_that_is_not_there_is_an_error() -> None:
    if Path("/dev/video73").exists():
        pytest.skip("there are many cameras here")
    with pytest.raises(VitEdgeError, match="camera 73 cannot be opened"):
        open_source("73")


def test_opencv_keeps_quiet_about_what_our_errors_say(clips: Path, tmp_path: Path) -> None:
    video = (clips / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(video[: len(video) // 2])
    code = (
        "import sys; from vitedge.runtime.camera import CameraOptions, open_source\n"
        "try: open_source(sys.argv[1])\n"
        "except Exception as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENCV")}
    for source in (str(tmp_path / "cut.mp4"), "73"):
        done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout and done.stderr == ""


def test_closing_ends_the_stream_and_may_be_repeated(clips: Path) -> None:
    source = open_source(str(clips / "clip.mp4"))
    next(source)
    source.close()
    source.close()
    assert list(source) == [] and source.skipped == []
    assert (source.captured, source.given, source.dropped) == (1, 1, 0) and source.state == ""
    untouched = open_source(str(clips / "clip.mp4"))
    untouched.close()
    assert (untouched.captured, untouched.given, untouched.dropped) == (1, 0, 1)  # the first frame is read on opening


def test_closing_in_another_thread_ends_a_video_that_is_being_read(clips: Path) -> None:
    with open_source(str(clips / "clip.mp4"), CameraOptions(loop=True)) as source:
        threading.Timer(0.3, source.close).start()
        count = sum(1 for _ in source)
    assert count > COUNT and source.captured == source.given + source.dropped and source.given == count


def test_files_begin_again_where_they_are_to_loop(clips: Path, tmp_path: Path) -> None:
    data = (clips / "clip.avi").read_bytes()
    (tmp_path / "broken.avi").write_bytes(data[: len(data) * 4 // 5])
    for i in range(3):
        save_image(tmp_path / "images" / f"{i}.png", 50 * i)
    (tmp_path / "images" / "3.png").write_bytes(b"no")
    for path, skipped in ((clips / "clip.mp4", 0), (tmp_path / "broken.avi", 1), (tmp_path / "images", 1)):
        once = [int(frame.image.mean()) for frame in open_source(str(path))]
        with open_source(str(path), CameraOptions(loop=True)) as source:
            frames = [next(source) for _ in range(3 * len(once) + 1)]
            assert source.total is None
        assert [frame.index for frame in frames] == list(range(3 * len(once) + 1))
        assert [int(frame.image.mean()) for frame in frames] == once * 3 + once[:1]
        assert len(source.skipped) == skipped and {frame.source for frame in frames} == {str(path)}
    (tmp_path / "a.png").write_bytes(b"no")
    with open_source(str(tmp_path / "a.png"), CameraOptions(loop=True)) as source, pytest.raises(VitEdgeError, match="none of 1"):
        next(source)


def test_in_real_time_a_file_gives_what_a_camera_would_have_given(clips: Path, tmp_path: Path) -> None:
    for i in range(COUNT):
        save_image(tmp_path / f"{i:02}.png", i)
    for path, fps, name in ((clips / "clip.mp4", 25.0, ""), (tmp_path, 40.0, "07.png")):
        begun = time.perf_counter()
        indices, names = [], []
        with open_source(str(path), CameraOptions(realtime=True, fps=40)) as source:
            assert source.live and (source.fps, source.total) == (fps, COUNT)
            for frame in source:
                indices.append(frame.index)
                names.append(frame.name)
                time.sleep(0.1)
        assert time.perf_counter() - begun > (COUNT - 1) / fps
        assert indices == sorted(set(indices)) and indices[-1] == COUNT - 1 and len(indices) < COUNT
        assert source.captured == COUNT == source.given + source.dropped and source.given == len(indices)
        assert source.skipped == [] and source.state == "" and (name or "") in (names if 7 in indices else [name])


def test_a_folder_gives_its_images_by_name_and_skips_the_damaged(tmp_path: Path) -> None:
    for i, name in enumerate(["c.jpg", "a.png", "d.png"]):
        save_image(tmp_path / name, 50 * (i + 1))
    (tmp_path / "b.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("not an image")
    with open_source(str(tmp_path)) as source:
        frames = list(source)
    assert [(frame.index, frame.name) for frame in frames] == [(0, "a.png"), (1, "c.jpg"), (2, "d.png")]
    assert [int(frame.image.mean().round()) for frame in frames] == [100, 50, 150]
    assert (source.fps, source.total) == (None, 4)
    assert len(source.skipped) == 1 and "b.jpg" in source.skipped[0]


def test_one_image_is_a_source_of_one(tmp_path: Path) -> None:
    save_image(tmp_path / "One.PNG")
    with open_source(str(tmp_path / "One.PNG")) as source:
        (frame,) = source
        assert (source.total, frame.name, frame.image.shape) == (1, "One.PNG", (20, 30, 3))


def test_images_of_which_none_decodes_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    for path in (tmp_path, tmp_path / "a.png"):
        with open_source(str(path)) as source, pytest.raises(VitEdgeError, match=r"none of 1 images.*a\.png"):
            next(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VitEdgeError, match="no images"):
        open_source(str(tmp_path / "empty"))


def test_closing_images_early_ends_the_stream(tmp_path: Path) -> None:
    for i in range(10):
        save_image(tmp_path / f"{i}.png")
    with open_source(str(tmp_path)) as source:
        next(source)
    source.close()
    assert list(source) == []


def test_images_need_no_opencv_and_videos_name_the_extra(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "cv2", None)  # what `import` takes for a module that is not there
    with open_source(str(tmp_path)) as source:
        assert len(list(source)) == 1
    with pytest.raises(MissingPackageError, match="opencv-python-headless") as caught:
        open_source(str(clips / "clip.mp4"))
    assert str(caught.value.hint).startswith("pip install opencv-python-headless; ")


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes with a name")
def test_what_would_be_waited_for_without_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in (str(tmp_path / "pipe.mp4"), "/dev/zero"):
        with pytest.raises(VitEdgeError, match="neither a file nor a folder"):
            open_source(name)
