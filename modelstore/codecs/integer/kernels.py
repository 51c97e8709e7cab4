"""Groups of numbers as integer codes with a scale and a zero point, and back; see `codecs.integer.codec` for what they mean.

Numbers are float32 in a scratch array while a group is worked on, codes one a byte until a row is packed. `kind` is the
dtype in memory: 0 bfloat16, 1 float16 (words of uint16), 2 float32 (uint32); scales are rounded to the same. Sums are
taken in halves, always in the same order, so that they vectorise and their bits are the same everywhere.

Nothing is checked here: `codecs.integer.codec` answers for every length. This module is imported when a kernel is wanted.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from modelstore.codecs.kernels import jit
from modelstore.codecs.kernels.bits import pack, unpack

STEPS = 21  # of the search for the best clip: 1, 0.99, … 0.8 of the range
_PATIENCE = 5
_TILE = 1024
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even, that lies in the low bits
_INT = np.int32(0x4B400000)  # its bits


@register_jitable
def _load(words, kind, w):  # type: ignore[no-untyped-def]
    """Words as float32; NaN as 0."""
    if kind == 0:
        for i in range(w.size):
            b = np.uint32(words[i])
            a = np.uint32(b & np.uint32(0x7FFF))
            a = np.uint32(0) if a > np.uint32(0x7F80) else a
            w[i] = np.uint32(((b & np.uint32(0x8000)) | a) << np.uint32(16)).view(np.float32)
    elif kind == 1:
        for i in range(w.size):
            b = np.uint32(words[i])
            a = np.uint32(b & np.uint32(0x7FFF))
            a = np.uint32(0) if a > np.uint32(0x7C00) else a
            x = np.uint32(a << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
            x = np.float32(np.inf) if a == np.uint32(0x7C00) else x
            w[i] = -x if b & np.uint32(0x8000) else x
    else:
        for i in range(w.size):
            b = np.uint32(words[i])
            a = np.uint32(b & np.uint32(0x7FFFFFFF))
            a = np.uint32(0) if a > np.uint32(0x7F800000) else a
            w[i] = np.uint32((b & np.uint32(0x80000000)) | a).view(np.float32)


@register_jitable
def _range(w):  # type: ignore[no-untyped-def]
    """Least and greatest finite number, 0 among them. Compared as integers of the same order, since those vectorise."""
    low = high = np.int32(0)
    for i in range(w.size):
        b = np.float32(w[i]).view(np.int32)
        b = np.int32(0) if np.int32(b & np.int32(0x7FFFFFFF)) == np.int32(0x7F800000) else b
        o = np.int32(b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = o if o < low else low
        high = o if o > high else high
    low = np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    least, most = np.int32(low).view(np.float32), np.int32(high).view(np.float32)
    return min(least, np.float32(0)) + np.float32(0), most


@register_jitable
def _finite(w):  # type: ignore[no-untyped-def]
    """Infinities become 0: they have no say in the choice of a scale."""
    for i in range(w.size):
        w[i] = np.float32(0) if abs(w[i]) > np.float32(3.4028235e38) else w[i]


@register_jitable
def _stored(s, kind):  # type: ignore[no-untyped-def]
    """A scale as it is stored: rounded half to even, in float16 up where it is subnormal there, and never 0."""
    b = np.float32(s).view(np.uint32)
    if kind == 0:
        b = np.uint32((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))
        return np.uint32(max(b, np.uint32(0x10000))).view(np.float32)
    if kind == 1:
        if s < np.float32(2.0**-14):
            return np.float32(max(np.ceil(s * np.float32(2.0**24)), np.float32(1)) * np.float32(2.0**-24))
        b = np.uint32((b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000))
        return np.uint32(b).view(np.float32)
    return np.uint32(max(b, np.uint32(1))).view(np.float32)


@register_jitable
def _scale(low, high, part, bits, symmetric, kind):  # type: ignore[no-untyped-def]
    """Scale and zero point for `part` of a range."""
    top = np.float32((1 << bits) - 1)
    low, high = np.float32(low * part), np.float32(high * part)
    if low == np.float32(0) and high == np.float32(0):
        s = np.float32(1)
    elif symmetric:
        s = _stored(np.float32(max(-low, high) / (top / np.float32(2))), kind)
    else:
        width = np.float32(high - low)
        if width > np.float32(3.4028235e38):
            half = np.float32(high * np.float32(0.5) - low * np.float32(0.5))
            s = _stored(np.float32(half / (top * np.float32(0.5))), kind)
        else:
            s = _stored(np.float32(width / top), kind)
    z = np.float32(0)
    if not symmetric:
        least = np.float32(-(1 << (bits - 1)))
        z = np.float32(np.rint(min(max(least - low / s, least), np.float32(least + top))))
    return s, z


@register_jitable
def _ends(s, z, bits, largest):  # type: ignore[no-untyped-def]
    """The codes that decode to finite numbers, none beyond `largest`."""
    half = np.float32(1 << (bits - 1))
    reach = np.float32(np.floor(min(largest / abs(s), np.float32(1024))))
    return max(-half, z - reach), min(half - np.float32(1), z + reach)


@register_jitable
def _round(w, s, z, least, most, bias, codes):  # type: ignore[no-untyped-def]
    """codes[i] = w[i] / s + z, clamped and rounded, + bias."""
    for i in range(w.size):
        t = np.float32(w[i] / s + z)
        t = least if t < least else t
        t = most if t > most else t
        codes[i] = np.uint8(np.float32(t + _MAGIC).view(np.int32) + bias)


@register_jitable
def _power(x, exponent):  # type: ignore[no-untyped-def]
    """x ** exponent of 0 <= x < 1000, to 3 digits, by polynomials: the same on every machine, and it vectorises."""
    b = np.float32(x).view(np.int32)
    m = np.int32((b & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32) - np.float32(1.5)
    p = (np.float32(-0.08001088) * m + np.float32(0.15544586)) * m + np.float32(-0.31974910)
    p = (p * m + np.float32(0.96096325)) * m + np.float32(0.58495050)
    t = np.float32(exponent * (np.float32(np.int32(b >> np.int32(23)) - np.int32(127)) + p))
    t = np.float32(-100) if t < np.float32(-100) else t
    shifted = np.float32(t + _MAGIC)
    f = t - (shifted - _MAGIC)
    q = (np.float32(0.05592204) * f + np.float32(0.24264008)) * f + np.float32(0.69312103)
    q = q * f + np.float32(0.99992448)
    e = np.int32((np.float32(shifted).view(np.int32) - _INT + np.int32(127)) << np.int32(23))
    return np.int32(e).view(np.float32) * q


@register_jitable
def _total(values):  # type: ignore[no-untyped-def]
    """The sum, by halves; `values` is overwritten."""
    n = values.size
    while n > 8:
        half = n // 2
        a, b = values[:half], values[n - half : n]
        for i in range(half):
            a[i] += b[i]
        n -= half
    total = np.float32(0)
    for i in range(n):
        total += values[i]
    return total


@register_jitable
def _inverse(s):  # type: ignore[no-untyped-def]
    """The inverse of a scale; finite."""
    size = np.float32(1) / max(abs(s), np.float32(2.0**-126))
    return -size if s < np.float32(0) else size


@register_jitable
def _loss(w, s, z, unit, bits, largest, room):  # type: ignore[no-untyped-def]
    """Sum of |error / unit| ** 2.4. Multiplies where `_round` divides: a code on the border may be its neighbour."""
    least, most = _ends(s, z, bits, largest)
    inverse, per = _inverse(s), _inverse(abs(unit))
    for i in range(w.size):
        t = np.float32(w[i] * inverse + z)
        t = least if t < least else t
        t = most if t > most else t
        r = np.float32(np.float32(t + _MAGIC) - _MAGIC)
        room[i] = _power(abs((r - z) * s - w[i]) * per, np.float32(2.4))
    return _total(room[: w.size])


@register_jitable
def _clip(w, low, high, bits, symmetric, kind, largest, room):  # type: ignore[no-untyped-def]
    """The one of shrinking ranges with the least loss."""
    unit, best_z = _scale(low, high, np.float32(1), bits, symmetric, kind)
    best_s, least, worse = unit, _loss(w, unit, best_z, unit, bits, largest, room), 0
    for i in range(1, STEPS):
        s, z = _scale(low, high, np.float32(1) - np.float32(i) / np.float32(100), bits, symmetric, kind)
        loss = _loss(w, s, z, unit, bits, largest, room)
        if loss < least:
            best_s, best_z, least, worse = s, z, loss, 0
        else:
            worse += 1
            if worse == _PATIENCE:
                break
    return best_s, best_z


@register_jitable
def _half_quadratic(w, low, high, bits, symmetric, kind, largest, room, tops, bottoms):  # type: ignore[no-untyped-def]
    """The scale that fits best once outlying errors are set apart; the zero point stays an integer."""
    s, z = _scale(low, high, np.float32(1), bits, symmetric, kind)
    best, least, worse = s, np.float32(np.inf), 0
    beta = np.float32(10)
    for _ in range(20):
        first, last = _ends(s, z, bits, largest)
        inverse, threshold = _inverse(s), np.float32(1) / beta
        for i in range(w.size):
            x = np.float32(w[i] * inverse)
            t = np.float32(x + z)
            t = first if t < first else t
            t = last if t > last else t
            c = np.float32(np.float32(t + _MAGIC) - _MAGIC) - z
            d = x - c
            a = abs(d)
            e = max(a - _power(a, np.float32(-0.3)) * threshold, np.float32(0))
            fit = x - (-e if d < np.float32(0) else e)
            room[i] = d * d
            tops[i] = fit * c
            bottoms[i] = c * c
        loss = np.float32(_total(room[: w.size]) * s) * s
        top, bottom = _total(tops[: w.size]), _total(bottoms[: w.size])
        if loss < least:
            best, least, worse = s, loss, 0
        else:
            worse += 1
        ratio = top / bottom if bottom > np.float32(0) else np.float32(0)
        changed = _stored(np.float32(s * ratio), kind) if ratio > np.float32(0) and ratio < np.float32(4) else s
        if worse == 3 or changed == s:
            break
        s = changed
        beta *= np.float32(1.01)
    return best, z


def _encode(words, kind, bits, symmetric, method, height, width, largest, scales, zeros, out):  # type: ignore[no-untyped-def]
    """A matrix, as blocks of height × width numbers (1 × group for groups), into packed codes, scales and zero points.

    words: (rows, columns); scales, zeros: float32 (rows / height, columns / width), found by `method`: 0 the range, 1 the
    best clip, 2 half-quadratic; or given: -1, one for each row or for all. out: uint8 (rows, bytes of a packed row).
    """
    rows, columns = words.shape
    bias = np.int32(1 << (bits - 1))
    count = min(height, rows) * min(width, columns)
    w = np.empty(count, np.float32)
    spare = count if method > 0 else 0
    room, tops, bottoms = np.empty(spare, np.float32), np.empty(spare, np.float32), np.empty(spare, np.float32)
    codes = np.empty((min(height, rows), columns), np.uint8)
    for top in range(0, rows, height):
        h = min(height, rows - top)
        for left in range(0, columns, width):
            n = min(width, columns - left)
            cell = w[: h * n]
            for r in range(h):
                _load(words[top + r, left : left + n], kind, cell[r * n : r * n + n])
            if method < 0:
                i = min(top, scales.shape[0] - 1)
                s, z = scales[i, 0], zeros[i, 0]
            else:
                low, high = _range(cell)
                if method == 0 or (low == np.float32(0) and high == np.float32(0)):
                    s, z = _scale(low, high, np.float32(1), bits, symmetric, kind)
                else:
                    _finite(cell)
                    if method == 1 and symmetric and high > -low:
                        # There is one more code below zero than above: the scale's sign turns the longer side there.
                        for i in range(cell.size):
                            cell[i] = -cell[i]
                        s, z = _clip(cell, -high, -low, bits, symmetric, kind, largest, room)
                        s = -s
                    elif method == 1:
                        s, z = _clip(cell, low, high, bits, symmetric, kind, largest, room)
                    else:
                        s, z = _half_quadratic(cell, low, high, bits, symmetric, kind, largest, room, tops, bottoms)
                    for r in range(h):
                        _load(words[top + r, left : left + n], kind, cell[r * n : r * n + n])
                scales[top // height, left // width] = s
                zeros[top // height, left // width] = z
            least, most = _ends(s, z, bits, largest)
            for r in range(h):
                _round(cell[r * n : r * n + n], s, z, least, most, bias, codes[r, left : left + n])
        for r in range(h):
            pack(codes[r], bits, out[top + r])


def _extremes(words, kind, low, high):  # type: ignore[no-untyped-def]
    """Rows' ranges, joined with those in `low` and `high`: float32 (rows,)."""
    w = np.empty(_TILE, np.float32)
    for r in range(words.shape[0]):
        for left in range(0, words.shape[1], _TILE):
            n = min(_TILE, words.shape[1] - left)
            _load(words[r, left : left + n], kind, w[:n])
            least, most = _range(w[:n])
            low[r] = min(low[r], least)
            high[r] = max(high[r], most)


def _candidates(low, high, bits, symmetric, kind, scales, zeros):  # type: ignore[no-untyped-def]
    """The candidates of `_clip`, for each row, the longer side turned below zero: scales, zeros: float32 (rows, up to STEPS)."""
    for r in range(low.size):
        turned = symmetric and scales.shape[1] > 1 and high[r] > -low[r]
        for i in range(scales.shape[1]):
            part = np.float32(1) - np.float32(i) / np.float32(100)
            s, z = _scale(low[r], high[r], part, bits, symmetric, kind)
            scales[r, i], zeros[r, i] = -s if turned else s, z


def _losses(words, kind, bits, largest, scales, zeros, losses):  # type: ignore[no-untyped-def]
    """Rows' losses by each candidate, added to `losses`: float64 (rows, STEPS)."""
    w, room = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for r in range(words.shape[0]):
        for left in range(0, words.shape[1], _TILE):
            n = min(_TILE, words.shape[1] - left)
            _load(words[r, left : left + n], kind, w[:n])
            _finite(w[:n])
            for i in range(scales.shape[1]):
                loss = _loss(w[:n], scales[r, i], zeros[r, i], scales[r, 0], bits, largest, room)
                losses[r, i] += np.float64(loss)


@register_jitable
def _store(numbers, kind, out):  # type: ignore[no-untyped-def]
    """float32 rounded half to even to words of the dtype; every NaN becomes the same."""
    for i in range(numbers.size):
        x = np.uint32(np.float32(numbers[i]).view(np.uint32))
        a = np.uint32(x & np.uint32(0x7FFFFFFF))
        if kind == 0:
            v = np.uint32((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
            v = np.uint32(0x7FC0) if a > np.uint32(0x7F800000) else v
        elif kind == 1:
            normal = np.uint32((a - np.uint32(0x37FFF001) + ((a >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
            small = np.float32(np.uint32(a).view(np.float32) + np.float32(0.5))
            v = np.uint32(np.float32(small).view(np.uint32) - np.uint32(0x3F000000))
            v = normal if a >= np.uint32(0x38800000) else v
            v = np.uint32(0x7C00) if a >= np.uint32(0x47800000) else v
            v = np.uint32(v | ((x >> np.uint32(16)) & np.uint32(0x8000)))
            v = np.uint32(0x7E00) if a > np.uint32(0x7F800000) else v
        else:
            v = np.uint32(0x7FC00000) if a > np.uint32(0x7F800000) else x
        out[i] = v


def _decode(packed, kind, bits, height, width, scales, zeros, out):  # type: ignore[no-untyped-def]
    """The reverse of `_encode`: (code - zero point) * scale, once rounded. out: words (rows, columns)."""
    rows, columns = out.shape
    bias = np.int32(1 << (bits - 1))
    codes, numbers = np.empty(columns, np.uint8), np.empty(min(width, _TILE), np.float32)
    for r in range(rows):
        unpack(packed[r], bits, codes)
        for left in range(0, columns, width):
            s, z = scales[r // height, left // width], zeros[r // height, left // width] + np.float32(bias)
            end = min(columns, left + width)
            for start in range(left, end, _TILE):
                n = min(_TILE, end - start)
                c, x = codes[start : start + n], numbers[:n]
                for i in range(n):
                    x[i] = (np.float32(np.int32(c[i])) - z) * s
                _store(x, kind, out[r, start : start + n])


@dataclass(frozen=True, slots=True)
class IntKernels:
    """The compiled kernels for words of 2 or 4 bytes."""

    encode: Callable[..., Any]
    decode: Callable[..., Any]
    extremes: Callable[..., Any]
    losses: Callable[..., Any]
    candidates: Callable[..., Any]


@cache
def kernels(itemsize: int) -> IntKernels:
    """Compiled, or loaded from the cache, the first time."""
    word: Any = {2: types.uint16, 4: types.uint32}[itemsize]
    read = types.Array(word, 2, "C", readonly=True, aligned=False)
    write = types.Array(word, 2, "C", aligned=False)
    table, row = types.Array(types.float32, 2, "C"), types.Array(types.float32, 1, "C")
    packed, bytes_in = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 2, "C", readonly=True, aligned=False)
    n, real, yes = types.intp, types.float32, types.boolean
    losses = types.Array(types.float64, 2, "C")
    return IntKernels(
        jit.compiled(_encode, types.void(read, n, n, yes, n, n, n, real, table, table, packed)),
        jit.compiled(_decode, types.void(bytes_in, n, n, n, n, table, table, write)),
        jit.compiled(_extremes, types.void(read, n, row, row)),
        jit.compiled(_losses, types.void(read, n, n, real, table, table, losses)),
        jit.compiled(_candidates, types.void(row, row, n, yes, n, table, table)),
    )
