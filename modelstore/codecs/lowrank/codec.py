"""`lowrank`: a matrix as the product of two thin ones, by truncated singular value decomposition."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.look import Look
from modelstore.codecs.lowrank import decompose
from modelstore.codecs.lowrank.kernels import product
from modelstore.codecs.numeric import levels
from modelstore.codecs.numeric.levels import TILE
from modelstore.codecs.numeric.numbers import Floats, from_float32, limit, without_nan
from modelstore.codecs.sparse.codec import within
from modelstore.codecs.weight import Encode, WeightCodec, group_of, is_convolution, matrix
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Region, Shape, extent, full

_HELD = 8 << 20  # bytes of factors that are kept for regions to come
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
        """Also tensors with fewer than two dimensions, and those whose factors would not be smaller."""
        reason = WeightCodec.refuses(self, shape, dtype)
        if reason or len(shape) < 2:
            return reason or "is not a matrix"
        _, rows, columns = _stack(shape)
        rank = self.rank_of(rows, columns) or 1
        if rank >= min(rows, columns):
            return f"is {rows} × {columns}, which leaves no rank below that of {rank}"
        stored = rank * (rows + columns) * factor_dtype(dtype).itemsize
        if stored >= rows * columns * dtype.itemsize:
            return f"is {rows} × {columns}, which factors of rank {rank} are not smaller than"
        return None

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate: by energy, of factors that have half the numbers."""
        count, rows, columns = _stack(shape)
        rank = self.rank_of(rows, columns) or LowRank(ratio=0.5).rank_of(rows, columns)
        stored = factor_dtype(dtype)
        coded = {"bfloat16": 1.33, "float16": 1.75, "float32": 3.35}[stored.name]
        return _RANK + math.ceil(count * rank * (rows + columns) * coded)

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank where it is known without the values, else 0."""
        if self.ratio:
            return max(1, int(self.ratio * rows * columns / (rows + columns)))
        return self.rank

    def memory(self, shape: Shape, dtype: DType) -> int:
        """Bytes that are held while a matrix is decomposed, and factors of matrices of the tensor after that."""
        count, rows, columns = _stack(shape)
        rank = self.rank_of(rows, columns)
        numbers = (rank or min(rows, columns)) * (rows + columns)
        factors = numbers * factor_dtype(dtype).itemsize
        # For a band there are its bytes, its numbers, and a chunk of which they are read; for regions, the factors as numbers.
        fitting = decompose.memory(rows, columns, rank) + 4 * decompose.BAND
        return max(fitting, 2 * factors + 4 * numbers) + factors * (min(2, count) - 1)

    def fit(self, look: Look) -> Encode:
        """Decompose each matrix when its first region is encoded (`decompose`), by energy all of them before that.

        In memory are what `memory` says: of a stack the factors of a few matrices, as many as the look's memory has room for,
        of a tensor never more than a band. If statistics have better factors of a matrix, it stores those.
        """
        shape, dtype = look.shape, look.dtype
        if look.statistics and look.statistics.factors and len(shape) == 2:
            return _given(*look.statistics.factors(self.rank_of(*shape), self.energy), factor_dtype(dtype))
        count, rows, columns = _stack(shape)
        bands = [_bands(look, index) for index in range(count)]
        needed = [decompose.enough(one, self.energy) if self.energy else self.rank_of(rows, columns) for one in bands]
        rank = min(max(needed), rows, columns)
        stored = factor_dtype(dtype)
        most = float(limit(stored))

        def narrowed(numbers: decompose.Reals) -> Bytes:
            raw = levels.narrowed(np.clip(numbers, -most, most).astype(np.float32), stored)
            return np.frombuffer(raw, np.uint8).reshape(len(numbers), -1)

        held = _HELD if look.memory is None else min(_HELD, max(0, look.memory - self.memory(shape, dtype)))
        pairs = _Recent(lambda index: decompose.factors(bands[index], rank, narrowed), held)
        rights = _Last()

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            check.values(values, extent(region), dtype)
            matrices, (a, b), (c, d) = _place(region, shape)
            c, d = c * stored.itemsize, d * stored.itemsize
            ones, twos = [], []
            known = rights.get((*matrices, c, d))
            for index in matrices:
                left, right = pairs.get(index)
                ones.append(left[a:b].reshape(-1))
                if known is None:
                    twos.append(np.ascontiguousarray(right[:, c:d]).reshape(-1))
            if known is None:
                known = rights.put((*matrices, c, d), byteplanes.encode(np.concatenate(twos), stored))
            return packed_left(np.concatenate(ones), rank, stored), known

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
        check.out(out, shape, dtype)
        one, two = (
            without_nan(raw, factor_dtype(dtype)).reshape(cut)
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
                most = limit(dtype)
                np.clip(tile, -most, most, out=tile)
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


def packed(left: Bytes, right: Bytes, rank: int, stored: DType) -> tuple[Buffer, ...]:
    """The planes of a region's factors, raw bytes of `factor_dtype`: its rows of left, its columns of right."""
    return packed_left(left, rank, stored), byteplanes.encode(right, stored)


def packed_left(left: Bytes, rank: int, stored: DType) -> Bytes:
    """The plane of a region's rows of left."""
    head = np.array([rank], "<u4").view(np.uint8)
    return np.concatenate([head, byteplanes.encode(left, stored)])


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


def _given(left: Floats, right: Floats, stored: DType) -> Encode:
    """Regions of a matrix whose factors are known, float32 that the stored dtype holds."""

    def encode(_: Bytes, region: Region) -> tuple[Buffer, ...]:
        (a, b), (c, d) = region
        rows, columns = (np.ascontiguousarray(part) for part in (left[a:b], right[:, c:d]))
        return packed(levels.narrowed(rows, stored), levels.narrowed(columns, stored), len(right), stored)

    return encode


def _bands(look: Look, index: int) -> decompose.Bands:
    """One matrix of a tensor, which is read in bands of whole rows."""
    read, shape, dtype = look.read, look.shape, look.dtype
    _, rows, columns = _stack(shape)
    lead: Region = ()
    rest: Region = full(shape)[1:]
    if not is_convolution(shape):
        at = np.unravel_index(index, shape[:-2]) if len(shape) > 2 else ()
        lead, rest = tuple((int(i), int(i) + 1) for i in at), full(shape)[-1:]

    def band(a: int, b: int) -> Floats:
        return without_nan(read((*lead, (a, b), *rest)), dtype).reshape(b - a, columns)

    return decompose.Bands(rows, columns, max(1, decompose.BAND // max(1, columns * dtype.itemsize)), band)


class _Recent:
    """The factors of the matrices that were asked for last: a region is of one, or of some that are next to each other."""

    def __init__(self, make: Callable[[int], tuple[Bytes, Bytes]], memory: int) -> None:
        self._make, self._memory = make, memory
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Bytes, Bytes]] = {}

    def get(self, index: int) -> tuple[Bytes, Bytes]:
        """(left, right) of a matrix; those of others are let go beyond two, or some megabytes."""
        with self._lock:
            pair = self._held.pop(index, None) or self._make(index)
            self._held[index] = pair
            most = max(2, self._memory // max(1, pair[0].nbytes + pair[1].nbytes))
            while len(self._held) > most:
                del self._held[next(iter(self._held))]
            return pair


class _Last:
    """The plane of right that was encoded last: all regions of the same columns share it, and its memory."""

    def __init__(self) -> None:
        self._held: tuple[tuple[int, ...], Buffer] | None = None

    def get(self, key: tuple[int, ...]) -> Buffer | None:
        """The plane of these matrices and columns, if it was the last."""
        held = self._held
        return held[1] if held is not None and held[0] == key else None

    def put(self, key: tuple[int, ...], plane: Buffer) -> Buffer:
        """Keep it in place of the one before."""
        self._held = (key, plane)
        return plane


def _stored(planes: Sequence[Buffer], shape: Shape, dtype: DType) -> tuple[tuple[Bytes, Bytes], Any]:
    """The raw factors of a region, and their shapes; `FormatError` unless the rank is one that the region can have."""
    check.planes(planes, ("left", "right"))
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
