"""The contract of a storage, and nothing more. Keys are relative, '/'-separated, and validated by the caller."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from modelstore.errors import FormatError
from modelstore.format.buffers import Buffer

LARGEST = 2 << 30  # bytes of an object that is read whole
SMALL = 4 << 20  # bytes of a record, and of the other small objects of a store


def too_large(key: str, size: int, limit: int) -> FormatError:
    """The error of an object that is larger than it can be by its kind."""
    return FormatError(f"object {key} has {size} bytes, at most {limit} are read: run 'modelstore repair'", object=key)


class ObjectInfo(NamedTuple):
    """An object's key, its size in bytes, and when it was last written (Unix seconds by the storage's clock).

    `tag` is another after each change, as far as the backend knows: equal infos are of the same object with the same bytes.
    """

    key: str
    size: int
    modified: float
    tag: str = ""


class Storage(Protocol):
    """Bytes at keys. All methods are synchronous and may be called from many threads in parallel.

    Each raises `NotFoundError` for an absent object, and `StorageError` for anything else that retries did not cure; both name
    the object.
    """

    @property
    def url(self) -> str:
        """The storage's URL, without credentials."""

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        """The whole object, for small ones (records, manifests); `FormatError` if it has more than `limit` bytes.

        That is found out before they are read.
        """

    def read(self, key: str, start: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable, contiguous) with the object's bytes from `start`.

        `CorruptionError` if the object ends before that.
        """

    def create(self, key: str, data: Buffer) -> bool:
        """Make an object that must not be there yet: True if this call made it, False if it was there already.

        Atomic among all writers everywhere: exactly one create of a key ever returns True, and nobody sees a part of it.
        """

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        """Write an object of `size` bytes from its pieces, visible whole or not at all.

        Only for objects whose key names their content: an object that is there is replaced by the same bytes.
        The pieces are taken as they are needed, and not held.
        """

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, None if there is none."""

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` (which is '' or ends in '/'), at any depth, in ascending order of their keys.

        At most the first `limit` of those whose key is greater than `after`, in as few requests as the backend can.
        """

    def folders(self, prefix: str) -> tuple[str, ...]:
        """Names of the immediate sub-folders of `prefix` (which is '' or ends in '/'), ascending."""

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is not an error."""

    @property
    def local(self) -> bool:
        """Whether objects are files of this machine: reading one is a call of the system, and no request."""
        return False

    def path(self, key: str) -> Path | None:
        """The file that is the object, None if the storage is not local."""

    def check_writable(self, what: str) -> None:  # noqa: ARG002
        """Refuse `what`: `UnsupportedError` if it is open for reading only, `StorageError` if this user may not write."""
        return None

    def hold_spare(self) -> None:
        """Hold a little space, where a storage can be full, for the notes of works that free some: as far as there is room."""
        return None

    def use_spare(self) -> bool:
        """Let go of the space that is held; whether there was any."""
        return False

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:  # noqa: ARG002
        """Remove leftovers of interrupted writers that were not touched since `before` (Unix seconds by the storage's clock);
        the removed entries, under names that are not keys. Nobody's work is disturbed. Empty where nothing can be left.
        """
        return ()
