"""Weights as whole codes, scales and zero points, for training that rounds as `int` does with scales that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.integer.planes import IntLayout
from modelstore.codecs.weight import AffineCodes
from modelstore.format.buffers import Buffer
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


@dataclass(frozen=True, slots=True)
class IntAffine:
    """See `AffineView`."""

    layout: IntLayout

    def scales(self, planes: Sequence[Buffer], shape: Shape, dtype: DType) -> AffineCodes:
        """As `AffineView.scales`."""
        _, scales, zeros = self.layout.unplane(planes, shape, dtype)
        return AffineCodes(self.layout.bits, self.layout.cell(shape), scales, zeros)

    def planes(self, codes: NDArray[np.int8], found: AffineCodes, dtype: DType) -> tuple[Buffer, ...]:
        """As `AffineView.planes`."""
        from modelstore.codecs.kernels import bits

        words = (codes.astype(np.int16) + (1 << (self.layout.bits - 1))).astype(np.uint8, order="C")
        packed = np.zeros((len(words), self.layout.line(words.shape[1])), np.uint8)
        bits.kernels()[0](words, self.layout.bits, packed)
        return self.layout.plane(packed, found.scales, found.zeros, dtype)
