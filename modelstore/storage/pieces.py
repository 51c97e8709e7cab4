"""Pieces of an object on their way into it: their sum checked, their size fitted to a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from modelstore.errors import StorageError
from modelstore.format.buffers import Buffer, as_bytes


def fitted(key: str, pieces: Iterable[Buffer], size: int, largest: int) -> Iterator[memoryview]:
    """The same bytes in views of at most `largest`; `StorageError`, before the last is used, unless they are `size` bytes."""
    total = 0
    for piece in pieces:
        view = as_bytes(piece).data
        total += view.nbytes
        if total > size:
            break
        for start in range(0, view.nbytes, largest):
            yield view[start : start + largest]
    if total != size:
        more = "more than" if total > size else f"{total:,} bytes, not"
        raise StorageError(f"the pieces of {key!r} are {more} {size:,} bytes", object=key)


def joined(key: str, pieces: Iterable[Buffer], size: int) -> bytes:
    """All pieces in one; for small objects, which are sent in one request."""
    return b"".join(fitted(key, pieces, size, max(size, 1)))
