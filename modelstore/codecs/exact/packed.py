"""`packed`: top bytes as codes of a fixed width, which decode without an entropy coder. Every dtype, every bit."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs import check
from modelstore.codecs.exact import byteplanes
from modelstore.codecs.weight import WeightCodec
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType
from modelstore.format.region import Shape

VERSION = 2  # `byteplanes` has 1
HEADER = struct.Struct("<BBBB4xQ")  # version, bits of a code, bytes of a word, log2 of a tile's words; whole bytes
LOG_TILE = 11
TILE = 1 << LOG_TILE

BITS = 3
DTYPES = frozenset(
    {"bfloat16", "float32"}
)  # of which the top byte is the exponent: others gain too little (docs/codecs.md)
RATIO = 0.61  # bytes that an exponent of trained weights takes less
SMALL = 1024  # words: fewer are laid out as `lossless` lays them out, which has less beside the values
ROOM = 16  # bytes of nibbles, and whole bytes, are at most one for so many words: with more, the entropy coder is the better one
WORTH = 0.88  # of the size of packed codes: where `lossless` is estimated to come below, as for zeros, it is taken


@dataclass(frozen=True, slots=True)
class FixedRate(WeightCodec):
    """One plane, `data`, laid out as docs/codecs.md says.

    bfloat16 weights take 0.695 to 0.7 of their raw bytes where `lossless` takes 0.667, and decode at more than twice its
    speed. Values that do not become smaller in this way (integers, zeros, noise) have the bytes that `lossless` would give
    them.
    """

    @property
    def name(self) -> str:
        return "packed"

    @property
    def exact(self) -> bool:
        return True

    def planes(self, dtype: DType) -> tuple[str, ...]:  # noqa: ARG002
        return ("data",)

    def refuses(self, shape: Shape, dtype: DType) -> str | None:
        if dtype.name not in DTYPES:
            return f"is {dtype.name}, of which codes of fixed width gain too little"
        return None if math.prod(shape) else "is empty"

    def size(self, shape: Shape, dtype: DType) -> int:
        """An estimate, by what weights come to."""
        return int(math.prod(shape) * (dtype.itemsize - RATIO)) + HEADER.size

    def encode(self, values: Bytes, shape: Shape, dtype: DType, base: Bytes | None = None) -> tuple[Buffer, ...]:  # noqa: ARG002
        check.values(values, shape, dtype)
        if dtype.name not in DTYPES or values.size < SMALL * dtype.lane or _vanishes(values, dtype):
            return (byteplanes.encode(values, dtype),)
        data = _encode(np.ascontiguousarray(values), dtype.lane)
        return (byteplanes.encode(values, dtype) if data is None else data,)

    def decode(
        self,
        planes: Sequence[Buffer],
        shape: Shape,
        dtype: DType,
        out: Bytes,
        base: Bytes | None = None,  # noqa: ARG002
    ) -> None:
        check.out(out, shape, dtype)
        data = as_bytes(check.single(planes))
        if not data.size or data[0] != VERSION:
            byteplanes.decode(data, dtype, out)
            return
        if dtype.name not in DTYPES:
            raise FormatError(f"an encoded chunk has codes of fixed width, which none of {dtype.name} has")
        data.flags.writeable = False  # of this view; the kernels are compiled for read-only planes
        _decode(data, dtype, out)


@dataclass(frozen=True, slots=True)
class TileParts:
    """The parts of an encoding in its bytes: views of it, and nothing beside.

    codes: of all tiles, one after the other; planes: (bytes of a word - 1, words); tops, and the numbers of escapes and of whole
    bytes: one for each tile; rest: nibbles, then whole bytes.
    """

    codes: Bytes
    planes: Bytes
    tops: Bytes
    escapes: NDArray[np.uint16]
    whole: NDArray[np.uint16]
    rest: Bytes


def _fixed(count: int, width: int) -> tuple[int, int, int]:
    """(tiles, bytes of all codes, bytes of an encoding without its escapes) of so many words."""
    tiles = -(-count // TILE)
    last = count - (tiles - 1) * TILE
    codes = BITS * ((tiles - 1) * (TILE // 8) + (last + 63) // 64 * 8) if tiles else 0
    return tiles, codes, HEADER.size + codes + (width - 1) * count + 5 * tiles


def _cut(data: Bytes, count: int, width: int) -> TileParts:
    """The parts of an encoding of so many words; what is left at its end are nibbles and whole bytes."""
    tiles, size, _ = _fixed(count, width)
    ends = np.cumsum([HEADER.size, size, (width - 1) * count, tiles, 2 * tiles, 2 * tiles]).tolist()
    codes, planes, tops, escapes, whole = (data[a:b] for a, b in pairwise(ends))
    planes = planes.reshape(width - 1, count)
    return TileParts(codes, planes, tops, escapes.view("<u2"), whole.view("<u2"), data[ends[-1] :])


def _vanishes(values: Bytes, dtype: DType) -> bool:
    """Whether byte planes are estimated to be so much smaller that codes of a fixed width are not worth their speed."""
    codes = 8 * (dtype.lane - 1) + BITS
    return byteplanes.estimate(values, dtype) < WORTH * codes


def _encode(values: Bytes, width: int) -> Bytes | None:
    """The encoding of whole words; None if it has more escapes than it has room for."""
    from modelstore.codecs.exact.packed_kernels import kernels

    words = values.view(f"<u{width}")
    count = words.size
    _, _, fixed = _fixed(count, width)
    room = count // ROOM
    out = np.empty(fixed + 2 * room, np.uint8)
    parts = _cut(out, count, width)
    encode, _ = kernels(width)
    apart = parts.rest[room:]  # whole bytes, until it is known how many nibbles lie before them
    nibbles, whole = encode(
        words, parts.codes, parts.planes, parts.tops, parts.escapes, parts.whole, parts.rest[:room], apart
    )
    if nibbles < 0:
        return None
    parts.rest[nibbles : nibbles + whole] = apart[:whole]
    out[: HEADER.size] = np.frombuffer(HEADER.pack(VERSION, BITS, width, LOG_TILE, whole), np.uint8)
    return out[: fixed + nibbles + whole]


def _decode(data: Bytes, dtype: DType, out: Bytes) -> None:
    """Write the words of stored bytes into `out`; `FormatError` if they are not such an encoding."""
    from modelstore.codecs.exact.packed_kernels import kernels

    flat, row, stride = byteplanes.as_words(out, dtype)
    count = out.size // dtype.lane
    if not kernels(dtype.lane)[1](data, count, row, stride, flat):
        raise _problem(data, count, dtype.lane)
    if flat.flags.owndata:
        out[:] = flat.view(np.uint8).reshape(out.shape)


def _problem(data: Bytes, count: int, width: int) -> FormatError:
    """What is wrong with stored bytes that are no encoding of so many words."""
    _, _, fixed = _fixed(count, width)
    if data.size < fixed:
        return FormatError(f"an encoded chunk has {data.size} bytes where its codes alone take {fixed}")
    parts = _cut(data, count, width)
    head, whole = data[: HEADER.size].tobytes(), int(parts.whole.sum(dtype=np.uint64))
    if head != HEADER.pack(VERSION, BITS, width, LOG_TILE, whole):
        return FormatError(
            f"an encoded chunk has the header {head.hex()}, which does not fit words of {width} bytes, {whole} of them kept whole"
        )
    rest = whole + int(((parts.escapes + np.uint32(1)) // 2).sum(dtype=np.uint64))
    if parts.rest.size != rest:
        return FormatError(f"an encoded chunk has {parts.rest.size} bytes for its escapes where they take {rest}")
    return FormatError("an encoded chunk has other escapes than it says")
