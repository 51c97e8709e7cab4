"""`kmeans`: weight sharing. Every weight is one of a few values that the whole tensor shares; indices are entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.look import Look
from modelstore.codecs.numeric import histogram, levels
from modelstore.codecs.shared import codebook, indices
from modelstore.codecs.shared.codebook import Codebook
from modelstore.codecs.weight import Encode, WeightCodec
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape, extent, full

_NORMAL = 0.94  # of its bits is the entropy of an index into the 16 best levels for normal weights


@dataclass(frozen=True, slots=True)
class KMeans(WeightCodec):
    """One codebook a tensor, by one of:

    bits      2^bits values of least squared error, by k-means (Han et al., "Deep Compression", 2016)
    levels    as many values as that, where it is set: any number, since indices are entropy-coded
    rate      bits a weight that indices may take once they are entropy-coded, where it is set: up to 255 values, chosen for
              the least squared error at that rate (Chou et al., "Entropy-Constrained Vector Quantization", 1989)

    Planes: `indices` (see `indices`), row-major; `codebook`, the values in the tensor's dtype, ascending: the same in every
    region, so that it is stored once. A codebook keeps all values of a tensor of 8 or 16 bits that has no more different
    values than it; wider ones to 2^-11 of each.
    """

    bits: int = 4
    levels: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        codebook.check_levels(self.bits, self.levels, self.rate)

    @property
    def name(self) -> str:
        return "kmeans"

    @property
    def _most(self) -> int:
        return self.levels or 1 << self.bits

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        """Entropy-coded indices, and what they stand for."""
        return ("indices", "codebook")

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate, for normal weights."""
        each = self.rate or _NORMAL * math.log2(self._most)
        return 1 + math.ceil(math.prod(shape) * each / 8) + self._most * dtype.itemsize

    def fit(self, look: Look) -> Encode:
        """Count how often each number occurs: the tensor is read once, and only counts of it are kept."""
        if look.importance is not None:
            return self._weighted(look, look.importance)
        book = codebook.fitted(histogram.of_tensor(look), look.dtype, self._most, self.rate)
        return lambda values, region: _encoded(values, extent(region), look.dtype, book)

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        counts = histogram.empty(dtype)
        histogram.count(values, dtype, counts)
        return _encoded(values, shape, dtype, codebook.fitted(counts, dtype, self._most, self.rate))

    def _weighted(self, look: Look, importance: NDArray[np.float32]) -> Encode:
        """The values of the codebook are those by which least is lost where each column counts by its importance."""
        values, dtype = look.read(full(look.shape)), look.dtype
        counts = histogram.empty(dtype)
        histogram.count(values, dtype, counts)
        heavy = histogram.weighted(values, dtype, importance)
        book = codebook.fitted(counts, dtype, self._most, self.rate, heavy)
        return lambda values, region: _encoded(values, extent(region), dtype, book)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.planes(planes, self.planes(dtype))
        check.out(out, shape, dtype)
        count = math.prod(shape)
        table = codebook.stored(planes[1], dtype)
        found = indices.decode(planes[0], count, table.size)
        columns = max(1, count)
        levels.gathered(
            lambda start, n: found[start : start + n], table.reshape(1, -1), columns, columns, shape, dtype, out
        )


def _encoded(values: Bytes, shape: Shape, dtype: DType, book: Codebook) -> tuple[Buffer, ...]:
    check.values(values, shape, dtype)
    return indices.encode(book.assign(np.ascontiguousarray(values)), book.levels), book.data
