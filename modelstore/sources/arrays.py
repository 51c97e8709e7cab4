"""NumPy's dtypes as ours, and boxes copied out of NumPy arrays, whatever their strides and byte order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Region, extent, slices

# ml_dtypes and NumPy name these as torch does; anything else (int4, float128, str, object) has no counterpart.
_NAMES = frozenset(name for name in DTYPES if name not in ("complex32", "float4_e2m1fn_x2"))


def dtype_of(name: str, kind: np.dtype[Any]) -> DType:
    """Our dtype for NumPy's, of the tensor of that name; `UnsupportedError` if there is none."""
    if not is_tensor_dtype(kind):
        raise UnsupportedError(
            f"{name!r} has dtype {kind}, which no tensor can have: convert it, or leave it out", tensor=name
        )
    return DTYPES[kind.name]


def is_tensor_dtype(kind: np.dtype[Any]) -> bool:
    """Whether a tensor can have NumPy's dtype; none can have texts, dates, objects or records."""
    return kind.name in _NAMES and DTYPES[kind.name].itemsize == kind.itemsize


def copy_box(array: NDArray[Any], region: Region, out: Bytes) -> None:
    """The region's little-endian bytes into `out`, bit for bit (a copy between equal dtypes never converts)."""
    little = array.dtype.newbyteorder("<")
    np.copyto(out.view(little).reshape(extent(region)), array[slices(region)], casting="equiv")
