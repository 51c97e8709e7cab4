"""A tier of files, one a piece, in a folder of shared memory or of a disk: bounded, and whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from modelstore.cluster.lru import SegmentedLRU
from modelstore.cluster.pieces import check_digest
from modelstore.format.buffers import Bytes, view
from modelstore.format.manifest import DIGEST_BYTES

ROOT = "modelstore-"  # clusters' folders begin with it
_PARTIAL = ".part"
_LOCK = "lock"


class TierStats(msgspec.Struct):
    """What a tier holds and did."""

    bytes: int = 0
    pieces: int = 0
    limit: int = 0
    pinned: int = 0  # bytes
    hits: int = 0
    evicted: int = 0  # pieces
    refused: int = 0  # pieces for which there was no room


def local_path(folder: str, digest: bytes) -> Path:
    """Where a reader on the node finds a piece in a host's folder."""
    name = digest.hex()
    return Path(folder) / name[:2] / name


class FileTier:
    """Pieces as files, private to this user. Safe to use from many threads.

    A map that was handed out stays valid when its piece is evicted. `trusted`: bytes need no check when they are read, since
    whoever reads them checks; a tier that outlives its process is not.
    """

    def __init__(self, folder: str, limit: int, *, trusted: bool) -> None:
        self._folder = Path(folder)
        self._trusted = trusted
        self._lru = SegmentedLRU(limit)
        self._lock = threading.Lock()
        self._stats = TierStats(limit=limit)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._find()

    def get(self, digest: bytes) -> Bytes | None:
        """A piece's bytes, mapped; None where it is not held, or was found wrong."""
        with self._lock:
            if digest not in self._lru:
                return None
            self._lru.touch(digest)
        data = _mapped(local_path(str(self._folder), digest))
        if data is None or (not self._trusted and blake3(view(data)).digest() != digest):
            self.remove([digest])
            return None
        self._stats.hits += 1
        return data

    def put(self, digest: bytes, data: Bytes) -> bool:
        """Hold a piece, in the place of others if need be; whether there was room."""
        check_digest(digest)
        size = len(data)
        with self._lock:
            if digest in self._lru:
                return True
            going = self._lru.room(size)
            if going is None:
                self._stats.refused += 1
                return False
            for old in going:
                self._forget(old)
                self._stats.evicted += 1
            self._lru.add(digest, size)  # counted before it is written: the bound holds at every moment
        path = local_path(str(self._folder), digest)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{_PARTIAL}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                rest = view(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            finally:
                os.close(fd)
            partial.rename(path)
        except OSError:  # no room after all, though the bound would allow it: others use the same memory
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            with self._lock:
                self._lru.remove(digest)
                self._stats.refused += 1
            return False
        with self._lock:
            if digest not in self._lru:  # evicted while it was written
                path.unlink(missing_ok=True)
                return False
        return True

    def has(self, digest: bytes) -> bool:
        """Whether it is held."""
        return digest in self._lru

    def check(self, digest: bytes) -> bool:
        """Whether a held piece's bytes are what its name says; a wrong one is removed. True for what is not held."""
        if not self.has(digest):
            return True
        data = _mapped(local_path(str(self._folder), digest))
        if data is not None and blake3(view(data)).digest() == digest:
            return True
        self.remove([digest])
        return False

    def remove(self, digests: Iterable[bytes]) -> int:
        """Let pieces go; bytes freed."""
        with self._lock:
            return sum(self._forget(digest) for digest in digests)

    def unpinned(self) -> list[bytes]:
        """What is held and may go."""
        with self._lock:
            return [digest for digest in self._lru.digests() if not self._lru.is_pinned(digest)]

    def digests(self) -> list[bytes]:
        """All that is held."""
        with self._lock:
            return self._lru.digests()

    def pin(self, digests: Iterable[bytes], pin: str) -> None:
        """Keep these until `unpin`."""
        with self._lock:
            self._lru.pin(digests, pin)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        with self._lock:
            self._lru.unpin(pin)

    def stats(self) -> TierStats:
        """What is held now, and what was done so far."""
        with self._lock:
            return msgspec.structs.replace(
                self._stats, bytes=self._lru.nbytes, pieces=len(self._lru), pinned=self._lru.pinned
            )

    def close(self, *, keep: bool) -> None:
        """Use it no more; the files go unless they are to be kept."""
        if not keep:
            _remove_folder(self._folder)
            with contextlib.suppress(OSError):
                self._folder.parent.rmdir()  # only where it is empty

    def _forget(self, digest: bytes) -> int:
        size = self._lru.remove(digest)
        with contextlib.suppress(OSError):
            local_path(str(self._folder), digest).unlink(missing_ok=True)
        return size

    def _find(self) -> None:
        """Take over the files of an earlier process; half-written ones and those beyond the limit are removed."""
        found = []
        for path in self._folder.glob("??/*"):
            try:
                digest, info = bytes.fromhex(path.name), path.stat()
            except (ValueError, OSError):
                digest, info = b"", None
            if info is None or len(digest) != DIGEST_BYTES:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                continue
            found.append((info.st_mtime, digest, info.st_size))
        for _, digest, size in sorted(found, reverse=True):  # the newest are kept
            if self._lru.nbytes + size <= self._lru.limit:
                self._lru.add(digest, size)
            else:
                local_path(str(self._folder), digest).unlink(missing_ok=True)


def claim(folder: str) -> int:
    """Mark a host's folder as in use, until the returned descriptor is closed or the process dies, however it dies."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def sweep(shared: str = "/dev/shm") -> int:
    """Remove what dead hosts left: their folders in the clusters' folders there, which nobody claims; bytes freed."""
    freed = 0
    for lock in Path(shared).glob(f"{ROOT}*/*/{_LOCK}"):
        with contextlib.suppress(OSError):
            fd = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                freed += _remove_folder(lock.parent)
                lock.parent.parent.rmdir()  # only where it is empty
            finally:
                os.close(fd)
    return freed


def _remove_folder(folder: Path) -> int:
    freed = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                freed += path.lstat().st_size
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed


def _mapped(path: Path) -> Bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        if not size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ), np.uint8)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
