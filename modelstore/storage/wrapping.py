"""A storage around a storage: one place that every operation passes, for retries, counts and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Buffer
from modelstore.storage.base import LARGEST, ObjectInfo, Storage

Verb = Literal["get", "read", "create", "put", "info", "list", "folders", "delete", "sweep"]
WRITES: frozenset[Verb] = frozenset({"create", "put", "delete"})
T = TypeVar("T")


class WrappingStorage(Storage):
    """Passes every operation on to `inner`, through `around`; a listing passes it once for its first object."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        """Do one operation; what a wrapper overrides."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return self.inner.url

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        return self.around("get", key, lambda: self.inner.get(key, limit))

    def read(self, key: str, start: int, out: memoryview) -> None:
        self.around("read", key, lambda: self.inner.read(key, start, out))

    def create(self, key: str, data: Buffer) -> bool:
        return self.around("create", key, lambda: self.inner.create(key, data))

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        self.around("put", key, lambda: self.inner.put(key, pieces, size))

    def info(self, key: str) -> ObjectInfo | None:
        return self.around("info", key, lambda: self.inner.info(key))

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        objects = self.inner.list(prefix, limit=limit, after=after)
        # The request is made when the first object is asked for, so that is what is wrapped.
        first = self.around("list", prefix, lambda: next(objects, None))
        if first is not None:
            yield first
            yield from objects

    def folders(self, prefix: str) -> tuple[str, ...]:
        return self.around("folders", prefix, lambda: self.inner.folders(prefix))

    def delete(self, key: str) -> None:
        self.around("delete", key, lambda: self.inner.delete(key))

    @property
    def local(self) -> bool:
        return self.inner.local

    def path(self, key: str) -> Path | None:
        return self.inner.path(key)

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:
        return self.inner.sweep(before, dry_run=dry_run)

    def check_writable(self, what: str) -> None:
        self.inner.check_writable(what)

    def hold_spare(self) -> None:
        self.inner.hold_spare()

    def use_spare(self) -> bool:
        return self.inner.use_spare()


class ReadOnlyStorage(WrappingStorage):
    """Reads only: every write is an `UnsupportedError`."""

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if verb in WRITES:
            raise UnsupportedError(f"cannot {verb} {key!r}: {self.url} is open for reading only", object=key)
        return act()

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:
        if not dry_run:
            raise UnsupportedError(f"cannot sweep {self.url}: it is open for reading only")
        return super().sweep(before, dry_run=True)

    def hold_spare(self) -> None:
        return None

    def use_spare(self) -> bool:
        return False

    def check_writable(self, what: str) -> None:
        raise UnsupportedError(f"cannot {what}: {self.url} is open for reading only")
