"""Raw bytes that tensors may hold: ordinary, and the awkward."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType

KINDS = ("bits", "zero", "constant", "normal", "special", "steps", "sparse")
FLOATS = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.float32,
    "complex32": np.float16,
    "complex128": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def make(kind: str, size: int, dtype: DType, seed: int) -> Bytes:
    """`size` bytes (whole elements) of that kind."""
    rng = np.random.default_rng(seed)
    if kind == "zero":
        return np.zeros(size, np.uint8)
    if kind == "constant":
        one = rng.integers(0, 256, dtype.itemsize, np.uint8)
        return np.tile(one, size // dtype.itemsize)
    if kind == "steps":  # ids, positions, offsets
        return np.arange(size // dtype.lane, dtype=np.uint64).astype(f"<u{dtype.lane}").view(np.uint8)
    if kind == "sparse":
        values = make("normal", size, dtype, seed).reshape(-1, dtype.itemsize)
        values[rng.random(len(values)) < 0.9] = 0
        return values.reshape(-1)
    if kind == "normal" and dtype.name in FLOATS:
        numbers = rng.standard_normal(size // dtype.lane).astype(np.float32) * 0.02
        return numbers.astype(FLOATS[dtype.name]).view(np.uint8)
    if kind == "special":  # NaN of every payload, infinities, -0.0, subnormals: patterns around the ends of the range
        bits = 8 * dtype.lane
        ends = [0, 1 << (bits - 1), (1 << bits) - 1, (1 << (bits - 1)) - 1, 1, (1 << (bits - 1)) + 1]
        ends += [0x7F80 << max(0, bits - 16), 0xFF81 << max(0, bits - 16), 0x7C01 << max(0, bits - 16)]
        table = np.array([e % (1 << bits) for e in ends], f"<u{dtype.lane}")
        return table[rng.integers(0, len(table), size // dtype.lane)].view(np.uint8)
    return rng.integers(0, 256, size, np.uint8)


def nearby(values: Bytes, seed: int) -> Bytes:
    """The values with some of their bytes changed: what a base could be."""
    rng = np.random.default_rng(seed)
    base = values.copy()
    changed = rng.random(base.size) < 0.05
    base[changed] ^= rng.integers(0, 256, int(changed.sum()), np.uint8)
    return base
