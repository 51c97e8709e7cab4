"""`mxfp4` and `nvfp4`: floating-point numbers of 4 bits (E2M1) in blocks of a row, each with a scale of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.floating import view as floatviews
from modelstore.codecs.floating.weighted import CLIPS, Importance, searched
from modelstore.codecs.look import Look
from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.numbers import Floats, limit
from modelstore.codecs.numeric.scaled import Format4, Grid
from modelstore.codecs.weight import Encode, EngineView, WeightCodec, group_of, matrix
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.grid import bands
from modelstore.format.region import Region, Shape, extent, full, size

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _below(number: float) -> float:
    return float(np.nextafter(np.float32(number), np.float32(0)))


# Halfway between two magnitudes goes to the even code: beyond 0.25 is code 1, from 0.75 on code 2, beyond 1.25 code 3, …
E2M1 = Format4(
    levels=(*_MAGNITUDES, *(-m for m in _MAGNITUDES)),
    borders=(0.25, _below(0.75), 1.25, _below(1.75), 2.5, _below(3.5), 5.0),
    signed=True,
)
MOST = 6.0  # of E2M1
MOST_SCALE = 448.0  # of E4M3
_LEAST_SCALE = 2.0**-9


@dataclass(frozen=True, slots=True)
class Mxfp4(WeightCodec):
    """OCP Microscaling Formats 1.0 (2023), MXFP4: blocks of 32 numbers with a power of two.

    Planes: `codes`, two E2M1 codes a byte, the first in the low bits, each row starting a byte; `scale`, a byte of E8M0 (2 **
    (byte - 127)) for each block of each row. The exponent is floor(log2(largest finite magnitude)) - 2, as the specification
    has it, so that numbers may saturate at 6; at least -126; 0 for a block of zeros.
    """

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def view(self) -> EngineView | None:
        return floatviews.Mxfp4View()

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("codes", "scale")

    def group(self, shape: Shape) -> Shape:
        return group_of(shape, 32)

    def size(self, shape: Shape, dtype: DType) -> int:  # noqa: ARG002
        grid = _grid(shape, 32)
        return grid.rows * (grid.line + grid.groups)

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        grid = _grid(shape, 32)
        exponents = _exponents(scaled.absmax(values, dtype, grid))
        codes = scaled.encode4(values, dtype, grid, _powers(exponents), E2M1)
        return codes, exponents.astype(np.uint8).reshape(-1)

    @property
    def looks_ahead(self) -> bool:
        return False

    def fit(self, look: Look) -> Encode:
        """Nothing is looked at, unless columns have an importance."""
        return WeightCodec.fit(self, look) if look.importance is None else self._weighted(look, look.importance)

    def _weighted(self, look: Look, importance: Importance) -> Encode:
        """The power of two that the specification has is tried, and those beside it."""
        values, shape, dtype = look.read(full(look.shape)), look.shape, look.dtype
        grid = _grid(shape, 32)
        first = _exponents(scaled.absmax(values, dtype, grid))
        tried = (_powers(np.clip(first + at, 1, 254)) for at in (0, 1, -1))
        scales = searched(values, dtype, grid, tried, E2M1, importance)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            mine = scaled.in_region(scales, region, shape, 32)
            exponents = (mine.view(np.uint32) >> 23).astype(np.uint8)
            return scaled.encode4(values, dtype, _grid(extent(region), 32), mine, E2M1), exponents.reshape(-1)

        return encode

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        grid = _grid(shape, 32)
        codes, scale = check.planes(planes, self.planes(dtype))
        scales = scaled.unplane(scale, (grid.rows, grid.groups), "float8_e8m0fnu", "scale")
        scaled.decode4(codes, grid, scales, E2M1, dtype, out)


@dataclass(frozen=True, slots=True)
class Nvfp4(WeightCodec):
    """NVFP4 (NVIDIA, 2025): blocks of 16 numbers with an E4M3 scale, and one float32 divisor of these for the tensor.

    Planes: `codes`, as of `mxfp4`; `scale`, an E4M3 byte for each block of each row; `global`, one float32. A number is
    code * (scale / global). global = 448 * 6 / largest finite magnitude of the tensor, 1 where all is zero; scale =
    global * (largest of the block / 6), rounded to E4M3 but at least its smallest number; 1 for a block of zeros.
    """

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def view(self) -> EngineView | None:
        return floatviews.Nvfp4View()

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("codes", "scale", "global")

    def group(self, shape: Shape) -> Shape:
        return group_of(shape, 16)

    def size(self, shape: Shape, dtype: DType) -> int:  # noqa: ARG002
        grid = _grid(shape, 16)
        return grid.rows * (grid.line + grid.groups) + 4

    def fit(self, look: Look) -> Encode:
        """The tensor is looked at for its largest magnitude, in bands of 4 MiB; where columns have an importance, whole."""
        if look.importance is not None:
            return self._weighted(look, look.importance)
        dtype, greatest = look.dtype, np.float32(0)
        for region in bands(full(look.shape), dtype.itemsize, look.band):
            n = size(region)
            greatest = max(greatest, scaled.absmax(look.read(region), dtype, Grid(1, n, n)).max())
        over = _global(greatest, dtype)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            check.values(values, extent(region), dtype)
            largest = scaled.absmax(values, dtype, _grid(extent(region), 16))
            return self._encode(values, extent(region), dtype, over, largest)

        return encode

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        largest = scaled.absmax(values, dtype, _grid(shape, 16))
        return self._encode(values, shape, dtype, _global(largest.max(), dtype), largest)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        grid = _grid(shape, 16)
        codes, scale, over = check.planes(planes, self.planes(dtype))
        scales = scaled.unplane(scale, (grid.rows, grid.groups), "float8_e4m3fn", "scale")
        divisor = scaled.unplane(over, (1, 1), "float32", "global")
        with np.errstate(all="ignore"):
            scales = scales / divisor
        scaled.decode4(codes, grid, scales, E2M1, dtype, out)

    def _encode(
        self, values: Bytes, shape: Shape, dtype: DType, over: np.float32, largest: Floats
    ) -> tuple[Buffer, ...]:
        grid = _grid(shape, 16)
        kept = _kept(largest, over)
        scales = _unkept(kept, largest.shape, over)
        codes = scaled.encode4(values, dtype, grid, scales, E2M1)
        return codes, kept, scaled.plane(np.array([over]), "float32")

    def _weighted(self, look: Look, importance: Importance) -> Encode:
        """Scales of down to 0.32 of each block's range are tried."""
        values, shape, dtype = look.read(full(look.shape)), look.shape, look.dtype
        grid = _grid(shape, 16)
        largest = scaled.absmax(values, dtype, grid)
        over = _global(largest.max(), dtype)
        tried = (_unkept(_kept(largest * np.float32(clip), over), largest.shape, over) for clip in CLIPS)
        scales = searched(values, dtype, grid, tried, E2M1, importance)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            mine = scaled.in_region(scales, region, shape, 16)
            codes = scaled.encode4(values, dtype, _grid(extent(region), 16), mine, E2M1)
            return codes, scaled.plane(mine * over, "float8_e4m3fn"), scaled.plane(np.array([over]), "float32")

        return encode


def _kept(largest: Floats, over: np.float32) -> Bytes:
    """The plane of scales of nvfp4 for blocks of these largest magnitudes."""
    wanted = np.clip(over * (largest / np.float32(MOST)), np.float32(_LEAST_SCALE), np.float32(MOST_SCALE))
    wanted[largest == 0] = 1
    return scaled.plane(wanted, "float8_e4m3fn")


def _unkept(kept: Bytes, shape: tuple[int, ...], over: np.float32) -> Floats:
    """The factor of numbers of such a plane."""
    return scaled.unplane(kept, shape, "float8_e4m3fn", "scale") / over


def _exponents(largest: Floats) -> NDArray[np.int16]:
    """For each block, biased by 127, as E8M0."""
    exponents = np.maximum((largest.view(np.uint32) >> 23).astype(np.int16) - 2, 1)
    exponents[largest == 0] = 127
    return exponents


def _powers(exponents: NDArray[np.int16]) -> Floats:
    return (exponents.astype(np.uint32) << 23).view(np.float32)


def _global(largest: np.float32, dtype: DType) -> np.float32:
    """The divisor of scales that makes the largest one 448; none that the greatest code would decode to infinity by."""
    if not largest:
        return np.float32(1)
    with np.errstate(over="ignore"):
        over = min(np.float32(MOST * MOST_SCALE) / largest, np.float32(2.0**120))
        while np.float32(MOST_SCALE) / over * np.float32(MOST) > limit(dtype):
            over = np.nextafter(over, np.float32(np.inf))
    return np.float32(over)


def _grid(shape: Shape, width: int) -> Grid:
    return Grid(*matrix(shape), width)
