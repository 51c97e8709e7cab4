"""Objects in this process's memory: for tests, and for what need not outlive it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from modelstore.errors import NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.format.locks import Lock
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.failures import ends_before
from modelstore.storage.keys import check_key, check_prefix


class _Shelf:
    """The objects under one name, shared by all storages of that name in the process."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.objects: dict[str, tuple[bytes, float]] = {}


_shelves: dict[str, _Shelf] = {}
_shelves_lock = Lock()


class MemoryStorage(Storage):
    """`memory://name`: every storage of one name in a process sees the same objects."""

    def __init__(self, name: str) -> None:
        self._name = name
        with _shelves_lock:
            self._shelf = _shelves.setdefault(name, _Shelf())

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_process, (self._name, os.getpid())

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        try:
            data = self._shelf.objects[check_key(key)][0]
        except KeyError:
            raise NotFoundError(f"no object {key!r} in {self.url}", object=key) from None
        if len(data) > limit:
            raise too_large(key, len(data), limit)
        return data

    def read(self, key: str, start: int, out: memoryview) -> None:
        piece = memoryview(self.get(key))[start : start + out.nbytes]
        if piece.nbytes != out.nbytes:
            raise ends_before(self.url, key, start + out.nbytes)
        out[:] = piece

    def create(self, key: str, data: Buffer) -> bool:
        item = as_bytes(data).tobytes(), time.time()
        with self._shelf.lock:
            return self._shelf.objects.setdefault(check_key(key), item) is item

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        check_key(key)
        data = b"".join(as_bytes(piece).data for piece in pieces)
        if len(data) != size:
            raise StorageError(f"the pieces of {key!r} are {len(data):,} bytes, not {size:,}", object=key)
        with self._shelf.lock:
            self._shelf.objects[key] = data, time.time()

    def info(self, key: str) -> ObjectInfo | None:
        item = self._shelf.objects.get(check_key(key))
        return None if item is None else ObjectInfo(key, len(item[0]), item[1], f"{id(item[0])}")

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._shelf.lock:
            objects = sorted(
                (k, len(d), t, f"{id(d)}") for k, (d, t) in self._shelf.objects.items() if k.startswith(prefix)
            )
        return (ObjectInfo(*item) for item in islice((item for item in objects if item[0] > after), limit))

    def folders(self, prefix: str) -> tuple[str, ...]:
        names = (item.key[len(prefix) :].split("/") for item in self.list(prefix))
        return tuple(sorted({parts[0] for parts in names if len(parts) > 1}))

    def delete(self, key: str) -> None:
        with self._shelf.lock:
            self._shelf.objects.pop(check_key(key), None)

    @property
    def local(self) -> bool:
        return False

    def path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:  # noqa: ARG002  nothing is left
        return ()


def _of_process(name: str, process: int) -> MemoryStorage:
    """The storage for a pickle, in the process that has the objects."""
    if process != os.getpid():
        raise UnsupportedError(
            f"memory://{name} lies in the memory of another process: use a folder or a bucket to share it"
        )
    return MemoryStorage(name)
