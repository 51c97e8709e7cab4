"""The few words of a region that differ from a base: where they are, and by how much. The encoding of `delta` after a small
step.

Between two steps of training about one value in a hundred changes, in every chunk. The bytes are laid out as docs/codecs.md
says: gaps between changed words, and the differences of their ordinals, each entropy-coded, in groups, so that a decoder needs
the memory of one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.exact import byteplanes, frames, scatter
from modelstore.codecs.exact.byteplanes import Word, words_of
from modelstore.codecs.exact.scatter import MORE
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType

VERSION = 3  # `byteplanes` has 1, `packed` 2
HEADER = struct.Struct("<BBBBQQ")  # version, 1, bytes of a word, log2 of GROUP; words, changed ones
HEAD = struct.Struct("<II")  # of a group: low bits of a gap, bytes of the coded parts of all its gaps
LOG_GROUP = 15
GROUP = 1 << LOG_GROUP  # changed words
TILE = 1 << 20  # words that are compared at once
MOST = 8  # one word in so many: where more changed, byte planes are smaller
CODED = 4  # a gap's coded part is about 2 to that power: the alphabet is small, and its code near the entropy
SMALL = 64  # bytes of a piece: fewer are stored as they are


def encode(values: Bytes, dtype: DType, base: Bytes) -> Bytes | None:
    """The encoding of `values` (uint8, 1-d, whole elements) against a base of the same size; None if too much changed."""
    how = words_of(dtype)
    lanes, under = (np.ascontiguousarray(raw).view(how.dtype) for raw in (values, base))
    at = _changed(lanes, under)
    if at is None:
        return None
    pieces = [HEADER.pack(VERSION, byteplanes.DIFFERS, how.width, LOG_GROUP, lanes.size, at.size)]
    last = -1
    for first in range(0, at.size, GROUP):
        here = at[first : first + GROUP].astype(np.int64)
        gaps = np.diff(here, prepend=last) - 1
        low = _low_bits(gaps)
        coded = _coded(gaps >> low)
        if coded.size > frames.BLOCK:
            return None
        delta = ordinals(lanes[here], how.magnitude) - ordinals(under[here], how.magnitude)
        signs, sizes = _parted(delta)
        streams = [_piece(s) for s in (coded, np.packbits(signs, bitorder="little"), *_planes(sizes, how.width))]
        lengths = struct.pack(f"<{len(streams)}I", *map(len, streams))
        pieces += [HEAD.pack(low, coded.size), lengths, _pack(gaps, low).tobytes(), *streams]
        last = int(here[-1])
    return np.frombuffer(b"".join(pieces), np.uint8)


def decode(plane: Buffer, dtype: DType, out: Bytes, base: Bytes) -> None:
    """Write the base, changed as `plane` says, into `out`, as `Codec.decode` says. `FormatError` if it is not such an
    encoding.
    """
    how = words_of(dtype)
    if out.ctypes.data != base.ctypes.data:
        out[:] = base.reshape(out.shape)
    flat, row, stride = byteplanes.as_words(out, dtype)
    if flat.flags.owndata:
        flat[:] = base.view(how.dtype)
    data, words, last = as_bytes(plane), out.size // how.width, -1
    data.flags.writeable = False  # of this view; the kernel is compiled for read-only pieces
    apply = scatter.apply(how.width)
    for group in _groups(data, how.width, words):
        stored = group.coded, group.low, group.packed, group.signs, group.planes
        last = apply(*stored, how.magnitude, row, stride, last, words, flat)
        if last == scatter.COUNT:
            raise FormatError(f"an encoded chunk has other gaps than those of {group.count} changed words")
        if last < 0:
            raise FormatError(f"an encoded chunk changes word {scatter.BEYOND - last} of {words}")
    if flat.flags.owndata:
        out[:] = flat.view(np.uint8).reshape(out.shape)


# ---------------------------------------------------------------------- where


def _changed(lanes: NDArray[Word], under: NDArray[Word]) -> NDArray[Any] | None:
    """The places of words that differ, ascending; None if more do than are worth it."""
    kind: type[np.uint32 | np.uint64] = (
        np.uint32 if lanes.size <= 1 << 32 else np.uint64
    )  # half the memory, where it will do
    found: list[NDArray[Any]] = [np.empty(0, kind)]
    count = 0
    for first in range(0, lanes.size, TILE):
        at = np.flatnonzero(lanes[first : first + TILE] != under[first : first + TILE])
        count += at.size
        if MOST * count > lanes.size:
            return None
        found.append((at + first).astype(kind))
    return np.concatenate(found)


def _low_bits(gaps: NDArray[np.int64]) -> int:
    """How many low bits of each gap are stored as they are: of gaps at random they are noise."""
    wide = max(0, int(np.log2(max(1.0, float(gaps.mean())))) - CODED)
    return min((wide, 0), key=lambda low: low * gaps.size + _bits(_coded(gaps >> low)))


def _bits(stream: Bytes) -> float:
    """About the bits that a Huffman code takes for a stream of bytes: none has less than one."""
    counts = np.bincount(stream, minlength=256)
    counts = counts[counts > 0]
    return float((counts * np.maximum(1.0, -np.log2(counts / stream.size))).sum())


def _coded(gaps: NDArray[np.int64]) -> Bytes:
    """Numbers as bytes: as many of `MORE` as it has times 255, and what is left."""
    full = gaps // MORE
    ends = np.cumsum(full + 1) - 1
    stream = np.full(int(ends[-1]) + 1, MORE, np.uint8)
    stream[ends] = gaps - full * MORE
    return stream


def _pack(gaps: NDArray[np.int64], low: int) -> Bytes:
    """The low bits of all gaps, one after the other, least significant first."""
    bits = np.empty((gaps.size, low), np.uint8)
    for i in range(low):
        bits[:, i] = gaps >> i & 1
    return np.packbits(bits.reshape(-1), bitorder="little")


# ---------------------------------------------------------------------- by how much


def ordinals(lanes: NDArray[Word], magnitude: int) -> NDArray[Word]:
    """Places in numeric order, of words whose bits below the sign are `magnitude`; and back."""
    kind = lanes.dtype.type
    zero, sign = kind(0), kind(8 * lanes.itemsize - 1)
    found: NDArray[Word] = lanes ^ ((zero - (lanes >> sign)) & kind(magnitude))
    return found


def _parted(delta: NDArray[Word]) -> tuple[Bytes, NDArray[Word]]:
    """Signs (1 where negative) and absolute values less one, of differences that are not 0."""
    kind = delta.dtype.type
    negative = delta >> kind(8 * delta.itemsize - 1)
    return negative.astype(np.uint8), (delta ^ (kind(0) - negative)) - (kind(1) - negative)


def _planes(lanes: NDArray[Word], width: int) -> list[Bytes]:
    """Bytes of words by their place, most significant first."""
    table = lanes.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(table[:, width - 1 - p]) for p in range(width)]


# ---------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class Group:
    """Changed words that are stored together. coded: the upper parts of gaps; packed: their `low` bits; signs, and planes of
    absolute values less one: of the differences."""

    count: int
    low: int
    packed: Bytes
    coded: Bytes
    signs: Bytes
    planes: tuple[Bytes, ...]


def _piece(piece: Bytes) -> bytes:
    """A piece as a zstd frame, or as it is where that is not smaller."""
    frame = frames.compress(piece, "entropy") if piece.size >= SMALL else None
    return piece.tobytes() if frame is None or len(frame) >= piece.size else frame


def _groups(data: Bytes, width: int, words: int) -> Iterator[Group]:
    """The groups of stored bytes, one after the other; `FormatError`, before anything is unpacked, where one cannot be."""
    if data.size < HEADER.size:
        raise FormatError(f"an encoded chunk of {data.size} bytes is too short for its header")
    *head, of, changed = HEADER.unpack(data[: HEADER.size].tobytes())
    if head != [VERSION, byteplanes.DIFFERS, width, LOG_GROUP] or of != words or changed > words:
        raise FormatError(
            f"an encoded chunk has the header {bytes(data[: HEADER.size]).hex()}, which does not fit {words} words of {width} "
            "bytes"
        )
    at = HEADER.size
    for first in range(0, changed, GROUP):
        group, at = _group(data, at, width, min(GROUP, changed - first))
        yield group
    if at != data.size:
        raise FormatError(f"an encoded chunk has {data.size} bytes where its groups take {at}")


def _group(data: Bytes, at: int, width: int, count: int) -> tuple[Group, int]:
    """The group of `count` changed words that starts at a byte, and the start of the next one."""
    streams = 2 + width
    start = at + HEAD.size + 4 * streams
    if data.size < start:
        raise FormatError(f"an encoded chunk of {data.size} bytes is too short for {count} changed words")
    low, coded = HEAD.unpack(data[at : at + HEAD.size].tobytes())
    lengths = np.frombuffer(data, "<u4", streams, at + HEAD.size).tolist()
    sizes = [coded, (count + 7) // 8, *[count] * width]
    packed = (count * low + 7) // 8
    whole = start + packed + sum(lengths)
    fit = low < 48 and count <= coded <= frames.BLOCK and all(a <= b for a, b in zip(lengths, sizes, strict=True))
    if not fit or data.size < whole:
        raise FormatError(f"an encoded chunk of {data.size} bytes has {count} changed words of other lengths")
    pieces, begin = [], start + packed
    for length, size in zip(lengths, sizes, strict=True):
        piece = data[begin : begin + length]
        pieces.append(piece if length == size else frames.decompress(piece, size))
        begin += length
    return Group(count, low, data[start : start + packed], pieces[0], pieces[1], tuple(pieces[2:])), whole
