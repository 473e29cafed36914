"""Camera formats as RGB, bit for bit as OpenCV converts them."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.pixels import frame_size, to_rgb
from vitedge.specs import PixelFormat

CODES = {"bgr": cv2.COLOR_BGR2RGB, "grey": cv2.COLOR_GRAY2RGB, "yuyv": cv2.COLOR_YUV2RGB_YUY2, "nv12": cv2.COLOR_YUV2RGB_NV12}


def picture(height: int, width: int, pixels: PixelFormat, seed: int = 0) -> NDArray[np.uint8]:
    """Noise in a format, of `height` x `width` or, where that must be even, the next larger size."""
    height, width = height + height % 2 * (pixels == "nv12"), width + width % 2 * (pixels in ("nv12", "yuyv"))
    shape = {"grey": (height, width), "yuyv": (height, width, 2), "nv12": (height * 3 // 2, width)}.get(
        pixels, (height, width, 3)
    )
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(sorted(CODES)), st.integers(0, 99))
def test_every_format_is_converted_as_opencv_does(height: int, width: int, pixels: Any, seed: int) -> None:
    given_ = picture(height, width, pixels, seed)
    wanted = cv2.cvtColor(given_, CODES[pixels])
    np.testing.assert_array_equal(to_rgb(given_, pixels), wanted)
    assert frame_size(given_, pixels) == wanted.shape[:2]


def test_rgb_is_taken_as_it_is() -> None:
    rgb = picture(3, 5, "rgb")
    assert to_rgb(rgb, "rgb") is rgb


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [
        ((4, 4), "rgb"),
        ((4, 4, 4), "bgr"),
        ((4, 4, 3), "grey"),
        ((4, 5, 2), "yuyv"),
        ((4, 4), "nv12"),
        ((6, 5), "nv12"),
        ((0, 4), "grey"),
    ],
)
def test_an_array_of_another_format_is_refused(shape: tuple[int, ...], pixels: PixelFormat) -> None:
    with pytest.raises(VitEdgeError, match=f"a picture in {pixels} must be .*, not uint8"):
        to_rgb(np.zeros(shape, np.uint8), pixels)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(VitEdgeError, match=r"must be a non-empty uint8.*, not float32"):
        to_rgb(np.zeros((2, 2, 3), np.float32), "rgb")  # type: ignore[arg-type]
    with pytest.raises(VitEdgeError, match="not list"):
        to_rgb([[1]], "grey")  # type: ignore[arg-type]


@pytest.mark.parametrize("pixels", ["RGB", "rgba", "", None, 5, ["rgb"]])
def test_a_format_that_there_is_not_is_refused(pixels: Any) -> None:
    with pytest.raises(VitEdgeError, match="there is no pixel format"):
        frame_size(picture(4, 4, "rgb"), pixels)
