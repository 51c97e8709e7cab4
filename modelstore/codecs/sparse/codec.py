"""`sparse`: pruned weights, as a bitmap of what is kept and its values, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.exact.kernels import WORDS
from modelstore.codecs.look import Look
from modelstore.codecs.numeric.levels import TILE
from modelstore.codecs.sparse.kernels import movers
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.codecs.weight import Encode, WeightCodec
from modelstore.errors import FormatError
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Shape, extent, full

_UINT8 = DTYPES["uint8"]
_CODED = {"bfloat16": 1.33, "float16": 1.75, "float32": 3.35, "float64": 7.0}  # bytes of a normal number without loss


@dataclass(frozen=True, slots=True)
class Sparse(WeightCodec):
    """The kept numbers are one of these, of equal magnitudes the earlier ones first, and never zeros or NaN:

    threshold         the numbers that exceed it in magnitude: all but zeros by default
    sparsity, scope   all but that share of the smallest, over the "tensor" or over each "row" of the matrix (an output
                      channel): rounded to whole weights, half up
    n, m              the n largest of every m columns of a row, such as 2 of 4

    Planes: `mask`, one bit an element in row-major order, the first in the lowest bit, as `lossless` encodes uint8, which
    leaves bits raw where they do not shrink; `values`, those kept, in order, as `lossless` encodes their dtype. They
    keep every bit, infinities too; all else decodes to +0.
    """

    threshold: float = 0.0
    sparsity: float = 0.0
    scope: str = "tensor"
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        assert self.pruning

    @property
    def name(self) -> str:
        return "sparse"

    @property
    def pruning(self) -> Pruning:
        """Which weights are kept."""
        return Pruning(self.threshold, self.sparsity, self.scope, self.n, self.m)

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        """A bitmap, and what it keeps."""
        return ("mask", "values")

    def group(self, shape: Shape) -> Shape:
        """Whole rows or patterns, where those are pruned."""
        return self.pruning.group(shape)

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate, for normal weights; a threshold is taken to prune nothing."""
        count = math.prod(shape)
        kept = self.pruning.kept
        return mask_size(count, self.pruning) + math.ceil(count * kept * _CODED.get(dtype.name, dtype.itemsize))

    def fit(self, look: Look) -> Encode:
        """Look for the magnitude at which a sparsity over the whole tensor is reached; else nothing is looked at.

        If statistics say which weights to keep, the codec stores those values.
        """
        dtype = look.dtype
        if look.statistics and look.statistics.kept:
            read = look.statistics.kept()
            return lambda _, region: Sparse().encode(read(region), extent(region), dtype)  # all that is no zero
        keep = self.pruning.fit(look)

        def encode(values: Bytes, region: tuple[tuple[int, int], ...]) -> tuple[Buffer, ...]:
            check.values(values, extent(region), dtype)
            mask = keep(values, region)
            return packed(mask), byteplanes.encode(compacted(values, mask, dtype), dtype)

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        return self.fit(within(values, shape, dtype))(values, full(shape))

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
        bits = unpacked(planes[0], math.prod(shape))
        kept = np.zeros(int(np.bitwise_count(bits).sum()) + 1, WORDS[dtype.itemsize])
        byteplanes.decode(planes[1], dtype, kept[:-1].view(np.uint8).reshape(1, -1))
        spread(bits, kept, out, dtype)


def within(values: Bytes, shape: Shape, dtype: DType) -> Look:
    """A tensor that is in memory."""
    return Look(partial(boxes.cut, np.ascontiguousarray(values), shape, dtype.itemsize), shape, dtype)


def mask_size(count: int, pruning: Pruning) -> int:
    """An estimate of the bytes of a mask."""
    kept = pruning.kept
    if pruning.m:
        bits = math.log2(math.comb(pruning.m, pruning.n)) / pruning.m
    else:
        bits = -sum(p * math.log2(p) for p in (kept, 1 - kept) if p)
    return 8 + math.ceil(min(1.0, bits) * count / 8)


def packed(mask: Bytes) -> Bytes:
    """A mask of one byte an element as the plane `mask`."""
    return byteplanes.encode(np.packbits(mask, bitorder="little"), _UINT8)


def unpacked(plane: Buffer, count: int) -> Bytes:
    """The bitmap of `count` elements that a plane holds, no bit being set after the last."""
    bits = np.zeros(-(-count // 8), np.uint8)
    byteplanes.decode(plane, _UINT8, bits.reshape(1, -1))
    if count % 8 and bits[-1] >> (count % 8):
        raise FormatError(f"the plane 'mask' keeps elements after the last of {count}")
    return bits


def compacted(values: Bytes, mask: Bytes, dtype: DType) -> Bytes:
    """The raw bytes of the elements whose mask is 1."""
    words = np.ascontiguousarray(values).view(WORDS[dtype.itemsize])
    out = np.empty(int(np.count_nonzero(mask)) + 1, words.dtype)
    movers(dtype.itemsize)[0](words, mask, out)
    return out[:-1].view(np.uint8)


def spread(bits: Bytes, kept: NDArray[np.unsignedinteger], out: Bytes, dtype: DType) -> None:
    """Write the words of `kept`, one more than there are bits, where bits are set, and 0 elsewhere, into `out`."""
    flat = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, np.uint8)
    words = flat.view(WORDS[dtype.itemsize])
    kernel = movers(dtype.itemsize)[1]
    used = 0
    for start in range(0, words.size, TILE):
        n = min(TILE, words.size - start)
        mask = np.unpackbits(bits[start // 8 : -(-(start + n) // 8)], count=n, bitorder="little")
        used += kernel(kept[used:], mask, words[start : start + n])
    if not out.flags.c_contiguous:
        out[:] = flat.reshape(out.shape)
