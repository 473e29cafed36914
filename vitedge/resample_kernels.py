"""The inner loops of resampling, compiled by numba when this module is imported: for resample_cpu.py and nobody else.

    rows of a picture  ->  strips of 16 rows, cut into quads  ->  narrow quads  ->  rows of the result  ->  patches

A quad is four neighbours along the axis that is filtered, in one int32; 16 quads of as many rows (across) or columns (down)
lie side by side. So one multiply-add works on 16 lanes, and both passes are the same arithmetic. A weight of 23 bits is
two of 12 and 11, high * 2**11 + low, since processors multiply-add pairs of 16 bits in one instruction; the sums, modulo
2**32, are those of the whole. What numba does not vectorize on its own is written for LLVM as vectors of any processor.
Holds no Python object and no lock: any number of threads may run it at once, each with a scratch of its own. Knows nothing
of specs and cards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vitedge.pixels import BLUE_U, GREEN_U, GREEN_V, LUMA, RED_V, SHIFT
from vitedge.resampling import PRECISION_BITS

LANES = 16  # rows or columns that are worked on at once
RED, GREEN, BLUE = 19595, 38470, 7471  # of ITU-R 601-2 luma, times 2**-16
LOW_BITS = 11  # of a weight, in its lower half
PACKED, YUYV, NV12 = 0, 1, 2  # how the pixels of a picture lie
LAYOUTS = {"yuyv": YUYV, "nv12": NV12}  # of the others, packed
BYTE, HALF, WORD, INDEX = ir.IntType(8), ir.IntType(16), ir.IntType(32), types.intp
BYTES, WORDS = types.uint8[::1], types.int32[::1]
PICTURE = types.Array(types.uint8, 2, "A", readonly=True)
TABLE = types.Array(types.int32, 1, "C", readonly=True)
F = TypeVar("F", bound=Callable[..., Any])
LANE, HALVES, QUAD = ir.VectorType(WORD, LANES), ir.VectorType(HALF, 2 * LANES), ir.VectorType(WORD, 4)


def compiled(function: F) -> F:
    """Compile with its callers, into which it disappears."""
    return cast(F, njit(nogil=True)(function))


def vector_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that writes LLVM's code one that compiled loops can call, without the first argument."""
    return cast(Callable[..., Any], intrinsic(function))


def compiled_now(function: F) -> F:
    """Compile for SIGNATURE, or load what was compiled before: numba keeps it beside this file, or in the user's cache."""
    try:
        return cast(F, njit(SIGNATURE, nogil=True, cache=True)(function))
    except Exception:  # noqa: BLE001  it can be kept nowhere, or what was kept is damaged, which raises whatever it likes
        return cast(F, njit(SIGNATURE, nogil=True)(function))


def all_lanes(value: int) -> ir.Constant:
    """A vector of 16 times the same."""
    return ir.Constant(LANE, [value] * LANES)


def pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any, pointee: Any) -> Any:
    """Where element `offset` of a flat array lies, as a pointer to a `pointee`."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), pointee.as_pointer())


def shuffled(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    """Those elements of two vectors, numbered through, that `order` names."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(order)), list(order)))


def interleaved(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    """Two vectors of 16 words shuffled alike in each of their four groups of 4; those of `b` are numbered from 16 on."""
    return shuffled(builder, a, b, [4 * group + place for group in range(4) for place in order])


def clipped(builder: Any, value: Any, low: ir.Constant, high: ir.Constant) -> Any:
    """A number, or a vector of them, within low..high."""
    value = builder.select(builder.icmp_signed(">", value, low), value, low)
    return builder.select(builder.icmp_signed("<", value, high), value, high)


def pair_products(builder: Any, taps: Any, weights: Any) -> Any:
    """Of int16[2 * LANES] and two int16 in an int32: a0 * w0 + a1 * w1 of every pair; pmaddwd where there is one."""
    one = builder.insert_element(ir.Constant(LANE, ir.Undefined), weights, ir.Constant(WORD, 0))
    factors = (taps, shuffled(builder, one, one, [0] * LANES))
    wide = ir.VectorType(WORD, 2 * LANES)
    products = builder.mul(*(builder.sext(builder.bitcast(factor, HALVES), wide) for factor in factors))
    even, odd = (shuffled(builder, products, products, range(start, 2 * LANES, 2)) for start in (0, 1))
    return builder.add(even, odd)


@vector_code
def weigh(_: Any, quads: Any, at: Any, step: Any, weights: Any, first: Any, count: Any, out: Any, to: Any, spread: Any) -> Any:
    """Weigh `count` quads of each of 16 lanes, from quads[at], `step` apart, by 4 words each from weights[first].

    The 16 bytes that come out are 4 words of `out`, from `to`, `spread` apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        quads, at, step, weights, first, count, out, to, spread = arguments
        kinds = signature.args
        # LLVM keeps both in registers; half a level, so that the shift at the end rounds
        high = cgutils.alloca_once_value(builder, all_lanes(1 << (PRECISION_BITS - LOW_BITS - 1)))
        low = cgutils.alloca_once_value(builder, all_lanes(0))
        with cgutils.for_range(builder, count) as loop:
            quad = builder.load(pointer(context, builder, kinds[0], quads, builder.add(at, builder.mul(loop.index, step)), LANE))
            quad.align = 4
            even = builder.and_(quad, all_lanes(0x00FF00FF))
            odd = builder.lshr(builder.bitcast(quad, HALVES), ir.Constant(HALVES, [8] * 2 * LANES))
            where = builder.add(first, builder.mul(loop.index, ir.Constant(first.type, 4)))
            for total, part in ((high, 0), (low, 2)):
                for taps, number in ((even, part), (odd, part + 1)):
                    offset = builder.add(where, ir.Constant(where.type, number))
                    weight = builder.load(pointer(context, builder, kinds[3], weights, offset, WORD))
                    builder.store(builder.add(builder.load(total), pair_products(builder, taps, weight)), total)
        total = builder.add(builder.shl(builder.load(high), all_lanes(LOW_BITS)), builder.load(low))
        levels = clipped(builder, builder.ashr(total, all_lanes(PRECISION_BITS)), all_lanes(0), all_lanes(255))
        words = builder.bitcast(builder.trunc(levels, ir.VectorType(BYTE, LANES)), QUAD)
        for number in range(4):
            offset = builder.add(to, builder.mul(spread, ir.Constant(to.type, number)))
            target = pointer(context, builder, kinds[6], out, offset, WORD)
            builder.store(builder.extract_element(words, ir.Constant(WORD, number)), target)
        return context.get_dummy_value()

    return types.void(WORDS, INDEX, INDEX, TABLE, INDEX, INDEX, WORDS, INDEX, INDEX), generate


def quad_cutter(bytes_: Sequence[int], count: int) -> Any:
    """What cuts 16 bytes of each of 16 rows into quads: four times 4 x 4 words, transposed.

    bytes_: their order, so that those of a quad come together. count: how many quads that makes.
    """

    @vector_code
    def cut(_: Any, strip: Any, at: Any, pitch: Any, quads: Any, to: Any, step: Any) -> Any:
        """From strip[at], rows `pitch` apart, to quads[to], those of the 16 rows side by side, the quads `step` apart."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            strip, at, pitch, quads, to, step = arguments

            def row(number: int) -> Any:
                offset = builder.add(at, builder.mul(pitch, ir.Constant(at.type, number)))
                loaded = builder.load(pointer(context, builder, signature.args[0], strip, offset, ir.VectorType(BYTE, 16)))
                loaded.align = 1
                return loaded

            def every_fourth(first: int) -> Any:
                a, b, c, d = (row(first + 4 * group) for group in range(4))
                upper, lower = shuffled(builder, a, b, range(32)), shuffled(builder, c, d, range(32))
                whole = shuffled(builder, upper, lower, range(64))
                sorted_ = shuffled(builder, whole, whole, [16 * group + byte for group in range(4) for byte in bytes_])
                return builder.bitcast(sorted_, LANE)

            a, b, c, d = (every_fourth(first) for first in range(4))
            for number in range(count):  # a column of four 4 x 4 matrices
                side, place = 2 * (number // 2), 2 * (number % 2)
                order = (side, 16 + side, side + 1, 17 + side)
                top, bottom = interleaved(builder, a, b, order), interleaved(builder, c, d, order)
                column = interleaved(builder, top, bottom, (place, place + 1, 16 + place, 17 + place))
                offset = builder.add(to, builder.mul(step, ir.Constant(to.type, number)))
                builder.store(column, pointer(context, builder, signature.args[3], quads, offset, LANE)).align = 4
            return context.get_dummy_value()

        return types.void(BYTES, INDEX, INDEX, WORDS, INDEX, INDEX), generate

    return cut


cut_plane = quad_cutter(range(16), 4)
cut_colours = quad_cutter([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 12, 13, 14, 15], 3)


@vector_code
def copy_bytes(_: Any, picture: Any, row: Any, column: Any, out: Any, to: Any, count: Any) -> Any:
    """Copy `count` bytes from picture[row, column] on, which lie side by side, to out[to]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        picture, row, column, out, to, count = arguments
        kind = signature.args[0]
        source = cgutils.get_item_pointer(
            context, builder, kind, context.make_array(kind)(context, builder, picture), [row, column]
        )
        cgutils.raw_memcpy(builder, pointer(context, builder, signature.args[3], out, to, BYTE), source, count, 1)
        return context.get_dummy_value()

    return types.void(PICTURE, INDEX, INDEX, BYTES, INDEX, INDEX), generate


@vector_code
def combined(_: Any, start: Any, a: Any, of_a: Any, b: Any, of_b: Any, c: Any, of_c: Any) -> Any:
    """start + a * of_a + b * of_b + c * of_c in 32 bits, where numba would take 64 and half the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = arguments[0]
        for number in (1, 3, 5):
            total = builder.add(total, builder.mul(arguments[number], arguments[number + 1]))
        return total

    return types.int32(*[types.int32] * 7), generate


@vector_code
def to_byte(_: Any, total: Any) -> Any:
    """total >> SHIFT within 0..255, in 32 bits too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.ashr(arguments[0], ir.Constant(WORD, SHIFT))
        return builder.trunc(clipped(builder, value, ir.Constant(WORD, 0), ir.Constant(WORD, 255)), BYTE)

    return types.uint8(types.int32), generate


@compiled
def level(y: Any, u: Any, of_u: Any, v: Any, of_v: Any) -> Any:
    """One channel of what a pixel of Y'CbCr is in RGB, as `vitedge.pixels` has it."""
    return to_byte(combined(1 << (SHIFT - 1), max(y - 16, 0), LUMA, u - 128, of_u, v - 128, of_v))


@compiled
def split_yuyv(raw: Any, luma: Any, chroma: Any) -> None:
    """Y U Y V as Y Y and U V, as nv12 has them."""
    for x in range(luma.shape[0]):
        luma[x], chroma[x] = raw[2 * x], raw[2 * x + 1]


@compiled
def to_colours(luma: Any, chroma: Any, red: Any, green: Any, blue: Any) -> None:
    """Pixels in Y, and for each pair of them U V, as three planes."""
    for pair in range(red.shape[0] >> 1):
        u, v = chroma[2 * pair], chroma[2 * pair + 1]
        for odd in range(2):
            x = 2 * pair + odd
            y = luma[x]
            red[x], green[x], blue[x] = level(y, u, 0, v, RED_V), level(y, u, GREEN_U, v, GREEN_V), level(y, u, BLUE_U, v, 0)


@compiled
def planes_to_luma(red: Any, green: Any, blue: Any, luma: Any) -> None:
    """ITU-R 601-2 luma, as Pillow has it."""
    for x in range(luma.shape[0]):
        luma[x] = combined(1 << 15, red[x], RED, green[x], GREEN, blue[x], BLUE) >> 16


@compiled
def packed_to_luma(raw: Any, bgr: Any, luma: Any) -> None:
    """The same of pixels of three bytes."""
    first, last = (BLUE, RED) if bgr else (RED, BLUE)
    for x in range(luma.shape[0]):
        luma[x] = combined(1 << 15, raw[3 * x], first, raw[3 * x + 1], GREEN, raw[3 * x + 2], last) >> 16


@compiled
def read_row(picture: Any, part: Any, y: Any, strip: Any, at: Any, raw: Any) -> None:
    """One row of the picture into the strip as it will be cut: packed pixels, or planes of 8 bits; luma for a grey model."""
    columns, plane = part.columns, part.pitch // 3
    # slices, whose indices LLVM sees to be no less than 0: with an offset in each of them it would not vectorize
    first, second, third = strip[at:][:columns], strip[at + plane :][:columns], strip[at + 2 * plane :][:columns]
    if part.layout == PACKED and not part.luma:
        copy_bytes(picture, y, part.left * part.wide, strip, at, columns * part.wide)
    elif part.layout == PACKED:
        copy_bytes(picture, y, part.left * part.wide, raw, 0, columns * part.wide)
        packed_to_luma(raw, part.bgr, first)
    else:
        luma, chroma, red = raw[:columns], raw[columns:], raw[2 * columns :][:columns] if part.luma else first
        read_yuv(picture, part, y, raw)
        to_colours(luma, chroma, red, second, third)
        if part.luma:
            planes_to_luma(red, second, third, first)


@compiled
def read_yuv(picture: Any, part: Any, y: Any, raw: Any) -> None:
    """One row of Y'CbCr: its luma, then U V of each pair of pixels."""
    columns = part.columns
    if part.layout == NV12:
        copy_bytes(picture, y, part.left, raw, 0, columns)
        copy_bytes(picture, picture.shape[0] // 3 * 2 + (y >> 1), part.left, raw, columns, columns)
    else:
        both = raw[2 * columns :]
        copy_bytes(picture, y, 2 * part.left, both, 0, 2 * columns)
        split_yuyv(both, raw[:columns], raw[columns:])


@compiled
def cut_strip(part: Any, strip: Any, quads: Any) -> None:
    """16 rows, of packed colours or of one or three planes, into `part.quads` quads a channel."""
    if part.layout == PACKED and part.channels == 3:
        for number in range(part.quads):
            cut_colours(strip, 12 * number, part.pitch, quads, LANES * number, LANES * part.quads)
    else:
        for plane in range(part.channels):
            for number in range(0, part.quads, 4):
                at, to = plane * (part.pitch // 3) + 4 * number, LANES * (plane * part.quads + number)
                cut_plane(strip, at, part.pitch, quads, to, LANES)


@compiled
def go_across(part: Any, quads: Any, first: Any, weights: Any, narrow: Any, to: Any) -> None:
    """16 rows of every column of the result, as 4 rows of quads of `narrow`."""
    for x in range(first.shape[0]):
        for channel in range(part.channels):
            at = LANES * (part.quads * channel + first[x])
            lane = part.channels * x + (2 - channel if part.bgr and part.channels == 3 else channel)
            weigh(quads, at, LANES, weights, 4 * part.across * x, part.across, narrow, to + lane, part.lanes)


@compiled
def go_down(part: Any, narrow: Any, first: Any, weights: Any, y: Any, row: Any) -> None:
    """Row `y` of the part of the result."""
    for lane in range(0, part.lanes, LANES):
        weigh(narrow, first[y] * part.lanes + lane, part.lanes, weights, 4 * part.down * y, part.down, row, lane >> 2, 1)


@compiled
def write_row(part: Any, row: Any, y: Any, out: Any) -> None:
    """Row `y` of the result, of which each patch has `patch_wide` bytes, into the patches."""
    first, at = y // part.patch * part.across_patches, y % part.patch * part.patch_wide
    for patch in range(part.across_patches):
        source, target = row[patch * part.patch_wide // part.repeat :], out[first + patch, at:][: part.patch_wide]
        if part.repeat == 1:
            for byte in range(target.shape[0]):
                target[byte] = source[byte] ^ part.flip
        else:
            for byte in range(target.shape[0]):
                target[byte] = source[byte // part.repeat] ^ part.flip


class Part(NamedTuple):
    """What a thread does of a picture: rows of the result, and of the source what they are made of.

    layout, wide, bgr, luma: how pixels lie, in how many bytes, whether blue is first, whether they are to become grey.
    channels: that are filtered. repeat: how often each is written. top, rows, left, columns: what is read of the source.
    quads: of a row and channel. pitch: of a row of the strip, in bytes. across, down: quads that a pixel of the result is
    made of. lanes: of a row of the result, in whole vectors. first_row: of the result. patch: its height; patch_wide: bytes
    of one of its rows; across_patches: how many lie side by side. flip: the bits to flip in every byte.
    """

    layout: int
    wide: int
    bgr: int
    luma: int
    channels: int
    repeat: int
    top: int
    rows: int
    left: int
    columns: int
    quads: int
    pitch: int
    across: int
    down: int
    lanes: int
    first_row: int
    patch: int
    patch_wide: int
    across_patches: int
    flip: int


PART = types.NamedUniTuple(INDEX, len(Part._fields), Part)
SIGNATURE = types.void(PICTURE, PART, TABLE, TABLE, TABLE, TABLE, types.uint8[:, ::1], BYTES, WORDS, WORDS, WORDS)


@compiled_now
def resample(
    picture: Any, part: Any, across_first: Any, across: Any, down_first: Any, down: Any, out: Any,
    strip: Any, quads: Any, narrow: Any, row: Any,
) -> None:  # fmt: skip
    """A part of the result from a picture, uint8[rows, bytes], into `out`, uint8[patches, bytes]; the last four are scratch."""
    raw = strip[LANES * part.pitch :]
    for top in range(0, part.rows, LANES):
        for number in range(min(LANES, part.rows - top)):
            read_row(picture, part, part.top + top + number, strip, number * part.pitch, raw)
        cut_strip(part, strip, quads)
        go_across(part, quads, across_first, across, narrow, (top >> 2) * part.lanes)
    for y in range(down_first.shape[0]):
        go_down(part, narrow, down_first, down, y, row)
        write_row(part, row.view(np.uint8), part.first_row + y, out)
