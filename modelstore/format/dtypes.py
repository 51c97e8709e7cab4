"""Every dtype a tensor can have: its name (torch's), width, and its name in a safetensors header."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from modelstore.errors import UnsupportedError

NumberKind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype.

    `name` is torch's attribute name, `itemsize` the bytes of an element, `lane` the bytes of one number in it
    (half of `itemsize` for complex), `safetensors` its name in a safetensors header (None if that format has none).
    """

    name: str
    itemsize: int
    kind: NumberKind
    safetensors: str | None

    @property
    def lane(self) -> int:
        """Bytes of one number: an element, or half of a complex one."""
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize


_ALL = (
    DType("bfloat16", 2, "float", "BF16"),
    DType("float16", 2, "float", "F16"),
    DType("float32", 4, "float", "F32"),
    DType("float64", 8, "float", "F64"),
    DType("float8_e4m3fn", 1, "float", "F8_E4M3"),
    DType("float8_e5m2", 1, "float", "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "float", "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "float", "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "float", "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1, "float", "F4"),  # two numbers a byte; safetensors counts the numbers, torch the bytes
    DType("int8", 1, "int", "I8"),
    DType("uint8", 1, "int", "U8"),
    DType("int16", 2, "int", "I16"),
    DType("uint16", 2, "int", "U16"),
    DType("int32", 4, "int", "I32"),
    DType("uint32", 4, "int", "U32"),
    DType("int64", 8, "int", "I64"),
    DType("uint64", 8, "int", "U64"),
    DType("bool", 1, "bool", "BOOL"),
    DType("complex32", 4, "complex", None),
    DType("complex64", 8, "complex", "C64"),
    DType("complex128", 16, "complex", None),
)

DTYPES = MappingProxyType({d.name: d for d in _ALL})
FROM_SAFETENSORS = MappingProxyType({d.safetensors: d for d in _ALL if d.safetensors})


def dtype(name: str) -> DType:
    """The dtype of that name; `UnsupportedError` naming it where there is none."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedError(f"dtype {name!r} cannot be stored; known are {', '.join(DTYPES)}") from None
