"""Shared parts of codecs with few values: numbers as float32, tables of the codes' values, and values gathered from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.exact.kernels import WORDS
from modelstore.codecs.kernels import codes as kernels
from modelstore.codecs.numeric.numbers import Floats, from_float32
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

Words = NDArray[np.unsignedinteger]
Unpack = Callable[[int, int], Bytes]  # first element, how many → their codes, one a byte

TILE = 40 << 10  # elements, of which bytes of 8 and of 5 codes are whole


def narrowed(floats: Floats, dtype: DType) -> Bytes:
    """float32 numbers of any shape as raw bytes of a dtype, 1-d."""
    out = np.empty(floats.size * dtype.itemsize, np.uint8)
    from_float32(floats, dtype, out.reshape(1, -1))
    return out


def words(plane: Buffer, count: int, dtype: DType, what: str) -> Words:
    """A plane of `count` raw numbers as unsigned words; `FormatError` if it has another length."""
    data = as_bytes(plane)
    if data.size != count * dtype.itemsize:
        raise FormatError(f"the plane {what!r} has {data.size} bytes where {count * dtype.itemsize} are expected")
    return data.view(WORDS[dtype.itemsize])


def negative(found: Words) -> Words:
    """The words of the same numbers with their signs turned."""
    return found ^ found.dtype.type(1 << (8 * found.itemsize - 1))


def gathered(unpack: Unpack, tables: Words, columns: int, group: int, shape: Shape, dtype: DType, out: Bytes) -> None:
    """Write tables[group of an element, its code] for every element of a region into `out`, as `Codec.decode` says.

    tables: words (rows * groups of a row, levels), for groups of `group` columns of rows of `columns`; codes are within.
    """
    check.out(out, shape, dtype)
    flat = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, np.uint8)
    target = flat.view(WORDS[dtype.itemsize])
    kernel = kernels.gather(dtype.itemsize)
    tables = np.ascontiguousarray(tables)
    for start in range(0, target.size, TILE):
        n = min(TILE, target.size - start)
        kernel(unpack(start, n), tables, columns, group, start, target[start : start + n])
    if flat.base is not out.base and flat.flags.owndata:
        out[:] = flat.reshape(out.shape)
