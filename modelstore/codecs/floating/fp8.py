"""`fp8`: floating-point numbers of 8 bits with a scale for each tensor, channel or block (Micikevicius et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.floating import view as floatviews
from modelstore.codecs.look import Look
from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.numbers import Floats
from modelstore.codecs.numeric.scaled import E4M3, E5M2, Format8, Grid
from modelstore.codecs.weight import Encode, EngineView, WeightCodec, group_of, is_convolution, matrix
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.grid import bands
from modelstore.format.region import Region, Shape, extent, full, slices

_FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
_GRANULARITIES = ("tensor", "channel", "block")
_COLUMNS = 128  # regions are cut at multiples of so many columns, though no group asks for it: matrices stay such


@dataclass(frozen=True, slots=True)
class Fp8(WeightCodec):
    """Planes `codes` (a byte a number, row-major) and `scale` (row-major), in which a number is code * scale.

    format          "e4m3" (largest 448; no infinities) or "e5m2" (largest 57344)
    granularity     numbers that share a scale: "tensor", "channel" (a row of the matrix) or "block"
    group_size      rows and columns of a block; those at the end are smaller, and no block spans two matrices of a stack

    A scale is the largest finite magnitude divided by the format's largest number, in the tensor's dtype for float16 and
    bfloat16 (as compressed-tensors keeps it), else in float32. Numbers are rounded half to even and saturate.
    """

    format: str = "e4m3"
    granularity: str = "channel"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ValueError(f"format {self.format!r} is not known; known are {', '.join(_FORMATS)}")
        if self.granularity not in _GRANULARITIES:
            raise ValueError(f"granularity {self.granularity!r} is not known; known are {', '.join(_GRANULARITIES)}")
        if type(self.group_size) is not int or not 16 <= self.group_size <= 4096 or self.group_size % 16:
            raise ValueError(f"group_size {self.group_size!r} is not a multiple of 16 from 16 to 4096")

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def _how(self) -> Format8:
        return _FORMATS[self.format]

    @property
    def view(self) -> EngineView | None:
        return floatviews.Fp8View(self.granularity, self.group_size) if self.format == "e4m3" else None

    @property
    def looks_ahead(self) -> bool:
        return self.granularity != "block"

    @property
    def by_rows(self) -> bool:
        return self.granularity == "channel"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("codes", "scale")

    def group(self, shape: Shape) -> Shape:
        if self.granularity == "block":
            return group_of(shape, self.group_size, self.group_size)
        return group_of(shape, _COLUMNS)

    def size(self, shape: Shape, dtype: DType) -> int:
        return (
            math.prod(shape)
            + math.prod(self._scales(shape)) * scaled.numpy_dtype_of(scaled.scale_dtype(dtype)).itemsize
        )

    def fit(self, look: Look) -> Encode:
        """Tensors and channels are looked at whole for their largest magnitude, in bands of 4 MiB; blocks are not."""
        shape, dtype = look.shape, look.dtype
        if self.granularity == "block":
            return lambda values, region: self.encode(values, extent(region), dtype)
        channels = _channels(shape, full(shape))
        largest = np.zeros(channels or (1,), np.float32)
        for region in bands(full(shape), dtype.itemsize, look.band):
            rows = math.prod(_channels(shape, region))
            grid = Grid(rows, math.prod(extent(region)) // rows, 1 << 40)
            there = largest[slices(region[: len(channels)])] if channels else largest
            np.maximum(there, scaled.absmax(look.read(region), dtype, grid).reshape(there.shape), out=there)
        if self.granularity == "tensor":
            one = self._choose(largest.max(keepdims=True).reshape(1, 1), dtype)
            return lambda values, region: self._encode(values, extent(region), dtype, one)
        scales = self._choose(largest, dtype)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            mine = scales[slices(region[: len(channels)])] if channels else scales
            return self._encode(values, extent(region), dtype, mine.reshape(-1, 1))

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        largest = scaled.absmax(values, dtype, self._grid(shape))
        if self.granularity == "tensor":
            largest = largest.max(keepdims=True)
        elif self.granularity == "block":
            rows, height = len(largest), _height(shape)
            tops = [top for start in range(0, rows, height) for top in range(start, start + height, self.group_size)]
            largest = np.maximum.reduceat(largest, tops, axis=0)
        return self._encode(values, shape, dtype, self._choose(largest, dtype))

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        codes, scale = check.planes(planes, self.planes(dtype))
        scales = scaled.unplane(scale, self._scales(shape), scaled.scale_dtype(dtype), "scale")
        scaled.decode8(codes, self._grid(shape), self._spread(scales, shape), self._how, dtype, out)

    def _encode(self, values: Bytes, shape: Shape, dtype: DType, scales: Floats) -> tuple[Buffer, ...]:
        codes = scaled.encode8(values, dtype, self._grid(shape), self._spread(scales, shape), self._how)
        return codes, scaled.plane(scales, scaled.scale_dtype(dtype))

    def _choose(self, largest: Floats, dtype: DType) -> Floats:
        return scaled.choose(largest, self._how.most, dtype, scaled.scale_dtype(dtype))

    def _grid(self, shape: Shape) -> Grid:
        rows, columns = matrix(shape)
        return Grid(rows, columns, self.group_size if self.granularity == "block" else max(1, columns))

    def _scales(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of the scales of a region."""
        rows, columns = matrix(shape)
        if self.granularity != "block":
            return (1 if self.granularity == "tensor" else rows), 1
        height = _height(shape)
        return rows // height * -(-height // self.group_size), -(-columns // self.group_size)

    def _spread(self, scales: Floats, shape: Shape) -> Floats:
        """The scales with a row for each row of the region, where they are not one, or so, already."""
        if self.granularity != "block":
            return scales
        rows, height = matrix(shape)[0], _height(shape)
        row = np.arange(rows)
        spread: Floats = scales[row // height * -(-height // self.group_size) + row % height // self.group_size]
        return spread


def _channels(shape: Shape, region: Region) -> tuple[int, ...]:
    """How many rows of the matrix a region of the tensor has parts of, along each dimension that rows are counted in."""
    lead = 1 if is_convolution(shape) else max(0, len(shape) - 1)
    return extent(region[:lead])


def _height(shape: Shape) -> int:
    """Rows of one matrix of a stack, or of the matrix that a shape is."""
    return shape[-2] if len(shape) > 2 and not is_convolution(shape) else max(1, matrix(shape)[0])
