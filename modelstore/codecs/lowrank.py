"""`lowrank`: a matrix as the product of two thin ones, by truncated singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import byteplanes, check, levels
from modelstore.codecs.kernels.product import product
from modelstore.codecs.levels import TILE
from modelstore.codecs.numbers import Floats, from_float32
from modelstore.codecs.sparse import within
from modelstore.codecs.weight import Encode, ReadValues, WeightCodec, group_of, is_convolution, matrix
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Region, Shape, extent, full

Doubles: TypeAlias = NDArray[np.float64]

_BAND = 16 << 20  # bytes that are read at once
_RANK = 4  # bytes of the rank before the factors of `left`


@dataclass(frozen=True, slots=True)
class LowRank(WeightCodec):
    """left · right, of the least squared error at that rank (Eckart and Young 1936). Exactly one is given:

    rank      of each matrix
    energy    the smallest rank that keeps this share of the sum of squares
    ratio     the largest rank whose factors have at most this share of the matrix's numbers

    A convolution [out, in, *kernel] is the matrix [out, in * kernel]: `right` is then a convolution of the same kernel into
    `rank` channels, `left` a 1×1 one out of them (Denton et al. 2014; Jaderberg et al. 2014). In a stack of matrices each has
    factors of its own, of one rank: by energy the largest that any of them needs.

    Planes: `left`, the rank as uint32 and then, as `lossless` encodes them, the factors' rows that the region has; `right`,
    likewise encoded, rank × the region's columns, for each matrix of a stack. The factors' dtype is the tensor's; bfloat16
    for float8, float32 for float64. Both share the singular values evenly, by their square roots. Numbers are summed in
    float32 over the rank, in its order, and rounded once: to the same bits everywhere, however a tensor is cut.
    """

    rank: int = 0
    energy: float = 0.0
    ratio: float = 0.0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise ValueError(f"rank is {self.rank!r}: whole numbers from 1 on are possible")
        for what, value in (("energy", self.energy), ("ratio", self.ratio)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{what} is {value!r}: shares between 0 and 1 are possible")
        if (self.rank > 0) + (self.energy > 0) + (self.ratio > 0) != 1:
            raise ValueError(f"{self} gives not exactly one of rank, energy and ratio")

    @property
    def name(self) -> str:
        return "lowrank"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        """The two factors."""
        return ("left", "right")

    def group(self, shape: Shape) -> Shape:
        """A convolution keeps its columns, anything else may be cut anywhere."""
        return group_of(shape, 0) if is_convolution(shape) else (*(1,) * (len(shape) - 1), *_last(shape))

    def refuses(self, shape: Shape, dtype: DType) -> str | None:
        """Also what has no two dimensions, and what its factors would not be smaller than."""
        reason = WeightCodec.refuses(self, shape, dtype)
        if reason or len(shape) < 2:
            return reason or "is no matrix"
        _, rows, columns = _stack(shape)
        rank = self._rank(rows, columns) or 1
        if rank >= min(rows, columns):
            return f"is {rows} × {columns}, which leaves no rank below that of {rank}"
        stored = rank * (rows + columns) * factor_dtype(dtype).itemsize
        if stored >= rows * columns * dtype.itemsize:
            return f"is {rows} × {columns}, which factors of rank {rank} are not smaller than"
        return None

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate: by energy, of factors that have half the numbers."""
        count, rows, columns = _stack(shape)
        rank = self._rank(rows, columns) or LowRank(ratio=0.5)._rank(rows, columns)
        stored = factor_dtype(dtype)
        coded = {"bfloat16": 1.33, "float16": 1.75, "float32": 3.35}[stored.name]
        return _RANK + math.ceil(count * rank * (rows + columns) * coded)

    def _rank(self, rows: int, columns: int) -> int:
        """The rank where it is known without the values, else 0."""
        if self.ratio:
            return max(1, int(self.ratio * rows * columns / (rows + columns)))
        return self.rank

    def fit(self, read: ReadValues, shape: Shape, dtype: DType) -> Encode:
        """Decompose: through the smaller of the two Gram matrices, in float64, read in bands of the tensor.

        In memory are that Gram matrix and its eigenvectors (16 bytes × the square of the shorter side, some three times over) and
        the factors; of a tensor never more than a band.
        """
        count, rows, columns = _stack(shape)
        ranks = [self._rank(rows, columns)] * count
        if self.energy:
            ranks = [_enough(_squares(_gram(read, shape, dtype, i)), self.energy) for i in range(count)]
        rank = min(max(ranks), rows, columns)
        stored = factor_dtype(dtype)
        pairs = [_factors(read, shape, dtype, i, rank) for i in range(count)]
        left = [np.frombuffer(levels.narrowed(one, stored), np.uint8).reshape(rows, -1) for one, _ in pairs]
        right = [np.frombuffer(levels.narrowed(two, stored), np.uint8).reshape(rank, -1) for _, two in pairs]

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            check.values(values, extent(region), dtype)
            matrices, (a, b), (c, d) = _place(region, shape)
            c, d = c * stored.itemsize, d * stored.itemsize
            one = np.concatenate([left[i][a:b].reshape(-1) for i in matrices])
            two = np.concatenate([np.ascontiguousarray(right[i][:, c:d]).reshape(-1) for i in matrices])
            head = np.array([rank], "<u4").view(np.uint8)
            return np.concatenate([head, byteplanes.encode(one, stored)]), byteplanes.encode(two, stored)

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        return self.fit(within(values, shape, dtype), shape, dtype)(values, full(shape))

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        one, two = (
            levels.numbers(raw, factor_dtype(dtype)).reshape(cut)
            for raw, cut in zip(*_stored(planes, shape, dtype), strict=True)
        )
        flat = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, np.uint8)
        rows, columns = one.shape[1], two.shape[2]
        width = columns * dtype.itemsize
        step = max(4, TILE // max(1, columns) // 4 * 4)
        for i in range(len(one)):
            for r in range(0, rows, step):
                n = min(step, rows - r)
                tile = np.empty((n, columns), np.float32)
                product()(one[i, r : r + n], two[i], tile)
                limit = levels.limit(dtype)
                np.clip(tile, -limit, limit, out=tile)
                at = (i * rows + r) * width
                from_float32(tile, dtype, flat[at : at + n * width].reshape(1, -1))
        if not out.flags.c_contiguous:
            out[:] = flat.reshape(out.shape)


def factors(planes: Sequence[Buffer], shape: Shape, dtype: DType) -> tuple[Bytes, Bytes, int]:
    """For engines that multiply by the pair: raw bytes of left and of right, of `factor_dtype`, and the rank.

    left: ([matrices,] rows, rank), right: ([matrices,] rank, columns) of the region of that shape. `FormatError` as decode.
    """
    (left, right), ((_, _, rank), _) = _stored(planes, shape, dtype)
    return left, right, rank


def factor_dtype(dtype: DType) -> DType:
    """In which the factors of a tensor of that dtype are stored."""
    if dtype.itemsize == 1:
        return DTYPES["bfloat16"]
    return DTYPES["float32"] if dtype.name == "float64" else dtype


def _last(shape: Shape) -> Shape:
    """A stack's columns are kept whole where a part of them could be taken for a kernel."""
    return () if not shape else (1,) if len(shape) <= 2 else (max(1, shape[-1]),)


def _stack(shape: Shape) -> tuple[int, int, int]:
    """How many matrices there are, their rows and columns."""
    rows, columns = matrix(shape)
    count = math.prod(shape[:-2]) if len(shape) > 2 and not is_convolution(shape) else 1
    return count, rows // (count or 1), columns


def _place(region: Region, shape: Shape) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
    """A region as which matrices of a stack, which of their rows, which of their columns."""
    if is_convolution(shape):
        return [0], region[0], (0, matrix(shape)[1])
    lead = shape[:-2]
    boxes = np.arange(math.prod(lead)).reshape(lead)[tuple(slice(a, b) for a, b in region[:-2])]
    return boxes.reshape(-1).tolist(), region[-2], region[-1]


def _regions(shape: Shape, dtype: DType, index: int) -> list[tuple[int, int, Region]]:
    """One matrix of a tensor in bands of whole rows: first row, number of rows, region."""
    _, rows, columns = _stack(shape)
    step = max(1, _BAND // max(1, columns * dtype.itemsize))
    lead: Region = ()
    rest: Region = full(shape)[1:]
    if not is_convolution(shape):
        at = np.unravel_index(index, shape[:-2]) if len(shape) > 2 else ()
        lead, rest = tuple((int(i), int(i) + 1) for i in at), full(shape)[-1:]
    return [(a, min(step, rows - a), (*lead, (a, min(rows, a + step)), *rest)) for a in range(0, rows, step)]


def _band(read: ReadValues, region: Region, columns: int, dtype: DType) -> Doubles:
    return levels.numbers(read(region), dtype).reshape(-1, columns).astype(np.float64)


def _gram(read: ReadValues, shape: Shape, dtype: DType, index: int) -> Doubles:
    """A · Aᵀ or Aᵀ · A, whichever is smaller."""
    _, rows, columns = _stack(shape)
    bands = _regions(shape, dtype, index)
    if columns <= rows:
        gram: Doubles = np.zeros((columns, columns))
        for _, _, region in bands:
            band = _band(read, region, columns, dtype)
            gram += band.T @ band
        return gram
    gram = np.empty((rows, rows))
    for i, (a, n, one) in enumerate(bands):
        upper = _band(read, one, columns, dtype)
        for b, m, two in bands[i:]:
            lower = upper if a == b else _band(read, two, columns, dtype)
            gram[a : a + n, b : b + m] = upper @ lower.T
            gram[b : b + m, a : a + n] = gram[a : a + n, b : b + m].T
    return gram


def _squares(gram: Doubles) -> Doubles:
    """Squared singular values, ascending."""
    return np.linalg.eigvalsh(gram).astype(np.float64, copy=False)


def _enough(squares: Doubles, energy: float) -> int:
    """The smallest rank that keeps that share, of ascending squared singular values."""
    found = np.cumsum(np.maximum(squares[::-1], 0))
    return int(np.searchsorted(found, energy * found[-1])) + 1 if found[-1] > 0 else 1


def _factors(read: ReadValues, shape: Shape, dtype: DType, index: int, rank: int) -> tuple[Floats, Floats]:
    """(left, right) of one matrix, float32, each with the square roots of the singular values."""
    _, rows, columns = _stack(shape)
    squares, vectors = np.linalg.eigh(_gram(read, shape, dtype, index))
    vectors = np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[largest, np.arange(rank)] < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    roots = np.maximum(squares[::-1][:rank], 0) ** 0.25
    inverse = np.divide(1.0, roots, out=np.zeros(rank), where=roots > roots[:1] * 1e-5)
    other = np.zeros((rows, rank)) if columns <= rows else np.zeros((rank, columns))
    for a, n, region in _regions(shape, dtype, index):
        band = _band(read, region, columns, dtype)
        if columns <= rows:
            other[a : a + n] = band @ vectors
        else:
            other += vectors[a : a + n].T @ band
    most = float(levels.limit(factor_dtype(dtype)))
    scaled, solved = vectors * roots, other * (inverse if columns <= rows else inverse[:, None])
    pair = (solved, scaled.T) if columns <= rows else (scaled, solved)
    one, two = (np.ascontiguousarray(np.clip(part, -most, most), np.float32) for part in pair)
    return one, two


def _stored(planes: Sequence[Buffer], shape: Shape, dtype: DType) -> tuple[tuple[Bytes, Bytes], Any]:
    """The raw factors of a region, and their shapes; `FormatError` unless the rank is one that the region can have."""
    levels.named(planes, ("left", "right"))
    count, rows, columns = _stack(shape)
    head, stored = as_bytes(planes[0]), factor_dtype(dtype)
    rank = int.from_bytes(head[:_RANK].tobytes(), "little")
    left, right = count * rows * rank * stored.itemsize, count * rank * columns * stored.itemsize
    # A frame of zstd shrinks its bytes by no more than about 2^14: factors beyond that are none that are there.
    if head.size < _RANK or not rank or left > head.size << 15 or right > as_bytes(planes[1]).size << 15:
        raise FormatError(f"the plane 'left' of {head.size} bytes says the rank {rank}, which its factors do not have")
    one, two = np.empty((1, left), np.uint8), np.empty((1, right), np.uint8)
    byteplanes.decode(head[_RANK:], stored, one)
    byteplanes.decode(planes[1], stored, two)
    return (one.reshape(-1), two.reshape(-1)), ((count, rows, rank), (count, rank, columns))
