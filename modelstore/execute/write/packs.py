"""Runs write plans: read, digest, encode, pack and upload, in parallel and within a byte budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from modelstore.codecs.loss import Loss
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Encoded, Input, encode_step
from modelstore.format import grid
from modelstore.format.buffers import Buffer, as_bytes, view
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.objects.manifest_builder import Location
from modelstore.plan.work import Work
from modelstore.plan.write import plan_steps
from modelstore.storage.base import Storage
from modelstore.storage.pool import Pool, ordered
from modelstore.store import packs
from modelstore.store.packs import Pack, PackBuilder, TensorNote
from modelstore.store.shelf import Shelf

Placed = tuple[bytes, Location]  # a stored chunk's digest, and where it lies


class Viewed(msgspec.Struct, frozen=True, array_like=True):
    """A tensor as one of its views reads it: the digest of the decoded values, and what they lost."""

    digest: str
    loss: Loss


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that is stored: its digest, each plane's chunks as (digest, location), and how its views read it."""

    digest: str
    planes: Mapping[str, Sequence[tuple[bytes, Location]]]
    views: tuple[Viewed, ...] = ()


@dataclass(slots=True)
class Tally:
    """The counts of a write: bytes of packs newly written, of chunks found already stored, and the raw bytes.

    A chunk is counted once, however often it is referred to, and one that this very work stored was not there before.
    """

    stored: int = 0
    reused: int = 0
    raw: int = 0
    seen: set[bytes] = field(default_factory=set)  # digests that are counted

    def find(self, digest: bytes, nbytes: int) -> None:
        """A chunk is needed that is in the store."""
        if digest not in self.seen:
            self.seen.add(digest)
            self.reused += nbytes


@dataclass(slots=True)
class _Progress:
    """A tensor on its way: the running digests of its values and of its views, and its chunks so far."""

    hashers: list[blake3]
    losses: list[Loss]
    planes: dict[str, list[tuple[bytes, Location | None]]]
    left: int
    waiting: int = 0  # chunks in packs that are not stored yet

    def written(self) -> Written:
        """The finished tensor."""
        planes = {name: [(d, at) for d, at in rows if at is not None] for name, rows in self.planes.items()}
        digest, *viewed = (hasher.hexdigest() for hasher in self.hashers)
        return Written(digest, planes, tuple(Viewed(d, loss) for d, loss in zip(viewed, self.losses, strict=True)))


class _ChunkPlace(NamedTuple):
    """Which chunk of which plane of which tensor, and its digest."""

    tensor: int
    plane: str
    chunk: int
    digest: bytes


@dataclass
class PackWriter:
    """Encodes inputs into packs. `known` are chunks that are in the store already, by digest, if `shelf` finds them good."""

    storage: Storage
    work: Work
    known: dict[bytes, Location]
    shelf: Shelf
    finished: Callable[[dict[str, Written], Sequence[Placed]], None] | None = None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        # A pack is held whole, twice while one is uploaded and the next filled; steps take the rest.
        self._pack_bytes = min(packs.PACK_BYTES, self.work.memory // 6)
        self._slab_limit = self.work.memory // 16

    def write(self, inputs: Sequence[Input]) -> dict[str, Written]:
        """Store all inputs, in order; what became of each, by name.

        `finished` hears, as packs are stored, of tensors whose every chunk is, and of the pack's chunks of other tensors.
        """
        self.shelf.expect(pack for pack, _, _ in self.known.values())
        state = _PackState(self, inputs)
        threads = self.work.limits.threads or max(2, os.cpu_count() or 1)
        steps = plan_steps(((i, item.plan) for i, item in enumerate(inputs)), self._slab_limit)
        # A step's raw bytes are there as: themselves, the encoded ones, those of a chunk, and two for each view.
        copies = 3 + 2 * max((len(item.views) for item in inputs), default=0)
        encoding = ordered(
            lambda step: encode_step(step, inputs),
            steps,
            threads,
            "modelstore-encode",
            ahead=2 * threads,
            memory=self.work.memory // 3,
            cost=lambda step: copies * step.nbytes,
        )
        with Pool(1, thread_name_prefix="modelstore-upload") as uploader:
            try:
                for encoded in encoding:
                    for item in encoded:
                        state.take(item)
                        if state.filled >= self._pack_bytes:
                            state.upload(uploader)
                    self.work.done(sum(e.part.nbytes for e in encoded if e.values))
                    del encoded, item  # or the next step is encoded while this one's values are held
                state.upload(uploader)
                state.settle()
            except BaseException:
                encoding.close()
                self.shelf.give_up()
                raise
        return state.written()


class _PackState:
    """The pack being filled, and the tensors on their way; used by one thread."""

    def __init__(self, writer: PackWriter, inputs: Sequence[Input]) -> None:
        self._writer = writer
        self._inputs = inputs
        self.filled = 0  # bytes of the pack being filled
        self._tensors: dict[int, _Progress] = {}
        self._filled: list[tuple[int, _ChunkPlace, Buffer]] = []  # the plane's number, the place, the bytes
        self._filling: set[bytes] = set()  # digests in packs not stored yet
        self._twins: list[_ChunkPlace] = []  # the same chunk again, before its pack was stored
        self._uploading: tuple[Future[bool], list[tuple[_ChunkPlace, int, int]], Pack] | None = None
        self._done: dict[str, Written] = {}
        self._own: set[str] = set()  # packs that were stored here
        for index, item in enumerate(inputs):
            names = item.codec.planes(DTYPES[item.plan.dtype])
            n = grid.count(item.plan.shape, item.plan.chunk)
            empty: list[tuple[bytes, Location | None]] = [(b"", None)] * n
            hashers, losses = [blake3() for _ in range(1 + len(item.views))], [Loss()] * len(item.views)
            planes = {name: list(empty) for name in names}
            self._tensors[index] = _Progress(hashers, losses, planes, n * len(names))

    def take(self, encoded: Encoded) -> None:
        """Digest a part's values and place its chunks, in order."""
        index = encoded.part.tensor
        tensor = self._tensors[index]
        for hasher, values in zip(tensor.hashers, encoded.values, strict=False):
            hasher.update(view(values))
        self._writer.tally.raw += encoded.part.nbytes if encoded.values else 0
        tensor.losses = [a + b for a, b in zip(tensor.losses, encoded.losses, strict=False)] or tensor.losses
        for chunk, planes in encoded.chunks:
            for number, (name, (digest, data)) in enumerate(zip(tensor.planes, planes, strict=True)):
                at = self._known(digest)
                tensor.left -= 1
                tensor.planes[name][chunk] = (digest, at)
                if at is not None:
                    self._writer.tally.find(digest, at[2])
                    continue
                tensor.waiting += 1
                place = _ChunkPlace(index, name, chunk, digest)
                if digest in self._filling:
                    self._twins.append(place)
                    continue
                self._filling.add(digest)
                self._filled.append((number, place, data))
                self.filled += len(as_bytes(data))

    def _known(self, digest: bytes) -> Location | None:
        """The place of a chunk that may be referred to: in a pack that this save has stored, or in one that is good."""
        at = self._writer.known.get(digest)
        if at is None or at[0] in self._own or self._writer.shelf.good(at[0]):
            return at
        del self._writer.known[digest]
        return None

    def upload(self, uploader: Pool) -> None:
        """Store the pack that was filled, once the one before it is stored."""
        self.settle()
        if not self._filled:
            return
        builder = PackBuilder()
        places = []
        # All first planes, then all second ones, …: who reads only the first finds them in one run.
        for _, place, data in sorted(self._filled, key=lambda filled: filled[0]):
            plan = self._inputs[place.tensor].plan
            builder.notes.setdefault(plan.name, TensorNote(plan.dtype, plan.shape, plan.chunk, plan.codec))
            start = builder.add(f"{plan.name}/{place.plane}/{place.chunk}", data)
            places.append((place, start, builder.size - start))
        pack = packs.finish(builder, {})
        writer = self._writer

        def put() -> bool:
            return writer.shelf.put(pack)

        self._uploading = uploader.submit(put), places, pack
        self._filled, self.filled = [], 0

    def settle(self) -> None:
        """Wait for the pack on its way; then its chunks have a location, and tensors may be finished."""
        stored: list[tuple[int, Placed]] = []
        if self._uploading is not None:
            future, places, pack = self._uploading
            tally, written = self._writer.tally, future.result()
            tally.stored += pack.size if written else 0
            self._uploading = None
            self._own.add(pack.digest)
            for place, start, n in places:
                at = (pack.digest, pack.data_start + start, n)
                self._writer.known[place.digest] = at
                tally.seen.add(place.digest) if written else tally.find(place.digest, n)
                self._filling.discard(place.digest)
                self._settle(place, at)
                stored.append((place.tensor, (place.digest, at)))
            again, self._twins = self._twins, []
            for place in again:
                known = self._writer.known.get(place.digest)
                if known is None:
                    self._twins.append(place)
                else:
                    self._settle(place, known)
        self._finish(stored)

    def _settle(self, place: _ChunkPlace, at: Location) -> None:
        tensor = self._tensors[place.tensor]
        tensor.planes[place.plane][place.chunk] = (place.digest, at)
        tensor.waiting -= 1

    def _finish(self, stored: Sequence[tuple[int, Placed]]) -> None:
        fresh: dict[str, Written] = {}
        for index in [i for i, t in self._tensors.items() if not t.left and not t.waiting]:
            fresh[self._inputs[index].plan.name] = self._tensors.pop(index).written()
        self._done.update(fresh)
        partial = [placed for index, placed in stored if index in self._tensors]
        if (fresh or partial) and self._writer.finished:
            self._writer.finished(fresh, partial)

    def written(self) -> dict[str, Written]:
        """All tensors; to be called when everything is stored."""
        assert not self._tensors, "a tensor was not finished"
        return self._done


def known_chunks(stored: Iterable[Manifest]) -> dict[bytes, Location]:
    """The places of the chunks of stored manifests, by digest."""
    known: dict[bytes, Location] = {}
    for manifest in stored:
        digests = manifest.chunks.digest
        rows = zip(manifest.pack.tolist(), manifest.offset.tolist(), manifest.length.tolist(), strict=True)
        for row, (pack, start, n) in enumerate(rows):
            known.setdefault(digests[32 * row : 32 * row + 32], (manifest.packs[pack], start, n))
    return known


def require_others(shelf: Shelf, reader: Reader, names: Collection[str]) -> None:
    """`CorruptionError` unless the store has, whole, all that a model is read from, but for its tensors of these names."""
    manifest = reader.manifest
    kept = [tensor for tensor in manifest.tensors if tensor.name not in names]
    shelf.require(reader.fetcher.model, _packs_of(manifest, [*manifest.files, *kept]))
    require_bases(shelf, reader.base, _deltas(manifest, kept))


def require_bases(shelf: Shelf, base: Reader | None, names: Collection[str]) -> None:
    """`CorruptionError` unless the store has, whole, what deltas of tensors of these names are decoded against."""
    while base is not None and names:
        manifest = base.manifest
        under = [tensor for tensor in manifest.tensors if tensor.name in names]
        shelf.require(base.fetcher.model, _packs_of(manifest, under))
        base, names = base.base, _deltas(manifest, under)


def _packs_of(manifest: Manifest, tensors: Sequence[Tensor]) -> list[str]:
    rows = [manifest.rows(tensor) for tensor in tensors]
    return [manifest.packs[i] for i in np.unique(manifest.pack[np.concatenate(rows)]).tolist()] if rows else []


def _deltas(manifest: Manifest, tensors: Iterable[Tensor]) -> set[str]:
    return {tensor.name for tensor in tensors if manifest.codecs[tensor.codec].name == "delta"}
