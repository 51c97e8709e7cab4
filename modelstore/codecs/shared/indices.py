"""Indices below 256, entropy-coded: a plane of its own, whatever codebook they point into.

Byte 0 says how the rest holds the indices, each being `bits` wide, as many as the number of levels needs:

    0   one after another, the first in the lowest bits, without a gap
    1   8 // bits of them a byte, the first in the lowest bits, the bytes encoded as `lossless` does uint8: blocks of
        128 KiB, each a zstd frame where that is smaller. Several indices in a byte are one symbol of its Huffman code,
        which so comes nearer to their entropy and is decoded faster than with one each.

Encoding takes what is smaller.
"""

from __future__ import annotations

import numpy as np

from modelstore.codecs.exact import byteplanes
from modelstore.codecs.kernels.codes import packing
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DTYPES

PACKED, CODED = 0, 1
_UINT8 = DTYPES["uint8"]


def width(levels: int) -> int:
    """Bits of an index below `levels` (1 to 256)."""
    return max(1, (levels - 1).bit_length())


def encode(indices: Bytes, levels: int) -> Bytes:
    """Indices, one a byte and below `levels`, as a plane."""
    bits = width(levels)
    whole = np.empty(-(-indices.size // (8 // bits)), np.uint8)
    packing().pack_whole(indices, bits, whole)
    coded = byteplanes.encode(whole, _UINT8)
    packed = -(-indices.size * bits // 8)
    out = np.empty(1 + min(coded.size, packed), np.uint8)
    if coded.size < packed:
        out[0] = CODED
        out[1:] = coded
    else:
        out[0] = PACKED
        packing().pack_bits(indices, bits, out[1:])
    return out


def decode(plane: Buffer, count: int, levels: int, what: str = "indices") -> Bytes:
    """`count` indices, one a byte, all below `levels`. `FormatError` if the plane holds no such indices."""
    data = as_bytes(plane)
    bits = width(levels)
    if not data.size or data[0] > CODED:
        raise FormatError(f"the plane {what!r} begins with {bytes(data[:1]).hex() or 'nothing'}: 00 or 01 are known")
    indices = np.empty(count, np.uint8)
    if data[0] == CODED:
        whole = np.empty((1, -(-count // (8 // bits))), np.uint8)
        byteplanes.decode(data[1:], _UINT8, whole)
        largest = packing().unpack_whole(whole.reshape(-1), bits, indices)
    else:
        expected = -(-count * bits // 8)
        if data.size - 1 != expected:
            raise FormatError(f"the plane {what!r} has {data.size} bytes where {1 + expected} are expected")
        largest = packing().unpack_bits(data[1:], bits, indices)
    if largest >= levels:
        raise FormatError(f"the plane {what!r} has the index {largest} where there are {levels} levels")
    return indices
