"""Matrices of numbers whose groups share a scale: the work of `floating.kernels` on whole regions, tile by tile.

A region is looked at as rows × columns (see `weight.matrix`); the scales are float32, (rows, groups of `width` columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.floating import kernels as floats
from modelstore.codecs.numeric.numbers import Floats, from_float32, limit, numpy_dtype, with_nan
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Region, Shape

TILE = 16 << 10  # numbers whose float32 stay in the second-level cache


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of a region's numbers: rows × columns, `width` columns sharing a scale."""

    rows: int
    columns: int
    width: int

    @property
    def groups(self) -> int:
        """Groups of a row, the last of which may be shorter."""
        return -(-self.columns // self.width)

    @property
    def line(self) -> int:
        """Bytes of a row of 4-bit codes."""
        return (self.columns + 1) // 2


@dataclass(frozen=True, slots=True)
class Format8:
    """A floating-point format of 8 bits: mantissa bits, bias, largest number, and the first magnitude that is none."""

    dtype: str
    mantissa: int
    bias: int
    most: float
    limit: int


E4M3 = Format8("float8_e4m3fn", 3, 7, 448.0, 0x7F)
E5M2 = Format8("float8_e5m2", 2, 15, 57344.0, 0x7C)


@dataclass(frozen=True, slots=True)
class Format4:
    """16 levels, by code; the borders between them, ascending; with `signed`, those of the magnitudes, bit 3 being the sign."""

    levels: tuple[float, ...]
    borders: tuple[float, ...]
    signed: bool

    @property
    def most(self) -> float:
        """The largest magnitude."""
        return max(map(abs, self.levels))


def absmax(values: Bytes, dtype: DType, grid: Grid) -> Floats:
    """For each group, the largest magnitude among finite numbers: float32 (rows, groups). float64 counts as float32."""
    out = np.zeros((grid.rows, grid.groups), np.float32)
    kernel = floats.kernels()["absmax"]
    for tile in _tiles(grid):
        part = np.empty((tile.rows, tile.grid.groups), np.uint32)
        kernel(_numbers(values, dtype, tile).view(np.uint32), tile.columns, grid.width, part)
        np.maximum(tile.of(out), part.view(np.float32), out=tile.of(out))  # a long group has several tiles
    return out


def encode8(values: Bytes, dtype: DType, grid: Grid, scales: Floats, how: Format8) -> Bytes:
    """One code a byte, row-major. scales: (rows, groups), or anything that broadcasts to it."""
    out = np.empty(grid.rows * grid.columns, np.uint8)
    kernel, scales = floats.kernels()["encode8"], np.broadcast_to(scales, (grid.rows, grid.groups))
    for tile in _tiles(grid):
        part, scale = out[tile.start : tile.stop], np.ascontiguousarray(tile.of(scales))
        kernel(_numbers(values, dtype, tile), tile.columns, grid.width, scale, how.mantissa, how.bias, how.most, part)
    return out


def decode8(codes: Buffer, grid: Grid, scales: Floats, how: Format8, dtype: DType, out: Bytes) -> None:
    """Such codes' numbers times their scales, into `out` as `Codec.decode` says. `FormatError` for infinities and NaN."""
    data = check.plane(codes, grid.rows * grid.columns, "codes")
    kernel, scales = floats.kernels()["decode8"], np.broadcast_to(scales, (grid.rows, grid.groups))
    room = np.empty(min(TILE, data.size), np.float32)

    def fill(tile: _Tile) -> Floats:
        part, scale = room[: tile.stop - tile.start], np.ascontiguousarray(tile.of(scales))
        args = (data[tile.start : tile.stop], tile.columns, grid.width, scale)
        if kernel(*args, how.mantissa, how.bias, how.limit, part):
            raise FormatError(f"plane 'codes' holds {how.dtype} codes of NaN or infinity")
        return part

    _write(fill, grid, dtype, out)


def encode4(values: Bytes, dtype: DType, grid: Grid, scales: Floats, how: Format4) -> Bytes:
    """Two codes a byte, the first in the low bits; each row starts a byte."""
    out = np.empty(grid.rows * grid.line, np.uint8)
    kernel, borders = floats.kernels()["encode4"], np.array(how.borders, np.float32)
    for tile in _tiles(grid):
        scale = np.ascontiguousarray(tile.of(scales))
        args = (_numbers(values, dtype, tile), tile.columns, grid.width, scale)
        kernel(*args, borders, how.signed, out[tile.nibbles])
    return out


def decode4(codes: Buffer, grid: Grid, scales: Floats, how: Format4, dtype: DType, out: Bytes) -> None:
    """Such codes' levels times their scales, into `out` as `Codec.decode` says."""
    data = check.plane(codes, grid.rows * grid.line, "codes")
    kernel, pairs = floats.kernels()["decode4"], _pairs(how.levels)
    room = np.empty(min(TILE, grid.rows * grid.columns), np.float32)

    def fill(tile: _Tile) -> Floats:
        part, scale = room[: tile.stop - tile.start], np.ascontiguousarray(tile.of(scales))
        kernel(data[tile.nibbles], tile.columns, grid.width, scale, pairs, part)
        return part

    with np.errstate(over="ignore"):
        _write(fill, grid, dtype, out)


def choose(largest: Floats, most: float, dtype: DType, kind: str) -> Floats:
    """Scales by which numbers up to `largest` become numbers up to `most`, rounded to a dtype of that name.

    The nearest that decode to finite numbers of the tensor's dtype; never subnormal float32, in float16 rounded up where
    they are subnormal; 1 where all is zero.
    """
    narrow = np.dtype(np.float32) if kind == "float32" else numpy_dtype_of(kind)
    exact = largest / np.float32(most)
    with np.errstate(over="ignore"):
        rounded = exact.astype(narrow)
    words = rounded.view(f"u{narrow.itemsize}")
    short = (rounded.astype(np.float32) < exact) & (exact < np.float32(2.0**-14)) & (kind == "float16")
    words += short
    end = limit(dtype)
    with np.errstate(over="ignore"):
        for _ in range(2):
            words -= (rounded.astype(np.float32) * np.float32(most) > end) & (words > 0)
    scales = np.maximum(rounded.astype(np.float32), np.float32(2.0**-24 if kind == "float16" else 2.0**-126))
    scales[largest == 0] = 1
    return scales


def in_region(scales: Floats, region: Region, shape: Shape, width: int) -> Floats:
    """The scales of a matrix's groups that a region of it has, float32 (rows, groups). shape: (rows, columns) of the matrix."""
    (a, b), (c, d) = region
    assert c % width == 0, "regions begin where groups do"
    assert d % width == 0 or d == shape[1], "regions end where groups do"
    return np.ascontiguousarray(scales[a:b, c // width : -(-d // width)])


def scale_dtype(dtype: DType) -> str:
    """The dtype of the scales of a tensor of that dtype: what compressed-tensors multiplies in, and gives back."""
    return dtype.name if dtype.name in ("bfloat16", "float16") else "float32"


def numpy_dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's, or ml_dtypes', dtype of a float dtype's name."""
    return numpy_dtype(DTYPES[name])


def plane(numbers: Floats, kind: str) -> Bytes:
    """float32 numbers as a plane of that dtype, little-endian."""
    return np.ascontiguousarray(numbers.astype(numpy_dtype_of(kind))).reshape(-1).view(np.uint8)


def unplane(buffer: Buffer, shape: tuple[int, ...], kind: str, name: str) -> Floats:
    """A plane of so many numbers as float32. `FormatError` if it holds more or fewer."""
    how = numpy_dtype_of(kind)
    data = check.plane(buffer, int(np.prod(shape, dtype=np.int64)) * how.itemsize, name)
    return data.view(how).astype(np.float32).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some rows, or a part of one row, of a grid."""

    grid: Grid  # of the tile itself
    row: int
    column: int
    whole: Grid

    @property
    def rows(self) -> int:
        return self.grid.rows

    @property
    def columns(self) -> int:
        return self.grid.columns

    @property
    def start(self) -> int:
        return self.row * self.whole.columns + self.column

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    @property
    def nibbles(self) -> slice:
        """The bytes of its 4-bit codes."""
        start = self.row * self.whole.line + self.column // 2
        return slice(start, start + self.rows * self.grid.line)

    def of(self, scales: NDArray[Any]) -> NDArray[Any]:
        """The scales of its groups."""
        first = self.column // self.whole.width
        return scales[self.row : self.row + self.rows, first : first + self.grid.groups]


def _tiles(grid: Grid) -> Iterator[_Tile]:
    """The grid in runs of at most `TILE` numbers, whole groups or parts of one."""
    if grid.columns <= TILE:
        step = max(1, TILE // max(1, grid.columns))
        for row in range(0, grid.rows, step):
            yield _Tile(Grid(min(step, grid.rows - row), grid.columns, grid.width), row, 0, grid)
        return
    step = TILE // grid.width * grid.width if grid.width <= TILE else 0
    for row in range(grid.rows):
        for group in range(0, grid.columns, step or grid.width):
            end = min(grid.columns, group + (step or grid.width))
            for column in range(group, end, TILE):
                yield _Tile(Grid(1, min(TILE, end - column), grid.width), row, column, grid)


def _numbers(values: Bytes, dtype: DType, tile: _Tile) -> Floats:
    return with_nan(values[tile.start * dtype.itemsize : tile.stop * dtype.itemsize], dtype)


def _write(fill: Callable[[_Tile], Floats], grid: Grid, dtype: DType, out: Bytes) -> None:
    """Each tile's numbers, rounded to the dtype, into their place."""
    flat = out.reshape(-1) if out.flags.c_contiguous else None
    if flat is None and out.shape[1] != grid.columns * dtype.itemsize:  # rows of another length: by way of memory
        flat = np.empty(out.size, np.uint8)
    for tile in _tiles(grid):
        filled = fill(tile)
        if flat is not None:
            part = flat[tile.start * dtype.itemsize : tile.stop * dtype.itemsize]
            from_float32(filled, dtype, part.reshape(1, -1))
        else:
            left = tile.column * dtype.itemsize
            box = out[tile.row : tile.row + tile.rows, left : left + tile.columns * dtype.itemsize]
            from_float32(filled, dtype, box)
    if flat is not None and not out.flags.c_contiguous:
        out[:] = flat.reshape(out.shape)


@cache
def _pairs(levels: tuple[float, ...]) -> NDArray[np.uint64]:
    """For each byte, the two levels of its codes, as the bits of float32 numbers side by side."""
    table = np.array(levels, np.float32)
    codes = np.arange(256)
    pairs = np.stack([table[codes & 15], table[codes >> 4]], axis=1).view(np.uint64)[:, 0].copy()
    pairs.flags.writeable = False
    return pairs
