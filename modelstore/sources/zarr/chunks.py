"""Decoded Zarr chunks, kept for a while: one may hold many of the regions that are asked for, one after another."""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from modelstore.format.region import Region, Shape, intersect

KEPT = 512 << 20  # bytes of decoded chunks; the latest is kept however large it is
LARGE = 64 << 20  # larger chunks are decoded one at a time, so that threads do not add up
_STRIPES = 8

ChunkPlace = tuple[str, Region]
Array = NDArray[Any]


class Chunks:
    """Decoded chunks by name and region, the least recently used forgotten first; safe for threads."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._kept: OrderedDict[ChunkPlace, Array] = OrderedDict()
        self._bytes = 0
        self._table = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._one = threading.Lock()

    def get(self, key: ChunkPlace, size: int, decode: Callable[[], Array]) -> Array:
        """The chunk of that key, decoded once however many threads ask; `size` is its bytes."""
        with self._one if size > LARGE else self._stripes[hash(key) % _STRIPES]:
            with self._table:
                found = self._kept.get(key)
                if found is not None:
                    self._kept.move_to_end(key)
                    return found
                if size > LARGE:
                    self._make_room(size)
            found = decode()
            with self._table:
                self._make_room(found.nbytes)
                self._kept[key] = found
                self._bytes += found.nbytes
            return found

    def clear(self) -> None:
        with self._table:
            self._kept.clear()
            self._bytes = 0

    def _make_room(self, size: int) -> None:
        while self._kept and self._bytes + size > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def overlapping(region: Region, shape: Shape, chunks: Sequence[int]) -> Iterator[tuple[Region, Region]]:
    """The chunks of a regular grid that a region touches, each with what they share."""
    spans = [range(a // n, -(-b // n)) for (a, b), n in zip(region, chunks, strict=True)]
    for index in itertools.product(*spans):
        box = tuple((i * n, min((i + 1) * n, end)) for i, n, end in zip(index, chunks, shape, strict=True))
        shared = intersect(box, region)
        if shared is not None:
            yield box, shared


def chunk_bytes(chunks: Sequence[int], itemsize: int) -> int:
    """The bytes of a whole chunk."""
    return math.prod(chunks) * itemsize
