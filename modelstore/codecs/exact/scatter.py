"""The kernel that changes a group of words in place, for `changes`: gaps and differences are read, and words written, in one
step.

Nothing is written beyond the region, whatever is stored; `changes` answers for the lengths of what it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

MORE = 255  # a byte of a gap's coded part that says that another one follows
COUNT = -1  # what `apply` answers: there are not as many gaps as words
BEYOND = -2  # minus the place: a place beyond the region


def _apply(coded, low, packed, signs, planes, magnitude, row, stride, last, words, out):  # type: ignore[no-untyped-def]
    """Change the group's words; the place of its last one, or what is wrong: COUNT, or BEYOND less a place.

    coded, low, packed, signs: as `changes.Group` has them; planes: as many uint8 arrays (n,) as a word has bytes, most
    significant first; magnitude: as in `kernels`; last: the place that the first gap begins behind. out: words, 1-d, of
    which `words` are the region's, in rows of `row` words that begin `stride` words apart.
    """
    width = out.itemsize
    sign = np.uint8(8 * width - 1)
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    mask = out.dtype.type(magnitude)
    keep = (np.uint64(1) << np.uint64(low)) - np.uint64(1)
    count = planes[0].size
    at = last
    c, p, have, bag = 0, 0, 0, np.uint64(0)
    for i in range(count):
        gap = np.int64(0)
        while c < coded.size and coded[c] == MORE:
            gap += MORE
            c += 1
        if c == coded.size:
            return COUNT
        gap = (gap + np.int64(coded[c])) << np.int64(low)
        c += 1
        while have < low:
            bag |= np.uint64(packed[p]) << np.uint64(have)
            p += 1
            have += 8
        at += 1 + (gap | np.int64(bag & keep))
        bag >>= np.uint64(low)
        have -= low
        if at >= words or at < 0:
            return COUNT if at < 0 else BEYOND - at
        size = zero
        for q in range(width):
            size |= out.dtype.type(out.dtype.type(planes[q][i]) << np.uint8(8 * (width - 1 - q)))
        negative = out.dtype.type(signs[i >> 3] >> np.uint8(i & 7)) & one
        change = out.dtype.type((size + (one - negative)) ^ (zero - negative))
        there = at if row == stride else at // row * stride + at % row
        w = out[there]
        x = out.dtype.type((w ^ ((zero - (w >> sign)) & mask)) + change)
        out[there] = x ^ ((zero - (x >> sign)) & mask)
    if c != coded.size:
        return COUNT
    return at


@cache
def apply(width: int) -> Callable[..., Any]:
    """`_apply` for words of `width` bytes, compiled or loaded from the cache the first time."""
    from numba import types

    kind: Any = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[width]
    word = types.Array(kind, 1, "C", aligned=False)
    piece = types.Array(types.uint8, 1, "C", readonly=True)
    planes = types.UniTuple(piece, width)  # type: ignore[no-untyped-call]
    group = (piece, types.intp, piece, piece, planes)
    where = (types.intp, types.intp, types.intp, types.intp)
    return jit.compiled(_apply, types.intp(*group, types.uint64, *where, word))
