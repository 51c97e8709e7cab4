"""Which weights are kept, by their magnitude; and those kept moved together, and back to their places.

A magnitude is the bits of a finite float32 without its sign, which order as the numbers do. Among equal ones the earlier are
kept; zeros never are. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

_BINS = 2048  # of a radix of 11 bits: three of them are a magnitude


def _above(numbers, limit, mask):  # type: ignore[no-untyped-def]
    """mask[i] = 1 where a magnitude exceeds `limit`. numbers: float32 (n,); mask: uint8 (n,)."""
    bits = numbers.view(np.uint32)
    for i in range(bits.size):
        mask[i] = np.uint8((bits[i] & np.uint32(0x7FFFFFFF)) > limit)


def _rows(numbers, pruned, mask):  # type: ignore[no-untyped-def]
    """Keep all of each row except the `pruned` smallest. numbers: float32 (rows, columns); mask: uint8 (rows, columns)."""
    rows, columns = numbers.shape
    counts = np.empty(_BINS, np.int64)
    for r in range(rows):
        bits = numbers[r].view(np.uint32)
        prefix = np.uint32(0)
        left = pruned  # how many are to go among those whose upper bits are the prefix
        for digit in range(3):
            shift = np.uint32(22 - 11 * digit)
            counts[:] = 0
            for i in range(columns):
                key = bits[i] & np.uint32(0x7FFFFFFF)
                if digit == 0 or (key >> (shift + np.uint32(11))) == prefix:
                    counts[(key >> shift) & np.uint32(_BINS - 1)] += 1
            place = 0
            while place < _BINS - 1 and counts[place] < left:
                left -= counts[place]
                place += 1
            prefix = (prefix << np.uint32(11)) | np.uint32(place)
            ties = counts[place] - left  # of those that equal the threshold in the end, so many are kept
        for i in range(columns):
            key = bits[i] & np.uint32(0x7FFFFFFF)
            keep = key > prefix
            if key == prefix and ties > 0:
                keep = True
                ties -= 1
            mask[r, i] = np.uint8(keep and key > np.uint32(0))


def _pattern(numbers, n, m, mask):  # type: ignore[no-untyped-def]
    """Keep the n largest of every m columns of a row. numbers: float32 (rows, columns); mask: uint8 (rows, columns)."""
    rows, columns = numbers.shape
    for r in range(rows):
        bits = numbers[r].view(np.uint32)
        for a in range(0, columns, m):
            b = min(columns, a + m)
            for i in range(a, b):
                key = bits[i] & np.uint32(0x7FFFFFFF)
                larger = 0
                for j in range(a, i):
                    larger += (bits[j] & np.uint32(0x7FFFFFFF)) >= key
                for j in range(i + 1, b):
                    larger += (bits[j] & np.uint32(0x7FFFFFFF)) > key
                mask[r, i] = np.uint8(larger < n and key > np.uint32(0))


def _compact(words, mask, out):  # type: ignore[no-untyped-def]
    """The words whose mask is 1, in order; how many. out: as many as there are, and one more."""
    at = np.int64(0)
    for i in range(words.size):
        out[at] = words[i]
        at += np.int64(mask[i])
    return at


def _spread(kept, mask, out):  # type: ignore[no-untyped-def]
    """out[i] = the next of `kept` where mask[i] is 1, else 0; how many were used. kept: one more than there are."""
    at = np.int64(0)
    for i in range(out.size):  # multiplied, since a branch would be guessed wrong half of the time
        out[i] = kept[at] * out.dtype.type(mask[i])
        at += np.int64(mask[i])
    return at


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(above, rows, pattern), compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, ndim: int, readonly: bool = False) -> Any:
        return types.Array(item, ndim, "C", readonly=readonly, aligned=False)

    numbers, mask = array(types.float32, 2, True), array(types.uint8, 2)
    above = types.void(array(types.float32, 1, True), types.uint32, array(types.uint8, 1))
    rows = types.void(numbers, types.intp, mask)
    pattern = types.void(numbers, types.intp, types.intp, mask)
    return jit.compiled(_above, above), jit.compiled(_rows, rows), jit.compiled(_pattern, pattern)


@cache
def movers(width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(compact, spread) for words of `width` bytes."""
    from numba import types

    word: Any = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[width]
    read = types.Array(word, 1, "C", readonly=True, aligned=False)
    write = types.Array(word, 1, "C", aligned=False)
    mask = types.Array(types.uint8, 1, "C", readonly=True, aligned=False)
    signature = types.intp(read, mask, write)
    return jit.compiled(_compact, signature), jit.compiled(_spread, signature)
