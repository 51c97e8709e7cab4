"""Single zstd frames of at most one block: as small as the entropy of their bytes, and safe to decode.

Measured on the exponents of LLM-like bf16 weights (one core; their entropy is 0.330 of the plane):
`ENTROPY` 0.334 at 0.99 GB/s, decoded at 2.6 GB/s; zstd level 1 0.379 at 0.32 and 1.46; level 3 0.407 at 0.20 and 1.15.
Looking for matches costs time, and the sequences of accidental ones cost size and slow the decoder; a table of 64 entries and
matches of 7 bytes leave the runs that are real. Level 3 pays for tables of integers, whose bytes repeat at a distance.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes

BLOCK = 1 << 17  # bytes of a frame: zstd's largest block; exponents of one stay in a core's second-level cache

FrameMethod = Literal["entropy", "matches"]

_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    window_log=17,
    chain_log=6,
    search_log=1,
    target_length=0,  # not a small or negative level: those switch the entropy coding of literals off
)
_MATCHES = zstandard.ZstdCompressionParameters.from_level(3, source_size=BLOCK, window_log=17)


class _Tools(threading.local):
    """One thread's contexts, which must not be shared, and its scratch memory, which is warm."""

    def __init__(self) -> None:
        self.compressors = {
            "entropy": zstandard.ZstdCompressor(compression_params=_ENTROPY),
            "matches": zstandard.ZstdCompressor(compression_params=_MATCHES),
        }
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=BLOCK)
        self.planes = np.empty((0, BLOCK), np.uint8)


_tools = _Tools()


def scratch(planes: int) -> Bytes:
    """This thread's scratch memory, uint8 (planes, BLOCK), of undefined content: to be used up before the caller returns."""
    if len(_tools.planes) < planes:
        _tools.planes = np.empty((planes, BLOCK), np.uint8)
    return _tools.planes[:planes]


def compress(piece: Bytes, method: FrameMethod) -> bytes:
    """`piece` (contiguous, at most `BLOCK` bytes) as a frame that states its content's size."""
    return _tools.compressors[method].compress(piece.data)


def compress_parts(parts: Sequence[Bytes], method: FrameMethod) -> bytes:
    """All parts, one after the other, as one frame, in which each starts a block, hence may have an entropy code of its own.

    Parts are contiguous, of any size. For many small ones a frame each would cost more calls.
    """
    job = _tools.compressors[method].compressobj(size=sum(part.size for part in parts))
    pieces = []
    for part in parts:
        pieces.append(job.compress(part.data))
        pieces.append(job.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    pieces.append(job.flush())
    return b"".join(pieces)


def decompress(frame: Bytes, size: int) -> NDArray[np.uint8]:
    """The `size` bytes that `frame` holds, read-only. `FormatError`, before anything is allocated, where it declares others."""
    view = frame.data
    try:
        if zstandard.frame_content_size(view) != size:
            raise FormatError(f"a zstd frame does not declare the {size} bytes that are expected of it")
        content = _tools.decompressor.decompress(view, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a zstd frame is damaged: {error}") from error
    if len(content) != size:  # an empty or skippable frame
        raise FormatError(f"a zstd frame holds {len(content)} bytes instead of {size}")
    return np.frombuffer(content, np.uint8)
