"""The folder that keeps uploads until a commit takes them: a folder with a bound, of one server, and empty when it starts.

Only commits to the same model may use an upload: knowing the digest of another model's file gives nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from modelstore.errors import StorageError
from modelstore.serve.refusals import RefusedError

_OID = re.compile(r"[0-9a-f]{64}")


class SpoolFile:
    """A file that is being received: counted against the spool's bound, digested as it passes."""

    def __init__(self, spool: UploadSpool, path: Path, most: int) -> None:
        self._spool = spool
        self._most = most
        self._out: BinaryIO = path.open("xb")
        self._sha256 = hashlib.sha256()
        self.path = path
        self.size = 0

    def write(self, piece: bytes) -> None:
        """The next bytes; `RefusedError` where they are more than was said, or than the spool has room for."""
        if self.size + len(piece) > self._most:
            raise RefusedError(413, f"more than the {self._most} bytes that were said")
        self._spool.take(len(piece))
        self.size += len(piece)
        self._sha256.update(piece)
        self._out.write(piece)

    def close(self) -> str:
        """Its SHA-256, once all of it is written."""
        self._out.close()
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Remove it."""
        self._out.close()
        self._spool.drop(self.path)


class UploadSpool:
    """The folder. May be used from many threads; `StorageError` where another server uses it."""

    def __init__(self, folder: Path, most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{folder} is the spool of another server: give each its own, --spool DIR") from None
        self._root = folder / "uploads"
        shutil.rmtree(self._root, ignore_errors=True)  # of a server that was killed: no commit had taken it
        self._root.mkdir()
        self._most = most
        self._used = 0
        self._lock = threading.Lock()
        self.key = os.urandom(32)

    def take(self, size: int) -> None:
        """Count bytes that are about to be written; `RefusedError` where there is no room."""
        with self._lock:
            if self._used + size > self._most:
                raise RefusedError(
                    507, f"the server has no room for more than {self._most} bytes of uploads: try later"
                )
            self._used += size

    def drop(self, path: Path) -> None:
        """Remove a file, and count it no more."""
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        with self._lock:
            self._used -= size

    @contextmanager
    def receive(self, most: int) -> Iterator[SpoolFile]:
        """A new file, of which nothing stays where it is not kept within the block."""
        file = SpoolFile(self, self._root / f"{uuid.uuid4().hex}.part", most)
        try:
            yield file
        finally:
            file.discard()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for a commit, removed with all that is in it."""
        path = self._root / f"{uuid.uuid4().hex}.commit"
        path.mkdir()
        try:
            yield path
        finally:
            for file in path.rglob("*"):
                if file.is_file():
                    self.drop(file)
            shutil.rmtree(path, ignore_errors=True)

    def object(self, model: str, oid: str, part: int | None = None) -> Path:
        """The path of a model's object with that SHA-256, or of one part of it, whether it is there or not."""
        if not _OID.fullmatch(oid):
            raise RefusedError(422, "an oid is 64 hexadecimal digits, of SHA-256")
        folder = self._root / hashlib.sha256(model.encode()).hexdigest()[:32]
        folder.mkdir(exist_ok=True)
        return folder / (oid if part is None else f"{oid}.{part}")

    def keep(self, file: SpoolFile, path: Path) -> None:
        """Give a received file its place. A file that is there already has the same bytes, or is of an earlier try."""
        self.drop(path)
        file.path.rename(path)

    def link(self, path: Path, into: Path) -> None:
        """The same bytes once more, counted once more."""
        into.parent.mkdir(parents=True, exist_ok=True)
        self.take(path.stat().st_size)
        os.link(path, into)

    def close(self) -> None:
        """Leave it to another server."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._lock_file.close()
