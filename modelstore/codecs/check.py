"""Checks of codecs' arguments (wrong ones are the caller's: `ValueError`) and of stored planes (`FormatError`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
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


def planes(stored: Sequence[Buffer], names: tuple[str, ...]) -> tuple[Buffer, ...]:
    """The stored planes, which must be as many as there are names; else `FormatError`."""
    if len(stored) != len(names):
        raise FormatError(f"{len(stored)} planes are stored where there are {len(names)}: {', '.join(names)}")
    return tuple(stored)


def plane(buffer: Buffer, size: int, name: str) -> Bytes:
    """A stored plane's bytes, read-only, which must be so many; else `FormatError`."""
    data = as_bytes(buffer)
    if data.size != size:
        raise FormatError(f"the plane {name!r} has {data.size} bytes where {size} are expected")
    data.flags.writeable = False  # of this view; kernels are compiled for read-only codes
    return data
