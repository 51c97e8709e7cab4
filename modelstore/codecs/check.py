"""What every codec asks of its arguments. Wrong ones are the caller's mistake: `ValueError`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape


def nbytes(shape: Shape, dtype: DType) -> int:
    """Raw bytes of a region."""
    return math.prod(shape) * dtype.itemsize


def values(array: Bytes, shape: Shape, dtype: DType, what: str = "values") -> None:
    """`array` must be the raw bytes of a region."""
    if array.ndim != 1 or array.itemsize != 1 or array.size != nbytes(shape, dtype):
        raise ValueError(
            f"{what}: {nbytes(shape, dtype)} bytes in one dimension are wanted, not {array.dtype}{array.shape}"
        )


def out(array: Bytes, shape: Shape, dtype: DType) -> None:
    """`array` must be rows of whole elements, with room for the region and no more."""
    if array.ndim != 2 or array.itemsize != 1 or array.size != nbytes(shape, dtype):
        raise ValueError(
            f"out: {nbytes(shape, dtype)} bytes in two dimensions are wanted, not {array.dtype}{array.shape}"
        )
    if array.shape[1] % dtype.itemsize:
        raise ValueError(f"out: a row of {array.shape[1]} bytes does not hold whole elements of {dtype.name}")
    if not array.flags.writeable:
        raise ValueError("out: the array is read-only")


def single(planes: Sequence[Buffer]) -> Buffer:
    """The one plane of a codec that stores one."""
    if len(planes) != 1:
        raise FormatError(f"{len(planes)} planes are stored where there is one, 'data'")
    return planes[0]
