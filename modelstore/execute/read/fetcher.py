"""Fetches a job's chunks and checks them; a wrong byte is never handed on, another copy is tried instead."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from modelstore.errors import CorruptionError, NotFoundError, StorageError
from modelstore.format.buffers import Bytes, view
from modelstore.format.digest import matches
from modelstore.format.locks import Lock
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import pack_key
from modelstore.plan.read import Range, ReadJob, Want
from modelstore.storage.base import Storage

log = logging.getLogger("modelstore")


class ChunkSource(Protocol):
    """The source of the encoded chunks of one manifest: the storage, a cluster's hosts. All its bytes are checked."""

    @property
    def model(self) -> str:
        """The model's name, for errors."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the chunks."""

    @property
    def bytes_read(self) -> int:
        """Encoded bytes that came from the storage, a mirror or hosts so far, gaps between ranges among them."""

    @property
    def local(self) -> bool:
        """Whether the packs are read as local files."""

    @property
    def elsewhere(self) -> bool:
        """Whether bytes may come from elsewhere than the store, and say nothing of the store's own."""

    def over(self, manifest: Manifest) -> ChunkSource:
        """The same for another manifest of the model."""

    def ranges(self, job: ReadJob, wants: Sequence[Want]) -> dict[int, Bytes]:
        """The encoded bytes of each of the job's rows. They may be in this thread's memory until its next job."""

    def direct(self, row: int, out: Bytes, tensor: str, chunk: int) -> None:
        """Read one row's bytes straight to where they belong."""


@dataclass
class Fetcher:
    """Bytes of one manifest's chunks, from a store or, where that fails, its mirrors."""

    model: str
    manifest: Manifest
    storage: Storage
    mirrors: Sequence[Storage] = ()
    bytes_read: int = 0  # encoded bytes that came from the storage, a mirror or hosts, gaps between ranges among them
    _moved: Manifest | None = None  # that of the same chunks in other packs, where compaction has taken them
    _healed: set[int] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _scratch: threading.local = field(default_factory=threading.local)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.manifest, self.storage, self.mirrors)

    @property
    def local(self) -> bool:
        """Whether the packs are read as local files."""
        return self.storage.local

    @property
    def elsewhere(self) -> bool:
        """Whether bytes may come from elsewhere than the store, and say nothing of the store's own."""
        return bool(self.mirrors)

    def over(self, manifest: Manifest) -> Fetcher:
        """The same for another manifest of the model."""
        return Fetcher(self.model, manifest, self.storage, self.mirrors)

    def ranges(self, job: ReadJob, wants: Sequence[Want]) -> dict[int, Bytes]:
        """The encoded bytes of each of the job's rows, checked. They are in this thread's scratch buffer."""
        buffer = self._buffer(job.fetched)
        pieces: dict[Range, Bytes | None] = {}
        at = 0
        for r in job.ranges:
            piece = buffer[at : at + r.stop - r.start]
            at += len(piece)
            pieces[r] = piece if self._read(r.pack, r.start, piece) else None
        manifest = self.manifest
        found: dict[int, Bytes] = {}
        rows = [(row, chunk) for chunk in job.chunks for row in chunk.rows]
        places = manifest.places([row for row, _ in rows])
        for (row, chunk), (pack, start, n) in zip(rows, places, strict=True):
            r, whole = next(
                (r, p) for r, p in pieces.items() if r.pack == pack and r.start <= start and start + n <= r.stop
            )
            data = None if whole is None else whole[start - r.start : start - r.start + n]
            if data is None or not matches(data, manifest.digest(row)):
                data = self.recover(row, wants[chunk.want].tensor.name, chunk.chunk)
            found[row] = data
        return found

    def direct(self, row: int, out: Bytes, tensor: str, chunk: int) -> None:
        """Read one row's bytes straight to where they belong, checked."""
        manifest = self.manifest
        read = self._read(int(manifest.pack[row]), int(manifest.offset[row]), out)
        if not read or not matches(out, manifest.digest(row)):
            out[:] = self.recover(row, tensor, chunk)

    def recover(self, row: int, tensor: str, chunk: int) -> Bytes:
        """A row's bytes from any good copy; the bad one is replaced. `CorruptionError` if there is none.

        Packs that a compaction has emptied may be gone while somebody still reads by the manifest of before it: the chunks
        are then where live records say.
        """
        manifest = self.manifest
        pack, start, n = int(manifest.pack[row]), int(manifest.offset[row]), int(manifest.length[row])
        key = pack_key(manifest.packs[pack])
        data = np.empty(n, np.uint8)
        reasons = []
        gone = False
        for storage in (self.storage, *self.mirrors):
            try:
                storage.read(key, start, view(data))
            except (NotFoundError, CorruptionError, StorageError) as error:
                gone |= isinstance(error, NotFoundError)
                reasons.append(str(error))
                continue
            self.count(n)
            if matches(data, manifest.digest(row)):
                if storage is not self.storage:
                    self._heal(pack, storage)
                return data
            reasons.append(f"the bytes in {storage.url} do not match their digest")
        if gone and self._read_where_moved(row, data):
            return data
        raise CorruptionError(
            f"chunk {chunk} of tensor {tensor!r} of model {self.model!r} is lost: "
            f"bytes {start} to {start + n} of {key} are wrong "
            f"({'; '.join(reasons)}); run 'modelstore repair {self.model} --from URL' with another copy of the store",
            model=self.model,
            tensor=tensor,
            chunk=chunk,
            object=key,
        )

    def _read_where_moved(self, row: int, out: Bytes) -> bool:
        """Whether a row's bytes were found at the new place of its chunk according to live records."""

        from modelstore.store.compact.moved import moved

        for look_again in (False, True):
            with self._lock:
                if look_again or self._moved is None:
                    self._moved = moved(self.storage, self.model, self.manifest)
                there = self._moved
            if there is None:
                return False
            try:
                self.storage.read(pack_key(there.packs[there.pack[row]]), int(there.offset[row]), view(out))
            except (NotFoundError, CorruptionError):
                continue  # moved once more
            self.count(len(out))
            return matches(out, self.manifest.digest(row))
        return False

    def count(self, nbytes: int) -> None:
        """So many bytes were read."""
        with self._lock:
            self.bytes_read += nbytes

    def _buffer(self, nbytes: int) -> Bytes:
        """This thread's buffer for this manifest, used again by the next job: fresh pages would cost more than the read."""
        buffer: Bytes | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._scratch.buffer = np.empty(-(-nbytes >> 20) << 20, np.uint8)
        return buffer[:nbytes]

    def _read(self, pack: int, start: int, out: Bytes) -> bool:
        """Whether the bytes could be read; they are not checked yet."""
        try:
            self.storage.read(pack_key(self.manifest.packs[pack]), start, view(out))
        except (NotFoundError, CorruptionError):
            return False
        except StorageError:
            if self.mirrors:
                return False
            raise
        self.count(len(out))
        return True

    def _heal(self, pack: int, mirror: Storage) -> None:
        from modelstore.store.mend.heal import replace_pack

        with self._lock:
            if pack in self._healed:
                return
            self._healed.add(pack)
        digest = self.manifest.packs[pack]
        try:
            replace_pack(self.storage, mirror, digest)
            log.warning("pack %s of %s was damaged and has been replaced from %s", digest, self.storage.url, mirror.url)
        except (NotFoundError, CorruptionError, StorageError) as error:
            log.warning("pack %s of %s is damaged and could not be replaced: %s", digest, self.storage.url, error)


Fetching = Callable[
    [str, Manifest, Storage, Sequence[Storage]], ChunkSource
]  # (model, manifest, storage, mirrors) → where its chunks come from
