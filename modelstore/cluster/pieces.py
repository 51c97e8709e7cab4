"""The pieces that hosts hold and hand out: chunks' encoded bytes, each named by its digest, with its place in the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from modelstore.format.objects.manifest import DIGEST_BYTES, Manifest
from modelstore.format.objects.record import pack_key
from modelstore.storage.base import Storage
from modelstore.storage.open import open_storage

SECTION = 8 << 20  # bytes of a pack that have one home, so that what it fetches are long ranges


class StoreAddress(msgspec.Struct, frozen=True):
    """A store as another process can open it: its URL, fsspec's options, and the S3 client."""

    url: str
    options: dict[str, Any] = {}
    engine: str | None = None

    def open(self) -> Storage:
        """The storage itself."""
        return open_storage(self.url, self.options, self.engine)


class Piece(NamedTuple):
    """One stored chunk of one plane: BLAKE3 of its bytes (32 bytes), and its place in the store."""

    digest: bytes
    pack: str
    offset: int
    length: int

    @property
    def key(self) -> str:
        """The object that holds it."""
        return pack_key(self.pack)


def pieces(manifest: Manifest, rows: Iterable[int]) -> list[Piece]:
    """Rows of a manifest's chunk table as pieces."""
    pack, offset, length = manifest.pack, manifest.offset, manifest.length
    return [
        Piece(manifest.digest(row), manifest.packs[int(pack[row])], int(offset[row]), int(length[row])) for row in rows
    ]


def section_keys(parts: Sequence[Piece]) -> NDArray[np.uint64]:
    """The keys that pieces are placed by: all that start in one section of a pack have one key. Shape [len(parts)]."""
    packs: dict[str, int] = {}
    made = np.empty(len(parts), np.uint64)
    for at, part in enumerate(parts):
        base = packs.get(part.pack)
        if base is None:
            base = packs[part.pack] = int(part.pack[:16], 16)
        made[at] = (base + (part.offset // SECTION) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return made


def check_digest(digest: bytes) -> bytes:
    """The digest; `ValueError` if it is not 32 bytes."""
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest is {DIGEST_BYTES} bytes, not {digest!r:.80}")
    return digest


def batches(parts: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in batches of about `size` bytes. Pure."""
    batch: list[Piece] = []
    nbytes = 0
    for part in parts:
        batch.append(part)
        nbytes += part.length
        if nbytes >= size:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
