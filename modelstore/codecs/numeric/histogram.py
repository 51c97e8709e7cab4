"""The number of times each number occurs in a tensor: enough to find one codebook, or one threshold.

Numbers of 8 and 16 bits are counted by their bit patterns, exactly. Wider ones are counted as float32 by the top 19 of
their 32 bits, each bin standing for its middle: off by at most 2^-11 of a number, far below what quantization loses.
Counts are integers, so that a histogram is the same in whatever order it was made, and histograms can be added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.exact.kernels import WORDS
from modelstore.codecs.kernels import jit
from modelstore.codecs.look import Look
from modelstore.codecs.numeric.numbers import Floats, limit, without_nan
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import full

Counts = NDArray[np.int64]
SHIFT = 13  # bits of a float32 that a bin leaves out: none that float16 has
_BAND = 4 << 20  # bytes that are weighed at once: sums of floats keep their order, whatever memory there is
_TILE = 32 << 10
_LIGHTEST = 1e-4  # what a number counts at least: it has to go somewhere


def count(values: Bytes, dtype: DType, counts: Counts) -> None:
    """Add the numbers in raw bytes to `counts`, made by `empty`."""
    width = dtype.itemsize
    if width <= 2:
        _kernel(width)(values.view(WORDS[width]), 0, counts)
        return
    for start in range(0, values.size, _TILE * width):
        found = without_nan(values[start : start + _TILE * width], dtype, infinite=True)
        _kernel(4)(found.view(np.uint32), SHIFT, counts)


def empty(dtype: DType) -> Counts:
    """Counts of nothing."""
    return np.zeros(1 << (8 * dtype.itemsize if dtype.itemsize <= 2 else 32 - SHIFT), np.int64)


def of_tensor(look: Look) -> Counts:
    """The counts of a whole tensor, read once, a few MiB at a time."""
    counts = empty(look.dtype)
    for band in grid.bands(full(look.shape), look.dtype.itemsize, look.band):
        count(look.read(band), look.dtype, counts)
    return counts


def weighted(values: Bytes, dtype: DType, importance: NDArray[np.float32]) -> NDArray[np.float64]:
    """As counts of the numbers in raw bytes of a matrix, where a number counts by the importance of its column, above 0."""
    width, columns = dtype.itemsize, importance.size
    found, heavy = np.zeros(len(empty(dtype))), np.maximum(importance.astype(np.float64), _LIGHTEST)
    rows = max(1, _BAND // (width * columns))
    for start in range(0, values.size, rows * columns * width):
        part = values[start : start + rows * columns * width]
        if width <= 2:
            bins = part.view(WORDS[width])
        else:
            bins = without_nan(part, dtype, infinite=True).view(np.uint32) >> np.uint32(SHIFT)
        found += np.bincount(bins, np.tile(heavy, bins.size // columns), found.size)
    return found


def numbers(counts: Counts, dtype: DType, of: NDArray[Any] | None = None) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """(the finite numbers that occur, ascending, float64; how often each does). NaN are 0; infinities are left out.

    of: what is given of each number instead of how often it occurs, by its place in the counts.
    """
    places = np.flatnonzero(counts)
    places = places[~_infinite(dtype)[places]]
    found = patterns(dtype)[places].astype(np.float64)
    order = np.argsort(found, kind="stable")
    return found[order], (counts if of is None else of)[places][order]


@cache
def _infinite(dtype: DType) -> NDArray[np.bool_]:
    """Which bins are those of infinities."""
    if dtype.itemsize <= 2:
        every = np.arange(1 << 8 * dtype.itemsize, dtype=WORDS[dtype.itemsize]).view(np.uint8)
        return np.isinf(without_nan(every, dtype, infinite=True))
    return np.isinf((np.arange(1 << (32 - SHIFT), dtype=np.uint32) << np.uint32(SHIFT)).view(np.float32))


@cache
def patterns(dtype: DType) -> Floats:
    """The number that each bin stands for, float32, by its place in the counts: infinities for the largest finite numbers."""
    if dtype.itemsize <= 2:
        found = without_nan(np.arange(1 << 8 * dtype.itemsize, dtype=WORDS[dtype.itemsize]).view(np.uint8), dtype)
    else:
        bits = np.arange(1 << (32 - SHIFT), dtype=np.uint32) << np.uint32(SHIFT)
        middle = np.where(bits & np.uint32(0x7FFFFFFF), bits | np.uint32(1 << (SHIFT - 1)), bits)
        middle = np.where(_infinite(dtype), bits, middle).view(np.float32)
        most = float(limit(dtype))
        found = np.nan_to_num(middle, nan=0.0, posinf=most, neginf=-most)
    found.flags.writeable = False
    return found


def _count(words, shift, counts):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        counts[words[i] >> shift] += 1


@cache
def _kernel(width: int) -> Callable[..., Any]:
    from numba import types

    word: Any = {1: types.uint8, 2: types.uint16, 4: types.uint32}[width]
    words = types.Array(word, 1, "C", readonly=True, aligned=False)
    return jit.compiled(_count, types.void(words, types.uint32, types.Array(types.int64, 1, "C", aligned=False)))
