"""GGUF's block formats: float32 numbers to the bytes that llama.cpp's reference quantization makes of them.

A block is 32 numbers of a row, and d, m are float16, little-endian:

    Q8_0  34 bytes: d, 32 × int8             number = d · q
    Q4_0  18 bytes: d, 16 bytes              number = d · (q − 8); byte i holds q of number i, and of number 16 + i above it
    Q4_1  20 bytes: d, m, 16 bytes           number = d · q + m

The bytes equal those of the `gguf` package for finite numbers (the sign of a zero m aside), whose Q8_0 is that of ggml's
reference code. Numbers that are not finite count as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.kernels import jit
from modelstore.codecs.numeric.numbers import Floats, from_float32
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES

BLOCK = 32
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_ITEM = {"F32": 4, "F16": 2, "BF16": 2}
_FLOAT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of so many numbers; for the block formats these are a multiple of 32."""
    return columns * _ITEM[kind] if kind in _ITEM else columns // BLOCK * _BLOCK_BYTES[kind]


def quantize(numbers: Floats, kind: str) -> Bytes:
    """float32 numbers, 1-d, as one of `TYPES`; a whole number of blocks where that has blocks."""
    if kind in _FLOAT:
        dtype = DTYPES[_FLOAT[kind]]
        out = np.empty(numbers.size * dtype.itemsize, np.uint8)
        from_float32(numbers, dtype, out.reshape(1, -1))
        return out
    blocks = numbers.size // BLOCK
    out = np.empty(blocks * _BLOCK_BYTES[kind], np.uint8)
    scales = np.empty(blocks * (2 if kind == "Q4_1" else 1), np.float32)
    _kernel(kind)(np.ascontiguousarray(numbers), out, scales)
    with np.errstate(over="ignore"):
        halves: NDArray[np.float16] = scales.astype(np.float16)
    table = out.reshape(blocks, -1)
    width = 4 if kind == "Q4_1" else 2
    table[:, :width] = halves.view(np.uint8).reshape(blocks, width)
    return out


def _q8_0(x, out, scales):  # type: ignore[no-untyped-def]
    for b in range(scales.size):
        largest = np.float32(0)
        for i in range(32):
            v = np.abs(x[32 * b + i])
            if v > largest and v < np.inf:
                largest = v
        d = largest / np.float32(127)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        scales[b] = d
        for i in range(32):
            v = x[32 * b + i]
            scaled = v * inverse if np.abs(v) < np.inf else np.float32(0)
            size = np.abs(scaled)
            whole = np.floor(size)
            whole += np.floor(np.float32(2) * (size - whole))  # halves go away from zero
            out[34 * b + 2 + i] = np.uint8(np.int8(whole if scaled >= 0 else -whole))


def _q4_0(x, out, scales):  # type: ignore[no-untyped-def]
    q = np.empty(32, np.uint8)
    for b in range(scales.size):
        largest = np.float32(0)
        for i in range(32):
            v = np.abs(x[32 * b + i])
            if v > largest and v < np.inf:
                largest = v
        signed = np.float32(0)
        for i in range(32):  # the first of that size
            if np.abs(x[32 * b + i]) == largest:
                signed = x[32 * b + i]
                break
        d = signed / np.float32(-8)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        scales[b] = d
        for i in range(32):
            v = x[32 * b + i]
            product = v * inverse if np.abs(v) < np.inf else np.float32(0)
            q[i] = np.uint8(min(np.float32(15), max(np.float32(0), np.trunc(product + np.float32(8.5)))))
        for i in range(16):
            out[18 * b + 2 + i] = q[i] | (q[16 + i] << np.uint8(4))


def _q4_1(x, out, scales):  # type: ignore[no-untyped-def]
    q = np.empty(32, np.uint8)
    clean = np.empty(32, np.float32)
    for b in range(scales.size // 2):
        low = np.float32(np.inf)
        high = np.float32(-np.inf)
        for i in range(32):
            v = x[32 * b + i]
            clean[i] = v if np.abs(v) < np.inf else np.float32(0)
            low = min(low, clean[i])
            high = max(high, clean[i])
        d = (high - low) / np.float32(15)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        scales[2 * b] = d
        scales[2 * b + 1] = low
        for i in range(32):
            product = (clean[i] - low) * inverse
            q[i] = np.uint8(min(np.float32(15), max(np.float32(0), np.trunc(product + np.float32(0.5)))))
        for i in range(16):
            out[20 * b + 4 + i] = q[i] | (q[16 + i] << np.uint8(4))


@cache
def _kernel(kind: str) -> Callable[..., Any]:
    from numba import types

    def array(item: Any, readonly: bool = False) -> Any:
        return types.Array(item, 1, "C", readonly=readonly, aligned=False)

    signature = types.void(array(types.float32, True), array(types.uint8), array(types.float32))
    return jit.compiled({"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}[kind], signature)
