"""Between float32 numbers and codes of 8 and 4 bits, tile by tile; numbers of a row share scales, `width` columns each.

A tile is rows × columns of float32 numbers, flat; `scales` is (rows, groups), groups = ceil(columns / width). Everything
is one division and one rounding a number, or one multiplication, so that results are the same on every machine. Loops
vectorise: bits are worked on as integers, with no branches and no tables but that of pairs of 4-bit codes.

Nothing is checked here: callers in `scaled` answer for every length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

RUN = 16  # numbers of a loop of a fixed length, which vectorises however short the group is
BLOCK = 1024  # numbers between one loop and the next: they stay in the first-level cache


def _absmax(numbers, columns, width, out):  # type: ignore[no-untyped-def]
    """Largest magnitude of the finite numbers of each group, 0 if there are none. numbers: float32 bits as uint32."""
    if width >= 8 * RUN or width % RUN:
        for r in range(out.shape[0]):
            for g in range(out.shape[1]):
                x = numbers[r * columns + g * width : r * columns + min(columns, (g + 1) * width)]
                largest = np.uint32(0)
                for i in range(x.size):
                    bits = x[i] & np.uint32(0x7FFFFFFF)
                    largest = max(largest, bits if bits < np.uint32(0x7F800000) else np.uint32(0))
                out[r, g] = largest
        return
    fold = np.empty(BLOCK, np.uint32)  # short groups: a block is folded in half until a number stands for each run
    for r in range(out.shape[0]):
        for g in range(out.shape[1]):
            out[r, g] = np.uint32(0)
        for start in range(0, columns, BLOCK):
            n = min(BLOCK, columns - start)
            x = numbers[r * columns + start : r * columns + start + n]
            for i in range(n):
                bits = x[i] & np.uint32(0x7FFFFFFF)
                fold[i] = bits if bits < np.uint32(0x7F800000) else np.uint32(0)
            for i in range(n, -(-n // RUN) * RUN):
                fold[i] = np.uint32(0)
            runs = -(-n // RUN)
            for part in (8, 4, 2, 1):
                for i in range(runs * part):
                    fold[i] = max(fold[2 * i], fold[2 * i + 1])
            g = start // width
            edge = (g + 1) * width - start
            for i in range(runs):
                if i * RUN >= edge:
                    g += 1
                    edge += width
                out[r, g] = max(out[r, g], fold[i])


def _encode8(numbers, columns, width, scales, mantissa, bias, most, out):  # type: ignore[no-untyped-def]
    """Codes of 1 sign bit, 7 - mantissa exponent bits and mantissa bits; what is beyond `most` becomes `most`.

    The nearest code, half to even: of normal numbers by adding half of the last place to the bits, of subnormal ones by
    adding 2^23, which leaves the integer in the low bits.
    """
    block = np.empty(BLOCK, np.float32)
    bits = block.view(np.uint32)
    sums = np.empty(BLOCK, np.float32)
    small = sums.view(np.uint32)
    shift = np.uint32(23 - mantissa)
    half = np.uint32((1 << (22 - mantissa)) - 1)
    rebias = np.uint32((127 - bias) << mantissa)
    normal = np.uint32((128 - bias) << 23)
    unit = np.uint32((127 + bias - 1 + mantissa) << 23)  # 1 / the smallest number, as bits
    places = np.empty(1, np.uint32)
    places[0] = unit
    steps = places.view(np.float32)[0]
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            stop = r * columns + min(columns, (g + 1) * width)
            for start in range(r * columns + g * width, stop, BLOCK):
                n = min(BLOCK, stop - start)
                x = numbers[start : start + n]
                o = out[start : start + n]
                for i in range(n):
                    v = x[i] / scale
                    v = v if v == v else np.float32(0)
                    v = v if v < most else most
                    v = v if v > -most else -most
                    block[i] = v
                    sums[i] = abs(v) * steps + np.float32(8388608.0)
                for i in range(n):
                    a = bits[i] & np.uint32(0x7FFFFFFF)
                    large = ((a + half + ((a >> shift) & np.uint32(1))) >> shift) - rebias
                    code = large if a >= normal else small[i] & np.uint32(0xFF)
                    o[i] = np.uint8(code | ((bits[i] >> np.uint32(24)) & np.uint32(0x80)))


def _decode8(codes, columns, width, scales, mantissa, bias, limit, out):  # type: ignore[no-untyped-def]
    """Numbers of such codes, into `out`; the count of codes whose magnitude is `limit` or more, which are not numbers."""
    block = np.empty(BLOCK, np.float32)
    bits = block.view(np.uint32)
    shift = np.uint32(23 - mantissa)
    rebias = np.uint32((127 - bias) << 23)
    smallest = np.uint32(1 << mantissa)
    places = np.empty(1, np.uint32)
    places[0] = np.uint32((127 - (bias - 1 + mantissa)) << 23)
    unit = places.view(np.float32)[0]
    wrong = np.uint32(0)
    top = np.uint32(limit)
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            stop = r * columns + min(columns, (g + 1) * width)
            for start in range(r * columns + g * width, stop, BLOCK):
                n = min(BLOCK, stop - start)
                c = codes[start : start + n]
                o = out[start : start + n]
                for i in range(n):
                    code = np.uint32(c[i] & np.uint8(0x7F))
                    wrong += np.uint32(code >= top)
                    bits[i] = (code << shift) + rebias
                for i in range(n):
                    code = np.uint32(c[i] & np.uint8(0x7F))
                    v = np.float32(np.int32(code)) * unit if code < smallest else block[i]
                    v = -v if c[i] > np.uint8(0x7F) else v
                    o[i] = v * scale
    return wrong


def _encode4(numbers, columns, width, scales, borders, signed, out):  # type: ignore[no-untyped-def]
    """Codes of 4 bits, two a byte, the first in the low bits; each row starts a byte. `width` is a multiple of 16.

    A code is how many of the ascending `borders` the number is beyond; with `signed` it is so for the magnitude, and
    bit 3 is the sign.
    """
    block = np.empty(BLOCK, np.float32)
    spread = np.empty(BLOCK, np.float32)  # the scale of each number
    runs = spread.reshape(BLOCK // RUN, RUN)
    bits = block.view(np.uint32)
    pairs = np.empty(BLOCK // 2, np.uint16)
    counts = pairs.view(np.uint8)  # little-endian, as all that is stored
    line = (columns + 1) // 2
    for r in range(scales.shape[0]):
        for start in range(0, columns, BLOCK):
            n = min(BLOCK, columns - start)
            x = numbers[r * columns + start : r * columns + start + n]
            g = start // width
            edge = (g + 1) * width - start
            for q in range((n + RUN - 1) // RUN):
                if q * RUN >= edge:
                    g += 1
                    edge += width
                scale = scales[r, g]
                for j in range(RUN):
                    runs[q, j] = scale
            for i in range(n):
                v = x[i] / spread[i]
                block[i] = v if v == v else np.float32(0)
            if signed:
                for i in range(n):
                    counts[i] = np.uint8((bits[i] >> np.uint32(28)) & np.uint32(8))
                    bits[i] &= np.uint32(0x7FFFFFFF)
            else:
                for i in range(n):
                    counts[i] = np.uint8(0)
            for k in range(borders.size):
                border = borders[k]
                for i in range(n):
                    counts[i] += np.uint8(block[i] > border)
            if n & 1:
                counts[n] = np.uint8(0)  # BLOCK is even: there is room
            o = out[r * line + start // 2 : r * line + (start + n + 1) // 2]
            for i in range(o.size):
                o[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


def _decode4(codes, columns, width, scales, pairs, out):  # type: ignore[no-untyped-def]
    """Numbers of such codes, into `out`. pairs: uint64 (256,), the two float32 numbers of each byte side by side."""
    wide = np.empty(BLOCK // 2, np.uint64)
    block = wide.view(np.float32)
    spread = np.empty(BLOCK, np.float32)  # the scale of each number
    runs = spread.reshape(BLOCK // RUN, RUN)
    line = (columns + 1) // 2
    for r in range(scales.shape[0]):
        for start in range(0, columns, BLOCK):
            n = min(BLOCK, columns - start)
            c = codes[r * line + start // 2 : r * line + (start + n + 1) // 2]
            o = out[r * columns + start : r * columns + start + n]
            for i in range(c.size):
                wide[i] = pairs[c[i]]
            g = start // width
            edge = (g + 1) * width - start
            for q in range((n + RUN - 1) // RUN):
                if q * RUN >= edge:
                    g += 1
                    edge += width
                scale = scales[r, g]
                for j in range(RUN):
                    runs[q, j] = scale
            for i in range(n):
                o[i] = block[i] * spread[i]


@cache
def kernels() -> dict[str, Callable[..., Any]]:
    """absmax, encode8, decode8, encode4 and decode4, compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, dims: int = 1, readonly: bool = False) -> Any:
        return types.Array(item, dims, "C", readonly=readonly, aligned=item is not types.uint8)

    f32, u32, u8, size = types.float32, types.uint32, types.uint8, types.intp
    numbers, scales = array(f32, readonly=True), array(f32, 2, True)
    codes = array(u8, readonly=True)
    format8 = (size, size)
    return {
        "absmax": jit.compiled(_absmax, types.void(array(u32, readonly=True), size, size, array(u32, 2))),
        "encode8": jit.compiled(_encode8, types.void(numbers, size, size, scales, *format8, f32, array(u8))),
        "decode8": jit.compiled(_decode8, u32(codes, size, size, scales, *format8, size, array(f32))),
        "encode4": jit.compiled(_encode4, types.void(numbers, size, size, scales, numbers, types.boolean, array(u8))),
        "decode4": jit.compiled(
            _decode4, types.void(codes, size, size, scales, array(types.uint64, readonly=True), array(f32))
        ),
    }
