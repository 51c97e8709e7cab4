"""Objects in any fsspec file system; for writing, in those only that can create exclusively."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from modelstore.errors import UnsupportedError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.failures import ends_before, failure, mentions
from modelstore.storage.keys import check_key, check_prefix, key_problem
from modelstore.storage.pieces import fitted, joined

PART = 8 << 20

# File systems whose `pipe_file(mode="create")` was seen, in its source, to be one conditional request. fsspec's own is
# "exists, then write", which lets two writers win; and many that override it (obstore's adapter) ignore the mode.
_EXCLUSIVE = {("s3fs.core", "S3FileSystem")}


def require_exclusive_create(filesystem: Any, protocol: str) -> None:
    """`UnsupportedError`, with what to use instead, unless the file system, or its class, is known to create exclusively."""
    made = filesystem if isinstance(filesystem, type) else type(filesystem)
    if not any((kind.__module__, kind.__name__) in _EXCLUSIVE for kind in made.__mro__):
        raise UnsupportedError(
            f"{protocol}:// cannot hold a store: {made.__name__} is not known to create a file exclusively,"
            " so that two writers could overwrite each other: use s3://, gs://, az:// or a local folder, or only read it"
            " (read_only=True)"
        )


class FsspecStorage(Storage):
    """An fsspec file system under a root path.

    `writer` is the file system that `put` uses: its client may repeat one part of a large object a few times; that of
    `filesystem` should not repeat anything.
    """

    def __init__(self, filesystem: Any, root: str, url: str, writer: Any = None) -> None:
        self._fs = filesystem
        self._writer = filesystem if writer is None else writer
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        path = self._at(key)
        try:
            data = bytes(self._fs.cat_file(path, start=0, end=limit + 1))
        except Exception as error:
            if mentions(error, "InvalidRange"):  # it is empty
                return b""
            raise failure(error, key, "read", self._url) from error
        if len(data) > limit:
            info = self.info(key)
            raise too_large(key, info.size if info else len(data), limit)
        return data

    def read(self, key: str, start: int, out: memoryview) -> None:
        path = self._at(key)
        if not out.nbytes:
            return
        try:
            data = self._fs.cat_file(path, start=start, end=start + out.nbytes)
        except Exception as error:
            if mentions(error, "InvalidRange"):
                raise ends_before(self._url, key, start + out.nbytes) from error
            raise failure(error, key, "read", self._url) from error
        if len(data) != out.nbytes:
            raise ends_before(self._url, key, start + out.nbytes)
        out[:] = data

    def create(self, key: str, data: Buffer) -> bool:
        path = self._at(key)
        try:
            self._fs.pipe_file(path, as_bytes(data).tobytes(), mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            if mentions(error, "PreconditionFailed"):
                return False
            raise failure(error, key, "create", self._url) from error
        return True

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        path = self._at(key)
        if size <= PART:
            data = joined(key, pieces, size)
            try:
                self._writer.pipe_file(path, data)
            except Exception as error:
                raise failure(error, key, "write", self._url) from error
            return
        try:
            file = self._writer.open(path, "wb", block_size=PART, autocommit=False)
        except Exception as error:
            raise failure(error, key, "write", self._url) from error
        try:
            for piece in fitted(key, pieces, size, PART):
                self._send(key, file.write, piece)
            self._send(key, file.close)
            self._send(key, file.commit)
        except BaseException:
            file.closed = True  # or its end would send what it holds
            with suppress(Exception):  # what made us give up is the error to tell
                file.discard()
            raise

    def info(self, key: str) -> ObjectInfo | None:
        path = self._at(key)
        try:
            self._fs.invalidate_cache()
            found = self._fs.info(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise failure(error, key, "look at", self._url) from error
        return None if found.get("type") == "directory" else _info(key, found)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        return islice((item for item in self._list(prefix) if item.key > after), limit)

    def folders(self, prefix: str) -> tuple[str, ...]:
        path = f"{self._root}/{check_prefix(prefix)}".rstrip("/")
        try:
            self._fs.invalidate_cache()
            found = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except Exception as error:
            raise failure(error, prefix, "list", self._url) from error
        names = (item["name"].rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] == "directory")
        return tuple(sorted(name for name in names if key_problem(prefix + name) is None))

    def delete(self, key: str) -> None:
        path = self._at(key)
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise failure(error, key, "delete", self._url) from error

    @property
    def local(self) -> bool:
        return False

    def path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:  # noqa: ARG002  nothing is left
        return ()

    def _send(self, key: str, act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:
            raise failure(error, key, "write", self._url) from error

    def _at(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        # fsspec has no listing by pages: the whole is asked for, whatever the limit.
        try:
            self._fs.invalidate_cache()
            found = self._fs.find(f"{self._root}/{prefix}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return
        except Exception as error:
            raise failure(error, prefix, "list", self._url) from error
        base = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        keys = ((path.removeprefix(base), item) for path, item in found.items() if path.startswith(base))
        for key, item in sorted(keys, key=lambda pair: pair[0]):
            if key.startswith(prefix) and key_problem(key) is None:
                yield _info(key, item)


def _info(key: str, item: dict[str, Any]) -> ObjectInfo:
    modified = next(
        (item[name] for name in ("LastModified", "mtime", "last_modified", "modified") if item.get(name)), 0.0
    )
    return ObjectInfo(
        key, int(item.get("size") or 0), modified.timestamp() if hasattr(modified, "timestamp") else float(modified)
    )
