"""Which weights of a tensor are kept: by magnitude, over the tensor, over each row, or in a pattern along the columns.

Magnitudes are compared as float32 (see `kernels`); NaN counts as 0, and zeros are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.look import Look
from modelstore.codecs.numeric import histogram
from modelstore.codecs.numeric.histogram import SHIFT, Counts
from modelstore.codecs.numeric.levels import TILE
from modelstore.codecs.numeric.numbers import Floats, limit, without_nan
from modelstore.codecs.sparse.kernels import kernels
from modelstore.codecs.weight import group_of, matrix
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent, full, offset

Keep = Callable[
    [Bytes, Region], Bytes
]  # a region's raw bytes, and where it lies → 1 for each element kept, 0 for others
SCOPES = ("tensor", "row")
_MAGNITUDE = 0x7FFFFFFF
_WIDEST = 64  # columns of a pattern


@dataclass(frozen=True, slots=True)
class Pruning:
    """Weights above a threshold, or all but a share of them, or n of every m columns of a row. See `sparse.Sparse`."""

    threshold: float = 0.0
    sparsity: float = 0.0
    scope: str = "tensor"
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        for what, value in (("threshold", self.threshold), ("sparsity", self.sparsity)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{what} is {value!r}: numbers from 0 on are possible")
        if self.sparsity >= 1:
            raise ValueError(f"sparsity is {self.sparsity}: it is the share that is pruned, below 1")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {self.scope!r}: it is one of {', '.join(SCOPES)}")
        if (
            type(self.n) is not int
            or type(self.m) is not int
            or not (self.n == self.m == 0 or 0 < self.n < self.m <= _WIDEST)
        ):
            raise ValueError(f"n, m are {self.n!r}, {self.m!r}: n of every m are kept, where 0 < n < m <= {_WIDEST}")
        if (self.threshold > 0) + (self.sparsity > 0) + (self.m > 0) > 1:
            raise ValueError(f"{self} says more than one thing: give a threshold, or a sparsity, or n and m")

    def group(self, shape: Shape) -> Shape:
        """The unit of the borders of regions."""
        if self.sparsity and self.scope == "row":
            return group_of(shape, 0)
        return group_of(shape, self.m) if self.m else (1,) * len(shape)

    @property
    def kept(self) -> float:
        """The share of weights that is kept, as far as it is known without them."""
        return self.n / self.m if self.m else 1 - self.sparsity

    def fit(self, look: Look) -> Keep:
        """How regions of a tensor are pruned. A sparsity over the tensor is exact, for which it is read up to three times."""
        shape, dtype = look.shape, look.dtype
        if self.m:
            pattern = kernels()[2]
            return lambda values, region: _by_rows(
                values, extent(region), dtype, lambda tile, mask: pattern(tile, self.n, self.m, mask)
            )
        if not self.sparsity:
            least = int(np.float32(min(self.threshold, float(limit(dtype)))).view(np.uint32))
            return lambda values, _: _above(values, dtype, least)
        if self.scope == "row":
            rows = kernels()[1]
            pruned = math.floor(self.sparsity * matrix(shape)[1] + 0.5)
            return lambda values, region: _by_rows(
                values, extent(region), dtype, lambda tile, mask: rows(tile, pruned, mask)
            )
        least, end = _cut(look, math.floor(self.sparsity * math.prod(shape) + 0.5))
        return lambda values, region: _above_or_early(values, region, shape, dtype, least, end)


def _by_rows(values: Bytes, shape: Shape, dtype: DType, kernel: Callable[[Floats, Bytes], None]) -> Bytes:
    rows, columns = matrix(shape)
    mask = np.empty((rows, columns), np.uint8)
    step = max(1, TILE // max(1, columns))
    width = columns * dtype.itemsize
    for r in range(0, rows, step):
        n = min(step, rows - r)
        kernel(without_nan(values[r * width : (r + n) * width], dtype).reshape(n, columns), mask[r : r + n])
    return mask.reshape(-1)


def _above(values: Bytes, dtype: DType, limit: int) -> Bytes:
    mask = np.empty(values.size // dtype.itemsize, np.uint8)
    for start in range(0, mask.size, TILE):
        tile = without_nan(values[start * dtype.itemsize : (start + TILE) * dtype.itemsize], dtype)
        kernels()[0](tile, limit, mask[start : start + tile.size])
    return mask


def _above_or_early(values: Bytes, region: Region, shape: Shape, dtype: DType, limit: int, end: int) -> Bytes:
    """Above the limit, or equal to it and before the place `end` in the tensor."""
    mask = _above(values, dtype, limit)
    if not end:
        return mask
    for start in range(0, mask.size, TILE):
        keys = _keys(values[start * dtype.itemsize : (start + TILE) * dtype.itemsize], dtype)
        equal = np.flatnonzero(keys == limit) + start
        inside = np.unravel_index(equal, extent(region)) if region else ()
        places = np.zeros(equal.size, np.int64)
        for along, (a, _), n in zip(inside, region, shape, strict=True):
            places = places * n + (along + a)
        mask[equal[places < end]] = 1
    return mask


def _keys(values: Bytes, dtype: DType) -> NDArray[np.uint32]:
    return without_nan(values, dtype).view(np.uint32) & np.uint32(_MAGNITUDE)


def _cut(look: Look, pruned: int) -> tuple[int, int]:
    """(the magnitude above which all is kept, the place in the tensor before which that magnitude itself is)."""
    if not pruned:
        return 0, 0
    read, shape, dtype = look.read, look.shape, look.dtype
    counts = histogram.of_tensor(look)
    exact = dtype.itemsize <= 2
    limit, more = _place(_magnitudes(dtype) if exact else _magnitudes(dtype) >> np.uint32(SHIFT), counts, pruned)
    if not exact:  # the bin is known: now its lower bits
        lower = np.zeros(1 << SHIFT, np.int64)
        for band in grid.bands(full(shape), dtype.itemsize, look.band):
            keys = _keys(read(band), dtype)
            lower += np.bincount(
                keys[keys >> np.uint32(SHIFT) == limit] & np.uint32((1 << SHIFT) - 1), minlength=1 << SHIFT
            )
        found, more = _place(np.arange(1 << SHIFT, dtype=np.uint32), lower, int(lower.sum()) - more)
        limit = limit << SHIFT | found
    if not more or not limit:  # zeros are not kept
        return limit, 0
    for band in grid.bands(full(shape), dtype.itemsize, look.band):
        equal = np.flatnonzero(_keys(read(band), dtype) == limit)
        if equal.size >= more:
            return limit, offset(band, shape) + int(equal[more - 1]) + 1
        more -= equal.size
    raise AssertionError("unreachable: what was counted is there")


@cache
def _magnitudes(dtype: DType) -> NDArray[np.uint32]:
    """The magnitudes that the bins of a histogram stand for."""
    return np.abs(histogram.patterns(dtype)).view(np.uint32)


def _place(keys: NDArray[np.uint32], counts: Counts, pruned: int) -> tuple[int, int]:
    """(the key among which the smallest `pruned` end, how many of that key are kept)."""
    held = np.flatnonzero(counts)
    found, inverse = np.unique(keys[held], return_inverse=True)
    sums = np.zeros(found.size, np.int64)
    np.add.at(sums, inverse, counts[held])
    until = np.cumsum(sums)
    at = int(np.searchsorted(until, pruned))
    return int(found[at]), int(until[at]) - pruned


def magnitudes(counts: Counts, dtype: DType) -> Counts:
    """A tensor's histogram by magnitude: how many share the top 18 bits of it, whatever the dtype. These can be added."""
    keys = _magnitudes(dtype) >> np.uint32(SHIFT)
    summed = np.zeros(1 << (31 - SHIFT), np.int64)
    np.add.at(summed, keys, counts)
    return summed


def global_threshold(histograms: Iterable[Counts], sparsity: float) -> float:
    """The magnitude, as float32, with a share of nearly `sparsity` of all weights at or below it.

    histograms: the `magnitudes` of each tensor. The share is off by at most half of what the bin at the threshold holds:
    all weights of one magnitude in bfloat16, float16 and float8; in wider dtypes those within 2^-10 of it.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: it is the share that is pruned, from 0 to below 1")
    total = np.zeros(1 << (31 - SHIFT), np.int64)
    for counts in histograms:
        total += counts
    until = np.concatenate([[0], np.cumsum(total)])
    wanted = sparsity * float(until[-1])
    at = int(np.searchsorted(until, wanted))
    if at and wanted - until[at - 1] < until[at] - wanted:
        at -= 1
    largest = np.array(min(max(0, (at << SHIFT) - 1), 0x7F7FFFFF), np.uint32)
    return float(largest.view(np.float32))
