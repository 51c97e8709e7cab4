"""Floating-point tensors as float32 numbers, and back; the arithmetic of codecs is done in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.kernels import jit
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType

Floats = NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)


def to_float32(values: Bytes, dtype: DType) -> Floats:
    """Raw bytes of a float dtype as float32, 1-d, in memory of its own. float64 is rounded; all others are exact."""
    if dtype.name == "bfloat16":
        out = np.empty(values.size // 2, np.float32)
        _kernels()[0](values.view(np.uint16), out.view(np.uint32))
        return out
    return values.view(numpy_dtype(dtype)).astype(np.float32)


def from_float32(numbers: Floats, dtype: DType, out: Bytes) -> None:
    """float32 numbers, rounded to the nearest even, as raw bytes of a dtype, into `out`: 2-d, rows contiguous.

    Numbers beyond float16's and float64's range become infinite, those beyond float8's as ml_dtypes makes them.
    """
    flat = numbers.reshape(-1)
    if dtype.name == "bfloat16":
        narrow = np.empty(flat.size, np.uint16)
        _kernels()[1](np.ascontiguousarray(flat).view(np.uint32), narrow)
        out[:] = narrow.view(np.uint8).reshape(out.shape)
        return
    with np.errstate(over="ignore"):
        out[:] = flat.astype(numpy_dtype(dtype)).view(np.uint8).reshape(out.shape)


def with_nan(values: Bytes, dtype: DType) -> Floats:
    """Raw bytes as float32. A finite number beyond float32 becomes its largest number; infinities and NaN stay."""
    if dtype.name != "float64":
        return to_float32(values, dtype)
    exact = values.view(np.float64)
    return np.where(np.isinf(exact), exact, np.clip(exact, -LARGEST, LARGEST)).astype(np.float32)


def without_nan(values: Bytes, dtype: DType, infinite: bool = False) -> Floats:
    """Raw bytes as float32 (n,): NaN as 0, infinities as the largest finite numbers, or as they are where that is asked for."""
    with np.errstate(over="ignore"):  # of float64
        found = to_float32(values, dtype)
    most = limit(dtype)
    if not (found.max(initial=0) <= most and found.min(initial=0) >= -most):  # or there is a NaN
        end = np.inf if infinite else float(most)
        np.nan_to_num(found, copy=False, nan=0.0, posinf=end, neginf=-end)
    return found


@cache
def limit(dtype: DType) -> np.float32:
    """The largest finite number of a dtype as float32; float64's is float32's."""
    import ml_dtypes

    return np.float32(min(float(ml_dtypes.finfo(numpy_dtype(dtype)).max), LARGEST))  # type: ignore[no-untyped-call]


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """NumPy's dtype of a float dtype, or ml_dtypes' where NumPy has none."""
    if dtype.name in ("float16", "float32", "float64"):
        return np.dtype(dtype.name)
    import ml_dtypes

    kind: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.name))
    return kind


def _widen(words, out):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        out[i] = np.uint32(words[i]) << np.uint32(16)


def _narrow(words, out):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        w = words[i]
        rounded = (w + np.uint32(0x7FFF) + ((w >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (w >> np.uint32(16)) | np.uint32(0x40)  # a NaN stays one
        out[i] = np.uint16(quiet if (w & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from numba import types

    def array(item: Any, readonly: bool = False) -> Any:
        return types.Array(item, 1, "C", readonly=readonly, aligned=False)

    widen = types.void(array(types.uint16, True), array(types.uint32))
    narrow = types.void(array(types.uint32, True), array(types.uint16))
    return jit.compiled(_widen, widen), jit.compiled(_narrow, narrow)
