"""SHA-256 and git's digest of files, found once for each content and kept in a small database, which is bounded.

A file that does not exist is named by what it is made of (`ExportedFile.digest`); what others call it by needs all of its bytes.
Nothing is guessed: what was not found yet is not told.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelstore.execute.export.view import ExportedFile

SMALL = 10_000_000  # bytes of a file that the Hub holds in git; larger ones, and weights, are named by their SHA-256
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_ROWS = 500_000
_TABLE = "CREATE TABLE IF NOT EXISTS digests (etag TEXT PRIMARY KEY, size INTEGER, sha256 TEXT, git TEXT)"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's names for git and the Hub: SHA-256, and git's id of the file itself, or of the pointer to a large one."""

    sha256: str
    git: str


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file outside of git."""
    return size > SMALL or path.endswith(_WEIGHTS)


def pointer(sha256: str, size: int) -> bytes:
    """The pointer that git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class FileHash:
    """Digests of a file's bytes as they pass, in order."""

    def __init__(self, path: str, size: int) -> None:
        self._large, self._size, self._seen = is_large(path, size), size, 0
        self._sha256 = hashlib.sha256()
        self._git = None if self._large else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, piece: bytes | memoryview) -> None:
        """The file's next bytes."""
        self._seen += len(piece)
        self._sha256.update(piece)
        if self._git is not None:
            self._git.update(piece)

    def found(self) -> FileDigest | None:
        """The digests, once all bytes have passed."""
        if self._seen != self._size:
            return None
        sha256 = self._sha256.hexdigest()
        git = self._git
        if git is None:
            text = pointer(sha256, self._size)
            git = hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False)
        return FileDigest(sha256, git.hexdigest())


class Digests:
    """Known digests, in a file that several servers may share; and the thread that finds more, one file at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "digests.sqlite"
        self._lock = threading.Lock()
        self._finding: dict[str, Future[None]] = {}
        self._queue: list[ExportedFile] = []
        self._closed = False
        self._do(_TABLE)

    def _do(self, statement: str, *values: object) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(self._path, timeout=30)) as database, database:
            return database.execute(statement, values).fetchall()

    def known(self, file: ExportedFile) -> FileDigest | None:
        """The known digests of a file, without reading it."""
        rows = self._do("SELECT sha256, git FROM digests WHERE etag = ? AND size = ?", _key(file), file.size)
        return FileDigest(*rows[0]) if rows else None

    def keep(self, file: ExportedFile, found: FileDigest) -> None:
        """Remember what a file's bytes were found to be; the oldest rows make room."""
        self._do("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", _key(file), file.size, found.sha256, found.git)
        self._do("DELETE FROM digests WHERE rowid <= (SELECT max(rowid) FROM digests) - ?", _ROWS)

    def find(self, file: ExportedFile) -> FileDigest:
        """A file's digests: those known, else those of its bytes, which are made for it."""
        known = self.known(file)
        if known is not None:
            return known
        made = FileHash(file.path, file.size)
        for piece in file.stream():
            made.update(piece)
            if self._closed:
                raise InterruptedError("the server ends")
        found = made.found()
        assert found is not None, "a stream gives all bytes"
        self.keep(file, found)
        return found

    def order(self, files: Iterable[ExportedFile]) -> list[Future[None]]:
        """Have digests of files found in a thread of their own, one after the other, each once."""
        with self._lock:
            asked = []
            for file in files:
                if file.digest not in self._finding:
                    self._finding[file.digest] = Future()
                    self._queue.append(file)
                    if len(self._finding) == 1:
                        threading.Thread(target=self._work, name="modelstore-digests", daemon=True).start()
                asked.append(self._finding[file.digest])
            return asked

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                file = self._queue.pop(0)
            try:
                self.find(file)
                error = None
            except Exception as raised:  # the waiting request hears of it; the next file is of another model
                error = raised
            with self._lock:
                done = self._finding.pop(file.digest)
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def close(self) -> None:
        """Find no more."""
        with self._lock:
            self._closed = True
            self._queue.clear()


def _key(file: ExportedFile) -> str:
    """A file's content, and whether git holds it, which its name says."""
    return f"{file.digest}{'+' if is_large(file.path, file.size) else ''}"
