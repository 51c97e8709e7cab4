"""BLAKE3: what names bytes, and what they are checked against."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

from modelstore.format.buffers import Buffer, as_bytes, view


def digest_of(data: Buffer) -> bytes:
    """The digest of bytes in memory, as tables of chunks hold it."""
    return blake3(data).digest()  # type: ignore[arg-type]  # as in `view`


def matches(data: Buffer, digest: bytes) -> bool:
    """Whether these bytes are those that the digest was made of: the check of whatever is read."""
    return blake3(data).digest() == digest  # type: ignore[arg-type]  # as in `view`


def name_of(*data: Buffer) -> str:
    """The digest of bytes, one after the other, in hexadecimal, as objects are named by it."""
    return name_of_pieces(data)


def name_of_pieces(pieces: Iterable[Buffer]) -> str:
    """The digest, in hexadecimal, of bytes that come in pieces, of which none is held."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(view(as_bytes(piece)))
    return hasher.hexdigest()
