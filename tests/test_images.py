"""Folders, samples, streams and every kind of file that a data set may hold."""

from __future__ import annotations

import random
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge import images
from vitedge.errors import ImageError, VitEdgeError
from vitedge.images import LOOK_AHEAD, ImageFile, decode, labels_of, list_images, sample, stream

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")

ODD = (37, 23)  # height, width


def gradient(height: int = ODD[0], width: int = ODD[1]) -> np.ndarray:
    """Different in every corner and channel, and smooth, so that JPEG keeps it nearly."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (y + x) * 255 // (height + width)], axis=-1).astype(np.uint8)


def save(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient() if array is None else array).save(path)
    return path


def folder_of(root: Path, *names: str) -> Path:
    """Empty files: listing and sampling open nothing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# Listing


def test_labels_are_the_first_sub_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, "z.jpg", "dog/b.PNG", "dog/a.jpeg", "cat/deep/er/c.Tiff", "cat/notes.txt", "cat/model.onnx")
    files = list_images(tmp_path)
    assert [(f.path.relative_to(tmp_path).as_posix(), f.label) for f in files] == [
        ("cat/deep/er/c.Tiff", "cat"),
        ("dog/a.jpeg", "dog"),
        ("dog/b.PNG", "dog"),
        ("z.jpg", None),
    ]
    assert labels_of(files) == ("cat", "dog")


def test_hidden_names_are_ignored(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "._a.jpg", ".cache/b.jpg", "cat/.ipynb_checkpoints/c.jpg")
    assert [f.path.name for f in list_images(tmp_path)] == ["a.jpg"]


def test_a_hidden_parent_of_the_root_does_not_matter(tmp_path: Path) -> None:
    folder_of(tmp_path, ".data/cat/a.jpg")
    assert [f.label for f in list_images(tmp_path / ".data")] == ["cat"]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    folder_of(tmp_path, "elsewhere/a.jpg", "root/dog/b.jpg")
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/dog/again").symlink_to(tmp_path / "root")
    assert [(f.path.name, f.label) for f in list_images(tmp_path / "root")] == [("a.jpg", "cat"), ("b.jpg", "dog")]


def test_order_is_that_of_the_names_not_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a/1.jpg", "a-b/1.jpg", "a.jpg", "B/1.jpg", "a/10.jpg", "a/2.jpg")
    expected = ["B/1.jpg", "a-b/1.jpg", "a.jpg", "a/1.jpg", "a/10.jpg", "a/2.jpg"]
    scandir = images.os.scandir
    for seed in range(5):
        monkeypatch.setattr(
            images.os, "scandir", lambda p, s=seed: random.Random(s).sample(entries := list(scandir(p)), len(entries))
        )
        assert [f.path.relative_to(tmp_path).as_posix() for f in list_images(tmp_path)] == expected


def test_a_single_file_is_a_list_of_one(tmp_path: Path) -> None:
    path = save(tmp_path / "cat" / "one.png")
    assert list_images(path) == [ImageFile(path, None)]


def test_what_cannot_be_listed_is_said_in_one_sentence(tmp_path: Path) -> None:
    folder_of(tmp_path, "empty/readme.txt", "clip.mp4")
    for path, match in [("missing", "no folder"), ("empty", "no images"), ("clip.mp4", "not an image file")]:
        with pytest.raises(VitEdgeError, match=match) as caught:
            list_images(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)
        assert caught.value.hint


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images.os, "scandir", denied)
    with pytest.raises(VitEdgeError, match="Permission denied"):
        list_images(tmp_path)


# Sampling


def many(**counts: int) -> list[ImageFile]:
    return [ImageFile(Path(f"/data/{label}/{i:04}.jpg"), label) for label, count in counts.items() for i in range(count)]


def test_a_sample_does_not_depend_on_the_order_of_the_files() -> None:
    files = [*many(cat=40, dog=25, owl=3), ImageFile(Path("/data/x.jpg"), None)]
    expected = sample(files, 30, seed=7)
    for seed in range(5):
        assert sample(random.Random(seed).sample(files, len(files)), 30, seed=7) == expected
    assert sample(files, 30, seed=8) != expected
    assert len(set(expected)) == 30


def test_a_sample_is_balanced_and_so_is_any_leading_part() -> None:
    drawn = sample(many(cat=1000, dog=50, owl=4), 30, seed=0)
    count = {label: sum(f.label == label for f in drawn) for label in ("cat", "dog", "owl")}
    assert count == {"cat": 13, "dog": 13, "owl": 4}
    assert {f.label for f in drawn[:3]} == {"cat", "dog", "owl"}


def test_a_sample_of_more_than_there_are_is_all_of_them() -> None:
    files = [ImageFile(Path(f"{i}.png"), None) for i in range(3)]
    assert sorted(sample(files, 10**20, 0), key=lambda file: file.path.name) == files


def test_a_small_sample_of_many_labels_draws_the_labels_too() -> None:
    files = many(**{f"label{i:03}": 2 for i in range(100)})
    first = {f.label for f in sample(files, 10, seed=0)}
    assert len(first) == 10
    assert first != {f.label for f in sample(files, 10, seed=1)}
    assert first != set(labels_of(files)[:10])


def test_more_than_there_are_is_all_of_them() -> None:
    files = many(cat=3, dog=2)
    assert set(sample(files, 99, seed=0)) == set(files)
    assert sample([], 5, seed=0) == []
    with pytest.raises(VitEdgeError, match="positive, not 0"):
        sample(files, 0, seed=0)


# Decoding


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("shape", [ODD, (1, 1), (1, 50), (50, 1)])
def test_lossless_formats_come_back_exactly(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    image = decode(save(tmp_path / f"x.{suffix}", gradient(*shape)))
    assert image.dtype == np.uint8
    assert np.array_equal(image, gradient(*shape))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_formats_come_back_nearly(tmp_path: Path, suffix: str) -> None:
    image = decode(save(tmp_path / f"x.{suffix}"))
    assert image.shape == (*ODD, 3)
    assert np.abs(image.astype(int) - gradient()).mean() < 6


def test_grey_and_one_bit_are_repeated_over_the_channels(tmp_path: Path) -> None:
    grey = gradient()[..., 0]
    assert np.array_equal(decode(save(tmp_path / "l.png", grey)), np.dstack([grey] * 3))
    assert np.array_equal(decode(save(tmp_path / "1.png", grey > 99)), np.dstack([np.uint8(255) * (grey > 99)] * 3))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgb, alpha = gradient(), gradient()[..., 1:2]
    assert np.array_equal(decode(save(tmp_path / "rgba.png", np.dstack([rgb, alpha]))), rgb)
    grey_alpha = Image.fromarray(rgb[..., 0]).convert("LA")
    grey_alpha.putalpha(Image.fromarray(alpha[..., 0]))
    grey_alpha.save(tmp_path / "la.png")
    assert np.array_equal(decode(tmp_path / "la.png"), np.dstack([rgb[..., 0]] * 3))


@pytest.mark.parametrize("name, transparency", [("p.png", None), ("p.png", 3), ("p.png", bytes(range(64))), ("p.gif", 3)])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_gives_its_colours(tmp_path: Path, name: str, transparency: int | bytes | None) -> None:
    indices = (np.arange(ODD[0] * ODD[1]) % 64).astype(np.uint8).reshape(ODD)
    palette = np.random.default_rng(0).integers(0, 256, (64, 3), dtype=np.uint8)
    picture = Image.fromarray(indices).copy()
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / name, **({} if transparency is None else {"transparency": transparency}))
    assert np.array_equal(decode(tmp_path / name), palette[indices])


def png_16(path: Path, grey: np.ndarray) -> None:
    """A 16-bit grey PNG, byte by byte as the standard has it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = grey.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def all_16_bits() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def as_8_bits(grey: np.ndarray) -> np.ndarray:
    return np.dstack([np.rint(grey.astype(np.float64) * 255 / 65535).astype(np.uint8)] * 3)


def test_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    png_16(tmp_path / "x.png", all_16_bits())
    assert np.array_equal(decode(tmp_path / "x.png"), as_8_bits(all_16_bits()))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_tiff_is_scaled_not_clipped(tmp_path: Path, mode: str) -> None:
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    Image.frombytes(mode, (256, 256), all_16_bits().astype(dtype).tobytes()).save(tmp_path / "x.tiff")
    assert np.array_equal(decode(tmp_path / "x.tiff"), as_8_bits(all_16_bits()))


def test_16_bit_pgm_is_scaled_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 256 256 65535\n" + all_16_bits().astype(">u2").tobytes())
    assert np.array_equal(decode(tmp_path / "x.pgm"), as_8_bits(all_16_bits()))


@pytest.mark.parametrize("low, high", [(-1, 9), (0, 65536)])
def test_integers_beyond_16_bits_are_refused(tmp_path: Path, low: int, high: int) -> None:
    path = save(tmp_path / "x.tiff", np.array([[low, high]], np.int32))
    with pytest.raises(ImageError, match=f"{low} to {high}"):
        decode(path)


def test_floats_are_taken_as_0_to_1(tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 300, dtype=np.float32).reshape(15, 20)
    assert np.array_equal(decode(save(tmp_path / "x.tiff", grey)), np.dstack([np.rint(grey * 255).astype(np.uint8)] * 3))


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan, np.inf])
def test_other_floats_are_refused(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "x.tiff", np.array([[0, value]], np.float32))
    with pytest.raises(ImageError, match="not from 0 to 1"):
        decode(path)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    assert np.abs(decode(tmp_path / "x.jpg").astype(int) - gradient()).max() < 12


UPRIGHT = {  # EXIF 2.3, tag 274: where row 0 and column 0 of the stored picture are, seen upright
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["rgb.png", "rgb.tiff", "grey16.png", "rgb.jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    grey = gradient()[..., 0].astype(np.uint16) * 257
    picture = Image.fromarray(grey if kind.startswith("grey") else gradient())
    picture.save(tmp_path / kind, exif=exif)
    stored = np.dstack([gradient()[..., 0]] * 3) if kind.startswith("grey") else gradient()
    expected = UPRIGHT[orientation](stored)
    image = decode(tmp_path / kind)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() <= (6 if kind.endswith("jpg") else 0)


def test_the_name_does_not_have_to_tell_the_format(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "really_png.jpg", format="PNG")
    assert np.array_equal(decode(tmp_path / "really_png.jpg"), gradient())


def broken(root: Path) -> list[Path]:
    """One file of every kind that cannot be decoded, all with image names."""
    root.mkdir(parents=True, exist_ok=True)
    whole = {suffix: save(root / f"whole.{suffix}", gradient(200, 300)).read_bytes() for suffix in ("jpg", "png", "tiff", "webp")}
    for suffix, data in whole.items():
        (root / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
        (root / f"beheaded.{suffix}").write_bytes(data[100:])
        (root / f"stub.{suffix}").write_bytes(data[:9])
        (root / f"whole.{suffix}").unlink()
    png = bytearray(whole["png"])
    png[20] ^= 0xFF
    (root / "checksum.png").write_bytes(png)
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("this is no image")
    (root / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (root / "dangling.png").symlink_to(root / "nowhere")
    return sorted(root.iterdir())


def test_whatever_cannot_be_decoded_is_an_image_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for path in [*broken(tmp_path / "broken"), tmp_path / "folder.png", tmp_path / "missing.jpg"]:
        with pytest.raises(ImageError) as caught:
            decode(path)
        reason = str(caught.value).removeprefix(f"cannot decode {path}: ")
        assert reason != str(caught.value), "the path is not named"
        assert reason.strip()
        assert "\n" not in reason


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    with pytest.raises(ImageError, match="the file is empty"):
        decode(tmp_path / "x.jpg")


def test_random_damage_is_never_another_error(tmp_path: Path) -> None:
    damage = random.Random(0)
    for suffix in ("jpg", "png", "bmp", "gif", "ppm", "webp"):
        whole = save(tmp_path / f"x.{suffix}").read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(damage.choice((1, 4))):
                data[damage.randrange(min(len(data), 200))] = damage.randrange(256)
            (tmp_path / f"x.{suffix}").write_bytes(data)
            try:
                image = decode(tmp_path / f"x.{suffix}")
            except ImageError:
                continue
            assert image.dtype == np.uint8
            assert image.shape[2] == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_an_image_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.png", gradient(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    assert decode(path).shape == (100, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(path)


# Streaming


def test_a_stream_keeps_the_order_and_skips_what_is_broken(tmp_path: Path) -> None:
    count = len(broken(tmp_path / "cat"))
    for i in range(9):
        save(tmp_path / "dog" / f"{i}.png", np.full((3 + i, 5, 3), i, np.uint8))
    files = sample(list_images(tmp_path), 1000, seed=3)
    skipped: list[str] = []
    streamed = list(stream(files, skipped))
    assert [file for file, _ in streamed] == [file for file in files if file.label == "dog"]
    assert all((image == int(file.path.stem)).all() for file, image in streamed)
    assert len(skipped) == count
    assert all("cannot decode" in message for message in skipped)


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    count = len(broken(tmp_path))
    skipped = ["from an earlier stream"]
    with pytest.raises(VitEdgeError, match=f"none of {count} images could be decoded; the first: cannot decode .*beheaded.jpg"):
        list(stream(list_images(tmp_path), skipped))
    assert len(skipped) == 1 + count
    with pytest.raises(VitEdgeError, match="none of 0 images"):
        list(stream([], skipped))


def test_a_stream_is_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(images, "decode", lambda path: started.append(path) or gradient(2, 2))
    files = many(cat=50)
    running = stream(files, [])
    assert started == []
    for taken in range(1, 20):
        next(running)
        assert len(started) <= taken + LOOK_AHEAD
    running.close()
    assert len(started) <= 19 + LOOK_AHEAD


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode", lambda path: np.zeros((256, 256, 3), np.uint8))
    size = 256 * 256 * 3
    tracemalloc.start()
    for _ in stream(many(cat=100), []):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (LOOK_AHEAD + 6) * size


def test_a_stream_left_early_leaves_no_thread(tmp_path: Path) -> None:
    files = [ImageFile(save(tmp_path / f"{i}.png"), None) for i in range(12)]
    before = threading.active_count()
    running = stream(files, [])
    next(running)
    running.close()
    assert threading.active_count() == before


def test_a_fault_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(images, "decode", faulty)
    with pytest.raises(ZeroDivisionError):
        list(stream(many(cat=3), []))
