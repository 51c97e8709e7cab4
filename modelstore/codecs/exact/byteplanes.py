"""Values as byte planes in blocks, each piece stored raw or as a zstd frame: what `lossless` and `delta` store.

The bytes are laid out as docs/codecs.md says, for every dtype alike: a header, the stored length of every piece, and block
after block of pieces. A block is the words of 128 KiB of each plane, so that the data between the split, or merge, and zstd
stay in a core's cache, and so that many frames can be decoded in parallel (on GPUs, too).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.exact import frames, plain
from modelstore.codecs.exact import kernels as words
from modelstore.codecs.exact.frames import BLOCK, FrameMethod
from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer, Bytes, as_bytes
from modelstore.format.dtypes import DType

Word: TypeAlias = np.unsignedinteger

VERSION = 1
DIFFERS = 1  # the flag that says that the differences from a base are stored, not the values
HEADER = struct.Struct("<BBBB")  # version, flags, planes, log2 of BLOCK
LOG_BLOCK = BLOCK.bit_length() - 1

TRY = 7.8  # planes of more bits a byte than this (0.975) are stored raw: zstd itself gives up near 0.984
SAMPLE = 64  # words in a run that the estimate looks at
SMALL = 64  # pieces of fewer bytes are stored raw: zstd's tables and header outweigh them
TRIAL = 32 << 10  # bytes of an integer plane that both methods are tried on


@dataclass(frozen=True, slots=True)
class WordShape:
    """How a dtype's lanes are changed before they are split (see `kernels/words`)."""

    width: int
    top: int  # mask of the top byte where the sign is moved below it, else 0
    magnitude: int  # mask of the bits below the sign of sign-magnitude numbers, else 0
    trial: bool  # whether repetitions at a distance are likely enough to be looked for

    @property
    def dtype(self) -> np.dtype[Word]:
        return words.WORDS[self.width]


@lru_cache(maxsize=64)
def words_of(dtype: DType) -> WordShape:
    """The words of a dtype: floats and complex lanes are sign-magnitude, but for the float8 of scales and the packed float4."""
    lane = dtype.lane
    signed = dtype.kind in ("float", "complex") and dtype.name not in ("float8_e8m0fnu", "float4_e2m1fn_x2")
    return WordShape(
        width=lane,
        top=0xFF << (8 * lane - 8) if signed and lane > 1 else 0,
        magnitude=(1 << (8 * lane - 1)) - 1 if signed else 0,
        trial=dtype.kind in ("int", "bool"),
    )


def encode(values: Bytes, dtype: DType, base: Bytes | None = None) -> Bytes:
    """`values` (uint8, 1-d, whole elements) encoded; with a base of the same size, as differences where that is smaller."""
    how = words_of(dtype)
    if not values.size:
        return np.frombuffer(HEADER.pack(VERSION, 0, how.width, LOG_BLOCK), np.uint8)
    lanes = np.ascontiguousarray(values).view(how.dtype)
    none = lanes[:0]
    costs = _costs(lanes, none, how) if base is not None or lanes.size >= SMALL else []
    differs = False
    if base is not None:
        under = np.ascontiguousarray(base).view(how.dtype)
        against = _costs(lanes, under, how)
        differs = sum(against) < sum(costs)
        costs = against if differs else costs
    return _write(lanes, under if differs else none, how, costs)


def estimate(values: Bytes, dtype: DType) -> float:
    """Estimated bits of a word, as `encode` will store it without a base."""
    how = words_of(dtype)
    lanes = np.ascontiguousarray(values).view(how.dtype)
    return sum(cost if cost < TRY else 8.0 for cost in _costs(lanes, lanes[:0], how))


def _costs(lanes: NDArray[Word], base: NDArray[Word], how: WordShape) -> list[float]:
    """Estimated bits a byte of each plane."""
    bits = np.empty(how.width)
    _, _, cost = words.kernels(how.width)
    top = 0 if base.size else how.top
    cost(lanes, base, how.magnitude, top, min(SAMPLE, lanes.size), np.empty((how.width, 256), np.uint32), bits)
    return [min(8.0, b) for b in bits.tolist()]


def _write(lanes: NDArray[Word], base: NDArray[Word], how: WordShape, costs: list[float]) -> Bytes:
    """The encoding of changed lanes, each plane being tried as frames where that is worth it."""
    width, count = how.width, lanes.size
    blocks = -(-count // BLOCK)
    at = HEADER.size + 4 * blocks * width
    out = np.empty(at + count * width, np.uint8)
    lengths: list[int] = []
    split, _, _ = words.kernels(width)
    change = (how.magnitude, 0 if base.size else how.top)
    space = frames.scratch(width)
    nothing: list[FrameMethod | None] = [None] * width
    methods = nothing if count < SMALL else _methods(lanes, base, how, costs)
    for start in range(0, count, BLOCK):
        v, u = lanes[start : start + BLOCK], base[start : start + BLOCK]
        n = v.size
        tried = methods if n >= SMALL else nothing
        split(v, u, *change, _places(tried, at, n), out, space)
        packed = [None if method is None else _smaller(space[p, :n], method) for p, method in enumerate(tried)]
        if packed.count(None) != tried.count(None):  # some did not shrink: make room for them
            split(v, u, *change, _places(packed, at, n), out, space)
        at += packed.count(None) * n
        for frame in packed:
            lengths.append(n if frame is None else len(frame))
            if frame is not None:
                out[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
                at += len(frame)
    head = HEADER.pack(VERSION, DIFFERS if base.size else 0, width, LOG_BLOCK) + struct.pack(
        f"<{len(lengths)}I", *lengths
    )
    out[: len(head)] = np.frombuffer(head, np.uint8)
    # The rest is not given back, unless it is much: an array shrunk in place costs the next call fresh pages.
    return out[:at] if at > out.size // 2 else out[:at].copy()


def _smaller(piece: Bytes, method: FrameMethod) -> bytes | None:
    """The piece as a frame, None if that is not smaller."""
    frame = frames.compress(piece, method)
    return frame if len(frame) < piece.size else None


def _methods(lanes: NDArray[Word], base: NDArray[Word], how: WordShape, costs: list[float]) -> list[FrameMethod | None]:
    """How to compress each plane: by its estimated bits a byte; integers by the result for the first piece."""
    if not how.trial:
        return ["entropy" if cost < TRY else None for cost in costs]
    split, _, _ = words.kernels(how.width)
    n = min(TRIAL, lanes.size)
    space = frames.scratch(how.width)
    split(lanes[:n], base[:n], how.magnitude, 0, np.full(how.width, -1), np.empty(0, np.uint8), space)
    methods: list[FrameMethod | None] = []
    for piece, cost in zip(space[:, :n], costs, strict=True):
        entropy, matches = len(frames.compress(piece, "entropy")), len(frames.compress(piece, "matches"))
        worth = cost < TRY or min(entropy, matches) < 0.98 * n
        methods.append(None if not worth else "matches" if matches < entropy else "entropy")
    return methods


def _places(coded: Sequence[bytes | FrameMethod | None], at: int, size: int) -> NDArray[np.int64]:
    """The place of each raw piece of a block: one after the other from `at`; -1 for those that become frames."""
    places = []
    for how in coded:
        places.append(-1 if how is not None else at)
        at += size if how is None else 0
    return np.array(places, np.int64)


def decode(plane: Buffer, dtype: DType, out: Bytes, base: Bytes | None = None) -> None:
    """Write the values that `plane` encodes into `out`, as `Codec.decode` says. `FormatError` if it is not such an encoding."""
    how = words_of(dtype)
    data = as_bytes(plane)
    data.flags.writeable = False  # of this view; the kernels are compiled for read-only pieces
    width, count = how.width, out.size // how.width
    blocks = -(-count // BLOCK)
    differs = _check_header(data, width, blocks)
    if differs and base is None:
        raise FormatError("an encoded chunk holds differences from a base where values are expected")
    if not count:
        return
    lengths = np.frombuffer(data, "<u4", blocks * width, HEADER.size).reshape(blocks, width).tolist()
    if not differs and blocks == 1 and plain.first.takes(count):
        pieces, _ = _pieces(data, HEADER.size + 4 * width, lengths[0], count)
        out[:] = plain.merge(pieces, how.top).view(np.uint8).reshape(out.shape)
        return
    flat, row, stride = as_words(out, dtype)
    under = np.ascontiguousarray(base).view(how.dtype) if differs and base is not None else flat[:0]
    in_place = differs and under.ctypes.data == out.ctypes.data
    _, merge, _ = words.kernels(width)
    change = (how.magnitude, 0 if differs else how.top)
    at = HEADER.size + 4 * blocks * width
    for b, sizes in enumerate(lengths):
        first = b * BLOCK
        pieces, at = _pieces(data, at, sizes, min(BLOCK, count - first))
        block = under[first : first + BLOCK]
        # A loop that reads and writes the same memory is not vectorised.
        merge(pieces, block.copy() if in_place else block, *change, first, row, stride, flat)
    if flat.flags.owndata:
        out[:] = flat.view(np.uint8).reshape(out.shape)


def _check_header(data: Bytes, width: int, blocks: int) -> bool:
    """Whether differences are stored; `FormatError` unless header and lengths fit so many planes and blocks, and the data."""
    if data.size < HEADER.size + 4 * blocks * width:
        raise FormatError(f"an encoded chunk of {data.size} bytes is too short for its header")
    version, flags, planes, block = HEADER.unpack(data[: HEADER.size].tobytes())
    if version != VERSION:
        raise FormatError(f"an encoded chunk has version {version}; version {VERSION} can be read")
    if flags & ~DIFFERS or planes != width or block != LOG_BLOCK:
        raise FormatError(
            f"an encoded chunk has the header {bytes(data[:4]).hex()}, which does not fit a lane of {width} bytes"
        )
    lengths = np.frombuffer(data, "<u4", blocks * width, HEADER.size)
    expected = HEADER.size + lengths.nbytes + int(lengths.sum(dtype=np.uint64))
    if data.size != expected:
        raise FormatError(f"an encoded chunk has {data.size} bytes where its lengths add up to {expected}")
    return bool(flags & DIFFERS)


def _pieces(data: Bytes, at: int, sizes: list[int], n: int) -> tuple[tuple[Bytes, ...], int]:
    """The pieces of one block, each `n` bytes, and the start of the next block: raw ones come first, then the frames."""
    if max(sizes) > n:
        raise FormatError(f"an encoded chunk has a piece of {max(sizes)} bytes where {n} are the most")
    raw, at = at, at + n * sizes.count(n)
    pieces = []
    for size in sizes:
        if size == n:
            pieces.append(data[raw : raw + n])
            raw += n
        else:
            pieces.append(frames.decompress(data[at : at + size], n))
            at += size
    return tuple(pieces), at


def as_words(out: Bytes, dtype: DType) -> tuple[NDArray[Word], int, int]:
    """(words over all that `out` spans, words of a row, words from row to row); new memory if rows are at odd distances."""
    how = words_of(dtype)
    rows, size = out.shape
    step = out.strides[0]
    if out.flags.c_contiguous:
        return out.reshape(-1).view(how.dtype), out.size // how.width, out.size // how.width
    if out.strides[1] != 1 or step < size or step % how.width:
        return np.empty(out.size // how.width, how.dtype), out.size // how.width, out.size // how.width
    span = np.lib.stride_tricks.as_strided(out, ((rows - 1) * step + size,), (1,))
    return span.view(how.dtype), size // how.width, step // how.width
