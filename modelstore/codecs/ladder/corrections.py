"""The ladder above codes from elsewhere: its own high nibbles ↔ what corrects the codes to them.

A code q given with its scale, and the low nibble of the ladder's own eight-bit code, all but say what the high one is: of the
numbers 16 * h + low, that nearest to what q stands for. The difference between h and that, negated where low is positive,
modulo 16, is the correction: 0 if the code was rounded to nearest, and then most often one less where it was not, since
what moved a number to the next code was near to it. Ratios of scales are fixed-point, so that every machine reads the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

_FIXED = 4096.0  # one, as a ratio
_LARGEST = 1 << 24  # ratio: the product with a code stays within 32 bits


def _correct(back, given, ours, own, theirs, other, first, columns, codes, corrections):  # type: ignore[no-untyped-def]
    """Corrections, bytes below 16, of a block's codes; or `back`, the high nibbles of codes that have the low ones only.

    given: int4 codes as bytes, 8 above, the first of them element `first` of (rows, columns); codes: the ladder's own as
    bytes. theirs, ours: float32 (groups of all rows,), the int4 scales of either, one for `other` and `own` columns.
    """
    eight, nibble = np.int32(8), np.uint8(15)
    groups, others = -(-columns // own), -(-columns // other)
    start = 0
    while start < given.size:
        row = (first + start) // columns
        column = (first + start) - row * columns
        g, h = column // own, column // other
        end = min(columns, (g + 1) * own, (h + 1) * other)
        n = min(end - column, given.size - start)
        x = np.float32(theirs[row * others + h] / ours[row * groups + g]) * np.float32(_FIXED)
        x = x if x == x else np.float32(0)
        ratio = np.int32(min(max(np.rint(x), np.float32(-_LARGEST)), np.float32(_LARGEST)))
        q, u, c = given[start : start + n], codes[start : start + n], corrections[start : start + n]
        for i in range(n):
            low = np.int32(u[i] & nibble) - eight
            p = ((np.int32(q[i]) - eight) * ratio - (low << np.int32(8)) + np.int32(2048)) >> np.int32(12)
            p = min(max(p, np.int32(-8)), np.int32(7)) + eight
            if back:
                d = np.int32(c[i])
                high = np.uint8((p - d if low > 0 else p + d) & np.int32(15))
                u[i] = np.uint8(high << np.uint8(4)) | np.uint8(u[i] & nibble)
            else:
                d = np.int32(u[i] >> np.uint8(4)) - p
                c[i] = np.uint8((-d if low > 0 else d) & np.int32(15))
        start += n


@cache
def correct() -> Callable[..., Any]:
    """The function above, compiled, or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, readonly: bool = True) -> Any:
        return types.Array(item, 1, "C", readonly=readonly, aligned=False)

    read, made, scale, size = array(types.uint8), array(types.uint8, False), array(types.float32), types.intp
    return jit.compiled(_correct, types.void(types.boolean, read, scale, size, scale, size, size, size, made, made))
