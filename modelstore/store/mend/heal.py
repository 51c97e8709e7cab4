"""Packs whose bytes are checked while they are read; a damaged one replaced by a good copy from another store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from blake3 import blake3

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.format.buffers import Pieces, view
from modelstore.format.digest import name_of_pieces
from modelstore.format.objects.record import pack_key
from modelstore.storage.base import Storage

_PIECE = 8 << 20


def pieces(storage: Storage, key: str, size: int, start: int = 0) -> Iterator[bytes]:
    """An object's bytes in pieces of 8 MiB, from `start` on."""
    for at in range(start, size, _PIECE):
        piece = np.empty(min(_PIECE, size - at), np.uint8)
        storage.read(key, at, view(piece))
        yield piece.tobytes()


def checked_pieces(storage: Storage, digest: str, size: int) -> Iterator[bytes]:
    """A pack's bytes in pieces; `CorruptionError` before the last one is given out, where they are not what its name says.

    So a writer of the pieces never has a whole object of wrong bytes.
    """
    key = pack_key(digest)
    hasher = blake3()
    left = size
    for piece in pieces(storage, key, size):
        hasher.update(piece)
        left -= len(piece)
        if not left and hasher.hexdigest() != digest:
            break
        yield piece
    else:
        if size:
            return
    raise CorruptionError(f"{key} in {storage.url} has other bytes than its name stands for", object=key)


def pack_is_good(storage: Storage, digest: str) -> bool:
    """Whether the pack is there and its bytes are what its name says; reads all of it."""
    key = pack_key(digest)
    info = storage.info(key)
    if info is None:
        return False
    try:
        return name_of_pieces(pieces(storage, key, info.size)) == digest
    except (NotFoundError, CorruptionError):
        return False


def replace_pack(storage: Storage, mirror: Storage, digest: str) -> None:
    """Copy a pack from a mirror, where it is whole, over the one in `storage`.

    The name is the digest of the bytes, so readers at work find the same pack, or a good one where it was bad. `NotFoundError`
    or `CorruptionError` if the mirror does not have a good copy.
    """
    key = pack_key(digest)
    info = mirror.info(key)
    if info is None:
        raise NotFoundError(f"{mirror.url} has no object {key}", object=key)
    if not pack_is_good(mirror, digest):
        raise CorruptionError(f"the copy of {key} in {mirror.url} is damaged too", object=key)
    storage.put(key, Pieces(lambda: pieces(mirror, key, info.size)), info.size)
