"""kernels/patchify.cu against the CPU's reference and against Pillow: its source, compiled by g++ and run thread by thread.

`tests/kernels` says how. Registers and spills, as NVIDIA's compiler sees them, are in test_patchify_nvrtc.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.engines import ROOT
from tests.kernels.shim import COMPILER, run, run_checked
from tests.test_pixels import CODES, picture
from tests.test_preprocess import noise, resize_whole, torchvision_crop
from vitedge.backends.patchify import SHARED_BYTES, THREADS, Launch, choose_tile, launch, source
from vitedge.errors import VitEdgeError
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.resampling import Taps, resampling
from vitedge.specs import ModelCard, PixelFormat, Preprocess

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no g++")
FORMATS = get_args(PixelFormat)
ROW_DIMENSIONS = {"rgb": 3, "bgr": 3, "grey": 1, "yuyv": 2, "nv12": 1}


def card(size: tuple[int, int], patch: int | None = None, channels: int = 3, **keys: Any) -> ModelCard:
    spec = Preprocess(size, (0.5,) * channels, (0.5,) * channels, channels=channels, **keys)
    return ModelCard("test", "embed", spec, patch)


@st.composite
def cards(draw: st.DrawFn) -> ModelCard:
    """Of up to 48 pixels a side, with patches that are cut from a tile, are a tile, or with none."""
    patch = draw(st.sampled_from([None, 3, 7, 16]))
    sides = st.integers(1, 48 // patch if patch else 48)
    height, width = draw(sides) * (patch or 1), draw(sides) * (patch or 1)
    return card(
        (height, width),
        patch,
        draw(st.sampled_from([1, 3])),
        resize=draw(st.sampled_from(["crop", "squash"])),
        crop_pct=draw(st.sampled_from([1.0, 0.95, 0.875])),
        interpolation=draw(st.sampled_from(["bicubic", "bilinear"])),
    )


def padded(rows: NDArray[np.uint8], pixels: PixelFormat, more: int) -> tuple[NDArray[np.uint8], int]:
    """The bytes of a picture with `more` bytes of noise behind each row but the last, and the pitch."""
    flat = rows.reshape(len(rows), -1)
    behind = np.random.default_rng(more).integers(0, 256, (len(rows), more), np.uint8)
    pitch = flat.shape[1] + more
    return np.concatenate([flat, behind], axis=1).reshape(-1)[: len(rows) * pitch - more], pitch


def reference(given_: NDArray[np.uint8], pixels: PixelFormat, model: ModelCard) -> NDArray[np.uint8]:
    out = np.empty(input_shape(model), input_dtype(model))
    write_input(given_, model, out, pixels)
    return out.view(np.uint8).reshape(-1)


def planned(given_: NDArray[np.uint8], pixels: PixelFormat, model: ModelCard, more: int) -> tuple[Launch, NDArray[np.uint8]]:
    """The launch for a picture with `more` bytes behind each row, and these bytes."""
    flat, pitch = padded(given_, pixels, more)
    height = len(given_) * 2 // 3 if pixels == "nv12" else len(given_)
    plan = launch(height, given_.shape[1], pitch, pixels, model)
    assert plan.picture_bytes == flat.size
    return plan, flat


def run_on(given_: NDArray[np.uint8], pixels: PixelFormat, model: ModelCard, more: int = 0) -> NDArray[np.uint8]:
    return run(*planned(given_, pixels, model, more))


def stark(given_: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Black and white alone: the hardest edges, where a filter overshoots and is clipped."""
    return np.asarray(np.where(given_ > 127, 255, 0), np.uint8)


SIDES = st.integers(1, 60) | st.integers(1, 400)


@needs_compiler
@settings(max_examples=2500, deadline=None)
@given(SIDES, SIDES, st.sampled_from(FORMATS), cards(), st.integers(0, 9), st.integers(0, 99), st.booleans())
def test_every_bit_is_that_of_the_reference(
    height: int, width: int, pixels: PixelFormat, model: ModelCard, more: int, seed: int, edges: bool
) -> None:
    given_ = picture(height, width, pixels, seed)
    given_ = stark(given_) if edges else given_
    np.testing.assert_array_equal(run_on(given_, pixels, model, more), reference(given_, pixels, model))


LARGE = [
    ((3000, 5000), card((14, 14), 14)),
    ((3000, 5000), card((224, 224), 14)),
    ((1500, 2500), card((5, 8), resize="squash")),  # scales of 300 and 313
    ((5000, 3000), card((1, 1), 1, resize="squash")),
    ((3000, 5000), card((28, 28), 7, channels=1)),
    ((1080, 1920), card((518, 518), 14)),
    ((1080, 1920), card((224, 224), 32, interpolation="bilinear", crop_pct=0.875)),
    ((2, 60_000), card((64, 64), 16, resize="squash")),
    ((60_000, 2), card((64, 64), 16)),
    ((2, 2), card((224, 224), 14)),
    ((224, 224), card((224, 224), 16)),
    ((256, 340), card((224, 224), 16, crop_pct=224 / 256)),  # cropped and not resized
]


@needs_compiler
@pytest.mark.parametrize(("shape", "model"), LARGE, ids=lambda value: None if isinstance(value, ModelCard) else f"{value}")
@pytest.mark.parametrize("pixels", ["rgb", "nv12"])
def test_large_and_lopsided_pictures(shape: tuple[int, int], model: ModelCard, pixels: PixelFormat) -> None:
    given_ = picture(*shape, pixels)
    np.testing.assert_array_equal(run_on(given_, pixels, model, 5), reference(given_, pixels, model))


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["bicubic", "bilinear"]), st.integers(0, 9))
def test_a_squashed_picture_is_pillows_to_the_bit(
    height: int, width: int, rows: int, columns: int, interpolation: Any, more: int
) -> None:
    image = noise(height, width, seed=height)
    wanted = resize_whole(image, rows, columns, Image.Resampling[interpolation.upper()])
    model = card((rows, columns), resize="squash", interpolation=interpolation)
    np.testing.assert_array_equal(run_on(image, "rgb", model, more), wanted.reshape(-1))


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40), st.sampled_from([1.0, 0.875]), st.sampled_from(sorted(CODES)), st.integers(0, 9))
def test_a_cropped_picture_of_any_camera_is_opencvs_and_pillows_within_a_level(
    height: int, width: int, size: int, crop_pct: float, pixels: Any, more: int
) -> None:
    given_ = picture(height, width, pixels, seed=width)
    image = cv2.cvtColor(given_, CODES[pixels])
    wanted = torchvision_crop(image, size, crop_pct, Image.Resampling.BICUBIC, squash=False)
    off = np.abs(run_on(given_, pixels, card((size, size), crop_pct=crop_pct), more).reshape(wanted.shape).astype(int) - wanted)
    # two levels where float32 decides both of two ties otherwise: see `_resample` of vitedge/preprocess.py
    assert off.max() <= 2 and (off > 1).sum() <= 4 + off.size // 200


SANITIZED = [
    ((37, 61), "rgb", card((28, 21), 7)),
    ((90, 122), "nv12", card((32, 48), 16)),
    ((31, 44), "yuyv", card((17, 9), channels=1)),
    ((400, 300), "bgr", card((4, 4), 4, interpolation="bilinear")),
    ((9, 5), "grey", card((30, 20), channels=3)),
]


@needs_compiler
@pytest.mark.parametrize(("shape", "pixels", "model"), SANITIZED, ids=[case[1] for case in SANITIZED])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_neither_race_nor_leave_their_memory(
    shape: tuple[int, int], pixels: PixelFormat, model: ModelCard, sanitizer: str
) -> None:
    given_ = stark(picture(*shape, pixels))
    plan, flat = planned(given_, pixels, model, 3)
    np.testing.assert_array_equal(run_checked(plan, flat, sanitizer), reference(given_, pixels, model))


BARRIER = "        __syncthreads();\n"


@needs_compiler
@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(barrier: int) -> None:
    plan, flat = planned(picture(400, 300, "bgr"), "bgr", card((4, 4), 4), 0)
    parts = source().split(BARRIER)
    assert len(parts) == 3
    parts[barrier : barrier + 2] = [parts[barrier] + parts[barrier + 1]]
    with pytest.raises(AssertionError, match="data race"):
        run_checked(plan, flat, "thread", BARRIER.join(parts))


@needs_compiler
def test_a_barrier_that_some_threads_miss_is_found() -> None:
    plan, flat = planned(picture(20, 30, "rgb"), "rgb", card((14, 14), 14), 0)
    text = source().replace(BARRIER, "        if (threadIdx.x != 1) __syncthreads();\n")
    with pytest.raises(AssertionError, match="not all threads"):
        run(plan, flat, text)


@needs_compiler
@pytest.mark.parametrize("short", ["shared_bytes", "picture_bytes", "out_bytes"])
def test_memory_that_is_a_pixel_too_short_is_found(short: str) -> None:
    plan, flat = planned(picture(20, 30, "rgb"), "rgb", card((14, 14), 14, resize="squash"), 0)
    less = dataclasses.replace(plan, **{short: getattr(plan, short) - 4})
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run_checked(less, flat, "address,undefined")


@needs_compiler
def test_a_read_behind_the_picture_ends_the_process() -> None:
    code = (
        "import dataclasses; from tests.backends.test_patchify import *\n"
        "plan, flat = planned(picture(20, 30, 'rgb'), 'rgb', card((20, 30)), 0)\n"
        "assert run(plan, flat).size == 1800\n"
        "run(dataclasses.replace(plan, picture_bytes=1799), flat)\n"
        "print('came through')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -11 and "came through" not in done.stdout, done.stderr


LENGTHS = st.integers(1, 200) | st.integers(1, 6000)


@settings(max_examples=500, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 1, 7, 14, 16, 32]), st.data())
def test_tiles_cover_the_result_once_and_fit_a_block(
    height: int, width: int, rows: int, columns: int, patch: int | None, data: st.DataObject
) -> None:
    keys = {
        "resize": data.draw(st.sampled_from(["crop", "squash"])),
        "interpolation": data.draw(st.sampled_from(["bicubic", "bilinear"])),
    }
    model = card((rows * (patch or 1), columns * (patch or 1)), patch, data.draw(st.sampled_from([1, 3])), **keys)
    plan = launch(height, width, 3 * width, "rgb", model)
    out_height, out_width, taps_x, taps_y, tile_height, band, pitch = plan.scalars[2:]
    assert (out_height, out_width) == model.preprocess.size
    assert 0 < plan.shared_bytes <= SHARED_BYTES
    assert 1 <= plan.block[0] * plan.block[1] <= THREADS <= 1024 and plan.block[2] == 1 and band >= 1
    for blocks, side, whole in zip(plan.grid, (plan.block[0], tile_height), (out_width, out_height), strict=True):
        assert (blocks - 1) * side < whole <= blocks * side <= 65_535
    pixel_bytes = 4 if model.preprocess.channels == 3 else 1
    assert longest(plan.tables[0], plan.block[0], taps_x) <= pitch
    narrow = longest(plan.tables[2], tile_height, taps_y) * plan.block[0]
    assert (band * pitch + narrow) * pixel_bytes <= plan.shared_bytes


def longest(first: NDArray[np.int32], side: int, taps: int) -> int:
    """The most source pixels that a tile reads, counted tile by tile."""
    tiles = [first[start : start + side] for start in range(0, len(first), side)]
    assert all((np.diff(tile) >= 0).all() for tile in tiles)  # what the kernel takes for granted
    return max(int(tile[-1] - tile[0]) + taps for tile in tiles)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, LENGTHS, cards())
def test_no_sum_leaves_32_bits_whatever_the_picture(height: int, width: int, model: ModelCard) -> None:
    found = resampling(height, width, model.preprocess)
    for taps in (found.across, found.down):
        weights = taps.weights.astype(np.int64)
        assert 255 * weights.clip(min=0).sum(axis=1).max() + 2**21 < 2**31
        assert 255 * weights.clip(max=0).sum(axis=1).min() >= -(2**31)


def test_a_usual_camera_gets_a_patch_a_block_and_half_the_shared_memory() -> None:
    for patch in (14, 16):
        plan = launch(1080, 1920, 1920, "nv12", card((224, 224), patch))
        assert plan.block[0] == plan.scalars[6] == patch and plan.grid == (224 // patch,) * 2
        assert plan.shared_bytes < SHARED_BYTES / 2
        assert plan.defines == ("PIXELS=NV12", "CHANNELS=3", f"PATCH={patch}")


def test_a_plan_is_made_once() -> None:
    model = card((224, 224), 14)
    assert launch(480, 640, 1920, "rgb", model) is launch(480, 640, 1920, "rgb", dataclasses.replace(model, name="other"))


def test_a_result_of_too_many_pixels_each_is_refused() -> None:
    ones = np.ones((1, 9000), np.int32)
    with pytest.raises(VitEdgeError, match="9000 x 9001 pixels") as caught:
        choose_tile(Taps(np.zeros(1, np.int32), ones), Taps(np.zeros(1, np.int32), ones), 1, 4)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("layout", "pixels", "message"),
    [
        ((0, 4, 12), "rgb", r"a picture in rgb must be a non-empty one, not 0 x 4"),
        ((4, 5, 10), "yuyv", r"a picture in yuyv must be a non-empty one of an even width, not 4 x 5"),
        ((3, 4, 4), "nv12", r"of an even height and width, not 3 x 4"),
        ((4, 4, 11), "bgr", r"rows of 4 pixels in bgr take 12 bytes, so they cannot be 11 bytes apart"),
    ],
)
def test_a_layout_that_no_picture_has_is_refused(layout: tuple[int, int, int], pixels: PixelFormat, message: str) -> None:
    with pytest.raises(VitEdgeError, match=message):
        launch(*layout, pixels, card((14, 14), 14))


def test_patches_that_do_not_fill_the_image_are_refused() -> None:
    with pytest.raises(VitEdgeError, match="cannot be cut into patches of 5 x 5"):
        launch(4, 4, 12, "rgb", card((14, 14), 5))
