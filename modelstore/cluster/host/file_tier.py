"""A tier of files, one a piece, in a folder of shared memory or of a disk: bounded, and whole or not there at all."""

from __future__ import annotations

import bisect
import contextlib
import errno
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import numpy as np

from modelstore.cluster.host.lru import SegmentedLRU
from modelstore.cluster.node.folders import remove_folder
from modelstore.cluster.pieces import check_digest
from modelstore.format.buffers import Bytes, view
from modelstore.format.digest import matches
from modelstore.format.objects.manifest import DIGEST_BYTES

_PARTIAL = ".part"
_PAGE = 4096  # a file takes whole pages of shared memory, and blocks of a disk
_MAPPED = 256 << 10  # bytes from which a file is mapped: a smaller one is read in the time that it takes to map it
_MAPS = 512  # at once: each takes a descriptor of the process (Python keeps one open), and one of its 65,530 maps
_BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)  # say nothing about the file


class TierStats(msgspec.Struct):
    """The content and counters of a tier."""

    bytes: int = 0
    pieces: int = 0
    limit: int = 0
    pinned: int = 0  # bytes
    hits: int = 0
    evicted: int = 0  # pieces
    refused: int = 0  # pieces for which there was no room
    wrong: int = 0  # pieces whose bytes had changed


def local_path(folder: str, digest: bytes) -> Path:
    """The path of a piece in a host's folder, for a reader on the node."""
    name = digest.hex()
    return Path(folder) / name[:2] / name


class FileTier:
    """Pieces as files, private to this user. Safe to use from many threads.

    Bytes are counted in whole pages, as the memory or the disk does, and from before they are written. A `trusted` tier
    (shared memory) starts empty and hands out maps without a check, since readers check them; a map stays valid when its piece
    is evicted. Any other outlives its process: it is found again, and its pieces are read and checked each time.
    """

    def __init__(self, folder: str, limit: int, *, trusted: bool) -> None:
        self._folder = Path(folder)
        self._trusted = trusted
        self._lru = SegmentedLRU(limit)
        self._lock = threading.Lock()
        self._writing: set[bytes] = set()
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._stats = TierStats(limit=limit)
        self._scrubbed = b""
        self._closed = False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if trusted:
            self._clear()
        else:
            self._find()

    def get(self, digest: bytes) -> Bytes | None:
        """A piece's bytes; None if it is not held, or was found wrong. Counts as a use of it."""
        with self._lock:
            if digest not in self._lru:
                return None
            self._lru.touch(digest)
        data = self._load(digest)
        if data is not None:
            with self._lock:
                self._stats.hits += 1
        return data

    def kept(self, digest: bytes) -> Bytes | None:
        """A map of a piece that was just put; None if there is none, or it would be no gain. Counts as no use."""
        if self._trusted and self._lru.size(digest) >= _MAPPED:
            return self._load(digest)
        return None

    def put(self, digest: bytes, data: Bytes) -> bool:
        """Hold a piece, in the place of others if need be; whether it is held now. Its bytes must have been checked."""
        check_digest(digest)
        size = cost(len(data))
        with self._lock:
            if digest in self._lru or digest in self._writing or self._closed:
                return digest in self._lru
            going = self._lru.reserve(size)
            if going is None:
                self._stats.refused += 1
                return False
            for old in going:
                self._unlink(old)
                self._stats.evicted += 1
            self._writing.add(digest)
        written = self._write(digest, data)
        with self._lock:
            self._writing.discard(digest)
            self._lru.release(size)
            if written and not self._closed:
                self._lru.add(digest, size)
                return True
            self._stats.refused += 1
            self._unlink(digest)
            return False

    def has(self, digest: bytes) -> bool:
        """Whether it is held."""
        with self._lock:
            return digest in self._lru

    def cost(self, size: int) -> int:
        """Bytes that a piece of `size` bytes takes of the limit."""
        return cost(size)

    def check(self, digest: bytes) -> bool:
        """Whether a held piece's bytes are what its name says; a wrong one is removed. True for what is not held."""
        if not self.has(digest):
            return True
        try:
            data = self._read(digest)
        except FileNotFoundError:  # evicted, or somebody removed it: nothing wrong can come of it
            self.evict([digest], pinned=True)
            return True
        except OSError as error:
            return error.errno in _BUSY or self._reject(digest)
        return self._right(digest, data)

    def scrub(self, limit: int) -> tuple[list[bytes], int]:
        """Check about `limit` bytes of what is held, on from where the last call ended: the wrong ones, and bytes checked."""
        with self._lock:
            names = sorted(self._lru.digests())
        at = bisect.bisect_right(names, self._scrubbed)
        wrong, checked = [], 0
        for digest in names[at:] + names[:at]:
            if checked >= limit:
                break
            self._scrubbed = digest
            checked += self._lru.size(digest)
            if not self.check(digest):
                wrong.append(digest)
        return wrong, checked

    def evict(self, digests: Collection[bytes] | None = None, *, pinned: bool = False) -> int:
        """Remove pieces (all, if none are named), pinned ones only if asked; bytes freed."""
        with self._lock:
            chosen = self._lru.digests() if digests is None else [d for d in dict.fromkeys(digests) if d in self._lru]
            going = [digest for digest in chosen if pinned or not self._lru.is_pinned(digest)]
            for digest in going:
                self._unlink(digest)
            return sum(self._lru.remove(digest) for digest in going)

    def pin(self, digests: Collection[bytes], pin: str) -> None:
        """Keep these, held now or later, until `unpin`."""
        with self._lock:
            self._lru.pin(digests, pin)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        with self._lock:
            self._lru.unpin(pin)

    def stats(self) -> TierStats:
        """The current content, and the counters."""
        with self._lock:
            lru = self._lru
            return msgspec.structs.replace(self._stats, bytes=lru.nbytes, pieces=len(lru), pinned=lru.pinned)

    def close(self, *, keep: bool) -> None:
        """Use it no more; the pieces' files are removed unless they must be kept, and shared memory's folder with them."""
        with self._lock:
            self._closed = True
        if self._trusted:
            remove_folder(self._folder)
            with contextlib.suppress(OSError):
                self._folder.parent.rmdir()  # only where it is empty
        elif not keep:
            self._clear()

    # ------------------------------------------------------------------ files

    def _load(self, digest: bytes) -> Bytes | None:
        try:
            data = self._read(digest)
        except OSError as error:
            if error.errno not in _BUSY:  # removed behind our back, or the disk cannot read it
                self.evict([digest], pinned=True)
            return None
        return data if self._trusted or self._right(digest, data) else None

    def _right(self, digest: bytes, data: Bytes) -> bool:
        return matches(data, digest) or self._reject(digest)

    def _reject(self, digest: bytes) -> bool:
        """Remove a wrong piece; False."""
        with self._lock:
            self._stats.wrong += 1
        self.evict([digest], pinned=True)
        return False

    def _read(self, digest: bytes) -> Bytes:
        """A file's bytes, mapped where that is a gain. A disk's are never: a bad sector under a map would kill the process."""
        fd = os.open(self._path(digest), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if self._trusted and size >= _MAPPED and len(self._maps) < _MAPS:
                with contextlib.suppress(OSError):  # no descriptor or map left: it can still be read
                    area = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
                    self._maps.add(area)
                    return np.frombuffer(area, np.uint8)
            data = np.empty(min(size, self._lru.limit), np.uint8)  # no more than it can have written
            done = 0
            while done < len(data):
                got = os.readv(fd, [view(data)[done:]])
                if not got:
                    break
                done += got
            return data[:done]
        finally:
            os.close(fd)

    def _write(self, digest: bytes, data: Bytes) -> bool:
        """Write a piece under another name, and give it its own when all of it is there; whether there was room."""
        path = self._path(digest)
        partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
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
            return False
        return True

    def _path(self, digest: bytes) -> Path:
        return local_path(str(self._folder), digest)

    def _unlink(self, digest: bytes) -> None:
        with contextlib.suppress(OSError):
            self._path(digest).unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[bytes | None, Path, os.stat_result]]:
        """The pieces' files, and half-written ones (None); all other entries of the folder are not ours."""
        for path in self._folder.glob("??/*"):
            name, _, rest = path.name.partition(".")
            try:
                digest, info = bytes.fromhex(name), path.lstat()
            except (ValueError, OSError):
                continue
            if len(digest) == DIGEST_BYTES and path.parent.name == name[:2] and stat.S_ISREG(info.st_mode):
                if not rest:
                    yield digest, path, info
                elif path.suffix == _PARTIAL:
                    yield None, path, info

    def _find(self) -> None:
        """Take over the files of an earlier process; half-written ones and those beyond the limit are removed."""
        found = []
        for digest, path, info in self._files():
            if digest is None:
                path.unlink(missing_ok=True)
            else:
                found.append((info.st_mtime, digest, cost(info.st_size)))
        keep, room = [], self._lru.limit
        for _, digest, size in sorted(found, reverse=True):  # the newest are kept
            if size <= room:
                keep.append((digest, size))
                room -= size
            else:
                self._unlink(digest)
        for digest, size in reversed(keep):  # and go last
            self._lru.add(digest, size)

    def _clear(self) -> None:
        for _, path, _ in self._files():
            path.unlink(missing_ok=True)
        for folder in self._folder.glob("??"):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty


def cost(size: int) -> int:
    """Bytes that a file of `size` bytes takes: whole pages, at least one."""
    return max(1, -(-size // _PAGE)) * _PAGE
