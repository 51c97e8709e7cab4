"""Decompressors for Zarr chunks that stop where a chunk is larger than its array says, and bounds on whole arrays.

A chunk's compressed bytes name any size, or none: zarr's own codecs make room for whatever comes.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from zarr.abc.codec import ArrayArrayCodec, BytesBytesCodec, Codec
from zarr.codecs import ShardingCodec
from zarr.codecs._v2 import V2Codec
from zarr.core.codec_pipeline import BatchedCodecPipeline

from modelstore.errors import FormatError, UnsupportedError

SLACK = 64 << 10  # bytes of headers and checksums beside a chunk's own
WIDER = 16  # times that a filter (astype, packbits) may store more than the array's own bytes
MAX_INNER = 1 << 22  # chunks of a shard
MAX_CHUNKS = 10_000  # chunks that an array may have however few files hold them
_PIECE = 1 << 20
_WINDOW = 128 << 20  # zstd's default limit


def bound(array: Any) -> None:
    """Give an open array decompressors that stop at the size of its chunks; see `zarr_chunks` for what that may be."""
    inner = array._async_array
    if inner.metadata.zarr_format == 2:
        filters, compressor = inner.metadata.filters, inner.metadata.compressor
        limit = math.prod(array.chunks) * array.dtype.itemsize * (WIDER if filters else 1) + SLACK
        made: Any = V2Codec  # which asks for codecs that encode as well
        codecs: list[Any] = [
            made(
                filters=tuple(_Numcodec(f, limit) for f in filters) if filters else None,
                compressor=_Numcodec(compressor, limit) if compressor else None,
            )
        ]
    else:
        codecs = list(_bounded(inner.metadata.codecs))
    object.__setattr__(inner, "codec_pipeline", BatchedCodecPipeline.from_codecs(codecs))


def check_array(name: str, array: Any, files: int, largest: int) -> None:
    """`FormatError` if an array's chunks are not in proportion to its files: how many, and the largest one's bytes."""
    outer = array.shards or array.chunks
    if any(n < 1 for n in (*outer, *array.chunks)):
        raise FormatError(f"array {name!r} has chunks of shape {array.chunks}, which is not valid", tensor=name)
    inside = math.prod(-(-n // m) for n, m in zip(outer, array.chunks, strict=True))
    if inside > MAX_INNER:
        raise UnsupportedError(
            f"array {name!r} has shards of {inside} chunks, where {MAX_INNER} is the limit: write larger chunks",
            tensor=name,
        )
    metadata = array.metadata
    filtered = (
        metadata.filters if metadata.zarr_format == 2 else any(isinstance(c, ArrayArrayCodec) for c in metadata.codecs)
    )
    most = math.prod(outer) * array.dtype.itemsize * (WIDER if filtered else 2) + 32 * inside + SLACK
    if largest > most:
        raise FormatError(
            f"array {name!r} has a chunk file of {largest} bytes, where its chunks take at most {most}: it is damaged",
            tensor=name,
        )
    chunks = math.prod(-(-n // m) for n, m in zip(array.shape, outer, strict=True))
    if chunks > max(MAX_CHUNKS, 16 * files):
        raise FormatError(
            f"array {name!r} has {chunks} chunks and {files} files that hold any: nearly all of it is missing; write the "
            "array, or larger chunks",
            tensor=name,
        )


def _bounded(codecs: Sequence[Codec]) -> list[Codec]:
    return [_bounded_one(codec, codecs) for codec in codecs]


def _bounded_one(codec: Codec, beside: Sequence[Codec]) -> Codec:
    if isinstance(codec, ShardingCodec):
        return replace(codec, codecs=tuple(_bounded(codec.codecs)))
    name = str(codec.to_dict().get("name", "")).removeprefix("numcodecs.")
    if not isinstance(codec, BytesBytesCodec) or name not in _DECODERS:
        return codec
    return _BoundedCodec(codec, name, any(isinstance(other, (ShardingCodec, ArrayArrayCodec)) for other in beside))


@dataclass(frozen=True)
class _BoundedCodec(BytesBytesCodec):
    """A codec of format 3 whose output is bounded by its chunk."""

    inner: BytesBytesCodec
    name: str
    wider: bool

    is_fixed_size = False

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        limit = size * (WIDER if self.wider else 1) + SLACK
        data = chunk_bytes.as_numpy_array()
        made = await asyncio.to_thread(_DECODERS[self.name], data, limit)
        if made is None:
            return await self.inner._decode_single(chunk_bytes, chunk_spec)
        return chunk_spec.prototype.buffer.from_bytes(made)

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)


class _Numcodec:
    """A codec of format 2 whose output is bounded; it only decodes."""

    def __init__(self, inner: Any, limit: int) -> None:
        self._inner = inner
        self._limit = limit

    def decode(self, data: Any, out: Any = None) -> Any:
        check = _DECODERS.get(self._inner.codec_id)
        made = check(np.frombuffer(data, np.uint8), self._limit) if check else None
        return self._inner.decode(data, out) if made is None else np.frombuffer(made, np.uint8)


def _too_large(limit: int) -> FormatError:
    return FormatError(f"a chunk decompresses to more than the {limit} bytes that it may have")


def _streamed(make: Callable[[], Any]) -> Callable[[NDArray[np.uint8], int], bytes]:
    """Decompress member after member with one of the standard library's decompressors, within a limit."""

    def decode(data: NDArray[np.uint8], limit: int) -> bytes:
        left, pieces, done = data.tobytes(), [], 0
        while left:
            job = make()
            while not job.eof:
                piece = job.decompress(left, min(_PIECE, limit + 1 - done))
                left = job.unconsumed_tail if hasattr(job, "unconsumed_tail") else b""
                if not piece and not left and getattr(job, "needs_input", True) and not job.eof:
                    raise FormatError("a chunk's compressed bytes end too early")
                pieces.append(piece)
                done += len(piece)
                if done > limit:
                    raise _too_large(limit)
            left = job.unused_data.lstrip(b"\0")  # as gzip's own reader passes over padding
        return b"".join(pieces)

    return decode


def _zstd(data: NDArray[np.uint8], limit: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data.tobytes(), read_across_frames=True)
    pieces, done = [], 0
    while piece := reader.read(min(_PIECE, limit + 1 - done)):
        pieces.append(piece)
        done += len(piece)
        if done > limit:
            raise _too_large(limit)
    return b"".join(pieces)


def _lz4(data: NDArray[np.uint8], limit: int) -> None:
    if data.size < 4 or int(data[:4].copy().view("<u4")[0]) > limit:
        raise _too_large(limit)


def _blosc(data: NDArray[np.uint8], limit: int) -> None:
    if data.size < 16 or int(data[12:16].copy().view("<u4")[0]) != data.size:
        raise FormatError("a chunk's blosc frame is cut short")
    if int(data[4:8].copy().view("<u4")[0]) > limit:
        raise _too_large(limit)


# By name: what decodes within a limit, or checks a frame's own word for its size and leaves the decoding to the codec.
_DECODERS: dict[str, Callable[[NDArray[np.uint8], int], bytes | None]] = {
    "gzip": _streamed(lambda: zlib.decompressobj(31)),
    "zlib": _streamed(lambda: zlib.decompressobj(15)),
    "bz2": _streamed(bz2.BZ2Decompressor),
    "lzma": _streamed(lambda: lzma.LZMADecompressor(memlimit=_WINDOW)),
    "zstd": _zstd,
    "lz4": _lz4,
    "blosc": _blosc,
}
