"""How each dtype appears in Zarr: as itself, widened without loss, or as its bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.format.dtypes import DType

Values = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ZarrDtype:
    """One dtype as Zarr shows it: `name` is Zarr's data type, `each` the elements shown for one stored element.

    `widened` is whether the stored bytes are converted on the way.
    """

    name: str
    widened: bool = False
    each: int = 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The little-endian NumPy dtype of what is shown."""
        return np.dtype(self.name).newbyteorder("<")

    @property
    def fill_value(self) -> Any:
        """Zero, as the metadata of an array needs it."""
        kind = self.dtype.kind
        return {"b": False, "c": [0.0, 0.0], "f": 0.0}.get(kind, 0)


_CORE = ("float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_AS_THEY_ARE = frozenset((*_CORE, "bool", "complex64", "complex128"))
# (exponent bits, mantissa bits, bias, what the highest exponent means)
_SMALL_FLOATS = MappingProxyType(
    {
        "float8_e4m3fn": (4, 3, 7, "nan at all ones"),
        "float8_e5m2": (5, 2, 15, "ieee"),
        "float8_e4m3fnuz": (4, 3, 8, "nan at minus zero"),
        "float8_e5m2fnuz": (5, 2, 16, "nan at minus zero"),
    }
)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def view(dtype: DType, *, bits: bool, scalar: bool = False) -> ZarrDtype:
    """How a stored dtype is shown. A 0-d tensor of two numbers a byte does not have an axis to double: its bits are shown."""
    if dtype.name in _AS_THEY_ARE:
        return ZarrDtype(dtype.name)
    if bits or (scalar and dtype.name == "float4_e2m1fn_x2"):
        return ZarrDtype(f"uint{8 * dtype.itemsize}")
    if dtype.name == "complex32":
        return ZarrDtype("complex64", widened=True)
    return ZarrDtype("float32", widened=True, each=2 if dtype.name == "float4_e2m1fn_x2" else 1)


def widen(raw: NDArray[np.uint8], dtype: DType) -> Values:
    """Stored bytes (flat, little-endian) as float32 or complex64, flat and exact; two values a byte for fp4."""
    if dtype.name == "bfloat16":
        return (raw.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if dtype.name == "complex32":
        return raw.view("<f2").astype("<f4").view("<c8")
    if dtype.name == "float4_e2m1fn_x2":
        return _table(dtype.name)[raw].reshape(-1)
    return _table(dtype.name)[raw]


@cache
def _table(name: str) -> NDArray[np.float32]:
    """The value, or two values, of each of the 256 bytes."""
    code = np.arange(256)
    if name == "float4_e2m1fn_x2":  # the low nibble is the first number
        signed = np.concatenate([_FP4, -_FP4])
        return np.stack([signed[code & 15], signed[code >> 4]], axis=1).astype(np.float32)
    if name == "float8_e8m0fnu":  # a power of two, no sign
        return np.where(code == 255, np.nan, np.ldexp(1.0, code - 127)).astype(np.float32)
    exponent_bits, mantissa_bits, bias, top = _SMALL_FLOATS[name]
    sign = np.where(code >> 7, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.ldexp(np.where(exponent, 1 + mantissa, mantissa), np.maximum(exponent, 1) - bias) * sign
    if top == "nan at minus zero":
        value[0x80] = np.nan
    elif top == "nan at all ones":
        value[[0x7F, 0xFF]] = np.nan
    else:
        highest = exponent == (1 << exponent_bits) - 1
        value[highest] = np.where(mantissa[highest] > 0, np.nan, np.inf * sign[highest])
    values: NDArray[np.float32] = value.astype(np.float32)
    return values
