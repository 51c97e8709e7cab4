"""The loss of a codec that is not exact: the energy of the error beside that of the signal."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np

from modelstore.codecs.kernels import jit
from modelstore.codecs.numeric.numbers import to_float32
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType

_TILE = 32 << 10  # elements


class Loss(msgspec.Struct, frozen=True, array_like=True):
    """Sums over elements: value², error², and how many values were NaN or infinite (which the sums leave out)."""

    signal: float = 0.0
    noise: float = 0.0
    nonfinite: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.signal + other.signal, self.noise + other.noise, self.nonfinite + other.nonfinite)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB; infinite if nothing was lost."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def loss_of(values: Bytes, decoded: Bytes, dtype: DType) -> Loss:
    """The loss between a region's raw bytes, of a float dtype, and the same after encoding and decoding."""
    if dtype.name == "bfloat16":
        signal, noise, nonfinite = _kernel(2)(values.view(np.uint16), decoded.view(np.uint16))
        return Loss(float(signal), float(noise), int(nonfinite))
    total = Loss()
    step = _TILE * dtype.itemsize
    for start in range(0, values.size, step):  # tiles whose float32 numbers stay in the cache
        one, other = (to_float32(side[start : start + step], dtype) for side in (values, decoded))
        signal, noise, nonfinite = _kernel(4)(one.view(np.uint32), other.view(np.uint32))
        total += Loss(float(signal), float(noise), int(nonfinite))
    return total


def _loss(values, decoded, shift):  # type: ignore[no-untyped-def]
    """values, decoded: the bits of float32 numbers, or their upper halves, which `shift` moves up."""
    ones, others = np.empty(1024, np.uint32), np.empty(1024, np.uint32)
    a, b = ones.view(np.float32), others.view(np.float32)
    signal = noise = np.float64(0)
    finite = 0
    for start in range(0, values.size, 1024):  # short sums in float32, which vectorise, long ones in float64
        n = min(1024, values.size - start)
        for i in range(n):
            ones[i] = np.uint32(values[start + i]) << shift
            others[i] = np.uint32(decoded[start + i]) << shift
        s = e = np.float32(0)
        known = np.int32(0)
        for i in range(n):
            is_finite = abs(a[i]) <= np.float32(3.4028235e38)
            v = a[i] if is_finite else np.float32(0)
            d = v - b[i] if is_finite else np.float32(0)
            s += v * v
            e += d * d
            known += np.int32(is_finite)
        signal += np.float64(s)
        noise += np.float64(e)
        finite += int(known)
    return signal, noise, values.size - finite


@cache
def _kernel(width: int) -> Callable[..., Any]:
    from numba import types

    word: Any = {2: types.uint16, 4: types.uint32}[width]
    words = types.Array(word, 1, "C", readonly=True, aligned=False)
    result = types.Tuple((types.float64, types.float64, types.int64))  # type: ignore[no-untyped-call]
    made = jit.compiled(_loss, result(words, words, types.uint32), reorder=True)
    shift = np.uint32(32 - 8 * width)
    return lambda values, decoded: made(values, decoded, shift)
