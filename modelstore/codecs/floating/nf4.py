"""`nf4`: codes of 4 bits for the 16 quantiles of normally distributed numbers, in groups of a row with a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.floating.weighted import CLIPS, Importance, searched
from modelstore.codecs.look import Look
from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.scaled import Format4, Grid
from modelstore.codecs.weight import Encode, WeightCodec, group_of, matrix
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, extent, full

# The levels as QLoRA's appendix gives them: quantiles of the normal distribution, eight below zero, zero, and seven above.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4 = Format4(LEVELS, tuple(float(np.float32((a + b) / 2)) for a, b in pairwise(LEVELS)), signed=False)


@dataclass(frozen=True, slots=True)
class Nf4(WeightCodec):
    """4-bit NormalFloat (Dettmers et al., "QLoRA", 2023), without double quantization.

    group_size  numbers of a row that share a scale: a multiple of 16 from 16 to 4096

    Planes: `codes`, two a byte, the first in the low bits, each row starting a byte; `scale`, the largest finite magnitude of
    each group of each row, rounded to bfloat16, 1 for a group of zeros. A number is LEVELS[code] * scale.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or not 16 <= self.group_size <= 4096 or self.group_size % 16:
            raise ValueError(f"group_size {self.group_size!r} is not a multiple of 16 from 16 to 4096")

    @property
    def name(self) -> str:
        return "nf4"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("codes", "scale")

    def group(self, shape: Shape) -> Shape:
        return group_of(shape, self.group_size)

    def size(self, shape: Shape, dtype: DType) -> int:  # noqa: ARG002
        grid = self._grid(shape)
        return grid.rows * (grid.line + 2 * grid.groups)

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        grid = self._grid(shape)
        scales = scaled.choose(scaled.absmax(values, dtype, grid), 1.0, dtype, "bfloat16")
        return scaled.encode4(values, dtype, grid, scales, NF4), scaled.plane(scales, "bfloat16")

    @property
    def looks_ahead(self) -> bool:
        return False

    def fit(self, look: Look) -> Encode:
        """Nothing is looked at, unless columns have an importance."""
        return WeightCodec.fit(self, look) if look.importance is None else self._weighted(look, look.importance)

    def _weighted(self, look: Look, importance: Importance) -> Encode:
        """Scales of down to 0.32 of each group's range are tried."""
        values, shape, dtype = look.read(full(look.shape)), look.shape, look.dtype
        grid = self._grid(shape)
        largest = scaled.absmax(values, dtype, grid)
        tried = (scaled.choose(largest * np.float32(clip), 1.0, dtype, "bfloat16") for clip in CLIPS)
        scales = searched(values, dtype, grid, tried, NF4, importance)

        def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
            mine = scaled.in_region(scales, region, shape, self.group_size)
            return scaled.encode4(values, dtype, self._grid(extent(region)), mine, NF4), scaled.plane(mine, "bfloat16")

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
        grid = self._grid(shape)
        codes, scale = check.planes(planes, self.planes(dtype))
        scales = scaled.unplane(scale, (grid.rows, grid.groups), "bfloat16", "scale")
        scaled.decode4(codes, grid, scales, NF4, dtype, out)

    def _grid(self, shape: Shape) -> Grid:
        return Grid(*matrix(shape), self.group_size)
