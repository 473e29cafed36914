"""The resize against Pillow's resize of the whole and a crop, the patches against explicit loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitedge.errors import VitEdgeError
from vitedge.preprocess import input_dtype, input_shape, patches_to_image, resize, write_input
from vitedge.specs import ModelCard, Preprocess


def spec(size: tuple[int, int] = (32, 32), channels: int = 3, **keys: Any) -> Preprocess:
    return Preprocess(size=size, mean=(0.5,) * channels, std=(0.5,) * channels, channels=channels, **keys)


def card(size: tuple[int, int], patch: int | None, channels: int = 3) -> ModelCard:
    return ModelCard("test", "classify", spec(size, channels), patch)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with saturated patches: the hardest input for a resampling filter."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(random.random((height, width, 1)) < 0.3, np.uint8(255) * (image > 127), image)


def resize_whole(image: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """Pillow's resize of the whole image, across first: what one call does up to Pillow 12, and in 13 for some shapes."""
    return np.asarray(Image.fromarray(image).resize((width, image.shape[0]), resample).resize((width, height), resample))


def torchvision_crop(image: np.ndarray, size: int, crop_pct: float, resample: Image.Resampling, squash: bool) -> np.ndarray:
    """Resize(int) or Resize((int, int)), then CenterCrop, as written in torchvision.transforms.functional."""
    target = math.floor(size / crop_pct)
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    new_short, new_long = target, int(target * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    if squash:
        new_width = new_height = target
    resized = resize_whole(image, new_height, new_width, resample)
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))  # noqa: RUF046
    return resized[top : top + size, left : left + size]


def assert_within_one_level(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected).max() <= 1


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 500),
    width=st.integers(1, 700),
    size=st.integers(1, 48),
    crop_pct=st.sampled_from([1.0, 0.9, 0.875]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    squash=st.booleans(),
)
def test_resizing_the_crop_equals_cropping_the_resized(
    height: int, width: int, size: int, crop_pct: float, interpolation: str, squash: bool
) -> None:
    image = noise(height, width, seed=height)
    resample = Image.Resampling[interpolation.upper()]
    wanted = spec((size, size), crop_pct=crop_pct, interpolation=interpolation, resize="squash" if squash else "crop")
    actual, expected = resize(image, wanted), torchvision_crop(image, size, crop_pct, resample, squash)
    off = np.abs(actual.astype(int) - expected)
    assert off.max() <= 2
    assert (
        off > 1
    ).sum() <= 4 + off.size // 200  # ties that float32 decides otherwise, in both passes: 3 in a million on average


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (1080, 1920), (255, 257), (224, 300), (256, 256), (60, 900)])
@pytest.mark.parametrize("squash", [False, True])
def test_the_usual_224_pixels(shape: tuple[int, int], squash: bool) -> None:
    image = noise(*shape)
    wanted = spec((224, 224), crop_pct=0.875, resize="squash" if squash else "crop")
    assert_within_one_level(resize(image, wanted), torchvision_crop(image, 224, 0.875, Image.Resampling.BICUBIC, squash))


def test_landscape_equals_a_single_call_of_any_pillow() -> None:
    image = noise(375, 500)
    whole = np.asarray(Image.fromarray(image).resize((341, 256), Image.Resampling.BICUBIC))
    assert_within_one_level(resize(image, spec((224, 224), crop_pct=0.875)), whole[16:240, 58:282])


@pytest.mark.parametrize("shape", [(1, 1), (1, 60_000), (60_000, 1), (2, 9999), (9999, 3), (1, 2)])
def test_extreme_shapes_need_no_extreme_memory(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (10, 20, 30), np.uint8)
    assert (resize(image, spec((64, 64), crop_pct=0.9)) == (10, 20, 30)).all()


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (31, 400), (400, 31), (64, 96)])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (20, 64)])
def test_a_size_that_is_not_square_is_covered_as_timm_does(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """ResizeKeepRatio(longest=0) and CenterCrop of timm.data.transforms."""
    image = noise(*shape)
    targets = [math.floor(side / 0.875) for side in size]
    ratio = min(shape[0] / targets[0], shape[1] / targets[1])
    full = [round(side / ratio) for side in shape]
    resized = resize_whole(image, full[0], full[1], Image.Resampling.BICUBIC)
    top, left = round((full[0] - size[0]) / 2.0), round((full[1] - size[1]) / 2.0)
    expected = resized[top : top + size[0], left : left + size[1]]
    assert_within_one_level(resize(image, spec(size, crop_pct=0.875)), expected)


@pytest.mark.parametrize("full", range(225, 300))
def test_a_crop_pct_that_was_a_quotient_gives_back_its_dividend(full: int) -> None:
    """HF and torchvision name both sizes; crop_pct is then 224 / full, whose inverse may fall just below full."""
    image = np.zeros((full, full, 3), np.uint8)
    assert np.shares_memory(resize(image, spec((224, 224), crop_pct=224 / full)), image)


def test_grey_is_pillows_luma_taken_before_the_resize() -> None:
    image = noise(90, 120)
    grey = resize(image, spec((28, 28), channels=1))
    luma = Image.fromarray(image).convert("L").resize((37, 28), Image.Resampling.BICUBIC)
    assert grey.shape == (28, 28, 1)
    assert_within_one_level(grey[..., 0], np.asarray(luma)[:, 4:32])


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_that_fits_is_left_alone(channels: int) -> None:
    image = np.repeat(np.arange(784, dtype=np.int64).astype(np.uint8).reshape(28, 28, 1), 3, axis=2)
    same = resize(image, spec((28, 28), channels))
    assert np.array_equal(same, image[..., :channels])
    assert np.shares_memory(same, image) == (channels == 3)


def test_cropping_alone_does_not_resample() -> None:
    image = noise(64, 80)
    cropped = resize(image, spec((56, 56), crop_pct=0.875))
    assert np.array_equal(cropped, image[4:60, 12:68])


@pytest.mark.parametrize("view", [np.s_[:, ::-1], np.s_[..., ::-1], np.s_[::2, 10:-7], np.s_[::-1]])
def test_views_of_any_strides_are_read_right(view: Any) -> None:
    image = noise(100, 131)
    image.flags.writeable = False
    assert np.array_equal(resize(image[view], spec()), resize(image[view].copy(), spec()))


@pytest.mark.parametrize("size, patch, channels", [((32, 48), 16, 3), ((28, 28), 4, 1), ((12, 8), 4, 3), ((5, 7), 1, 3)])
def test_patches_are_pixels_minus_128_in_the_documented_order(size: tuple[int, int], patch: int, channels: int) -> None:
    model = card(size, patch, channels)
    image = noise(57, 83)
    out = np.empty(input_shape(model), input_dtype(model))
    write_input(image, model, out)

    pixels = resize(image, model.preprocess)
    expected = []
    for top in range(0, size[0], patch):
        for left in range(0, size[1], patch):
            row = [int(pixels[top + y, left + x, c]) - 128 for y in range(patch) for x in range(patch) for c in range(channels)]
            expected.append(row)
    assert out.dtype == np.int8
    assert out.tolist() == expected
    assert np.array_equal(patches_to_image(out, model), pixels)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 8), channels=st.sampled_from([1, 3]))
def test_patches_and_back_is_the_same_image(rows: int, columns: int, patch: int, channels: int) -> None:
    model = card((rows * patch, columns * patch), patch, channels)
    grey_as_rgb = np.repeat(noise(rows * patch, columns * patch)[..., :1], 3, axis=2)
    image = noise(rows * patch, columns * patch) if channels == 3 else grey_as_rgb
    out = np.empty(input_shape(model), np.int8)
    write_input(image, model, out)
    assert np.array_equal(patches_to_image(out, model), image[..., :channels])


def test_one_row_of_a_batch_is_written_and_no_other() -> None:
    model = card((32, 32), 8)
    batch = np.full((3, *input_shape(model)), 77, np.int8)
    write_input(noise(32, 32), model, batch[1])
    assert (batch[[0, 2]] == 77).all()
    assert np.array_equal(patches_to_image(batch[1], model), noise(32, 32))


def test_a_model_without_a_patch_gets_the_image() -> None:
    model = card((32, 48), None)
    assert input_shape(model) == (32, 48, 3)
    assert input_dtype(model) == np.uint8
    out = np.empty((32, 48, 3), np.uint8)
    write_input(noise(100, 100), model, out)
    assert np.array_equal(out, resize(noise(100, 100), model.preprocess))
    with pytest.raises(VitEdgeError, match="not patches"):
        patches_to_image(np.zeros((6, 768), np.int8), model)


@pytest.mark.parametrize(
    "image, named",
    [
        (np.zeros((8, 8, 3), np.float32), r"float32\[8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), r"uint8\[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8\[8, 8, 4\]"),
        (np.zeros((8, 8, 1), np.uint8), r"uint8\[8, 8, 1\]"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8\[0, 8, 3\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"uint8\[1, 8, 8, 3\]"),
        (Image.new("RGB", (8, 8)), "Image"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, named: str) -> None:
    with pytest.raises(VitEdgeError, match=rf"uint8\[height, width, 3\].*{named}"):
        resize(image, spec())


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((16, 192), np.uint8),
        np.zeros((15, 192), np.int8),
        np.zeros((1, 16, 192), np.int8),
        np.zeros((192, 16), np.int8).T,
        np.zeros((16, 384), np.int8)[:, ::2],
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(VitEdgeError, match=r"contiguous int8\[16, 192\]"):
        write_input(noise(32, 32), card((32, 32), 8), out)


def test_patches_of_another_model_are_refused() -> None:
    with pytest.raises(VitEdgeError, match=r"int8\[16, 192\], not int8\[4, 768\]"):
        patches_to_image(np.zeros((4, 768), np.int8), card((32, 32), 8))


@pytest.mark.parametrize("patch", [0, -4, 5, 33])
def test_a_size_that_patches_do_not_divide_is_refused(patch: int) -> None:
    with pytest.raises(VitEdgeError, match=r"\(32, 32\).*patches of"):
        input_shape(card((32, 32), patch))
