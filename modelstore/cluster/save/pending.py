"""Objects of saves that are under way, in files of shared memory, until the storage has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.format.buffers import Buffer, as_bytes, view
from modelstore.format.digest import name_of_pieces

PART = 32 << 20  # bytes of an object that are sent, or read, at once


@dataclass(slots=True)
class Kept:
    """An object, and whether all of it is there, and on its way to the storage."""

    path: Path
    size: int
    whole: bool = False
    storing: bool = False


class Parts(Sequence[bytes]):
    """A kept object's bytes, read as they are wanted; may be gone through again."""

    def __init__(self, there: Kept) -> None:
        self._there = there

    def __len__(self) -> int:
        return -(-self._there.size // PART)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._there.path.open("rb") as file:
            file.seek(index * PART)
            return file.read(PART)


def write_part(there: Kept, start: int, data: Buffer) -> None:
    """Keep bytes of an object from `start` on."""
    fd = os.open(there.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        at, rest = start, view(as_bytes(data))
        while rest:
            done = os.pwrite(fd, rest, at)
            at, rest = at + done, rest[done:]
    finally:
        os.close(fd)


def digest_of_kept(there: Kept) -> bytes:
    """The BLAKE3 of an object's bytes."""
    parts = Parts(there)
    return bytes.fromhex(name_of_pieces(parts[index] for index in range(len(parts))))
