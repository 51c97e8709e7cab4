"""Between words (unsigned lanes of 1, 2, 4 or 8 bytes) and byte planes, most significant plane first.

The words are changed on the way, so that the bits that vary little move to the top bytes:

    a top given     the sign moved down to the place below the top byte, which then holds nothing but exponent (and in
                    float16 the first bits after it). `top` is the mask of the top byte, or 0: nothing moves
    a base given    zigzag of (ordinal of word - ordinal of base word), modulo the word. The ordinal of a sign-magnitude
                    number is its place in numeric order, bits below the sign flipped where the sign is set; of any
                    other word, the word itself. `magnitude` is the mask of the bits below the sign, or 0.

Both are bijections of the bit patterns: NaN payloads and -0.0 survive. Work goes tile by tile, words of a tile being
kept in the first-level cache between the change and the split; all inner loops vectorise, at 10 to 20 GB/s a core.

Nothing is checked here: callers in `byteplanes` answer for every length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

WORDS: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n}") for n in (1, 2, 4, 8)}
TILE = 2048  # words


def _split(values, base, magnitude, top, places, out, scratch):  # type: ignore[no-untyped-def]
    """Plane p of `values` goes to `out` from places[p], or to scratch[p] where that is negative.

    values, base: words, 1-d, base of the same length or empty; places: int64 (planes,); out: uint8 1-d;
    scratch: uint8 (planes, at least len(values)).
    """
    width = values.itemsize
    bits = 8 * width
    above = values.dtype.type(top)
    moved = values.dtype.type((above >> np.uint8(1)) & ~above)
    rest = values.dtype.type(~(above | moved))
    sign = np.uint8(bits - 1)
    tile = np.empty(TILE, values.dtype)
    zero = tile.dtype.type(0)
    mask = tile.dtype.type(magnitude)
    for start in range(0, values.size, TILE):
        n = min(TILE, values.size - start)
        v = values[start : start + n]
        if base.size:
            b = base[start : start + n]
            for i in range(n):
                x = v[i] ^ ((zero - (v[i] >> sign)) & mask)
                y = b[i] ^ ((zero - (b[i] >> sign)) & mask)
                d = tile.dtype.type(x - y)
                tile[i] = (d << np.uint8(1)) ^ (zero - (d >> sign))
        else:
            for i in range(n):
                tile[i] = ((v[i] << np.uint8(1)) & above) | ((v[i] >> np.uint8(8)) & moved) | (v[i] & rest)
        if width == 1:
            only = scratch[0, start : start + n] if places[0] < 0 else out[places[0] + start : places[0] + start + n]
            for i in range(n):
                only[i] = np.uint8(tile[i])
        else:
            for p in range(0, width, 2):
                one, two = places[p] + start, places[p + 1] + start
                high = scratch[p, start : start + n] if places[p] < 0 else out[one : one + n]
                low = scratch[p + 1, start : start + n] if places[p + 1] < 0 else out[two : two + n]
                shift = np.uint8(bits - 16 - 8 * p)
                for i in range(n):
                    w = tile[i] >> shift
                    high[i] = np.uint8(w >> np.uint8(8))
                    low[i] = np.uint8(w)


def _merge(pieces, base, magnitude, top, first, row, stride, out):  # type: ignore[no-untyped-def]
    """The reverse: words first, first + 1, … of a region whose rows of `row` words start `stride` words apart in `out`.

    pieces: as many uint8 arrays (n,) as a word has bytes; base: words (n,) or empty; out: words, 1-d.
    """
    width = out.itemsize
    bits = 8 * width
    above = out.dtype.type(top)
    moved = out.dtype.type((above >> np.uint8(1)) & ~above)
    rest = out.dtype.type(~(above | moved))
    sign = np.uint8(bits - 1)
    count = pieces[0].size
    tile = np.empty(TILE, out.dtype)
    one = tile.dtype.type(1)
    zero = tile.dtype.type(0)
    mask = tile.dtype.type(magnitude)
    line = first // row
    column = first - line * row
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        if width == 1:
            only = pieces[0][start : start + n]
            for i in range(n):
                tile[i] = only[i]
        elif width > 2 or base.size:
            for p in range(0, width, 2):
                high = pieces[p][start : start + n]
                low = pieces[p + 1][start : start + n]
                shift = np.uint8(bits - 16 - 8 * p)
                if p == 0:
                    for i in range(n):
                        pair = (np.uint16(high[i]) << np.uint8(8)) | np.uint16(low[i])
                        tile[i] = tile.dtype.type(pair) << shift
                else:
                    for i in range(n):
                        pair = (np.uint16(high[i]) << np.uint8(8)) | np.uint16(low[i])
                        tile[i] |= tile.dtype.type(pair) << shift
        done = 0
        while done < n:
            m = min(n - done, row - column)
            w = tile[done : done + m]
            o = out[line * stride + column : line * stride + column + m]
            if base.size:
                b = base[start + done : start + done + m]
                for i in range(m):
                    y = b[i] ^ ((zero - (b[i] >> sign)) & mask)
                    x = tile.dtype.type(y + ((w[i] >> np.uint8(1)) ^ (zero - (w[i] & one))))
                    o[i] = x ^ ((zero - (x >> sign)) & mask)
            elif width == 2:  # the most frequent of all, in one pass
                high = pieces[0][start + done : start + done + m]
                low = pieces[width - 1][start + done : start + done + m]
                for i in range(m):
                    pair = np.uint16(np.uint16(high[i]) << np.uint8(8)) | np.uint16(low[i])
                    o[i] = ((pair & above) >> np.uint8(1)) | ((pair & moved) << np.uint8(8)) | (pair & rest)
            else:
                for i in range(m):
                    o[i] = ((w[i] & above) >> np.uint8(1)) | ((w[i] & moved) << np.uint8(8)) | (w[i] & rest)
            done += m
            column += m
            if column == row:
                column = 0
                line += 1


def _cost(values, base, magnitude, top, run, counts, bits):  # type: ignore[no-untyped-def]
    """Estimated size of each plane, in bits a byte, into `bits`: the entropy of the bytes of sampled words.

    To it are added what a sample underestimates (Miller and Madow: half a nat a sample for each further kind of byte)
    and the table of a Huffman code (4 bits a kind), so that small tensors are not tried in vain.

    The sample is `run` words at the start of each of equally long stretches, at most 64 of them, over all of `values`. counts:
    uint32 (planes, 256), overwritten; bits: float64 (planes,).
    """
    width = values.itemsize
    wide = 8 * width
    above = values.dtype.type(top)
    moved = values.dtype.type((above >> np.uint8(1)) & ~above)
    rest = values.dtype.type(~(above | moved))
    sign = np.uint8(wide - 1)
    zero = values.dtype.type(0)
    mask = values.dtype.type(magnitude)
    step = max(run, values.size // 64)
    counts[:] = 0
    total = 0
    for start in range(0, values.size - run + 1, step):
        for i in range(start, start + run):
            v = values[i]
            if base.size:
                x = v ^ ((zero - (v >> sign)) & mask)
                y = base[i] ^ ((zero - (base[i] >> sign)) & mask)
                d = values.dtype.type(x - y)
                w = (d << np.uint8(1)) ^ (zero - (d >> sign))
            else:
                w = ((v << np.uint8(1)) & above) | ((v >> np.uint8(8)) & moved) | (v & rest)
            for p in range(width):
                counts[p, np.uint8(w >> np.uint8(wide - 8 - 8 * p))] += np.uint32(1)
        total += run
    for p in range(width):
        entropy = 0.0
        kinds = 0
        for k in range(256):
            if counts[p, k]:
                share = counts[p, k] / total
                entropy -= share * np.log2(share)
                kinds += 1
        bits[p] = entropy + (kinds - 1) * (0.72 / total + 4 / values.size)


@cache
def kernels(width: int) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(split, merge, cost) for words of `width` bytes, compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, readonly: bool = False) -> Any:
        return types.Array(item, 1, "C", readonly=readonly, aligned=False)

    word = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[width]
    words, out = array(word, True), array(word)
    plane = types.Array(types.uint8, 1, "C")
    piece = types.Array(types.uint8, 1, "C", readonly=True)
    pieces = types.UniTuple(piece, width)  # type: ignore[no-untyped-call]
    table = types.Array(types.uint8, 2, "C")
    how = (types.uint64, types.uint64)
    split = types.void(words, words, *how, types.Array(types.int64, 1, "C"), plane, table)
    merge = types.void(pieces, words, *how, types.intp, types.intp, types.intp, out)
    counts, bits = types.Array(types.uint32, 2, "C"), types.Array(types.float64, 1, "C")
    cost = types.void(words, words, *how, types.intp, counts, bits)
    return jit.compiled(_split, split), jit.compiled(_merge, merge), jit.compiled(_cost, cost)
