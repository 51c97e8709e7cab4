"""Codes (one small integer a byte) packed into few bits and back, and values gathered by them from tables.

Nothing is checked here: callers in `codecs` guarantee every length, and that codes are within their tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit


def _pack_bits(codes, bits, out):  # type: ignore[no-untyped-def]
    """Codes of `bits` each, one after another, the first in the lowest bits. out: uint8 (ceil(n * bits / 8),)."""
    held = np.uint64(0)
    filled = 0
    at = 0
    for i in range(codes.size):
        held |= np.uint64(codes[i]) << np.uint64(filled)
        filled += bits
        while filled >= 8:
            out[at] = np.uint8(held & np.uint64(255))
            at += 1
            held >>= np.uint64(8)
            filled -= 8
    if filled:
        out[at] = np.uint8(held)


def _unpack_bits(packed, bits, codes):  # type: ignore[no-untyped-def]
    """The reverse; the largest code."""
    held = np.uint64(0)
    filled = 0
    at = 0
    mask = np.uint64((1 << bits) - 1)
    largest = np.uint8(0)
    for i in range(codes.size):
        while filled < bits:
            held |= np.uint64(packed[at]) << np.uint64(filled)
            at += 1
            filled += 8
        codes[i] = np.uint8(held & mask)
        held >>= np.uint64(bits)
        filled -= bits
        largest = max(largest, codes[i])
    return largest


def _pack_whole(codes, bits, out):  # type: ignore[no-untyped-def]
    """8 // bits codes a byte, the first in the lowest bits. out: uint8 (ceil(n / (8 // bits)),)."""
    per = 8 // bits
    full = codes.size // per
    for i in range(full):
        byte = np.uint8(0)
        for j in range(per):
            byte |= np.uint8(codes[i * per + j] << np.uint8(j * bits))
        out[i] = byte
    if full * per < codes.size:
        byte = np.uint8(0)
        for j in range(codes.size - full * per):
            byte |= np.uint8(codes[full * per + j] << np.uint8(j * bits))
        out[full] = byte


def _unpack_whole(packed, bits, codes):  # type: ignore[no-untyped-def]
    """The reverse; the largest code."""
    per = 8 // bits
    full = codes.size // per
    mask = np.uint8((1 << bits) - 1)
    largest = np.uint8(0)
    for i in range(full):
        for j in range(per):
            code = np.uint8(packed[i] >> np.uint8(j * bits)) & mask
            codes[i * per + j] = code
            largest = max(largest, code)
    for j in range(codes.size - full * per):
        code = np.uint8(packed[full] >> np.uint8(j * bits)) & mask
        codes[full * per + j] = code
        largest = max(largest, code)
    return largest


def _pack_trits(codes, out):  # type: ignore[no-untyped-def]
    """Five codes of 0 to 2 a byte, the first the lowest digit to base 3. out: uint8 (ceil(n / 5),)."""
    full = codes.size // 5
    for i in range(full):
        c = codes[5 * i : 5 * i + 5]
        out[i] = np.uint8(c[0] + 3 * c[1] + 9 * c[2] + 27 * c[3] + 81 * c[4])
    if 5 * full < codes.size:
        byte = 0
        for i in range(codes.size - 1, 5 * full - 1, -1):
            byte = 3 * byte + codes[i]
        out[full] = np.uint8(byte)


def _unpack_trits(packed, codes):  # type: ignore[no-untyped-def]
    """The reverse; the largest code. Bytes are below 243."""
    full = codes.size // 5
    largest = np.uint8(0)
    for i in range(full):
        byte = np.uint16(packed[i])
        for j in range(5):
            rest = np.uint16(byte * np.uint32(171) >> np.uint32(9))  # byte // 3
            codes[5 * i + j] = np.uint8(byte - np.uint16(3) * rest)
            byte = rest
        largest = max(largest, np.uint8(2))
    if 5 * full < codes.size:
        last = np.uint16(packed[full])
        for i in range(5 * full, codes.size):
            rest = np.uint16(last * np.uint32(171) >> np.uint32(9))
            codes[i] = np.uint8(last - np.uint16(3) * rest)
            last = rest
    return largest


def _gather(codes, tables, columns, group, first, out):  # type: ignore[no-untyped-def]
    """out[i] = tables[group of element first + i, codes[i]], of a matrix whose rows are cut into groups of columns.

    tables: words (rows * groups of a row, levels); out: words (n,).
    """
    groups = (columns + group - 1) // group
    row = first // columns
    column = first - row * columns
    done = 0
    while done < codes.size:
        within = column // group
        end = min(columns, (within + 1) * group)
        n = min(codes.size - done, end - column)
        table = tables[row * groups + within]
        c = codes[done : done + n]
        o = out[done : done + n]
        for i in range(n):
            o[i] = table[c[i]]
        done += n
        column += n
        if column == columns:
            column = 0
            row += 1


def _lookup(words, table, out):  # type: ignore[no-untyped-def]
    """out[i] = table[words[i]]: a code for every pattern of bits. words: unsigned; table: uint8, one entry a pattern."""
    for i in range(words.size):
        out[i] = table[words[i]]


def _assign(numbers, table, bounds, out):  # type: ignore[no-untyped-def]
    """out[i] = how many of `bounds` (float32, ascending) are below numbers[i] (float32, no NaN).

    table: uint8 (65536,), by the upper half of a number's bits how many bounds are below all numbers that share it.
    """
    bits = numbers.view(np.uint32)
    for i in range(numbers.size):
        code = np.int64(table[bits[i] >> np.uint32(16)])
        while code < bounds.size and bounds[code] < numbers[i]:
            code += 1
        out[i] = np.uint8(code)


@dataclass(frozen=True, slots=True)
class PackingKernels:
    """The compiled kernels that do not depend on a dtype."""

    pack_bits: Callable[..., Any]
    unpack_bits: Callable[..., Any]
    pack_whole: Callable[..., Any]
    unpack_whole: Callable[..., Any]
    pack_trits: Callable[..., Any]
    unpack_trits: Callable[..., Any]
    assign: Callable[..., Any]


@cache
def packing() -> PackingKernels:
    """Kernels on codes, compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, readonly: bool = False) -> Any:
        return types.Array(item, 1, "C", readonly=readonly, aligned=False)

    read, write = array(types.uint8, True), array(types.uint8)
    numbers = array(types.float32, True)
    pack, unpack = types.void(read, types.intp, write), types.uint8(read, types.intp, write)
    return PackingKernels(
        jit.compiled(_pack_bits, pack),
        jit.compiled(_unpack_bits, unpack),
        jit.compiled(_pack_whole, pack),
        jit.compiled(_unpack_whole, unpack),
        jit.compiled(_pack_trits, types.void(read, write)),
        jit.compiled(_unpack_trits, types.uint8(read, write)),
        jit.compiled(_assign, types.void(numbers, read, numbers, write)),
    )


@cache
def gather(width: int) -> Callable[..., Any]:
    """`_gather` for words of `width` bytes."""
    from numba import types

    word: Any = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[width]
    codes = types.Array(types.uint8, 1, "C", readonly=True, aligned=False)
    tables = types.Array(word, 2, "C", readonly=True, aligned=False)
    out = types.Array(word, 1, "C", aligned=False)
    return jit.compiled(_gather, types.void(codes, tables, types.intp, types.intp, types.intp, out))


@cache
def lookup(width: int) -> Callable[..., Any]:
    """`_lookup` for words of `width` bytes, 1 or 2."""
    from numba import types

    word: Any = {1: types.uint8, 2: types.uint16}[width]
    words = types.Array(word, 1, "C", readonly=True, aligned=False)
    table = types.Array(types.uint8, 1, "C", readonly=True, aligned=False)
    return jit.compiled(_lookup, types.void(words, table, types.Array(types.uint8, 1, "C", aligned=False)))
