"""`binary` and `ternary`: weights as their signs, with one scale for each row of the matrix or each group of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.kernels import codes as packings
from modelstore.codecs.numeric import levels
from modelstore.codecs.numeric.levels import TILE, Words
from modelstore.codecs.numeric.numbers import Floats, without_nan
from modelstore.codecs.signs import kernels as signs
from modelstore.codecs.weight import WeightCodec, group_of, matrix
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

LEAST = 16  # columns of a group: below, scales weigh more than signs, and a stack of matrices looks like convolutions
THRESHOLD = 0.7  # of the mean magnitude: Li's optimum for uniform and, nearly, for normal weights


class _Signs(WeightCodec):
    """The shared parts of both. Scales have the tensor's own dtype: values are ± a scale, so nothing is lost by that.

    Infinities have codes, but no part in a scale: they decode to it. Without anything finite in a group it is 0.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        columns = self._columns
        if isinstance(columns, bool) or not isinstance(columns, int) or (columns != 0 and columns < LEAST):
            raise ValueError(f"group_size is {columns!r}: 0 (one scale a row), or at least {LEAST} columns a group")

    @property
    def _columns(self) -> int:
        raise NotImplementedError

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        """Packed codes, and the scales."""
        return ("codes", "scales")

    def group(self, shape: Shape) -> Shape:
        """Whole groups: without `group_size`, whole rows."""
        return group_of(shape, self._columns)

    def _cut(self, shape: Shape) -> tuple[int, int, int, int]:
        """The sizes of a region: rows, columns, columns of a group, groups of a row."""
        rows, columns = matrix(shape)
        group = min(self._columns or columns, columns) or 1
        return rows, columns, group, -(-columns // group)

    def _codes(self, values: Bytes, shape: Shape, dtype: DType) -> tuple[Bytes, Bytes]:
        """One code an element, and the scales in the tensor's dtype."""
        check.values(values, shape, dtype)
        rows, columns, group, groups = self._cut(shape)
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((rows, groups), np.float32)
        step = max(1, TILE // max(1, columns))
        width = columns * dtype.itemsize
        for r in range(0, rows, step):  # rows whose float32 numbers stay in the cache
            n = min(step, rows - r)
            tile = without_nan(values[r * width : (r + n) * width], dtype, infinite=True).reshape(n, columns)
            self._kernel(tile, group, codes[r : r + n], scales[r : r + n])
        return codes.reshape(-1), levels.narrowed(scales, dtype)

    def _kernel(self, tile: Floats, group: int, codes: Bytes, scales: Floats) -> None:
        raise NotImplementedError

    def _scales(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> Words:
        rows, _, _, groups = self._cut(shape)
        return levels.words(planes[1], rows * groups, dtype, "scales")


@dataclass(frozen=True, slots=True)
class Binary(_Signs):
    """sign(w) times the mean of abs(w) over the row, or over each `group_size` columns of it where they are given.

    Rastegari et al., "XNOR-Net" (2016): for a row this is the scale of least squared error. Zeros count as positive.

    Planes: `codes`, one bit an element in row-major order, the first in the lowest bit, 1 where negative; `scales`, one
    number of the tensor's dtype for each row and group of it. A group of zeros has the scale 0.
    """

    group_size: int = 0

    @property
    def name(self) -> str:
        return "binary"

    @property
    def _columns(self) -> int:
        return self.group_size

    def size(self, shape: Shape, dtype: DType) -> int:
        """Exact."""
        rows, columns, _, groups = self._cut(shape)
        return -(-rows * columns // 8) + rows * groups * dtype.itemsize

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        codes, scales = self._codes(values, shape, dtype)
        return np.packbits(codes, bitorder="little"), scales

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.planes(planes, self.planes(dtype))
        rows, columns, group, _ = self._cut(shape)
        bits = check.plane(planes[0], -(-rows * columns // 8), "codes")
        scales = self._scales(planes, shape, dtype)

        def unpack(start: int, n: int) -> Bytes:
            return np.unpackbits(bits[start // 8 : -(-(start + n) // 8)], count=n, bitorder="little")

        tables = np.stack([scales, levels.negative(scales)], axis=1)
        levels.gathered(unpack, tables, columns, group, shape, dtype, out)

    def _kernel(self, tile: Floats, group: int, codes: Bytes, scales: Floats) -> None:
        signs.kernels()[0](tile, group, codes, scales)


@dataclass(frozen=True, slots=True)
class Ternary(_Signs):
    """-s, 0 or s: 0 if abs(w) is at most 0.7 of its mean over the row or group, s the mean of abs(w) over the others.

    Li, Zhang, Liu, "Ternary Weight Networks" (2016).

    Planes: `codes`, 0, 1, 2 for -, 0, +, five a byte as digits to base 3, the first the lowest: 1.6 bits a weight, where
    normal weights have an entropy of 1.56 and two bits each would take a quarter more; `scales`, as those of `binary`.
    """

    group_size: int = 0

    @property
    def name(self) -> str:
        return "ternary"

    @property
    def _columns(self) -> int:
        return self.group_size

    def size(self, shape: Shape, dtype: DType) -> int:
        """Exact."""
        rows, columns, _, groups = self._cut(shape)
        return -(-rows * columns // 5) + rows * groups * dtype.itemsize

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        codes, scales = self._codes(values, shape, dtype)
        packed = np.empty(-(-codes.size // 5), np.uint8)
        packings.packing().pack_trits(codes, packed)
        return packed, scales

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.planes(planes, self.planes(dtype))
        rows, columns, group, _ = self._cut(shape)
        packed = check.plane(planes[0], -(-rows * columns // 5), "codes")
        if packed.max(initial=0) >= 3**5:
            raise FormatError(f"the plane 'codes' has the byte {packed.max()}: five digits to base 3 are below {3**5}")
        scales = self._scales(planes, shape, dtype)
        kernel = packings.packing().unpack_trits
        space = np.empty(min(TILE, rows * columns), np.uint8)

        def unpack(start: int, n: int) -> Bytes:
            kernel(packed[start // 5 : -(-(start + n) // 5)], space[:n])
            return space[:n]

        tables = np.stack([levels.negative(scales), np.zeros_like(scales), scales], axis=1)
        levels.gathered(unpack, tables, columns, group, shape, dtype, out)

    def _kernel(self, tile: Floats, group: int, codes: Bytes, scales: Floats) -> None:
        signs.kernels()[1](tile, group, THRESHOLD, codes, scales)
