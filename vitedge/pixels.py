"""A picture as cameras deliver it in, uint8[H, W, 3] RGB out.

    "rgb", "bgr"  uint8[H, W, 3]       "grey"  uint8[H, W]
    "yuyv"        uint8[H, W, 2]       Y U, Y V of two neighbours (YUY2, 4:2:2), W even
    "nv12"        uint8[H * 3/2, W]    all of Y, then rows of U V for 2 x 2 pixels (4:2:0), H and W even

Y'CbCr is that of ITU-R BT.601 in video range, and neighbours share their colour unsmoothed, both to the bit as in OpenCV's
cvtColor. This is the reference: others compute the same integers. Knows nothing of sizes that models want.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.specs import PixelFormat

SHIFT = 20  # of the factors below: 255/219, and 2 * 255/224 times (1 - Kr), (1 - Kb) and what is left for green
LUMA, RED_V, GREEN_U, GREEN_V, BLUE_U = 1220542, 1673527, -409993, -852492, 2116026


def frame_size(picture: NDArray[np.uint8], pixels: PixelFormat) -> tuple[int, int]:
    """The (height, width) of a picture; a VitEdgeError where its array is none of that format."""
    if not isinstance(pixels, str) or pixels not in _WANTED:
        raise VitEdgeError(f"there is no pixel format {pixels!r}", hint=f"known: {', '.join(_WANTED)}")
    even = {"yuyv": (1, 2), "nv12": (3, 2)}.get(pixels, (1, 1))
    shape = {"grey": (), "nv12": (), "yuyv": (2,)}.get(pixels, (3,))
    fits = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim >= 2 and picture.size > 0
    if not fits or picture.shape[2:] != shape or picture.shape[0] % even[0] or picture.shape[1] % even[1]:
        raise VitEdgeError(f"a picture in {pixels} must be a non-empty {_WANTED[pixels]}, not {described(picture)}")
    height, width = picture.shape[:2]
    return (height * 2 // 3 if pixels == "nv12" else height), width


def to_rgb(picture: NDArray[np.uint8], pixels: PixelFormat) -> NDArray[np.uint8]:
    """The picture as uint8[H, W, 3] RGB; a view of it where it is that already, or BGR."""
    height, width = frame_size(picture, pixels)
    if pixels == "rgb":
        return picture
    if pixels == "bgr":
        return picture[..., ::-1]
    if pixels == "grey":
        return np.repeat(picture[..., None], 3, axis=2)
    if pixels == "yuyv":
        colour = picture[..., 1].reshape(height, width // 2, 2).repeat(2, axis=1)
        return _from_yuv(picture[..., 0], colour)
    colour = picture[height:].reshape(height // 2, width // 2, 2).repeat(2, axis=0).repeat(2, axis=1)
    return _from_yuv(picture[:height], colour)


def described(value: object) -> str:
    """What an array is, or the type of what is none, for a sentence."""
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _from_yuv(luma: NDArray[np.uint8], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8[H, W] and uint8[H, W, 2] (U, V) as uint8[H, W, 3] RGB."""
    grey = np.maximum(luma.astype(np.int32) - 16, 0) * LUMA + (1 << (SHIFT - 1))
    u, v = np.moveaxis(colour.astype(np.int32) - 128, 2, 0)
    rgb: NDArray[np.int32] = np.stack((grey + RED_V * v, grey + GREEN_V * v + GREEN_U * u, grey + BLUE_U * u), axis=2)
    return np.asarray(np.clip(rgb >> SHIFT, 0, 255), np.uint8)


_WANTED: dict[PixelFormat, str] = {
    "rgb": "uint8[height, width, 3]",
    "bgr": "uint8[height, width, 3]",
    "grey": "uint8[height, width]",
    "yuyv": "uint8[height, width, 2] of an even width",
    "nv12": "uint8[height * 3/2, width] of an even height and width",
}
