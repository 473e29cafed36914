"""Numbers in, test pictures out, and the numbers back from the pictures.

    TestPattern(size)(n)  ->  uint8[H, W, 3] RGB with n as digits and as a code of black and white cells
    burnt_in_number(picture)  ->  n, also after scaling and lossy coding

So whoever has a frame knows which one it is, and by the source's rate when it was made. Needs NumPy alone.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import VitEdgeError

DEFAULT_SIZE, DEFAULT_FPS = (1280, 720), 30.0
MIN_SIZE = (80, 60)  # below it the digits have no room
COLUMNS, ROWS, CODE_HEIGHT = 20, 2, 0.2  # of the code, along the lower edge; its height as a part of the picture's
NUMBER_BITS = 32
GLYPH_ROWS, GLYPH_COLUMNS = 5, 3
GLYPHS = (0x7B6F, 0x4926, 0x73E7, 0x79A7, 0x49ED, 0x79CF, 0x7BCF, 0x4927, 0x7BEF, 0x79EF)  # 3 x 5 bits, the upper left one first
MOVING = 8  # pixels that the bar goes on from frame to frame


class TestPattern:
    """A grey picture with a bar that moves; `size` is (width, height)."""

    __test__ = False  # what pytest would else collect where a test imports it

    def __init__(self, size: tuple[int, int] = DEFAULT_SIZE) -> None:
        self._width, self._height = size
        if size[0] < MIN_SIZE[0] or size[1] < MIN_SIZE[1]:
            raise VitEdgeError(f"the test pattern needs at least {MIN_SIZE[0]}x{MIN_SIZE[1]} pixels, not {size[0]}x{size[1]}")
        ramp = np.linspace(40, 200, self._width)[None, :, None] * np.array([0.6, 0.8, 1.0])
        self._ground = np.repeat(ramp.astype(np.uint8), self._height, axis=0)
        self._cells = _cells(self._width, self._height)

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """A new picture with `number`, of which the code holds the lower 32 bits."""
        image: NDArray[np.uint8] = self._ground.copy()
        start = number * MOVING % self._width
        image[:, start : start + max(MOVING, self._width // 40)] = (255, 160, 0)
        for bit, (rows, columns) in zip(_bits(number), self._cells, strict=True):
            image[rows, columns] = 255 if bit else 0
        self._write(image, str(number))
        return image

    def _write(self, image: NDArray[np.uint8], digits: str) -> None:
        scale = max(1, min(self._height // 20, self._width // ((GLYPH_COLUMNS + 1) * max(len(digits), 8))))
        top, left = self._height // 10, scale
        for digit in digits:
            glyph = np.kron(_glyph(int(digit)), np.ones((scale, scale), np.bool_))
            image[top : top + glyph.shape[0], left : left + glyph.shape[1]][glyph] = 255
            left += (GLYPH_COLUMNS + 1) * scale


def burnt_in_number(image: NDArray[np.uint8]) -> int:
    """The number in a picture of TestPattern, of whatever size it is by now; a VitEdgeError where there is none."""
    height, width = image.shape[:2]
    if height >= 2 * ROWS / CODE_HEIGHT and width >= 2 * COLUMNS:
        bits = [_inner(image, cell).mean() > 127 for cell in _cells(width, height)]
        number = sum(1 << place for place, bit in enumerate(bits[:NUMBER_BITS]) if bit)
        if bits == _bits(number):
            return number
    hint = "only pictures of the source `synthetic` have one, in the lower fifth of the whole picture"
    raise VitEdgeError("no frame number is burnt into this picture", hint=hint)


def _bits(number: int) -> list[bool]:
    """The lower 32 bits, and 8 to check them by; black and white pictures are no number."""
    number %= 1 << NUMBER_BITS
    check = zlib.crc32(number.to_bytes(4, "little")) & 0xFF ^ 0x5A
    return [bool((number | check << NUMBER_BITS) >> place & 1) for place in range(COLUMNS * ROWS)]


def _cells(width: int, height: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each cell of the code."""
    tops = np.rint(height * np.linspace(1 - CODE_HEIGHT, 1, ROWS + 1)).astype(int).tolist()
    lefts = np.rint(width * np.linspace(0, 1, COLUMNS + 1)).astype(int).tolist()
    return [
        (slice(tops[row], tops[row + 1]), slice(lefts[column], lefts[column + 1]))
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]


def _inner(image: NDArray[np.uint8], cell: tuple[slice, slice]) -> NDArray[np.uint8]:
    """The middle of a cell, which its neighbours have not run into."""
    rows, columns = ((slice(s.start + (s.stop - s.start) // 4, s.stop - (s.stop - s.start) // 4)) for s in cell)
    return image[rows, columns]


def _glyph(digit: int) -> NDArray[np.bool_]:
    bits = [bool(GLYPHS[digit] >> place & 1) for place in range(GLYPH_ROWS * GLYPH_COLUMNS)]
    return np.array(bits).reshape(GLYPH_ROWS, GLYPH_COLUMNS)
