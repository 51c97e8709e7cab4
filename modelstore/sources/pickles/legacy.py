"""The files that torch wrote before 1.6: five pickles, then the storages one after another, read in their places."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, UnsupportedError
from modelstore.sources.local.reading import ArrayPlace, Files
from modelstore.sources.pickles.archive import MAX_TABLE, FileRange, placed_in
from modelstore.sources.pickles.tensors import ALLOWED, Ref, StorageRef, storage_of
from modelstore.sources.pickles.unpickle import unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_NUMBER = 8  # bytes of the count of elements before each storage


class LegacyArchive:
    """As `Archive`, of the old format. `FormatError` if the file is not valid, or of another format."""

    def __init__(self, opened: Files, path: Path) -> None:
        self._opened = opened
        self._path = path
        self.size = path.stat().st_size
        self._storages: dict[str, StorageRef] = {}
        stream = _BoundedReader(FileRange(opened, path, 0, self.size, MAX_TABLE), min(self.size, MAX_TABLE))
        if self._next(stream) != _MAGIC:
            raise self._bad("not a file of torch.save")
        if self._next(stream) != _PROTOCOL:
            raise self._bad("it was saved in an unknown version of torch's old format")
        system = self._next(stream)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UnsupportedError(f"{path} was saved on a big-endian machine: save it again on another")
        self._saved = self._next(stream)
        keys = self._next(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise self._bad("its list of storages is not valid")
        self._places = self._lie(keys, stream.tell())

    def structure(self) -> Any:
        """See `Archive.structure`."""
        return self._saved

    def place(self, ref: Ref) -> ArrayPlace:
        """See `Archive.place`."""
        if ref.storage not in self._places:
            raise self._bad(f"the file has no storage {ref.storage[:40]!r}")
        return placed_in(ref, self._path, *self._places[ref.storage])

    def _next(self, stream: io.BufferedReader) -> Any:
        return unpickle(stream, ALLOWED, self._storage, inert=True, where=str(self._path))

    def _storage(self, pid: Any) -> StorageRef:
        storage = storage_of(pid)
        known = self._storages.setdefault(storage.key, storage)
        if known != storage:
            raise FormatError(f"the storage {storage.key[:40]!r} has two types")
        return storage

    def _lie(self, keys: list[str], at: int) -> dict[str, tuple[int, int]]:
        """The start of each storage, and its bytes."""
        places: dict[str, tuple[int, int]] = {}
        for key in keys:
            storage = self._storages.get(key)
            if storage is None or key in places:
                raise self._bad(f"its list of storages has {key[:40]!r} twice, or nothing uses it")
            if at + _NUMBER > self.size:
                raise self._bad("the file ends before its storages do: it was cut short")
            count = int.from_bytes(self._opened.bytes(self._path, at, _NUMBER), "little")
            length = count * (storage.dtype.itemsize if storage.dtype else 1)
            at += _NUMBER
            if at + length > self.size:
                raise self._bad(f"the storage {key[:40]!r} of {length} bytes reaches beyond the end: it was cut short")
            places[key] = (at, length)
            at += length
        return places

    def _bad(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what}", object=str(self._path))


class _BoundedReader(io.BufferedReader):
    """A buffered file that reserves no more for a read than the file has."""

    def __init__(self, raw: FileRange, limit: int) -> None:
        super().__init__(raw)
        self._limit = limit

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._limit if size is None or size < 0 else min(size, self._limit))

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(self._limit if size is None or size < 0 else min(size, self._limit))


def is_legacy(head: bytes) -> bool:
    """Whether a file with this start may be of the old format: a pickle of its magic number."""
    return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:32]
