"""Rows of codes of 2, 3, 4 or 8 bits, packed into bytes and back, by themselves or within other kernels.

Code i of a row starts at bit i * bits, the lowest bit of a byte being the first; a row ends with a whole byte. Read as
little-endian words of 32 bits this is what compressed-tensors packs. Nothing is checked here.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from modelstore.codecs.kernels import jit


@register_jitable
def pack(codes, bits, out):  # type: ignore[no-untyped-def]
    """Codes of `bits` each, the first in the lowest bits, into a row of whole bytes."""
    n = codes.size
    if bits == 8:
        for i in range(n):
            out[i] = codes[i]
        return
    done = 0
    if bits == 4:
        for i in range(n // 2):
            out[i] = codes[2 * i] | np.uint8(codes[2 * i + 1] << np.uint8(4))
        done = n // 2 * 2
    elif bits == 2:
        for i in range(n // 4):
            high = np.uint8(codes[4 * i + 2] << np.uint8(4)) | np.uint8(codes[4 * i + 3] << np.uint8(6))
            out[i] = codes[4 * i] | np.uint8(codes[4 * i + 1] << np.uint8(2)) | high
        done = n // 4 * 4
    else:
        for i in range(n // 8):
            c = codes[8 * i : 8 * i + 8]
            v = np.uint32(0)
            for j in range(8):
                v = np.uint32(v | (np.uint32(c[j]) << np.uint32(3 * j)))
            for j in range(3):
                out[3 * i + j] = np.uint8(v >> np.uint32(8 * j))
        done = n // 8 * 8
    at = done * bits // 8
    for i in range(at, out.size):
        out[i] = 0
    for i in range(done, n):
        bit = (i - done) * bits
        v = np.uint32(codes[i]) << np.uint32(bit & 7)
        out[at + (bit >> 3)] |= np.uint8(v)
        if v > np.uint32(255):
            out[at + (bit >> 3) + 1] |= np.uint8(v >> np.uint32(8))


@register_jitable
def unpack(row, bits, codes):  # type: ignore[no-untyped-def]
    """The reverse."""
    n = codes.size
    if bits == 8:
        for i in range(n):
            codes[i] = row[i]
        return
    done = 0
    if bits == 4:
        for i in range(n // 2):
            codes[2 * i] = row[i] & np.uint8(15)
            codes[2 * i + 1] = row[i] >> np.uint8(4)
        done = n // 2 * 2
    elif bits == 2:
        for i in range(n // 4):
            codes[4 * i] = row[i] & np.uint8(3)
            codes[4 * i + 1] = (row[i] >> np.uint8(2)) & np.uint8(3)
            codes[4 * i + 2] = (row[i] >> np.uint8(4)) & np.uint8(3)
            codes[4 * i + 3] = row[i] >> np.uint8(6)
        done = n // 4 * 4
    else:
        for i in range(n // 8):
            b = row[3 * i : 3 * i + 3]
            v = np.uint32(np.uint32(b[0]) | (np.uint32(b[1]) << np.uint32(8)) | (np.uint32(b[2]) << np.uint32(16)))
            for j in range(8):
                codes[8 * i + j] = np.uint8((v >> np.uint32(3 * j)) & np.uint32(7))
        done = n // 8 * 8
    for i in range(done, n):
        bit = i * bits
        v = np.uint32(row[bit >> 3]) >> np.uint32(bit & 7)
        if (bit & 7) + bits > 8:
            v |= np.uint32(row[(bit >> 3) + 1]) << np.uint32(8 - (bit & 7))
        codes[i] = np.uint8(v & np.uint32((1 << bits) - 1))


def _pack_rows(codes, bits, out):  # type: ignore[no-untyped-def]
    """codes: uint8 (rows, columns); out: uint8 (rows, at least the bytes of a packed row), zeros where bits is 8."""
    for r in range(codes.shape[0]):
        pack(codes[r], bits, out[r])


def _unpack_rows(packed, bits, codes):  # type: ignore[no-untyped-def]
    """The reverse."""
    for r in range(codes.shape[0]):
        unpack(packed[r], bits, codes[r])


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(pack rows, unpack rows), compiled or loaded from the cache the first time."""
    read = types.Array(types.uint8, 2, "C", readonly=True, aligned=False)
    how = types.void(read, types.intp, types.Array(types.uint8, 2, "C"))
    return jit.compiled(_pack_rows, how), jit.compiled(_unpack_rows, how)
