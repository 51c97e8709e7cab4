"""Repair: lost manifests from their copies, damaged packs from the same chunks elsewhere, or from another copy of the store.

Problems that cannot be repaired stay in the report, with what to do. Nothing that is good is written again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from modelstore.errors import (
    CorruptionError,
    FormatError,
    ModelStoreError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from modelstore.format.answers.results import Problem, Report
from modelstore.format.buffers import view
from modelstore.format.names import ORIGINAL, Reference
from modelstore.format.objects import manifest as man
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key, pack_key
from modelstore.format.progress import Advance
from modelstore.storage.base import Storage
from modelstore.storage.pool import ordered
from modelstore.store import packs, relying
from modelstore.store.catalog import Catalog
from modelstore.store.damage import noting
from modelstore.store.describe import problem
from modelstore.store.mend import records
from modelstore.store.mend.heal import pack_is_good, replace_pack
from modelstore.store.mend.remake import Elsewhere, PackedChunk, contents, locations, remake
from modelstore.store.repo import Repo
from modelstore.store.unread import told_once

_THREADS = 4
_LARGEST_COPY = 1 << 30  # bytes of a compressed manifest
_LOST = (NotFoundError, CorruptionError, FormatError, StorageError)


def repair(
    repo: Repo,
    ref: Reference | None,
    source: Storage | None,
    *,
    progress: Advance | None = None,
) -> Report:
    """Mend what a reference names, or all that is live: records, then manifests, then every pack that they refer to.

    A bare name stands for all versions of the model, `name@version` for all its variants. `source` is another copy of the
    store; without one, manifests, their copies, and packs whose chunks are all in other packs too, can be repaired. `progress`
    hears of the bytes of packs checked. Done again if problems are left and a version was compacted or deleted meanwhile.
    """
    report, looked = _once(repo, ref, source, progress)
    while report.problems and any(repo.catalog.changed(model, numbers) for model, numbers in looked.items()):
        after, looked = _once(repo, ref, source, progress)
        done = (*report.repaired, *after.repaired)
        report = msgspec.structs.replace(after, repaired=done, notes=(*report.notes, *after.notes))
    return report


def _once(
    repo: Repo, ref: Reference | None, source: Storage | None, progress: Advance | None
) -> tuple[Report, dict[str, dict[int, int]]]:
    """One repair, and the number of the record of each version that it looked at, by model."""
    work = _Repair(repo, source)
    looked: dict[str, dict[int, int]] = {}
    copies = [*([source] if source is not None else []), *repo.mirrors]
    if records.mend_store(repo.storage, copies, repo.catalog.recorded, repo.catalog.known):
        work.repaired.append(rec.STORE_KEY)
    repo.catalog.open(again=True)
    names = [ref.name] if ref else repo.catalog.models(closed=True)
    mended = records.mend(
        repo.storage, copies, names, journals=ref is None, keep=lambda record: work.kept(record, copies)
    )
    work.repaired += mended.repaired
    for model in [ref.name] if ref else repo.catalog.models(closed=True):
        for record, variant, entry in live(repo.catalog, model, ref, work.problems):
            looked.setdefault(model, {})[record.version] = record.number
            work.variant(record, variant, entry)
    for size in ordered(work.pack, work.packs, _THREADS, "modelstore-repair"):
        work.done(size, progress)
    inside, elsewhere = work.chunks_of_bad()
    for size in ordered(lambda pack: work.mend(pack, inside[pack], elsewhere), work.bad, _THREADS, "modelstore-repair"):
        work.done(size, progress)
    left = [*mended.problems, *(p for p in work.problems if p.object not in {one.object for one in mended.problems})]
    notes = tuple(mended.notes)
    return Report(work.chunks, work.nbytes, work.tensors, told_once(left), tuple(work.repaired), notes), looked


def live(
    catalog: Catalog, model: str, ref: Reference | None, problems: list[Problem]
) -> Iterator[tuple[VersionRecord, str, VariantEntry]]:
    """A model's live versions and variants, as far as `ref` names them; a record that cannot be read becomes a problem."""
    damaged: list[ModelStoreError] = []
    if ref is None or (ref.is_newest and ref.variant == ORIGINAL):
        records = catalog.live(model, damaged)
    else:
        record = noting(damaged, lambda: catalog.resolve(ref))
        records = [record] if record is not None else []
    problems += [problem(error, model) for error in damaged]
    if damaged and not records:
        return
    if ref is not None and not records:
        catalog.newest(model)  # says what is wrong with the name
    if ref is not None and ref.variant != ORIGINAL:
        yield records[0], ref.variant, catalog.entry(ref)[1]
        return
    for record in records:
        for variant, entry in record.variants.items():
            yield record, variant, entry


def read_copy(storage: Storage, copy: str, digest: str) -> tuple[Manifest, bytes]:
    """A manifest, and its stored bytes, from the pack that is its copy; an error where that is not a good one."""
    key = pack_key(copy)
    opened = packs.open_pack(storage, key)
    entry = next((e for e in opened.entries if e.name == packs.COPY_ENTRY), None)
    if entry is None or entry.stop - entry.start > _LARGEST_COPY:
        raise FormatError(f"object {key} is not a copy of a manifest: run 'modelstore repair'", object=key)
    data = np.empty(entry.stop - entry.start, np.uint8)
    storage.read(key, opened.data_start + entry.start, view(data))
    return man.decode(data.tobytes(), digest, key), data.tobytes()


def copy_of(storage: Storage, model: str, digest: str, manifest: Manifest) -> packs.Pack:
    """The pack that is the copy of a manifest whose record is gone."""
    try:
        return packs.copy_pack(model, digest, storage.get(manifest_key(model, digest)))
    except NotFoundError:  # the manifest came from a mirror
        return packs.copy_pack(model, digest, man.encode(manifest)[1])


def _has(storage: Storage, key: str, size: int) -> bool:
    try:
        info = storage.info(key)
    except StorageError:  # another copy of the store, which cannot be reached
        return False
    return info is not None and info.size >= size


@dataclass
class _Repair:
    """One repair: what it found and did so far."""

    repo: Repo
    source: Storage | None
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    packs: dict[str, tuple[str, str, int]] = field(default_factory=dict)  # digest → model, first tensor, chunks
    bad: list[str] = field(default_factory=list)  # of these
    nbytes: int = 0
    tensors: int = 0
    _seen: set[tuple[str, str, str]] = field(default_factory=set)
    _chunks: dict[str, NDArray[np.uint64]] = field(default_factory=dict)  # pack → where its chunks lie, each once
    _noted: dict[tuple[str, str], None] = field(default_factory=dict)
    _copies: dict[str, str] | None = None  # manifest → pack, as packs' headers say

    def done(self, nbytes: int, progress: Advance | None) -> None:
        """Count bytes that were looked at, and tell of them."""
        self.nbytes += nbytes
        if progress and nbytes:
            progress(nbytes)

    def variant(self, record: VersionRecord, variant: str, entry: VariantEntry) -> None:
        """Mend a variant's manifest, its copy, and the manifests under it; note the packs that they need."""
        model, digest, copy = record.model, entry.manifest, entry.copy
        while (model, digest, copy) not in self._seen:
            self._seen.add((model, digest, copy))
            found = self._manifest(model, digest, copy)
            if found is None:
                return
            manifest, data = found
            if copy:
                self._copy(record, variant, entry, data)
            if (model, digest) not in self._noted:
                self._noted[model, digest] = None
                self._note(model, manifest)
            if manifest.base is None:
                return
            model, digest, copy = manifest.base.model, manifest.base.manifest, ""

    def _note(self, model: str, manifest: Manifest) -> None:
        self.tensors += len(manifest.tensors)
        counts = np.bincount(manifest.pack, minlength=len(manifest.packs))
        offsets = np.split(
            np.asarray(manifest.offset)[np.argsort(manifest.pack, kind="stable")], np.cumsum(counts)[:-1]
        )
        first: dict[int, str] = {}
        for tensor in (*manifest.tensors, *manifest.files):
            for plane in tensor.planes:
                for pack in np.unique(manifest.pack[plane.first : plane.first + tensor.chunks]).tolist():
                    first.setdefault(pack, tensor.name)
        for index, digest in enumerate(manifest.packs):
            self.packs.setdefault(digest, (model, first.get(index, ""), int(counts[index])))
            self._chunks[digest] = np.union1d(self._chunks.get(digest, offsets[index]), offsets[index])

    @property
    def chunks(self) -> int:
        """Chunks of the packs that were noted, each counted once."""
        return sum(len(offsets) for offsets in self._chunks.values())

    @contextmanager
    def kept(self, record: VersionRecord, copies: Sequence[Storage]) -> Iterator[str]:
        """Why what a record names cannot be relied on: an object that no copy of the store has, or that is being removed.

        "" where there is none such: all of it stays there until the end of the block.
        """
        id = uuid.uuid4().hex
        needed: dict[str, int] = {}  # 0: this can be made again
        for entry in record.variants.values():
            needed.setdefault(pack_key(entry.copy), 0)
            at: tuple[str, str, str] | None = (record.model, entry.manifest, entry.copy)
            while at is not None and manifest_key(*at[:2]) not in needed:
                key = manifest_key(*at[:2])
                manifest, _, reasons = self._find(*at)
                if manifest is None:
                    yield f"neither manifest {key} nor its copy can be had: {reasons[0]}"
                    return
                needed[key] = 0
                for pack, size in relying.objects_of(manifest).items():
                    needed[pack] = max(size, needed.get(pack, 0))
                at = (manifest.base.model, manifest.base.manifest, "") if manifest.base else None
        coming = {key for key, size in needed.items() if not size or any(_has(at, key, size) for at in copies)}
        try:
            relying.hold(self.repo.storage, record.model, id, needed, lambda: coming)
        except relying.GoneError as error:
            why = f"object {error.object} is missing, too short, or being removed"
        except (FormatError, CorruptionError) as error:
            why = str(error)
        else:
            try:
                yield ""
            finally:
                relying.release(self.repo.storage, id)
            return
        yield why

    def _manifest(self, model: str, digest: str, copy: str) -> tuple[Manifest, bytes] | None:
        """A good manifest, put back where it was not; None, and a problem, where there is none anywhere."""
        key = manifest_key(model, digest)
        manifest, data, reasons = self._find(model, digest, copy)
        if manifest is not None:
            if reasons:
                try:
                    self.repo.storage.put(key, [data], len(data))
                    self.repaired.append(key)
                except (StorageError, CorruptionError) as error:  # all else is repaired nevertheless
                    self.problems.append(problem(error, model))
            return manifest, data
        unread = next((error for error in reasons if isinstance(error, StorageError | UnsupportedError)), None)
        if unread is not None:  # it may be good, or is of a newer release
            self.problems.append(problem(unread, model))
        else:
            message = (
                f"manifest {key} of model {model!r} is lost, and so is its copy ({reasons[0]}): {self._advice(model)}"
            )
            self.problems.append(Problem("corruption", message, model=model, object=key))
        return None

    def _find(self, model: str, digest: str, copy: str) -> tuple[Manifest | None, bytes, list[ModelStoreError]]:
        """A good manifest, its stored bytes, and why it is not that of its own object; None if there is none anywhere."""
        key = manifest_key(model, digest)

        def from_mirror() -> tuple[Manifest, bytes]:
            manifest = self.repo.manifests.read(model, digest)
            return manifest, man.encode(manifest)[1]

        def from_object(storage: Storage) -> tuple[Manifest, bytes]:
            data = storage.get(key)
            return man.decode(data, digest, key), data

        ways: list[Callable[[], tuple[Manifest, bytes]]] = [lambda: from_object(self.repo.storage)]
        both = [self.repo.storage] if self.source is None else [self.repo.storage, self.source]
        ways += [lambda at=at: read_copy(at, copy, digest) for at in both if copy]  # type: ignore[misc]
        if self.source is not None:
            ways.append(lambda source=self.source: from_object(source))  # type: ignore[misc]
        ways += [from_mirror, lambda: read_copy(self.repo.storage, self._search().get(digest, digest), digest)]
        reasons: list[ModelStoreError] = []
        for way in ways:
            try:
                manifest, data = way()
            except (*_LOST, UnsupportedError) as error:
                reasons.append(error)
                continue
            return manifest, data, reasons
        return None, b"", reasons

    def _copy(self, record: VersionRecord, variant: str, entry: VariantEntry, data: bytes) -> None:
        """See that the entry's copy is a good one; a lost one is made again."""
        try:
            if pack_is_good(self.repo.storage, entry.copy):
                read_copy(self.repo.storage, entry.copy, entry.manifest)
                return
        except (NotFoundError, CorruptionError, FormatError):
            pass  # a good pack, of something else: the entry is wrong
        except StorageError as error:  # it may be good: it is left alone
            self.problems.append(problem(error, record.model))
            return
        made = packs.copy_pack(record.model, entry.manifest, data)
        self.repo.storage.put(pack_key(made.digest), made.pieces, made.size)
        self.repaired.append(pack_key(made.digest))
        if made.digest != entry.copy:
            pointed = msgspec.structs.replace(entry, copy=made.digest)
            self.repo.catalog.replace_entry(record.model, record.version, variant, self.writer, pointed)

    def _search(self) -> dict[str, str]:
        """The copies of manifests among all packs, found by what their headers say; looked for once, as a last resort."""
        if self._copies is None:
            self._copies = {digest: copy for _, digest, copy in packs.manifest_copies(self.repo.storage)}
        return self._copies

    def pack(self, digest: str) -> int:
        """Check a pack; its size where it is good. One that is not is noted as bad."""
        try:
            if not pack_is_good(self.repo.storage, digest):
                self.bad.append(digest)
                return 0
        except _LOST as error:
            self._told(digest, error)
        return self._size(digest)

    def chunks_of_bad(self) -> tuple[dict[str, list[PackedChunk]], dict[bytes, list[Location]]]:
        """The contents of bad packs, and the other places of their chunks in this store: manifests are read one by one."""
        if not self.bad:
            return {}, {}
        inside = contents(self.bad, self._readable())
        return inside, locations(self._readable(), {part.digest for parts in inside.values() for part in parts})

    def _readable(self) -> Iterator[Manifest]:
        for model, digest in self._noted:
            with suppress(*_LOST):
                yield self.repo.manifests.read(model, digest)

    def mend(self, digest: str, parts: Sequence[PackedChunk], elsewhere: Elsewhere) -> int:
        """Replace a bad pack: made again of its chunks, else from the other copy of the store; its size."""
        try:
            if not self._remade(digest, parts, elsewhere):
                if self.source is None:
                    raise CorruptionError("it is missing or its bytes are not those that its name stands for")
                replace_pack(self.repo.storage, self.source, digest)
            self.repaired.append(pack_key(digest))
        except _LOST as error:
            self._told(digest, error)
        return self._size(digest)

    def _remade(self, digest: str, parts: Sequence[PackedChunk], elsewhere: Elsewhere) -> bool:
        try:
            return remake(self.repo.storage, digest, parts, elsewhere)
        except _LOST:
            if self.source is None:
                raise
            return False  # what it was to be made of cannot be read

    def _told(self, digest: str, error: ModelStoreError) -> None:
        key, (model, tensor, chunks) = pack_key(digest), self.packs[digest]
        what = f"{chunks} chunks, the first of tensor {tensor!r}"
        state = "cannot be read" if isinstance(error, StorageError) else "is damaged"
        message = f"pack {key} of model {model!r}, with {what}, {state} ({error}): {self._advice(model)}"
        self.problems.append(Problem(error.kind, message, model=model, tensor=tensor or None, object=key))

    def _size(self, digest: str) -> int:
        try:
            info = self.repo.storage.info(pack_key(digest))
        except StorageError:  # told already
            return 0
        return info.size if info else 0

    def _advice(self, model: str) -> str:
        if self.source is None:
            return f"run 'modelstore repair {model} --from URL' with another copy of the store"
        return f"{self.source.url} cannot repair it; try another copy of the store, or save the model again"
