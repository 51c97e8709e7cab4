"""The planes of `int`: the places of codes, scales and zero points, and the checks of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.numbers import Floats
from modelstore.codecs.weight import is_convolution, matrix
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


@dataclass(frozen=True, slots=True)
class IntLayout:
    """As `codec.Int` says. Cells are what shares a scale: rows × columns of the matrix that a tensor or region is."""

    bits: int
    symmetric: bool
    granularity: str
    group_size: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the planes."""
        return ("codes", "scale") if self.symmetric else ("codes", "scale", "zero")

    def line(self, columns: int) -> int:
        """Bytes of a row of codes."""
        return -(-columns * self.bits // 8)

    def each(self, shape: Shape) -> int:
        """The number of rows that cells are within: for blocks those of one matrix of a stack, else all."""
        stack = self.granularity == "block" and len(shape) > 2 and not is_convolution(shape)
        return shape[-2] if stack else matrix(shape)[0]

    def cell(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a cell."""
        rows, columns = matrix(shape)
        if self.granularity in ("tensor", "channel"):
            return (rows if self.granularity == "tensor" else 1), columns
        height = min(self.group_size, self.each(shape)) if self.granularity == "block" else 1
        return height, min(self.group_size, columns)

    def grid(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of the scales."""
        rows, columns = matrix(shape)
        height, width = self.cell(shape)
        each = self.each(shape)
        return rows // each * -(-each // height), -(-columns // width)

    def sizes(self, shape: Shape, dtype: DType) -> tuple[int, ...]:
        """Bytes of each plane."""
        rows, columns = matrix(shape)
        high, wide = self.grid(shape)
        scales = high * wide * scaled.numpy_dtype_of(scaled.scale_dtype(dtype)).itemsize
        return (rows * self.line(columns), scales, high * wide)[: len(self.names)]

    def plane(self, packed: Bytes, scales: Floats, zeros: Floats, dtype: DType) -> tuple[Buffer, ...]:
        """Packed codes, scales, and zero points as float32 of (code - 2^(bits - 1)), as planes."""
        codes, scale = packed.reshape(-1), scaled.plane(scales, scaled.scale_dtype(dtype))
        if self.symmetric:
            return codes, scale
        return codes, scale, (zeros.reshape(-1) + (1 << (self.bits - 1))).astype(np.uint8)

    def unplane(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> tuple[NDArray[np.uint8], Floats, Floats]:
        """The reverse. `FormatError` if the planes are not a region's of that shape and dtype."""
        named = check.planes(planes, self.names)
        rows, columns = matrix(shape)
        grid = self.grid(shape)
        codes = check.plane(named[0], rows * self.line(columns), "codes")
        scales = scaled.unplane(named[1], grid, scaled.scale_dtype(dtype), "scale")
        zeros = np.zeros(grid, np.float32)
        if not self.symmetric:
            stored = check.plane(named[2], grid[0] * grid[1], "zero")
            if int(stored.max(initial=0)) >> self.bits:
                raise FormatError(f"plane 'zero' holds {int(stored.max())}, which is not a code of {self.bits} bits")
            zeros = stored.reshape(grid).astype(np.float32) - np.float32(1 << (self.bits - 1))
        return codes.reshape(rows, -1), scales, zeros
