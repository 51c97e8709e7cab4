"""The ladder's numbers: floats ↔ eight-bit codes, and what is left of the float beyond its code.

A code q8 of -128..127 is handled as the byte u = q8 + 136, whose high nibble is q4 + 8 and whose low nibble is the rest;
smaller bytes, down to q8 = -136, only damage makes. Streams are numbered by the bit length of abs(q8), 7 at the most;
stream 0 holds whole words, where the code is 0, the others symbols of a byte. Numbers of float formats ("kind": 0 bfloat16,
1 float16, 2 float32) are words; the ordinal of a word, its place in numeric order, has the bits below the sign flipped
where the sign is set.

The difference between a word's ordinal and that of the word nearest to q8 * s8, its lowest `drop` bits rounded away, negated
where q8 is negative, plus `bias`, modulo the word, is `symbol << shift | rest`. If the symbol would need more than a byte, the
word itself is stored separately, as a patch.

Loops over elements vectorise, except for the walk along the streams, whose cursors wait for the cache: it takes four
quarters of a block in turn. Callers answer for every length; nothing is checked here but what says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

ZERO = 136  # the byte of the code 0
STREAMS = 8
LANES = 4  # quarters of a block
_RUN = 512  # elements that share a group, hence a scale, and are kept in the first-level cache


def _largest(words, magnitude, infinity, columns, group, out):  # type: ignore[no-untyped-def]
    """The largest finite magnitude of each group, as a word, 0 if there is none. words: (rows * columns,)."""
    word = words.dtype.type
    mask, end = word(magnitude), word(infinity)
    tile = np.empty(_RUN, words.dtype)
    groups = -(-columns // group)
    for g in range(out.size):
        row = g // groups
        start = row * columns + (g - row * groups) * group
        stop = min(start + group, (row + 1) * columns)
        most = word(0)
        while start < stop:
            run = words[start : min(start + _RUN, stop)]
            for i in range(run.size):
                m = word(run[i] & mask)
                tile[i] = m if m < end else word(0)
            for i in range(run.size):
                most = max(most, tile[i])
            start += _RUN
        out[g] = most


def _split(words, kind, first, columns, group, scale, shift, bias, drop, out, symbols, rests, at, patches):  # type: ignore[no-untyped-def]
    """Codes, symbols and rests of a block of words, the first of which is element `first` of (rows, columns).

    scale: float32 (groups of all rows,); out, symbols: uint8; rests: words; at: uint32, in which the places of words to keep
    apart are noted, as many as there is room for. How many there are is returned. patches: their words.
    """
    word = words.dtype.type
    sign = np.uint8(8 * words.itemsize - 1)
    zero = word(0)
    below = word((word(1) << sign) - word(1))
    mask = word((word(1) << np.uint8(shift)) - word(1))
    cut, offset = np.uint8(shift), word(bias)
    half, whole = word((1 << drop) >> 1), word(-(1 << drop))
    bits = np.empty(_RUN, np.uint32)
    numbers = bits.view(np.float32)
    code = np.empty(_RUN, np.float32)
    product = np.empty(_RUN, np.uint32)
    products = product.view(np.float32)
    base = np.empty(_RUN, words.dtype)
    groups = -(-columns // group)
    kept = 0
    start = 0
    while start < words.size:
        row = (first + start) // columns
        column = (first + start) - row * columns
        g = column // group
        n = min(min(columns, (g + 1) * group) - column, words.size - start, _RUN)
        s = scale[row * groups + g]
        w = words[start : start + n]
        # the words as float32
        if kind == 0:
            for i in range(n):
                bits[i] = np.uint32(w[i]) << np.uint32(16)
        elif kind == 1:
            for i in range(n):
                bits[i] = np.uint32(w[i] & word(0x7FFF)) << np.uint32(13)
            for i in range(n):
                scaled = numbers[i] * np.float32(5.192296858534828e33)  # 2 ** 112: float16's exponent as float32's
                numbers[i] = -scaled if w[i] >> np.uint8(15) else scaled
            for i in range(n):
                infinite = np.uint32(0x7F800000) | (np.uint32(w[i] & word(0x8000)) << np.uint32(16))
                infinite |= np.uint32(w[i] & word(0x03FF)) << np.uint32(13)
                bits[i] = infinite if (w[i] & word(0x7C00)) == word(0x7C00) else bits[i]
        else:
            for i in range(n):
                bits[i] = np.uint32(w[i])
        for i in range(n):
            x = np.rint(numbers[i] / s)
            x = x if x == x else np.float32(0)
            x = x if x > np.float32(-128) else np.float32(-128)
            code[i] = x if x < np.float32(119) else np.float32(119)
        u = out[start : start + n]
        for i in range(n):
            u[i] = np.uint8(np.int32(code[i] + np.float32(ZERO)))
            products[i] = code[i] * s
        # their nearest words
        if kind == 0:
            for i in range(n):
                p = product[i]
                base[i] = word(
                    np.uint32(p + np.uint32(0x7FFF) + ((p >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
        elif kind == 1:
            for i in range(n):
                p = product[i] & np.uint32(0x7FFFFFFF)
                odd = (p >> np.uint32(13)) & np.uint32(1)
                normal = np.uint32(p - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
                bits[i] = np.uint32(0x7C00) if p >= np.uint32(0x477FF000) else normal
                products[i] = abs(products[i]) + np.float32(0.5)  # whose last bit is the last of a subnormal float16
                base[i] = word(0x8000) if code[i] < np.float32(0) else zero
            for i in range(n):
                small = np.uint32(product[i] - np.uint32(0x3F000000))
                base[i] |= word(small if small <= np.uint32(0x400) else bits[i])  # 0x400: the least normal number
        else:
            for i in range(n):
                base[i] = word(product[i])
        if drop:
            for i in range(n):
                base[i] = word(base[i] + half) & whole
        wide = zero
        t = rests[start : start + n]
        for i in range(n):
            x = w[i] ^ ((zero - (w[i] >> sign)) & below)
            y = base[i] ^ ((zero - (base[i] >> sign)) & below)
            d = word(x - y)
            d = word((zero - d) if u[i] < np.uint8(ZERO) else d)
            d = word(d + offset)
            t[i] = d
            d = zero if u[i] == np.uint8(ZERO) else d
            wide |= d
        sym = symbols[start : start + n]
        for i in range(n):
            sym[i] = np.uint8(t[i] >> cut)
        if word(wide >> cut) > word(255):
            for i in range(n):
                if u[i] != np.uint8(ZERO) and word(t[i] >> cut) > word(255):
                    if kept < at.size:
                        at[kept] = np.uint32(start + i)
                        patches[kept] = w[i]
                    kept += 1
                    sym[i] = np.uint8(offset >> cut)
        for i in range(n):
            t[i] &= mask
        start += n
    return kept


def _join(u, symbols, rests, kind, first, columns, group, scale, shift, bias, drop, out):  # type: ignore[no-untyped-def]
    """Words of codes, symbols and rests, the reverse of `_split`, but for code 0 and patches. rests: words, or empty.

    Without symbols, the words nearest to code * scale, where the code is u - `bias`.
    """
    word = out.dtype.type
    sign = np.uint8(8 * out.itemsize - 1)
    zero = word(0)
    below = word((word(1) << sign) - word(1))
    cut, offset = np.uint8(shift), word(bias)
    half, whole = word((1 << drop) >> 1), word(-(1 << drop))
    middle = np.float32(ZERO) if symbols.size else np.float32(bias)
    bits = np.empty(_RUN, np.uint32)
    base = np.empty(_RUN, out.dtype)
    product = np.empty(_RUN, np.uint32)
    products = product.view(np.float32)
    groups = -(-columns // group)
    start = 0
    while start < u.size:
        row = (first + start) // columns
        column = (first + start) - row * columns
        g = column // group
        n = min(min(columns, (g + 1) * group) - column, u.size - start, _RUN)
        s = scale[row * groups + g]
        c = u[start : start + n]
        o = out[start : start + n]
        for i in range(n):
            products[i] = (np.float32(c[i]) - middle) * s
        if kind == 0:
            for i in range(n):
                p = product[i]
                base[i] = word(
                    np.uint32(p + np.uint32(0x7FFF) + ((p >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
        elif kind == 1:
            for i in range(n):
                p = product[i] & np.uint32(0x7FFFFFFF)
                odd = (p >> np.uint32(13)) & np.uint32(1)
                normal = np.uint32(p - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
                bits[i] = np.uint32(0x7C00) if p >= np.uint32(0x477FF000) else normal
                base[i] = word((product[i] >> np.uint32(16)) & np.uint32(0x8000))
            for i in range(n):
                products[i] = abs(products[i]) + np.float32(0.5)
            for i in range(n):
                small = np.uint32(product[i] - np.uint32(0x3F000000))
                base[i] |= word(small if small <= np.uint32(0x400) else bits[i])
        else:
            for i in range(n):
                base[i] = word(product[i])
        if symbols.size:
            if drop:
                for i in range(n):
                    base[i] = word(base[i] + half) & whole
            sym = symbols[start : start + n]
            if rests.size:
                rest = rests[start : start + n]
                for i in range(n):
                    y = base[i] ^ ((zero - (base[i] >> sign)) & below)
                    d = word(word((word(sym[i]) << cut) | word(rest[i])) - offset)
                    d = word((zero - d) if c[i] < np.uint8(ZERO) else d)
                    x = word(y + d)
                    o[i] = x ^ ((zero - (x >> sign)) & below)
            else:
                for i in range(n):
                    y = base[i] ^ ((zero - (base[i] >> sign)) & below)
                    d = word(word(sym[i]) - offset)
                    d = word((zero - d) if c[i] < np.uint8(ZERO) else d)
                    x = word(y + d)
                    o[i] = x ^ ((zero - (x >> sign)) & below)
        else:
            for i in range(n):
                o[i] = base[i]
        start += n


def _count(u, counts):  # type: ignore[no-untyped-def]
    """How many codes of each quarter of a block belong to each stream. counts: int64 (LANES, STREAMS)."""
    quarter = u.size // 4
    for lane in range(4):
        start = lane * quarter
        stop = u.size if lane == 3 else start + quarter
        total = counts[lane]
        total[:] = 0
        while start < stop:
            n = min(stop - start, 224)  # what a byte counts to
            c1 = c2 = c4 = c8 = c16 = c32 = c64 = np.uint8(0)
            for x in u[start : start + n]:
                a = np.uint8(max(x, np.uint8(ZERO)) - min(x, np.uint8(ZERO)))
                c1 = np.uint8(c1 + np.uint8(a >= np.uint8(1)))
                c2 = np.uint8(c2 + np.uint8(a >= np.uint8(2)))
                c4 = np.uint8(c4 + np.uint8(a >= np.uint8(4)))
                c8 = np.uint8(c8 + np.uint8(a >= np.uint8(8)))
                c16 = np.uint8(c16 + np.uint8(a >= np.uint8(16)))
                c32 = np.uint8(c32 + np.uint8(a >= np.uint8(32)))
                c64 = np.uint8(c64 + np.uint8(a >= np.uint8(64)))
            total[0] += n - np.int64(c1)
            total[1] += np.int64(c1) - np.int64(c2)
            total[2] += np.int64(c2) - np.int64(c4)
            total[3] += np.int64(c4) - np.int64(c8)
            total[4] += np.int64(c8) - np.int64(c16)
            total[5] += np.int64(c16) - np.int64(c32)
            total[6] += np.int64(c32) - np.int64(c64)
            total[7] += np.int64(c64)
            start += n


def _scatter(u, symbols, lengths, cursors, streams):  # type: ignore[no-untyped-def]
    """Each symbol to its stream. lengths: uint8 (256,), the stream of each code.

    cursors: uint64 (LANES, STREAMS), the start of each quarter in each stream in `streams`, advanced.
    """
    one = np.uint64(1)  # unsigned: a signed place might count from the end
    quarter = u.size // 4
    u0, u1, u2, u3 = u[:quarter], u[quarter : 2 * quarter], u[2 * quarter : 3 * quarter], u[3 * quarter :]
    s0, s1, s2 = symbols[:quarter], symbols[quarter : 2 * quarter], symbols[2 * quarter : 3 * quarter]
    s3 = symbols[3 * quarter :]
    c0, c1, c2, c3 = cursors[0], cursors[1], cursors[2], cursors[3]
    for i in range(quarter):
        k0, k1, k2, k3 = lengths[u0[i]], lengths[u1[i]], lengths[u2[i]], lengths[u3[i]]
        p0, p1, p2, p3 = c0[k0], c1[k1], c2[k2], c3[k3]
        c0[k0] = p0 + one
        c1[k1] = p1 + one
        c2[k2] = p2 + one
        c3[k3] = p3 + one
        streams[p0] = s0[i]
        streams[p1] = s1[i]
        streams[p2] = s2[i]
        streams[p3] = s3[i]
    for i in range(quarter, u3.size):
        k = lengths[u3[i]]
        p = c3[k]
        c3[k] = p + one
        streams[p] = s3[i]


def _gather(u, streams, lengths, cursors, symbols):  # type: ignore[no-untyped-def]
    """The reverse of `_scatter`: symbols in the order of elements."""
    one = np.uint64(1)
    quarter = u.size // 4
    u0, u1, u2, u3 = u[:quarter], u[quarter : 2 * quarter], u[2 * quarter : 3 * quarter], u[3 * quarter :]
    s0, s1, s2 = symbols[:quarter], symbols[quarter : 2 * quarter], symbols[2 * quarter : 3 * quarter]
    s3 = symbols[3 * quarter :]
    c0, c1, c2, c3 = cursors[0], cursors[1], cursors[2], cursors[3]
    for i in range(quarter):
        k0, k1, k2, k3 = lengths[u0[i]], lengths[u1[i]], lengths[u2[i]], lengths[u3[i]]
        p0, p1, p2, p3 = c0[k0], c1[k1], c2[k2], c3[k3]
        c0[k0] = p0 + one
        c1[k1] = p1 + one
        c2[k2] = p2 + one
        c3[k3] = p3 + one
        s0[i] = streams[p0]
        s1[i] = streams[p1]
        s2[i] = streams[p2]
        s3[i] = streams[p3]
    for i in range(quarter, u3.size):
        k = lengths[u3[i]]
        p = c3[k]
        c3[k] = p + one
        s3[i] = streams[p]


def _pack(u, high, low):  # type: ignore[no-untyped-def]
    """High and low nibbles, two a byte, the first in the low bits; after an odd number of codes, zeros."""
    half = u.size // 2
    for i in range(half):
        a, b = u[2 * i], u[2 * i + 1]
        high[i] = (a >> np.uint8(4)) | (b & np.uint8(0xF0))
        low[i] = (a & np.uint8(0x0F)) | (b << np.uint8(4))
    if u.size % 2:
        high[half] = u[2 * half] >> np.uint8(4)
        low[half] = u[2 * half] & np.uint8(0x0F)


def _unpack(high, low, u):  # type: ignore[no-untyped-def]
    """The reverse of `_pack`; without `low`, the high nibbles as bytes."""
    half = u.size // 2
    if low.size:
        for i in range(half):
            h, l = high[i], low[i]  # noqa: E741
            u[2 * i] = (h << np.uint8(4)) | (l & np.uint8(0x0F))
            u[2 * i + 1] = (h & np.uint8(0xF0)) | (l >> np.uint8(4))
        if u.size % 2:
            u[2 * half] = (high[half] << np.uint8(4)) | (low[half] & np.uint8(0x0F))
    else:
        for i in range(half):
            u[2 * i] = high[i] & np.uint8(0x0F)
            u[2 * i + 1] = high[i] >> np.uint8(4)
        if u.size % 2:
            u[2 * half] = high[half] & np.uint8(0x0F)


@dataclass(frozen=True, slots=True)
class LadderKernels:
    """The functions above, compiled."""

    largest: Callable[..., Any]
    split: Callable[..., Any]
    join: Callable[..., Any]
    count: Callable[..., Any]
    scatter: Callable[..., Any]
    gather: Callable[..., Any]
    pack: Callable[..., Any]
    unpack: Callable[..., Any]


@cache
def kernels(width: int) -> LadderKernels:
    """The kernels for words of `width` bytes (2 or 4), compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, readonly: bool = False, dims: int = 1) -> Any:
        return types.Array(item, dims, "C", readonly=readonly, aligned=False)

    word = {2: types.uint16, 4: types.uint32}[width]
    size, whole = types.intp, types.uint64
    words, out = array(word, True), array(word)
    codes, made, places = array(types.uint8, True), array(types.uint8), array(types.uint32)
    scale, cursors = array(types.float32, True), array(types.uint64, dims=2)
    grid = (size, size, size, size, scale)  # kind, first, columns, group
    largest = types.void(words, whole, whole, size, size, out)
    split = size(words, *grid, size, whole, size, made, made, out, places, out)
    join = types.void(codes, codes, words, *grid, size, whole, size, out)
    count = types.void(codes, array(types.int64, dims=2))
    walk = types.void(codes, codes, codes, cursors, made)
    return LadderKernels(
        jit.compiled(_largest, largest),
        jit.compiled(_split, split),
        jit.compiled(_join, join),
        jit.compiled(_count, count),
        jit.compiled(_scatter, walk),
        jit.compiled(_gather, walk),
        jit.compiled(_pack, types.void(codes, made, made)),
        jit.compiled(_unpack, types.void(codes, codes, made)),
    )
