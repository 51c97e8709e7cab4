"""How the ladder's planes are laid out: nibbles in pieces, and what is left of the original beyond its codes.

Numbers are little-endian. A plane of nibbles: version (1 byte), two zeros, log2 of a piece's bytes (17); the length (u32) of
each piece as stored; the pieces, each as it is where it is stored in all its bytes, else a zstd frame. In a piece, nibble 2i
is in the low bits of byte i.

The residual: version, form, `drop` (see `kernels/ladder`), log2 of a block's elements (18). Form 0: the values, as
`lossless` stores them. Form 1:

    zeros, patches                     counts, u32
    three lengths, u32                 of the encodings of the words of code 0, the patches' places, the patches' words
    a length, u32, for each block      of its symbols as stored
    a byte for each block              bit k is set where the symbols of stream k are packed
    the three encodings                as `lossless` stores words of the tensor's dtype, uint32 and again the dtype
    block after block                  symbols: as they are where as many bytes are stored, else a zstd frame; then rests

A block's symbols are seven streams, one after the other: of the codes whose abs has 1 bit, then 2, … 7 or more, each in the
order of elements. A stream of symbols from 120 to 135 only is packed: nibbles, as above, of symbol - 120. Rests are nibbles
for float16, u16 for float32; there are none for bfloat16. If bits are dropped, since the numbers were rounded to bfloat16 or
float16 before, the rests say little: they follow the symbols in their frame, the low bytes of u16 before the high ones.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.exact import byteplanes, frames
from modelstore.codecs.ladder import kernels
from modelstore.codecs.ladder.kernels import LANES, STREAMS, ZERO
from modelstore.codecs.numeric.numbers import Floats
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES, DType

VERSION = 1
PIECE = frames.BLOCK  # bytes of nibbles
BLOCK = 2 * PIECE  # elements
LOG_PIECE, LOG_BLOCK = PIECE.bit_length() - 1, BLOCK.bit_length() - 1
HEADER = struct.Struct("<BBBB")
COUNTS = struct.Struct("<5I")
VALUES, DIFFERENCES = 0, 1
_PATCHES = 16  # more than one in so many elements, and the values are stored as they are
_LEAST = 120  # of the 16 symbols about that of no difference
_POOR = 0.65  # of the raw size: from there on a residual is compared with the values stored as they are

Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Split:
    """How words of a dtype are split: see `kernels/ladder`."""

    number: int
    width: int
    magnitude: int
    infinity: int
    shift: int
    bias: int
    drops: tuple[int, ...] = ()  # bits that numbers of narrower formats do not use

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(f"<u{self.width}")


KINDS = {
    "bfloat16": Split(0, 2, 0x7FFF, 0x7F80, 0, 128),
    "float16": Split(1, 2, 0x7FFF, 0x7C00, 4, 128 * 16 + 8, (3,)),
    "float32": Split(2, 4, 0x7FFFFFFF, 0x7F800000, 16, (128 << 16) + (1 << 15), (16, 13)),
}


def unused(words: Words, kind: Split) -> int:
    """How many of the lowest bits are zero in nearly all words, as far as a sample of them tells."""
    sample = words[:: max(1, words.size >> 12)]
    enough = sample.size - sample.size // 16
    return next((n for n in kind.drops if np.count_nonzero(sample & ((1 << n) - 1) == 0) >= enough), 0)


class Scratch(threading.local):
    """One thread's memory for a block, warm, of undefined content."""

    def __init__(self) -> None:
        self.codes = np.empty(BLOCK, np.uint8)
        self.symbols = np.empty(BLOCK, np.uint8)
        self.streams = np.empty(BLOCK, np.uint8)
        self.places = np.empty(BLOCK, np.uint32)
        self.words = np.empty(2 * BLOCK, np.uint16)
        self.counts = np.empty((LANES, STREAMS), np.int64)

    def of(self, kind: Split, n: int) -> Words:
        """`n` words."""
        if self.words.nbytes < n * kind.width:
            self.words = np.empty(n * kind.width // 2, np.uint16)
        words: Words = self.words.view(kind.dtype)[:n]
        return words


scratch = Scratch()
LENGTHS = np.array([min(7, abs(u - ZERO).bit_length()) for u in range(256)], np.uint8)
LENGTHS.flags.writeable = False


class NibbleWriter:
    """A plane of nibbles in the making."""

    def __init__(self) -> None:
        self._pieces: list[Bytes] = []

    def add(self, piece: Bytes) -> None:
        """The next piece, which is the caller's to change afterwards."""
        self._pieces.append(squeezed(piece))

    def plane(self) -> Bytes:
        """All of it."""
        lengths = np.array([piece.size for piece in self._pieces], "<u4").view(np.uint8)
        head = np.frombuffer(HEADER.pack(VERSION, 0, 0, LOG_PIECE), np.uint8)
        return np.concatenate([head, lengths, *self._pieces])


class NibbleReader:
    """The pieces of a plane of nibbles. `FormatError` if it is none of `count` nibbles."""

    def __init__(self, data: Bytes, count: int, name: str) -> None:
        self._data, self._count, self._name = data, count, name
        pieces = -(-count // BLOCK)
        if data.size < HEADER.size + 4 * pieces:
            raise FormatError(f"the plane {name!r} has {data.size} bytes, too few for its header")
        if data[: HEADER.size].tobytes() != HEADER.pack(VERSION, 0, 0, LOG_PIECE):
            raise FormatError(f"the plane {name!r} begins with {data[:4].tobytes().hex()}, which is not known")
        lengths = data[HEADER.size : HEADER.size + 4 * pieces].view("<u4").astype(np.int64)
        self._ends = HEADER.size + 4 * pieces + np.cumsum(lengths)
        self._lengths = lengths
        end = int(self._ends[-1]) if pieces else HEADER.size
        if end != data.size:
            raise FormatError(f"the plane {name!r} has {data.size} bytes where its lengths add up to {end}")

    def piece(self, index: int) -> Bytes:
        """The nibbles of a block, packed."""
        size = -(-min(BLOCK, self._count - index * BLOCK) // 2)
        end, length = int(self._ends[index]), int(self._lengths[index])
        return expanded(self._data[end - length : end], size, self._name)


def squeezed(piece: Bytes) -> Bytes:
    """A piece as a frame, if that is worth it, else a copy of it."""
    if piece.size >= byteplanes.SMALL and _bits(piece) < byteplanes.TRY:
        frame = frames.compress(piece, "entropy")
        if len(frame) < piece.size:
            return np.frombuffer(frame, np.uint8)
    return piece.copy()


def expanded(stored: Bytes, size: int, name: str) -> Bytes:
    """The `size` bytes that are stored as they are or as a frame."""
    if stored.size > size:
        raise FormatError(f"the plane {name!r} has a piece of {stored.size} bytes where {size} are the most")
    return stored if stored.size == size else frames.decompress(stored, size)


def _bits(piece: Bytes) -> float:
    """Entropy of a sample of the bytes, in bits."""
    sample = piece[:: max(1, piece.size >> 12)]
    counts = np.bincount(sample, minlength=256)
    share = counts[counts > 0] / sample.size
    return float(-(share * np.log2(share)).sum()) + (share.size - 1) * (0.72 / sample.size + 4 / piece.size)


class ResidualWriter:
    """The residual in the making, block after block."""

    def __init__(self, kind: Split, words: Words) -> None:
        self._kind, self._count = kind, words.size
        self.drop = unused(words, kind)
        self._symbols: list[Bytes] = []
        self._packed: list[int] = []
        self._rests: list[Bytes] = []
        self._zeros: list[Words] = []
        self._places: list[NDArray[np.uint32]] = []
        self._patches: list[Words] = []
        self._patched = 0

    @property
    def hopeless(self) -> bool:
        """Whether there are so many patches that the values are better stored as they are."""
        return self._patched > self._count // _PATCHES

    def patches(self, places: NDArray[np.uint32], words: Words, first: int, count: int) -> None:
        """The patches of a block that starts at element `first`: some of them, if there are more than there is room for."""
        self._patched += count
        if count:
            self._places.append(places[:count] + np.uint32(first))
            self._patches.append(words[:count].copy())

    def block(self, codes: Bytes, symbols: Bytes, rests: Words, values: Words) -> None:
        """A block's symbols and rests, and the words of its codes 0."""
        work = kernels.kernels(self._kind.width)
        work.count(codes, scratch.counts)
        cursors, sizes = starts(scratch.counts)
        streams = scratch.streams[: codes.size]
        work.scatter(codes, symbols, LENGTHS, cursors, streams)
        self._zeros.append(values[np.flatnonzero(codes == ZERO)])
        parts, packed = [], 0
        for k, part in enumerate(np.split(streams, np.cumsum(sizes[:-1]))[1:], start=1):
            if part.size and part.min() >= _LEAST and part.max() < _LEAST + 16:
                parts.append(packed_nibbles(part - np.uint8(_LEAST)))
                packed |= 1 << k
            elif part.size:
                parts.append(part)
        if self._kind.number == 1:
            rest = [packed_nibbles(rests.astype(np.uint8))]
        else:
            rest = [rests.astype("<u2").view(np.uint8)] if self._kind.number else []
        if self.drop:
            parts += halves(rest[0]) if self._kind.number == 2 else rest
        else:
            self._rests += rest
        frame = np.frombuffer(frames.compress_parts(parts, "entropy") if parts else b"", np.uint8)
        self._symbols.append(frame if frame.size < sum(part.size for part in parts) else _join(*parts))
        self._packed.append(packed)

    def plane(self, values: Bytes, dtype: DType) -> Bytes:
        """All of it; or the values, where that is smaller."""
        plain = HEADER.pack(VERSION, VALUES, 0, LOG_BLOCK)
        if self.hopeless:
            return _join(plain, byteplanes.encode(values, dtype))
        zeros = _concatenated(self._zeros, self._kind.dtype)
        patches = _concatenated(self._patches, self._kind.dtype)
        places = _concatenated(self._places, np.dtype(np.uint32))
        sides = [
            byteplanes.encode(array.view(np.uint8), how)
            for array, how in ((zeros, dtype), (places, DTYPES["uint32"]), (patches, dtype))
        ]
        head = HEADER.pack(VERSION, DIFFERENCES, self.drop, LOG_BLOCK)
        head += COUNTS.pack(zeros.size, patches.size, *(side.size for side in sides))
        lengths = np.array([symbols.size for symbols in self._symbols], "<u4").view(np.uint8)
        body: list[Bytes] = []
        for b, symbols in enumerate(self._symbols):
            body.append(symbols)
            body += self._rests[b : b + 1]
        packed = np.array(self._packed, np.uint8)
        size = sum(map(len, (head, lengths, packed, *sides, *body)))
        if size > _POOR * values.size:
            apart = byteplanes.encode(values, dtype)
            if apart.size + HEADER.size < size:
                return _join(plain, apart)
        return _join(head, lengths, packed, *sides, *body)


def starts(counts: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(the start of each quarter in each stream, (LANES, STREAMS); the streams' sizes). Streams follow each other."""
    sizes = counts.sum(axis=0)
    first = np.cumsum(sizes) - sizes
    return np.ascontiguousarray(first + np.cumsum(counts, axis=0) - counts, np.uint64), sizes


def halves(pairs: Bytes) -> list[Bytes]:
    """The first, then the second bytes of all pairs."""
    return [np.ascontiguousarray(pairs[::2]), np.ascontiguousarray(pairs[1::2])]


def packed_nibbles(values: Bytes) -> Bytes:
    """Bytes below 16, packed."""
    low = np.empty(-(-values.size // 2), np.uint8)
    kernels.kernels(2).pack(values, np.empty_like(low), low)
    return low


def _concatenated(arrays: list[Words], dtype: np.dtype[np.unsignedinteger]) -> Words:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _join(*pieces: bytes | Bytes) -> Bytes:
    if not pieces:
        return np.empty(0, np.uint8)
    return np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])


class ResidualReader:
    """Gives blocks their original words. `FormatError` if the plane is not a residual of `count` words."""

    def __init__(self, data: Bytes, kind: Split, dtype: DType, count: int) -> None:
        self._data, self._kind, self._count = data, kind, count
        self._drop = int(data[2])
        if self._drop not in (0, *kind.drops):
            raise FormatError(f"the plane 'residual' drops {self._drop} bits, which is not known")
        blocks = -(-count // BLOCK)
        at = HEADER.size + COUNTS.size + 5 * blocks
        if data.size < at:
            raise FormatError(f"the plane 'residual' has {data.size} bytes, too few for its header")
        zeros, patches, *sides = COUNTS.unpack(data[HEADER.size : HEADER.size + COUNTS.size].tobytes())
        if zeros > count or patches > count:
            raise FormatError(f"the plane 'residual' has {zeros} zeros and {patches} patches of {count} elements")
        lengths = data[at - 5 * blocks : at - blocks].view("<u4").astype(np.int64)
        self._packed = data[at - blocks : at].tolist()
        rests = 0 if self._drop else sum(_rest_bytes(kind, min(BLOCK, count - b)) for b in range(0, count, BLOCK))
        expected = at + sum(sides) + int(lengths.sum()) + rests
        if data.size != expected:
            raise FormatError(f"the plane 'residual' has {data.size} bytes where its lengths add up to {expected}")
        self._lengths = lengths.tolist()
        read: list[Words] = []
        for size, n, how in zip(sides, (zeros, patches, patches), (dtype, DTYPES["uint32"], dtype), strict=True):
            out = np.empty(n, f"<u{how.itemsize}")
            byteplanes.decode(data[at : at + size], how, out.view(np.uint8).reshape(1, -1))
            read.append(out)
            at += size
        self._zeros, self._places, self._patches = read
        if (self._places >= count).any():
            raise FormatError("the plane 'residual' has a patch outside its elements")
        self._at, self._zero = at, 0

    def block(self, index: int, codes: Bytes, out: Words, grid: tuple[int, int, int, int, Floats]) -> None:
        """The next block's words, into `out`. `grid`: kind, first element, columns, group and scales, as kernels take them."""
        work = kernels.kernels(self._kind.width)
        n = codes.size
        work.count(codes, scratch.counts)
        cursors, sizes = starts(scratch.counts)
        end = self._at + self._lengths[index]
        apart = _rest_bytes(self._kind, n)
        streams, rest = self._streams(self._data[self._at : end], sizes.tolist(), self._packed[index], apart)
        self._at = end + (0 if self._drop else apart)
        symbols, places = scratch.symbols[:n], np.flatnonzero(codes == ZERO)
        work.gather(codes, streams, LENGTHS, cursors, symbols)
        rests = self._rests(rest if self._drop else self._data[end : self._at], n)
        work.join(codes, symbols, rests, *grid, self._kind.shift, self._kind.bias, self._drop, out)
        zeros = self._zeros[self._zero : self._zero + places.size]
        if zeros.size != places.size:
            raise FormatError(f"the plane 'residual' has {self._zeros.size} zeros; its codes have more")
        self._zero += places.size
        out[places] = zeros
        first = index * BLOCK
        here = (self._places >= first) & (self._places < first + n)
        if here.any():
            out[self._places[here] - np.uint32(first)] = self._patches[here]

    def end(self) -> None:
        """After the last block: all must be used up."""
        if self._zero != self._zeros.size:
            raise FormatError(f"the plane 'residual' has {self._zeros.size} zeros; its codes have {self._zero}")

    def _streams(self, stored: Bytes, sizes: list[int], packed: int, rest: int) -> tuple[Bytes, Bytes]:
        """All streams, one after the other, of stream 0, which is none, any bytes; and what follows, `rest` bytes at most."""
        packs = [0, *(-(-n // 2) if packed >> k & 1 else n for k, n in enumerate(sizes[1:], start=1))]
        data = expanded(stored, sum(packs) + (rest if self._drop else 0), "residual")
        streams = scratch.streams[: sum(sizes)]
        to, at = sizes[0], 0
        for k in range(1, STREAMS):
            part, piece = streams[to : to + sizes[k]], data[at : at + packs[k]]
            if packed >> k & 1:
                kernels.kernels(2).unpack(piece, piece[:0], part)
                part += np.uint8(_LEAST)
            else:
                part[:] = piece
            to, at = to + sizes[k], at + packs[k]
        return streams, data[at:]

    def _rests(self, data: Bytes, n: int) -> Words:
        if self._kind.number == 2 and self._drop:
            both: Words = data[:n].astype("<u4") | (data[n:].astype("<u4") << np.uint32(8))
            return both
        if self._kind.number == 2:
            return data.view("<u2").astype("<u4")
        if self._kind.number == 1:
            nibbles = scratch.streams[:n]
            kernels.kernels(2).unpack(data, data[:0], nibbles)
            return nibbles.astype("<u2")
        return np.empty(0, self._kind.dtype)


def _rest_bytes(kind: Split, n: int) -> int:
    """Bytes that the rests of `n` words take."""
    return (0, -(-n // 2), 2 * n)[kind.number]


def is_values(data: Bytes) -> bool:
    """Whether a residual holds the values themselves. `FormatError` if it is of no form that is known."""
    head = data[: HEADER.size].tobytes()
    known = [
        HEADER.pack(VERSION, VALUES, 0, LOG_BLOCK),
        *(HEADER.pack(VERSION, DIFFERENCES, n, LOG_BLOCK) for n in range(32)),
    ]
    if head not in known:
        raise FormatError(f"the plane 'residual' begins with {head.hex()}, which is not known")
    return head[1] == VALUES
