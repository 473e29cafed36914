"""An image in, one row of an engine's input out, on the CPU.

    a picture (see pixels.py)  ->  resized, cropped uint8[h, w, C]  ->  int8[N, P*P*C] patches, or the image itself

This is the reference, by Pillow: resample_cpu.py and the CUDA kernel equal it bit for bit. It equals what torchvision's and
timm's evaluation transforms do, but for ties (see `_resample`). No mean, std or float: the engine has those folded into its
first layer. Knows nothing of files, cameras, batches or engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitedge.errors import VitEdgeError
from vitedge.pixels import described, to_rgb
from vitedge.resample_cpu import write_patches
from vitedge.resampling import rows_read, scaled_size, seen_region
from vitedge.specs import ModelCard, PixelFormat, Preprocess

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIGN_BIT = np.uint8(0x80)


def write_input(image: NDArray[np.uint8], card: ModelCard, out: NDArray[Any], pixels: PixelFormat = "rgb") -> None:
    """Resize `image`, laid out as `vitedge.pixels` says, and write it to `out`, one C-contiguous row of the engine's input.

    out: int8[N, P*P*C] where the card has a patch: patches in raster order, each [py][px][c], values pixel - 128;
    else uint8[h, w, C]. A VitEdgeError says which dtype or shape does not fit.
    """
    shape, dtype = input_shape(card), input_dtype(card)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise VitEdgeError(f"the input buffer of {card.name} must be a contiguous {dtype}{list(shape)}, not {described(out)}")
    fill_input(image, card, out, pixels)


def fill_input(image: NDArray[np.uint8], card: ModelCard, out: NDArray[Any], pixels: PixelFormat) -> None:
    """`write_input` into a row that is known to fit, as those of a session are: looking costs as much as a tiny picture."""
    if write_patches(image, pixels, card.preprocess, card.patch, out):
        return
    resized = resize(to_rgb(image, pixels), card.preprocess)
    if card.patch is None:
        out[...] = resized
    else:
        rows, columns = patch_grid(card.preprocess, card.patch)
        patched = resized.reshape(rows, card.patch, columns, card.patch, -1).transpose(0, 2, 1, 3, 4)
        np.bitwise_xor(patched, SIGN_BIT, out=out.view(np.uint8).reshape(patched.shape))


def input_shape(card: ModelCard) -> tuple[int, ...]:
    """The shape of one input row: (patches, P*P*C), or (h, w, C) of a model without a patch."""
    spec = card.preprocess
    if card.patch is None:
        return (*spec.size, spec.channels)
    rows, columns = patch_grid(spec, card.patch)
    return rows * columns, card.patch * card.patch * spec.channels


def input_dtype(card: ModelCard) -> np.dtype[Any]:
    """int8 for patches, uint8 for an image."""
    return np.dtype(np.uint8 if card.patch is None else np.int8)


def patch_grid(spec: Preprocess, patch: int) -> tuple[int, int]:
    """The (rows, columns) of patches of `patch` x `patch` pixels; a VitEdgeError where they do not fill the image."""
    if patch < 1 or any(side % patch for side in spec.size):
        raise VitEdgeError(f"an image of {spec.size} (height, width) cannot be cut into patches of {patch} x {patch}")
    return spec.size[0] // patch, spec.size[1] // patch


def patches_to_image(patches: NDArray[np.int8], card: ModelCard) -> NDArray[np.uint8]:
    """The image, uint8[h, w, C], that `patches`, int8[N, P*P*C], were cut from: to look at what an engine was fed."""
    if card.patch is None:
        raise VitEdgeError(f"{card.name} takes an image, not patches")
    if patches.shape != input_shape(card) or patches.dtype != np.int8:
        raise VitEdgeError(f"the patches of {card.name} must be int8{list(input_shape(card))}, not {described(patches)}")
    rows, columns = patch_grid(card.preprocess, card.patch)
    pixels: NDArray[np.uint8] = patches.view(np.uint8) ^ SIGN_BIT
    pixels = pixels.reshape(rows, columns, card.patch, card.patch, -1).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(*card.preprocess.size, card.preprocess.channels)


def resize(image: NDArray[np.uint8], spec: Preprocess) -> NDArray[np.uint8]:
    """`image`, uint8[H, W, 3] RGB, resized and center-cropped to uint8[h, w, C]; grey (C = 1) is ITU-R 601-2 luma.

    An image that needs no resizing comes back as a view of itself. A VitEdgeError says what else was given.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise VitEdgeError(f"an image must be a non-empty uint8[height, width, 3] in RGB order, not {described(image)}")
    source, (height, width) = (image.shape[0], image.shape[1]), spec.size
    rows, columns = seen_region(*source, spec)
    if scaled_size(source, spec) == source:
        cropped = image[int(rows[0]) : int(rows[1]), int(columns[0]) : int(columns[1])]
        return cropped if spec.channels == 3 else np.asarray(_picture(cropped, spec))[..., None]
    # Resizing no more than the crop keeps halves the time and bounds the memory, whatever the aspect ratio.
    return np.asarray(_resample(image, spec, rows, columns)).reshape(height, width, spec.channels)


def _resample(image: NDArray[np.uint8], spec: Preprocess, rows: tuple[float, float], columns: tuple[float, float]) -> Image.Image:
    """The given rows and columns of `image` at `spec.size`; the filter sees beyond them, as it does in a resized whole.

    Across, then down, in two calls, since models were trained so: one call of Pillow 13 would go down first for some
    shapes, and the 8 bits in between make that differ by 20 levels at hard edges. Pillow keeps a box in float32, so where
    exact arithmetic meets a tie (x.5) in both passes, a pixel may end up two levels off: 3 in a million, of pure noise.
    """
    height, width = spec.size
    first, last = rows_read(image.shape[0], rows, spec)
    resampling = RESAMPLING[spec.interpolation]
    narrow = _picture(image[first:last], spec).resize(
        (width, last - first), resampling, (columns[0], 0, columns[1], last - first)
    )
    return narrow.resize((width, height), resampling, (0, rows[0] - first, width, rows[1] - first))


def _picture(image: NDArray[np.uint8], spec: Preprocess) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if spec.channels == 3 else picture.convert("L")
