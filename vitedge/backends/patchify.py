"""A picture's layout and a model's card in, one launch of kernels/patchify.cu out: what to compile, upload and pass.

    (height, width, pitch, pixels) + ModelCard  ->  Launch

Whoever has a GPU compiles `source()` with `-D` before each of `Launch.defines`, takes the function `FUNCTION`, and launches it on
`grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory and these arguments, in this order:

    const uint8* picture     the first row of the picture, rows `pitch` bytes apart; NV12: picture + height * pitch is its U V
    uint8* out               one row of the engine's input, as `vitedge.preprocess.write_input` fills it
    const int32*             the four arrays of `tables`, on the GPU: first_x, weights_x, first_y, weights_y
    int32                    the nine of `scalars`: the picture's height and pitch, the result's height and width, taps_x, taps_y,
                             tile_height, band, staged_pitch

No pointer needs to be aligned to more than its type. The result equals write_input bit for bit. Knows nothing of CUDA's
libraries, of streams or of memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError
from vitedge.preprocess import patch_grid
from vitedge.resampling import Taps, resampling
from vitedge.specs import ModelCard, PixelFormat, Preprocess

FUNCTION = "patchify"
THREADS = 256  # of a block at most, as the kernel declares
SHARED_BYTES = 48 * 1024  # what every GPU gives a block unasked
TILE = 16  # pixels a side, or the patches that come nearest to it
ROWS_AT_ONCE = 2  # that a thread narrows in one go
FEWEST_ROWS = 8  # of a band; with fewer, most threads wait
FEWEST_BLOCKS = 16  # two for each multiprocessor of the smallest Orin
ROW_BYTES: dict[PixelFormat, int] = {"rgb": 3, "bgr": 3, "grey": 1, "yuyv": 2, "nv12": 1}  # a pixel, in a row of the picture


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch of the kernel, for pictures of one layout and one model.

    defines: NAME=VALUE each. grid: blocks in x and y. block: threads in x, y and z. tables, scalars: the arguments that follow
    the two addresses, see the module. picture_bytes, out_bytes: how much is read from the one and written to the other.
    """

    defines: tuple[str, ...]
    grid: tuple[int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    tables: tuple[NDArray[np.int32], ...]
    scalars: tuple[int, ...]
    picture_bytes: int
    out_bytes: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block makes, and the shared memory it does that in, in pixels.

    height, width: of the result. band: rows of the picture that are staged at once. pitch: between these. rows: that the
    tallest tile needs, each `width` pixels when narrowed.
    """

    height: int
    width: int
    band: int
    pitch: int
    rows: int

    @property
    def pixels(self) -> int:
        """What shared memory has to hold."""
        return self.band * self.pitch + self.rows * self.width


def source() -> str:
    """The kernel, CUDA C++ for any compiler of the toolkit, NVRTC included."""
    return Path(__file__).with_name("kernels").joinpath("patchify.cu").read_text("utf-8")


def launch(height: int, width: int, pitch: int, pixels: PixelFormat, card: ModelCard) -> Launch:
    """How to turn pictures of `height` x `width` in `pixels`, rows `pitch` bytes apart, into the input of `card`'s engines.

    Computed once for each layout. A VitEdgeError says which layout no picture can have.
    """
    return _launch(height, width, pitch, pixels, card.preprocess, card.patch)  # a card has labels, slow to hash


@functools.lru_cache(maxsize=64)
def _launch(height: int, width: int, pitch: int, pixels: PixelFormat, spec: Preprocess, patch: int | None) -> Launch:
    _check_layout(height, width, pitch, pixels)
    if patch is not None:
        patch_grid(spec, patch)
    found = resampling(height, width, spec)
    across, down = found.across, found.down
    pixel_bytes = 4 if spec.channels == 3 and pixels != "grey" else 1
    tile = choose_tile(across, down, patch or 1, pixel_bytes)
    taps_x, taps_y = across.weights.shape[1], down.weights.shape[1]
    return Launch(
        defines=(f"PIXELS={pixels.upper()}", f"CHANNELS={spec.channels}", f"PATCH={patch or 0}"),
        grid=(_quotient(spec.size[1], tile.width), _quotient(spec.size[0], tile.height)),
        block=(tile.width, THREADS // tile.width, 1),
        shared_bytes=tile.pixels * pixel_bytes,
        tables=(across.first, _by_tap(across), down.first, _by_tap(down)),
        scalars=(height, pitch, *spec.size, taps_x, taps_y, tile.height, tile.band, tile.pitch),
        picture_bytes=_picture_bytes(height, width, pitch, pixels),
        out_bytes=spec.size[0] * spec.size[1] * spec.channels,
    )


def choose_tile(across: Taps, down: Taps, patch: int, pixel_bytes: int) -> Tile:
    """The largest tile up to TILE a side that shared memory has room for and that leaves enough blocks, by halving.

    Tiles overlap in what they read, by nearly the taps, so the larger they are, the less is done twice. Those of whole patches
    are written in one piece. A VitEdgeError where not even a pixel has room: at some 1500 pixels of the picture a side.
    """
    side, room = patch * max(1, round(TILE / patch)), SHARED_BYTES // pixel_bytes
    tile = _tile(across, down, min(side, len(down.first)), min(side, len(across.first)), room)
    while tile.height * tile.width > 1 and not _is_good(tile, across, down):
        tile = _tile(across, down, _quotient(tile.height, 2), _quotient(tile.width, 2), room)
    if tile.band < 1:
        raise VitEdgeError(
            f"shared memory has no room for the {tile.rows} x {tile.pitch} pixels of a picture that make one of the result",
            hint="scale the pictures down before, or resize on the CPU",
        )
    return tile


def _is_good(tile: Tile, across: Taps, down: Taps) -> bool:
    blocks = _quotient(len(across.first), tile.width) * _quotient(len(down.first), tile.height)
    return tile.band >= min(FEWEST_ROWS, tile.rows) and blocks >= FEWEST_BLOCKS


def _tile(across: Taps, down: Taps, height: int, width: int, room: int) -> Tile:
    """A tile of `height` x `width` with bands as high as `room` pixels allow, which may be none."""
    rows, columns = _longest(down, height), _longest(across, width)
    pitch = columns | 1  # odd: what lies below one another is in different banks of shared memory
    band = min(ROWS_AT_ONCE * (THREADS // width), (room - rows * width) // pitch)
    band = _quotient(rows, _quotient(rows, band)) if band > 0 else 0  # as many bands of one height
    return Tile(height, width, band, pitch, rows)


def _longest(taps: Taps, side: int) -> int:
    """The most pixels of the picture that `side` pixels in a row of the result are made from."""
    ends = np.minimum(np.arange(side, len(taps.first) + side, side), len(taps.first)) - 1
    return int(np.max(taps.first[ends] - taps.first[::side])) + int(taps.weights.shape[1])


def _by_tap(taps: Taps) -> NDArray[np.int32]:
    """int32[taps, out], as the kernel reads them."""
    return np.ascontiguousarray(taps.weights.T)


def _check_layout(height: int, width: int, pitch: int, pixels: PixelFormat) -> None:
    least = ROW_BYTES[pixels] * width
    if min(height, width) < 1 or (pixels in ("yuyv", "nv12") and width % 2) or (pixels == "nv12" and height % 2):
        even = {"yuyv": " of an even width", "nv12": " of an even height and width"}.get(pixels, "")
        raise VitEdgeError(f"a picture in {pixels} must be a non-empty one{even}, not {height} x {width} (height x width)")
    if pitch < least:
        raise VitEdgeError(f"rows of {width} pixels in {pixels} take {least} bytes, so they cannot be {pitch} bytes apart")


def _picture_bytes(height: int, width: int, pitch: int, pixels: PixelFormat) -> int:
    """From the first byte to the last that is read; what follows the last row up to `pitch` is not."""
    rows = height * 3 // 2 if pixels == "nv12" else height
    return (rows - 1) * pitch + ROW_BYTES[pixels] * width


def _quotient(whole: int, part: int) -> int:
    return -(-whole // part)
