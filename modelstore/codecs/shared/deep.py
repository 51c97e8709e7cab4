"""`deep`: the whole of Deep Compression. Weights are pruned, those left share values, and everything is entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.kernels.codes import gather
from modelstore.codecs.look import Look
from modelstore.codecs.numeric import histogram
from modelstore.codecs.shared import codebook, indices
from modelstore.codecs.sparse import codec as sparse
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.codecs.weight import Encode, WeightCodec, matrix
from modelstore.format import grid
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent, full


@dataclass(frozen=True, slots=True)
class Deep(WeightCodec):
    """Han, Mao, Dally, "Deep Compression" (2016), without its retraining. Pruning as in `sparse`, shared values as in `kmeans`.

    threshold, sparsity, scope    the share to prune: half of each tensor by default
    bits, levels, rate            the codebook of the kept weights; rate in bits of a kept weight

    Planes: `mask`, as that of `sparse`; `indices` and `codebook`, as those of `kmeans`, of the weights kept. The mask takes
    the place of the paper's gaps: coded in bytes it comes within a few percent of its entropy, as gaps do.
    """

    sparsity: float = 0.5
    scope: str = "tensor"
    threshold: float = 0.0
    bits: int = 4
    levels: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        assert self._pruning
        codebook.check_levels(self.bits, self.levels, self.rate)

    @property
    def name(self) -> str:
        return "deep"

    @property
    def _pruning(self) -> Pruning:
        return Pruning(self.threshold, self.sparsity, self.scope)

    @property
    def _most(self) -> int:
        return self.levels or 1 << self.bits

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        """A bitmap, and entropy-coded indices of what it keeps."""
        return ("mask", "indices", "codebook")

    def group(self, shape: Shape) -> Shape:
        """Whole rows, where those are pruned."""
        return self._pruning.group(shape)

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate, for normal weights."""
        count = math.prod(shape)
        each = self.rate or math.log2(self._most)
        book = self._most * dtype.itemsize
        return sparse.mask_size(count, self._pruning) + math.ceil(count * self._pruning.kept * each / 8) + book

    def fit(self, look: Look) -> Encode:
        """Look for what is pruned, then count what is left: the tensor is read once more than `sparse` does."""
        shape, dtype = look.shape, look.dtype
        keep = self._pruning.fit(look)
        counts = histogram.empty(dtype)
        row = matrix(shape)[1] * dtype.itemsize  # bands have whole rows
        for band in grid.bands(full(shape), dtype.itemsize, max(look.band, row)):
            values = look.read(band)
            histogram.count(sparse.compacted(values, keep(values, band), dtype), dtype, counts)
        book = codebook.fitted(counts, dtype, self._most, self.rate)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            check.values(values, extent(region), dtype)
            mask = keep(values, region)
            found = book.assign(sparse.compacted(values, mask, dtype))
            return sparse.packed(mask), indices.encode(found, book.levels), book.data

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        return self.fit(sparse.within(values, shape, dtype))(values, full(shape))

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
        bits = sparse.unpacked(planes[0], math.prod(shape))
        table = codebook.stored(planes[2], dtype)
        count = int(np.bitwise_count(bits).sum())
        found = indices.decode(planes[1], count, table.size)
        kept = np.zeros(count + 1, table.dtype)
        gather(dtype.itemsize)(found, table.reshape(1, -1), count + 1, count + 1, 0, kept[:-1])
        sparse.spread(bits, kept, out, dtype)
