"""`half`: numbers of 16 bits, losslessly coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.numeric.numbers import from_float32, limit, to_float32, with_nan
from modelstore.codecs.weight import WeightCodec
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Shape

KINDS = ("float16", "bfloat16")
RATIO = {"float16": 0.85, "bfloat16": 0.67, "float8_e4m3fn": 0.9, "float8_e5m2": 0.85}  # of weights, losslessly coded
_TILE = 32 << 10  # numbers


@dataclass(frozen=True, slots=True)
class Half(WeightCodec):
    """Numbers rounded to the nearest of `dtype`, "float16" or "bfloat16", half to even; float8 stays as it is.

    One plane, `data`: these numbers, encoded as `lossless` does. Finite numbers beyond the range become its end;
    infinities and NaN stay (not NaN's payload). float64 is rounded to float32 first.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in KINDS:
            raise ValueError(f"dtype {self.dtype!r} is not known; known are {', '.join(KINDS)}")

    @property
    def name(self) -> str:
        return "half"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("data",)

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate, by what weights come to."""
        kept = self._kept(dtype)
        return int(math.prod(shape) * kept.itemsize * RATIO[kept.name]) + 16

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        kept = self._kept(dtype)
        if kept == dtype:
            return (byteplanes.encode(values, dtype),)
        out = np.empty(math.prod(shape) * kept.itemsize, np.uint8)
        end = np.float32(_end(dtype, kept))
        for start in range(0, math.prod(shape), _TILE):
            stop = min(start + _TILE, math.prod(shape))
            numbers = with_nan(values[start * dtype.itemsize : stop * dtype.itemsize], dtype)
            numbers = np.where(np.isfinite(numbers), np.clip(numbers, -end, end), numbers)
            from_float32(numbers, kept, out[start * kept.itemsize : stop * kept.itemsize].reshape(1, -1))
        return (byteplanes.encode(out, kept),)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        (data,) = check.planes(planes, self.planes(dtype))
        kept = self._kept(dtype)
        if kept == dtype:
            byteplanes.decode(data, dtype, out)
            return
        rows, row = out.shape
        narrow = np.empty((rows, row // dtype.itemsize * kept.itemsize), np.uint8)
        byteplanes.decode(data, kept, narrow)
        step = max(1, _TILE * dtype.itemsize // max(1, row))
        for r in range(0, rows, step):
            for start in range(0, row // dtype.itemsize, _TILE):
                part = narrow[r : r + step, start * kept.itemsize : (start + _TILE) * kept.itemsize]
                place = out[r : r + step, start * dtype.itemsize : (start + _TILE) * dtype.itemsize]
                from_float32(to_float32(part.reshape(-1), kept), dtype, place)

    def _kept(self, dtype: DType) -> DType:
        return dtype if dtype.itemsize == 1 else DTYPES[self.dtype]


def _end(dtype: DType, kept: DType) -> float:
    """The largest number of `kept` that is finite in `dtype`, too."""
    if kept.name == "bfloat16" and dtype.name == "float16":
        return 65280.0
    return min(float(limit(kept)), float(limit(dtype)))
