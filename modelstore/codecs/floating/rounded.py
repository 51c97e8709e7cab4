"""`round`: numbers rounded to multiples of a step, losslessly coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.numeric.numbers import from_float32, limit, to_float32
from modelstore.codecs.weight import WeightCodec
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

_TILE = 32 << 10  # numbers
_WHOLE = 2.0**23  # float32 numbers from here on have no fraction
_BYTES = 0.9  # a number: what weights, rounded to about a twentieth of their spread, are coded in


@dataclass(frozen=True, slots=True)
class Round(WeightCodec):
    """The nearest multiple of `step`, half to even, then rounded to the tensor's dtype: 1.0 gives whole numbers.

    One plane, `data`: these numbers in the tensor's dtype, encoded as `lossless` does. Computed in float32, float64
    too, as step * round(number / step); what is 2^23 steps or more away from zero stays, as do infinities and NaN;
    a number that would become infinite becomes the largest one.
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        good = isinstance(self.step, float | int) and not isinstance(self.step, bool)
        if not good or not 2.0**-100 <= self.step <= 2.0**100:
            raise ValueError(f"step {self.step!r} is not a number from 2^-100 to 2^100")

    @property
    def name(self) -> str:
        return "round"

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("data",)

    def size(self, shape: Shape, dtype: DType) -> int:  # noqa: ARG002
        """A rough estimate: how few kinds of numbers are left is not known beforehand."""
        return int(math.prod(shape) * _BYTES) + 16

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        out = np.empty_like(values)
        step, end = np.float32(self.step), limit(dtype)
        for start in range(0, values.size, _TILE * dtype.itemsize):
            piece = values[start : start + _TILE * dtype.itemsize]
            with np.errstate(over="ignore", invalid="ignore"):
                numbers = to_float32(piece, dtype)
                steps = numbers / step
                near = np.abs(steps) < np.float32(_WHOLE)
                rounded = np.clip(np.rint(steps) * step, -end, end)
            if near.all():
                from_float32(rounded, dtype, out[start : start + piece.size].reshape(1, -1))
                continue
            place = out[start : start + piece.size].reshape(-1, dtype.itemsize)
            from_float32(np.where(near, rounded, np.float32(0)), dtype, place.reshape(1, -1))
            place[~near] = piece.reshape(-1, dtype.itemsize)[~near]  # bit for bit
        return (byteplanes.encode(out, dtype),)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        byteplanes.decode(check.planes(planes, self.planes(dtype))[0], dtype, out)
