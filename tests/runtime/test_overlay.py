import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.engines import run_python
from vitedge.errors import VitEdgeError
from vitedge.preprocess import resize
from vitedge.runtime import overlay
from vitedge.runtime.camera import open_source
from vitedge.runtime.overlay import draw, open_recorder
from vitedge.specs import Frame, ModelCard, Prediction, Preprocess, Resize, Task, Timing

cv2 = pytest.importorskip("cv2")

GREY = 90
TIMING = Timing(3.0, 1.2, 21.9, 0.1)


def card_of(task: Task, **options: object) -> ModelCard:
    return ModelCard("m", task, Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, **options), 16)  # type: ignore[arg-type]


def grey_frame(height: int, width: int) -> Frame:
    return Frame(np.full((height, width, 3), GREY, np.uint8), 0, 0)


def classified(*probabilities: float) -> Prediction:
    top = tuple((f"label {i}", p) for i, p in enumerate(probabilities))
    return Prediction(top, np.zeros(len(top), np.float32), TIMING)


def dense(values: NDArray[np.float32]) -> Prediction:
    return Prediction((), values, TIMING)


def changed(picture: NDArray[np.uint8], below: int = 60) -> NDArray[np.bool_]:
    """Where a grey picture was drawn on, `below` the line with the timing."""
    mask: NDArray[np.bool_] = (picture != GREY).any(axis=2)
    mask[:below] = False
    return mask


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (1080, 1920), (200, 320)])
def test_labels_are_drawn_in_the_lower_left_corner_of_a_copy(height: int, width: int) -> None:
    frame = grey_frame(height, width)
    picture = draw(frame, classified(0.9, 0.05, 0.03), card_of("classify"))
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    assert (frame.image == GREY).all()
    rows, columns = np.nonzero(changed(picture))
    assert rows.min() > height * 0.6 and columns.min() < 30
    assert (picture[:20, :100] != GREY).any()  # the timing


def test_the_bar_of_a_label_is_as_long_as_it_is_probable() -> None:
    def bar(probability: float) -> int:
        picture = draw(grey_frame(480, 640), classified(probability), card_of("classify")).astype(int)
        return int((picture[..., 1] - picture[..., 0] > 100).any(axis=0).sum())  # columns with teal in them

    widths = [bar(probability) for probability in (0.25, 0.5, 1.0)]
    assert widths == pytest.approx([widths[2] / 4, widths[2] / 2, widths[2]], abs=2)
    assert widths[2] > 250 and bar(0.0) == 0


def test_a_tiny_image_is_enlarged_by_a_whole_factor() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    picture = draw(Frame(image, 0, 0), classified(0.6, 0.3), card_of("classify"))
    assert picture.shape == (336, 336, 3)
    assert (picture[150:160, 320:336] == image.repeat(12, 0).repeat(12, 1)[150:160, 320:336]).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 400), (30, 400), (400, 3), (2000, 10), (57, 320)])
def test_pictures_of_any_shape_can_be_drawn_on(height: int, width: int) -> None:
    card = card_of("dense", crop_pct=0.9)
    draw(grey_frame(height, width), classified(*[0.1] * 10), card_of("classify"))
    draw(grey_frame(height, width), dense(np.eye(14, dtype=np.float32)), card)


def test_labels_that_are_long_empty_or_not_ascii_can_be_drawn() -> None:
    top = (("very " * 60 + "long", 0.5), ("", 0.2), ("Bär, 熊", 0.2), ("two\nlines", 0.1))
    picture = draw(grey_frame(240, 320), Prediction(top, np.zeros(4, np.float32), TIMING), card_of("classify"))
    assert not changed(picture)[:, 315:].any()  # nothing leaves the panel


@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 360)])
def test_the_heat_map_lies_where_the_model_looked(mode: Resize, crop_pct: float, height: int, width: int) -> None:
    """A white square is put into the frame; a "model" that answers with brightness must light up the same pixels."""
    card = card_of("dense", resize=mode, crop_pct=crop_pct)
    image = np.zeros((height, width, 3), np.uint8)
    top, left = round(height * 0.3), round(width * 0.6)
    image[top : top + 60, left : left + 80] = 255
    seen = resize(image, card.preprocess)[..., 0].astype(np.float32) / 255
    heat = draw(Frame(np.full_like(image, GREY), 0, 0), dense(seen[None]), card)
    inside = np.zeros((height, width), bool)
    inside[top + 3 : top + 57, left + 3 : left + 77] = True
    around = np.ones((height, width), bool)
    around[top - 3 : top + 63, left - 3 : left + 83] = False
    around[:60] = False
    bright = heat.astype(int).sum(axis=2) > 3 * GREY + 100
    bright[(heat == 255).all(axis=2)] = False  # the outline
    assert bright[inside].all() and not bright[around].any()


def test_the_background_stays_where_the_map_is_cold() -> None:
    values = np.zeros((1, 14, 14), np.float32)
    values[0, 7:, 7:] = 1
    picture = draw(grey_frame(448, 448), dense(values), card_of("dense"))
    assert not changed(picture)[:, :200].any()
    assert (picture[300:, 300:] != GREY).any(axis=2).all()


def test_values_beyond_one_are_stretched_and_values_within_are_not() -> None:
    ramp = np.linspace(0, 1, 14 * 14, dtype=np.float32).reshape(1, 14, 14)
    card, frame = card_of("dense"), grey_frame(224, 448)
    as_is = draw(frame, dense(ramp), card)
    np.testing.assert_allclose(draw(frame, dense(ramp * 40 - 20), card).astype(int), as_is.astype(int), atol=2)
    assert draw(frame, dense(ramp * 0.2), card).astype(int).sum() != as_is.astype(int).sum()
    assert not changed(draw(grey_frame(300, 300), dense(np.full((1, 14, 14), 7, np.float32)), card)).any()


def test_what_cannot_be_drawn_is_an_error() -> None:
    for shape in ((3, 14, 14), (196,), (14, 14, 1)):
        with pytest.raises(VitEdgeError, match="one channel"):
            draw(grey_frame(300, 300), dense(np.zeros(shape, np.float32)), card_of("dense"))
    with pytest.raises(VitEdgeError, match="nan"):
        draw(grey_frame(300, 300), dense(np.full((1, 14, 14), np.nan, np.float32)), card_of("dense"))


def colours(count: int, height: int = 120, width: int = 160) -> list[NDArray[np.uint8]]:
    """Plain pictures: red, green, blue and so on."""
    palette = np.array([(220, 30, 30), (30, 200, 40), (40, 50, 210)], np.uint8)
    return [np.full((height, width, 3), palette[i % 3], np.uint8) for i in range(count)]


@pytest.mark.parametrize("name", ["out.mp4", "OUT.AVI"])
def test_a_recorded_video_gives_back_what_was_written(tmp_path: Path, name: str) -> None:
    pictures = colours(12)
    with open_recorder(tmp_path / "new" / name, 29.97) as recorder:
        for picture in pictures:
            recorder.write(picture, "ignored.png")
        assert not (tmp_path / "new" / name).exists()
    recorder.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    with open_source(str(tmp_path / "new" / name)) as source:
        assert source.fps == pytest.approx(29.97, abs=0.01)
        frames = list(source)
    assert len(frames) == 12
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.image.shape == picture.shape
        np.testing.assert_allclose(frame.image[60, 80].astype(int), picture[60, 80].astype(int), atol=12)


def test_odd_and_changing_sizes_are_fitted_to_the_first(tmp_path: Path) -> None:
    first, wide, tall = (np.full((*size, 3), 200, np.uint8) for size in ((121, 161), (100, 400), (300, 60)))
    with open_recorder(tmp_path / "out.avi", 10) as recorder:
        for picture in (first, wide, tall):
            recorder.write(picture)
    with open_source(str(tmp_path / "out.avi")) as source:
        images = [frame.image for frame in source]
    assert [image.shape for image in images] == [(120, 160, 3)] * 3
    assert images[0].min() > 180
    assert images[1][:38].max() < 20 and images[1][45:75].min() > 180  # black bars above and below
    assert images[2][:, :64].max() < 20 and images[2][:, 72:88].min() > 180


def test_a_recording_survives_the_failure_of_its_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_recorder(tmp_path / "out.mp4", 10) as recorder:
        for picture in colours(5):
            recorder.write(picture)
        raise RuntimeError
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert len(list(source)) == 5


def test_without_pictures_there_is_no_file_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")
    with open_recorder(tmp_path / "out.mp4", 10):
        pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.mp4", b"old")]


def test_a_folder_receives_one_jpeg_a_picture(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "a" / "out", 0) as recorder:
        for picture, name in zip(colours(3), ("cat.png", "", "x.y.jpg"), strict=True):
            recorder.write(picture, name)
    paths = sorted((tmp_path / "a" / "out").iterdir())
    assert [path.name for path in paths] == ["000000-cat.jpg", "000001.jpg", "000002-x.y.jpg"]
    for path, picture in zip(paths, colours(3), strict=True):
        np.testing.assert_allclose(np.asarray(Image.open(path))[60, 80].astype(int), picture[60, 80].astype(int), atol=6)


def test_places_that_cannot_be_recorded_to_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out.mp4", tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(VitEdgeError, match="cannot write"):
            open_recorder(path, 10)
    with pytest.raises(VitEdgeError, match=r"cannot record out\.gif") as caught:
        open_recorder(tmp_path / "out.gif", 10)
    assert ".mp4, .avi" in str(caught.value.hint)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(VitEdgeError, match="frames a second"):
            open_recorder(tmp_path / "out.mp4", fps)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_video_that_opencv_refuses_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(VitEdgeError, match=r"OpenCV cannot write .*/out\.mp4: ") as caught,
        open_recorder(tmp_path / "out.mp4", 10) as recorder,
    ):
        recorder.write(np.zeros((2, 70000, 3), np.uint8))
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.engines import run_python
from vitedge.errors import VitEdgeError
from vitedge.runtime.overlay import open_recorder

random = np.random.default_rng(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # writes beyond it fail, as on a full disk
try:
    with open_recorder(Path(sys.argv[1]), 10) as recorder:
        for _ in range(40):
            recorder.write(random.integers(0, 256, (120, 160, 3), np.uint8))
except VitEdgeError as error:
    print(error, "|", error.hint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(("name", "limit"), [("out.avi", 150_000), ("out.avi", 100), ("out.mp4", 50_000)])
def test_a_disk_that_fills_up_is_an_error_and_what_was_there_stays(tmp_path: Path, name: str, limit: int) -> None:
    (tmp_path / name).write_bytes(b"old")
    ran = run_python(FULL_DISK, tmp_path / name, limit)
    assert re.search(rf"^only \d+ of 40 frames could be written to {tmp_path / name}, is the disk full\?", ran.stdout), ran
    assert "partial" not in ran.stdout and "space" in ran.stdout
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


@pytest.mark.parametrize("fps", [0.5, 29.97, 1000])
@pytest.mark.parametrize("name", ["out.mp4", "out.avi"])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_whole_video_is_seen_to_be_whole_without_reading_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fps: float, count: int
) -> None:
    monkeypatch.setattr(overlay, "_readable_frames", lambda _: pytest.fail("the cheap check did not do"))
    with open_recorder(tmp_path / name, fps) as recorder:
        for picture in colours(count):
            recorder.write(picture)
    assert (tmp_path / name).is_file()


def test_a_container_that_cannot_count_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_ends_at", lambda *_: False)
    with open_recorder(tmp_path / "out.avi", 10) as recorder:
        for picture in colours(5):
            recorder.write(picture)
    assert (tmp_path / "out.avi").is_file()


def test_names_too_long_for_a_picture_are_cut_between_characters(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "out", 0) as recorder:
        for name in ("\u732b" * 83 + ".png", "x" * 251 + ".png", "a" + "\U0001f600" * 62 + ".png"):
            recorder.write(colours(1)[0], name)
    stems = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert stems == ["000000-" + "\u732b" * 64, "000001-" + "x" * 193, "000002-a" + "\U0001f600" * 48]
