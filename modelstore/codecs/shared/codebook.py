"""A codebook fitted to a tensor, and the indices of its numbers in it: what `kmeans` and `deep` share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.exact.kernels import WORDS
from modelstore.codecs.kernels import codes as kernels
from modelstore.codecs.numeric import histogram, levels
from modelstore.codecs.numeric.histogram import Counts
from modelstore.codecs.numeric.levels import TILE, Words
from modelstore.codecs.numeric.numbers import without_nan
from modelstore.codecs.shared import clusters
from modelstore.codecs.shared.clusters import Numbers
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType

LARGEST = 256  # levels


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """Levels in the tensor's dtype, ascending, and how numbers are assigned to them.

    `table` is uint8: for dtypes of 8 and 16 bits the index of every bit pattern; for wider ones, by the upper half of a
    float32's bits, how many `bounds` (float32, ascending) are below all numbers that share it.
    """

    data: Bytes
    table: Bytes
    bounds: NDArray[np.float32]
    dtype: DType

    @property
    def levels(self) -> int:
        """How many there are."""
        return self.data.size // self.dtype.itemsize

    def assign(self, values: Bytes) -> Bytes:
        """The index of every number in raw bytes, one a byte."""
        width = self.dtype.itemsize
        out = np.empty(values.size // width, np.uint8)
        if width <= 2:
            kernels.lookup(width)(values.view(WORDS[width]), self.table, out)
            return out
        kernel = kernels.packing().assign
        for start in range(0, out.size, TILE):
            tile = without_nan(values[start * width : (start + TILE) * width], self.dtype)
            kernel(tile, self.table, self.bounds, out[start : start + tile.size])
        return out


def fitted(counts: Counts, dtype: DType, most: int, rate: float, heavy: NDArray[np.float64] | None = None) -> Codebook:
    """The codebook of a tensor out of its histogram: of at most `most` levels, or of `rate` bits an index where that is set.

    `heavy`: of each bin, what its numbers count together for the error, where they do not count alike.
    """
    values, often = histogram.numbers(counts, dtype)
    weights = None if heavy is None else histogram.numbers(counts, dtype, heavy)[1]
    if not values.size:
        values, often, weights = np.zeros(1), np.ones(1, np.int64), None
    scale = 2.0 ** np.floor(
        np.log2(np.abs(values).max() or 1.0)
    )  # squares of float32's largest and smallest stay numbers
    numbers = Numbers.of(values / scale, often, weights)
    if rate:
        points, bounds = clusters.entropy_constrained(numbers, rate)
    else:
        alike = None if weights is None else clusters.kmeans(Numbers.of(values / scale, often), most)[0]
        points, bounds = clusters.kmeans(numbers, most, alike)
    return _made(points * scale, bounds * scale, dtype)


def _made(points: NDArray[np.float64], bounds: NDArray[np.float64], dtype: DType) -> Codebook:
    """Levels rounded to the dtype, those that have become equal being one, and the tables for their bounds."""
    data = levels.narrowed(points.astype(np.float32), dtype).view(WORDS[dtype.itemsize])
    apart = np.concatenate([[True], data[1:] != data[:-1]])
    found = np.ascontiguousarray(data[apart])
    cut = bounds[apart[1:]].astype(np.float32)
    if dtype.itemsize <= 2:
        table = np.searchsorted(cut, histogram.patterns(dtype), "left").astype(np.uint8)
        return Codebook(found.view(np.uint8), table, cut, dtype)
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lowest = np.where(upper >> np.uint32(31), upper | np.uint32(0xFFFF), upper).view(np.float32)
    table = np.searchsorted(cut, np.nan_to_num(lowest, nan=0.0), "left").astype(np.uint8)
    return Codebook(found.view(np.uint8), table, cut, dtype)


def stored(plane: Buffer, dtype: DType) -> Words:
    """A plane of 1 to 256 levels as unsigned words."""
    data = as_bytes(plane)
    count, rest = divmod(data.size, dtype.itemsize)
    if rest or not 1 <= count <= LARGEST:
        raise FormatError(
            f"the plane 'codebook' has {data.size} bytes: 1 to {LARGEST} levels of {dtype.name} are expected"
        )
    return data.view(WORDS[dtype.itemsize])


def check_levels(bits: int, count: int, rate: float) -> None:
    """`ValueError` unless the parameters name a codebook: bits or levels or rate."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}: 1 to 8 are possible")
    if isinstance(count, bool) or not isinstance(count, int) or not (count == 0 or 2 <= count <= LARGEST):
        raise ValueError(f"levels is {count!r}: 2 to {LARGEST} are possible, or 0 for as many as bits can number")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (rate == 0 or 1 <= rate <= 8):
        raise ValueError(f"rate is {rate!r}: 1 to 8 bits a weight are possible, or 0 for k-means")
    if count and rate:
        raise ValueError(f"levels is {count} and rate is {rate}: give one of them")
