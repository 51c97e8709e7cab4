"""The journal of a save: what is stored already, so that an interrupted one goes on where it stopped.

Each page speaks of one pack: of the tensors that it completed, and of its chunks of tensors that were not complete yet.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import Placed, Tally, Viewed, Written
from modelstore.format import grid
from modelstore.format.digest import name_of
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import FORMAT, Digest
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.objects.record import JOBS, pack_key
from modelstore.format.objects.sealed import seal, unseal
from modelstore.format.progress import Advance
from modelstore.storage.base import Storage
from modelstore.store.shelf import Shelf


class _NotedChunk(msgspec.Struct, frozen=True, array_like=True):
    digest: Digest
    pack: Digest
    offset: int
    length: int


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    digest: Digest
    planes: dict[str, tuple[_NotedChunk, ...]]
    views: tuple[Viewed, ...] = ()


class Page(msgspec.Struct, frozen=True):
    """One page: tensors that are stored, each with all its chunks, stored chunks of others, and what the work itself notes."""

    tensors: dict[str, _Tensor]
    chunks: tuple[_NotedChunk, ...]
    notes: dict[str, Any] = {}


class Journal:
    """The stored objects of one job, as create-only objects under `jobs/<id>/`."""

    def __init__(self, storage: Storage, job: str) -> None:
        self._storage = storage
        self._prefix = f"{JOBS}{job}/"

    def finished(self, shelf: Shelf) -> tuple[dict[str, Written], dict[bytes, Location], dict[str, Any]]:
        """Tensors that an earlier run stored, if all their chunks are there, and its notes by names of its own.

        Without those whose pack is gone, or old (such a pack may be garbage about to be collected), or not good.
        """
        found: dict[str, Written] = {}
        known: dict[bytes, Location] = {}
        notes: dict[str, Any] = {}
        there: dict[str, bool] = {}

        def is_there(pack: str) -> bool:
            if pack not in there:
                info = self._storage.info(pack_key(pack))
                there[pack] = info is not None and shelf.young(info.modified) and shelf.good(pack)
            return there[pack]

        for info in list(self._storage.list(self._prefix)):
            try:
                page = unseal(self._storage.get(info.key), Page, info.key, what="journal")
            except NotFoundError:  # another run of the same work was finished meanwhile
                continue
            except (FormatError, UnsupportedError):  # what it says is not known, so it is stored again
                continue
            notes.update(page.notes)
            known.update(_placed(chunk) for chunk in page.chunks if is_there(chunk.pack))
            for name, tensor in page.tensors.items():
                planes = {plane: [_placed(chunk) for chunk in chunks] for plane, chunks in tensor.planes.items()}
                placed = [at for chunks in planes.values() for at in chunks]
                known.update(at for at in placed if is_there(at[1][0]))
                if all(is_there(pack) for _, (pack, _, _) in placed):
                    found[name] = Written(tensor.digest, planes, tensor.views)
        return found, known, notes

    def note(self, written: Mapping[str, Written], chunks: Sequence[Placed]) -> None:
        """Record tensors of which every chunk is stored, and stored chunks of others."""
        tensors = {
            name: _Tensor(done.digest, {plane: _chunks(placed) for plane, placed in done.planes.items()}, done.views)
            for name, done in written.items()
        }
        self._write(Page(tensors, _chunks(chunks)))

    def remark(self, name: str, said: Any) -> None:
        """Record plain data that the job needs to find again, by a name of its own."""
        self._write(Page({}, (), {name: said}))

    def _write(self, page: Page) -> None:
        self._storage.create(f"{self._prefix}{uuid.uuid4().hex}.json", seal(page))

    def clear(self) -> None:
        """Remove the journal; what it speaks of is published, or given up."""
        for info in list(self._storage.list(self._prefix)):
            self._storage.delete(info.key)


def _placed(chunk: _NotedChunk) -> Placed:
    return bytes.fromhex(chunk.digest), (chunk.pack, chunk.offset, chunk.length)


def _chunks(placed: Sequence[Placed]) -> tuple[_NotedChunk, ...]:
    return tuple(_NotedChunk(digest.hex(), *at) for digest, at in placed)


@dataclass(frozen=True, slots=True)
class Resumed:
    """A work that goes on: its journal, the tensors that are done, the chunks that are stored, and what it noted."""

    journal: Journal
    written: dict[str, Written]
    known: dict[bytes, Location]
    notes: dict[str, Any]


def resume(
    storage: Storage,
    identity: Sequence[str],
    inputs: Sequence[Input],
    shelf: Shelf,
    tally: Tally,
    progress: Advance | None,
) -> Resumed:
    """The journal of this very work, and those of its inputs that an earlier run stored; they are added to the tally.

    `identity` is all that the work's result depends on: its like names the same journal.
    """
    journal = Journal(storage, job_id(identity))
    finished, known, notes = journal.finished(shelf)
    if finished or known:
        journal.note({}, ())  # a fresh page: garbage collection keeps what a journal names while it is being written
    written = {}
    for item in inputs:
        done = finished.get(item.plan.name)
        if done is None or not _fits(item, done):
            continue
        written[item.plan.name] = done
        raw = math.prod(item.plan.shape) * item.plan.itemsize
        tally.raw += raw
        for chunks in done.planes.values():
            for digest, at in chunks:
                tally.find(digest, at[2])
        if progress:
            progress(raw)
    return Resumed(journal, written, known, notes)


def job_id(identity: Sequence[str]) -> str:
    """The name of the journal of a work."""
    return name_of("\0".join((str(FORMAT), *identity)).encode())[:32]


def _fits(item: Input, done: Written) -> bool:
    """Whether a journal's tensor is cut and encoded as it would be now: another release, or another version before it."""
    n = grid.count(item.plan.shape, item.plan.chunk)
    planes = item.codec.planes(DTYPES[item.plan.dtype])
    return (
        tuple(done.planes) == planes
        and all(len(chunks) == n for chunks in done.planes.values())
        and len(done.views) == len(item.views)
    )
