"""Between words of 2 or 4 bytes and fixed-rate codes of their top bytes, tile by tile: what `packed` lays out.

A tile is 2,048 words (the last of a region fewer). The words' signs are moved as `kernels` moves them, so that the top byte is
the exponent of a bfloat16 or float32. A tile stores a code of three bits for it: how far it is below the tile's `top`. The
highest code is an escape, for an exponent that is elsewhere: a nibble says where near the codes, or that the byte is 0, or
that it is among the bytes that are kept whole.

Codes are stored in eight stripes of `m` bytes: word i of a tile is number i % m of stripe i // m, so that every inner loop is
over neighbours, with one shift for all of them, and vectorises. Escapes are few (1 word in 40 of trained weights): their
places are read off a mask, 64 words at a time.

Encoding checks nothing but the room for escapes: `packed` answers for every length. Decoding checks all that it reads.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic, register_jitable

from modelstore.codecs.kernels import jit

VERSION = 2  # `byteplanes` has 1
HEADER = 16  # bytes
LOG_TILE = 11
TILE = 1 << LOG_TILE  # words
STRIPE = TILE // 8
BITS = 3
ESCAPE = np.uint8(7)
ABOVE = 4  # nibbles of bytes above `top`: the first says four above, the last one above
ZERO, WHOLE = np.uint8(14), np.uint8(15)  # nibbles of the byte 0, and of one that is kept whole
LOOKED = 4  # every fourth top byte of a tile is counted to find its `top`: all four are no smaller in the fourth digit


@register_jitable
def _pack(codes, m, out):  # type: ignore[no-untyped-def]
    """The codes of a tile, uint8 (8 m,), into 3 m bytes: the upper two bits of all, then the lowest.

    Byte j of the first 2 m bytes holds, from its lowest bits, those of words j, j + 2 m, j + 4 m, j + 6 m; byte j of the m
    others, those of words j, j + m, … j + 7 m.
    """
    two, one = out[: 2 * m], out[2 * m : 3 * m]
    for j in range(m):
        byte = np.uint8(0)
        for s in range(8):
            byte |= (codes[s * m + j] & np.uint8(1)) << np.uint8(s)
        one[j] = byte
    for j in range(2 * m):
        byte = np.uint8(0)
        for s in range(4):
            byte |= (codes[2 * s * m + j] >> np.uint8(1)) << np.uint8(2 * s)
        two[j] = byte


@register_jitable
def _unpack(packed, m, codes):  # type: ignore[no-untyped-def]
    """The reverse."""
    for s in range(8):
        c = codes[s * m : (s + 1) * m]
        two, one = packed[(s & 1) * m : (s & 1) * m + m], packed[2 * m : 3 * m]
        up, low = np.uint8(s & 6), np.uint8(s)
        for j in range(m):
            c[j] = (((two[j] >> up) & np.uint8(3)) << np.uint8(1)) | ((one[j] >> low) & np.uint8(1))


@intrinsic
def _ones(_context, word):  # type: ignore[no-untyped-def]
    """The number of bits that are set."""
    return word(word), lambda _, builder, __, arguments: builder.ctpop(arguments[0])


@register_jitable
def _find(codes, m, mask, places, found):  # type: ignore[no-untyped-def]
    """The number of escapes in a tile, whose words are then `found`, in the order of the mask's bits.

    mask: uint8 (m,), whose bit s of byte j is set where word j of stripe s is an escape; places: the same memory as words of 64
    bits; found: uint16 (TILE + 8,). Four places of each 64 words are noted whether or not there are so many: a loop over those
    there are would be mispredicted nearly every time.
    """
    for j in range(m):
        mask[j] = 0
    for s in range(8):
        c = codes[s * m : (s + 1) * m]
        bit = np.uint8(1 << s)
        for j in range(m):
            mask[j] |= bit if c[j] == ESCAPE else np.uint8(0)
    one = np.uint64(1)
    count = 0
    for w in range(m // 8):
        left = places[w]
        first = np.uint64(64 * w)
        number = np.int64(_ones(left))  # type: ignore[call-arg]
        for k in range(4):
            found[count + k] = np.uint16(first + trailing_zeros(left))
            left &= left - one
        for k in range(4, number):
            found[count + k] = np.uint16(first + trailing_zeros(left))
            left &= left - one
        count += number
    for k in range(count):
        found[k] = (found[k] & np.uint16(7)) * np.uint16(m) + (found[k] >> np.uint16(3))
    return count


@register_jitable
def _choose(tops, counts):  # type: ignore[no-untyped-def]
    """The highest of the seven neighbouring bytes that most of `tops` are among; counts: int32 (256,), overwritten."""
    counts[:] = 0
    least, most = np.uint8(255), np.uint8(0)
    for i in range(tops.size):
        least, most = min(least, tops[i]), max(most, tops[i])
    for i in range(0, tops.size, LOOKED):
        counts[tops[i]] += np.int32(1)
    within, best, top = 0, 0, 6
    for k in range(least, most + 1):
        within += counts[k]
        if k >= least + 7:
            within -= counts[k - 7]
        if within > best:
            best, top = within, max(k, 6)
    return np.uint8(top)


def _encode(words, packed, planes, tops, escapes, whole, nibbles, bytes_):  # type: ignore[no-untyped-def]
    """(bytes of nibbles, whole bytes) of all `words`; the first is -1 if either has no room.

    words: 1-d; packed: uint8, codes of all tiles; planes: uint8 (bytes of a word - 1, words); tops: uint8 (tiles,); escapes,
    whole: uint16 (tiles,), the number of escapes, and of whole bytes among them; nibbles, bytes_: uint8, the room for them.
    """
    width = words.itemsize
    bit = np.uint8(8 * width - 8)
    tile, codes = np.empty(TILE, np.uint8), np.zeros(TILE, np.uint8)
    mask, found, counts = np.empty(STRIPE, np.uint8), np.empty(TILE + 8, np.uint16), np.empty(256, np.int32)
    places = mask.view(np.uint64)
    one = words.dtype.type(1)
    sign = np.uint8(8 * width - 1)
    at, far = 0, 0
    for t in range(tops.size):
        start = t * TILE
        n = min(TILE, words.size - start)
        m = (n + 63) // 64 * 8
        v = words[start : start + n]
        e = tile[:n]
        for i in range(n):
            e[i] = np.uint8((v[i] << one) >> bit)
        p, down = planes[0, start : start + n], np.uint8(bit - np.uint8(8))
        for i in range(n):
            p[i] = np.uint8((v[i] >> down) & words.dtype.type(0x7F)) | np.uint8((v[i] >> sign) << np.uint8(7))
        for k in range(1, width - 1):
            p = planes[k, start : start + n]
            down = np.uint8(8 * (width - 2 - k))
            for i in range(n):
                p[i] = np.uint8(v[i] >> down)
        top = _choose(e, counts)
        tops[t] = top
        for i in range(n):
            codes[i] = min(np.uint8(top - e[i]), ESCAPE)
        codes[n : 8 * m] = 0
        _pack(codes, m, packed[t * BITS * STRIPE : t * BITS * STRIPE + BITS * m])
        number = _find(codes, m, mask, places, found)
        if at + (number + 1) // 2 > nibbles.size or far + number >= bytes_.size:
            return -1, 0
        before = far
        for k in range(number):
            byte = e[found[k]]
            below = np.uint8(np.uint8(top + np.uint8(ABOVE)) - byte)
            nibble = below if below < ABOVE else np.uint8(below - ESCAPE)
            if nibble >= ZERO or not byte:
                nibble = WHOLE if byte else ZERO
            if k & 1:
                nibbles[at + (k >> 1)] |= np.uint8(nibble << np.uint8(4))
            else:
                nibbles[at + (k >> 1)] = nibble
            bytes_[far] = byte
            far += nibble == WHOLE
        at += (number + 1) // 2
        escapes[t], whole[t] = number, far - before
    return at, far


@register_jitable
def _fits(data, width, whole, end):  # type: ignore[no-untyped-def]
    """Whether the header is that of words of `width` bytes, of which so many are kept whole, and all parts end at `end`."""
    known = data[0] == VERSION and data[1] == BITS and data[2] == width and data[3] == LOG_TILE
    stored = np.uint64(0)
    for k in range(8):
        stored |= np.uint64(data[8 + k]) << np.uint64(8 * k)
    return known and not data[4:8].any() and stored == np.uint64(whole) and data.size == end


def _decode(data, count, row, stride, out):  # type: ignore[no-untyped-def]
    """The reverse of a whole encoding of `count` words, into rows of `row` words that start `stride` words apart in `out`.

    One call, since for a chunk of 100,000 words the views of its parts would cost as much as they do. data: uint8, as
    `packed` lays it out. False if it is not such an encoding; nothing is read or written beyond `data` and the rows then.
    """
    width = out.itemsize
    tiles = (count + TILE - 1) // TILE
    last = count - (tiles - 1) * TILE
    first = HEADER + BITS * ((tiles - 1) * STRIPE + (last + 63) // 64 * 8)
    top = first + (width - 1) * count
    rest = top + 5 * tiles
    if count < 1 or data.size < rest:
        return False
    escapes, whole = data[top + tiles : top + 3 * tiles].view(np.uint16), data[top + 3 * tiles : rest].view(np.uint16)
    nibbles, kept = np.int64(0), np.int64(0)
    for t in range(tiles):
        nibbles += (np.int64(escapes[t]) + 1) // 2
        kept += np.int64(whole[t])
    if not _fits(data, width, kept, rest + nibbles + kept):
        return False
    planes = data[first:top].reshape((width - 1, count))
    return _decode_tiles(
        data[HEADER:first],
        planes,
        data[top : top + tiles],
        escapes,
        whole,
        data[rest : rest + nibbles],
        data[rest + nibbles :],
        row,
        stride,
        out,
    )


@register_jitable
def _decode_tiles(packed, planes, tops, escapes, whole, nibbles, bytes_, row, stride, out):  # type: ignore[no-untyped-def]
    """The reverse of `_encode`, of parts that end where they should; False if escapes do not match their counts.

    As for `_encode`; nibbles are as many as `escapes` says.
    """
    count = planes.shape[1]
    tile, mask, found = np.empty(TILE, np.uint8), np.empty(STRIPE, np.uint8), np.empty(TILE + 8, np.uint16)
    places = mask.view(np.uint64)
    near = np.zeros(16, np.uint8)
    line, column = 0, 0
    at, far = 0, 0
    for t in range(tops.size):
        start = t * TILE
        n = min(TILE, count - start)
        m = (n + 63) // 64 * 8
        _unpack(packed[t * BITS * STRIPE : t * BITS * STRIPE + BITS * m], m, tile)
        number = _find(tile, m, mask, places, found)
        if number != escapes[t] or far + whole[t] > bytes_.size:
            return False
        top = tops[t]
        for i in range(8 * m):
            tile[i] = top - tile[i]
        for k in range(ZERO):
            near[k] = np.uint8(top + np.uint8(ABOVE)) - np.uint8(k) - (ESCAPE if k >= ABOVE else np.uint8(0))
        stop = far + whole[t]
        for k in range(number):
            nibble = (nibbles[at + (k >> 1)] >> np.uint8(4 * (k & 1))) & WHOLE
            if nibble < WHOLE:
                tile[found[k]] = near[nibble]
            elif far < stop:
                tile[found[k]] = bytes_[far]
                far += 1
            else:
                return False
        if far != stop:
            return False
        at += (number + 1) // 2
        done = 0
        while done < n:
            size = min(n - done, row - column)
            o = out[line * stride + column : line * stride + column + size]
            first = start + done
            _join(tile[done : done + size], planes[:, first : first + size], o)
            done += size
            column += size
            if column == row:
                column = 0
                line += 1
    return True


@register_jitable
def _join(e, planes, out):  # type: ignore[no-untyped-def]
    """Words of their top bytes and their other planes, the signs moved back."""
    if out.itemsize == 2:
        low = planes[0]
        for i in range(out.size):
            p = np.uint16(low[i])
            both = (p | (p << np.uint8(8))) & np.uint16(0x807F)
            out[i] = out.dtype.type((np.uint16(e[i]) << np.uint8(7)) | both)
    else:
        high, middle, low = planes[0], planes[1], planes[2]
        for i in range(out.size):
            q = np.uint32(high[i])
            signed = ((q << np.uint8(16)) | (q << np.uint8(24))) & np.uint32(0x807F0000)
            rest = (np.uint32(middle[i]) << np.uint8(8)) | np.uint32(low[i])
            out[i] = out.dtype.type((np.uint32(e[i]) << np.uint8(23)) | signed | rest)


@cache
def kernels(width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(encode, decode) for words of `width` bytes, compiled or loaded from the cache the first time."""

    def array(item: Any, dimensions: int = 1, readonly: bool = False) -> Any:
        return types.Array(item, dimensions, "C", readonly=readonly, aligned=False)

    word = {2: types.uint16, 4: types.uint32}[width]
    byte, number = types.uint8, types.uint16
    stored = (array(byte), array(byte, 2), array(byte), array(number), array(number), array(byte), array(byte))
    encode = types.UniTuple(types.intp, 2)(array(word, 1, True), *stored)
    decode = types.boolean(array(byte, 1, True), types.intp, types.intp, types.intp, array(word))
    return jit.compiled(_encode, encode), jit.compiled(_decode, decode)
