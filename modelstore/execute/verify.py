"""Verification: every stored chunk against its digest, and, deep, every tensor against the digest of what was saved.

Nothing is repaired, and no mirror stands in: only this store is looked at. It never stops at a problem.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

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
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader, whole_want
from modelstore.format import grid
from modelstore.format.answers.results import Problem, Report
from modelstore.format.buffers import Bytes, view
from modelstore.format.digest import matches, name_of, name_of_pieces
from modelstore.format.names import Reference
from modelstore.format.objects.manifest import DIGEST_BYTES, Manifest, Tensor, decode
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key, pack_key
from modelstore.plan.read import GAP, JOB_BYTES
from modelstore.plan.work import Work
from modelstore.storage.base import Storage
from modelstore.storage.pool import ordered
from modelstore.store.damage import noting
from modelstore.store.describe import problem
from modelstore.store.mend.records import damage
from modelstore.store.mend.repair import live, read_copy
from modelstore.store.packs import open_pack
from modelstore.store.repo import Repo
from modelstore.store.unread import told_once

_BAD = (NotFoundError, CorruptionError, FormatError, StorageError)
_PATIENCE = 32  # jobs refused in a row, each with all its retries, after which a storage is taken to be out of reach
_WINDOW = 4  # parts of a large tensor decoded at a time

T = TypeVar("T")
U = TypeVar("U")
Rows = NDArray[np.int64]


def verify(
    repo: Repo,
    ref: Reference | None,
    *,
    deep: bool,
    work: Work,
) -> Report:
    """Check the variant that a reference names, or all that is live, and what its deltas are stored against.

    `deep` decodes every tensor as well, within the memory of `work` whatever its size. It hears of the stored
    bytes checked, and of the raw bytes decoded. A chunk that several variants share is read once, or deep once for each.
    """
    checking = _Verification(repo, work)
    models = [ref.name] if ref is not None else repo.catalog.models(closed=True)
    found = damage(repo.storage, models, journals=ref is None)
    for model in models:
        checking.model(model, ref, deep)
    if ref is None:
        noting(checking.damaged, repo.catalog.open)
    told = {one.object for one in found}
    found += [problem(error, ref.name if ref else "") for error in checking.damaged if error.object not in told]
    return Report(checking.chunks, checking.nbytes, checking.tensors, told_once([*found, *checking.problems]))


@dataclass
class _Verification:
    """One verification: what it has seen so far."""

    repo: Repo
    work: Work
    problems: list[Problem] = field(default_factory=list)
    damaged: list[ModelStoreError] = field(default_factory=list)  # records
    chunks: int = 0
    nbytes: int = 0
    tensors: int = 0
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _checked: dict[str, NDArray[np.bytes_]] = field(default_factory=dict)  # pack → `_places` of its chunks
    _silent: int = 0  # jobs in a row that the storage refused
    _headers: set[str] = field(default_factory=set)  # packs whose headers were looked at
    _wrong: set[tuple[str, bytes]] = field(default_factory=set)  # the same of bad chunks

    def model(self, model: str, ref: Reference | None, deep: bool) -> None:
        """Check what is live of a model, or what a reference names.

        Anew where there are problems and a version was compacted or deleted since it was looked at: what it named may be gone.
        """
        told, counts = len(self.problems), (self.chunks, self.nbytes, self.tensors)
        while True:
            looked: dict[int, int] = {}
            for record, entry in self._named(model, ref):
                looked[record.version] = record.number
                self.variant(model, entry, deep)
            if len(self.problems) == told or not self.repo.catalog.changed(model, looked):
                return
            del self.problems[told:]
            self.chunks, self.nbytes, self.tensors = counts
            for known in (self._seen, self._checked, self._headers, self._wrong):
                known.clear()

    def _named(self, model: str, ref: Reference | None) -> list[tuple[VersionRecord, VariantEntry]]:
        if ref is None:
            return [(record, entry) for record, _, entry in live(self.repo.catalog, model, None, [])]
        named = noting(self.damaged, lambda: self.repo.catalog.entry(ref))
        return [named] if named is not None else []

    def variant(self, model: str, entry: VariantEntry, deep: bool) -> None:
        """Check a variant's manifest and its copy, its chunks and tensors; then those that it is stored against."""
        digest, copy = entry.manifest, entry.copy
        while (model, digest) not in self._seen:
            self._seen.add((model, digest))
            manifest = self._manifest(model, digest, copy)
            if manifest is None:
                return
            self.tensors += len(manifest.tensors)
            if deep:
                self._check_tensors(model, manifest)
            else:
                self._check_chunks(model, manifest)
            self._check_headers(model, manifest)
            if manifest.base is None:
                return
            model, digest, copy = manifest.base.model, manifest.base.manifest, ""

    def _manifest(self, model: str, digest: str, copy: str) -> Manifest | None:
        """A manifest, from elsewhere if it is damaged here, so that the rest can be checked; None if there is none."""
        found: list[Manifest] = []
        key = manifest_key(model, digest)
        ways: list[tuple[str, str, Callable[[], Manifest]]] = [
            ("manifest", key, lambda: decode(self.repo.storage.get(key), digest, key))
        ]
        if copy:
            ways.append(("copy of the manifest", pack_key(copy), lambda: read_copy(self.repo.storage, copy, digest)[0]))
        for what, at, way in ways:
            try:
                found.append(way())
            except (StorageError, UnsupportedError) as error:  # which does not say that anything is damaged
                self.problems.append(problem(error, model))
            except _BAD as error:
                text = f"the {what} of model {model!r}, {at}, is damaged ({error}): run 'modelstore repair {model}'"
                self.problems.append(Problem(error.kind, text, model=model, object=at))
        if found:
            return found[0]
        try:
            return self.repo.manifests.read(model, digest)  # a mirror's
        except (CorruptionError, UnsupportedError, StorageError):
            return None  # told above

    # ------------------------------------------------------------------ chunks

    def _check_chunks(self, model: str, manifest: Manifest) -> set[int]:
        """Check every chunk that was not checked before; the rows of those that are bad."""
        places = _places(manifest)
        fresh = self._fresh(manifest, places)
        missing: Counter[int] = Counter()
        unread: dict[int, Problem] = {}
        first: dict[int, int] = {}
        owners = _Owners(manifest)

        def check(job: list[int]) -> list[tuple[int, ModelStoreError | None]]:
            if self._silent >= _PATIENCE:
                return [(row, StorageError("it was not asked for any more")) for row in job]
            return _check(self.repo.storage, manifest, job)

        for results in self._looked(check, _jobs(manifest, fresh)):
            refused = all(isinstance(error, StorageError) for _, error in results)
            self._silent = self._silent + 1 if refused else 0
            for row, error in results:
                read = not isinstance(error, StorageError)
                self.chunks += read
                self.nbytes += read * int(manifest.length[row])
                self.work.done(int(manifest.length[row]))
                if error is None:
                    continue
                pack = int(manifest.pack[row])
                self._wrong.add((manifest.packs[pack], places[row].tobytes()))
                if isinstance(error, NotFoundError):
                    missing[pack] += 1
                    first.setdefault(pack, row)
                elif isinstance(error, StorageError):
                    name, chunk = owners.of(row)
                    key = pack_key(manifest.packs[pack])
                    unread.setdefault(pack, Problem(error.kind, str(error), model, name, chunk, key))
                else:
                    self.problems.append(_chunk_problem(model, manifest, row, owners.of(row), error))
        for pack, n in missing.items():
            key = pack_key(manifest.packs[pack])
            name, _ = owners.of(first[pack])
            what = f"with {n} chunks, the first of tensor {name!r}"
            message = f"pack {key} of model {model!r}, {what}, is missing: {_advice(model)}"
            self.problems.append(Problem("not_found", message, model=model, tensor=name, object=key))
        self.problems += unread.values()
        if not self._wrong:
            return set()
        packs = manifest.packs
        return {row for row, p in enumerate(manifest.pack.tolist()) if (packs[p], places[row].tobytes()) in self._wrong}

    def _fresh(self, manifest: Manifest, places: NDArray[np.uint8]) -> Rows:
        """One row for each place that was not checked before, in the order of packs and offsets; they count as checked now."""
        keys = places.view(f"S{places.shape[1]}").reshape(-1)  # of one length, so trailing zeros make no two equal
        order = np.lexsort((manifest.offset, manifest.pack))
        ends = np.searchsorted(manifest.pack[order], np.arange(len(manifest.packs) + 1))
        fresh = []
        for pack, digest in enumerate(manifest.packs):
            rows = order[ends[pack] : ends[pack + 1]]
            found, at = np.unique(keys[rows], return_index=True)
            before = self._checked.get(digest)
            if before is not None:
                new = ~np.isin(found, before)
                at, found = at[new], np.concatenate([before, found[new]])
            self._checked[digest] = found
            fresh.append(rows[np.sort(at)])
        return np.concatenate(fresh or [np.zeros(0, np.int64)])

    def _threads(self) -> int:
        return self.work.limits.reading_threads(self.repo.storage.local)

    def _check_headers(self, model: str, manifest: Manifest) -> None:
        """Check that the header makes each pack a whole safetensors file; packs with bad chunks, and lost ones, are reported
        already.
        """
        told = {digest for digest, _ in self._wrong}
        fresh = [digest for digest in manifest.packs if digest not in self._headers and digest not in told]
        self._headers.update(fresh)

        def check(digest: str) -> ModelStoreError | None:
            try:
                open_pack(self.repo.storage, pack_key(digest))
            except _BAD as error:
                return error
            return None

        if self._silent >= _PATIENCE:
            return
        for digest, error in zip(fresh, self._looked(check, fresh), strict=True):
            if error is not None:
                key = pack_key(digest)
                message = f"the header of pack {key} of model {model!r} is damaged ({error}): {_advice(model)}"
                unread = isinstance(error, StorageError)
                self.problems.append(Problem(error.kind, str(error) if unread else message, model=model, object=key))

    # ------------------------------------------------------------------ tensors

    def _check_tensors(self, model: str, manifest: Manifest) -> None:
        """Decode everything and compare; chunk by chunk only where something is bad, so that all of it is named."""
        wrong: set[int] | None = None
        try:
            reader = Variant(replace(self.repo, mirrors=()), model, manifest).reader
        except ModelStoreError as error:
            self.problems.append(problem(error, model))
            self._check_chunks(model, manifest)
            return
        for group in (manifest.tensors, manifest.files):
            left = {tensor.name: tensor for tensor in group}
            while left:
                try:
                    for tensor, digest in self._decoded(reader, list(left.values())):
                        del left[tensor.name]
                        self._compare(model, tensor, digest)
                except _BAD as error:
                    if wrong is None:
                        wrong = self._check_chunks(model, manifest)
                    bad = [n for n, t in left.items() if wrong and not wrong.isdisjoint(manifest.rows(t).tolist())]
                    if not bad:
                        self.problems.append(problem(error, model))
                        bad = [error.tensor] if error.tensor in left else list(left)
                    for name in bad:
                        del left[name]
        if wrong is None:
            rows = self._fresh(manifest, _places(manifest))
            self.chunks += len(rows)
            self.nbytes += int(manifest.length[rows].sum())

    def _compare(self, model: str, tensor: Tensor, digest: str) -> None:
        if digest != tensor.digest:
            message = (
                f"tensor {tensor.name!r} of model {model!r} decodes to other bytes than were saved, though every "
                f"stored chunk is good: save the model again, and report this"
            )
            self.problems.append(Problem("corruption", message, model=model, tensor=tensor.name))

    def _decoded(self, reader: Reader, tensors: list[Tensor]) -> Iterator[tuple[Tensor, str]]:
        """Each tensor with the digest of its decoded bytes; those too large to be held go in parts."""
        small = [t for t in tensors if t.nbytes <= self.work.memory // 4]
        wants = [whole_want(t) for t in small]
        for index, buffer in reader.stream(wants, self.work):
            yield small[index], name_of(buffer)
        for tensor in tensors:
            if tensor.nbytes > self.work.memory // 4:
                yield tensor, self._in_parts(reader, tensor)

    def _in_parts(self, reader: Reader, tensor: Tensor) -> str:
        limit = self.work.memory // (4 * _WINDOW)
        threads = min(_WINDOW, self._threads())
        regions = grid.runs(tensor.shape, tensor.chunk, tensor.kind.itemsize, limit)

        def parts() -> Iterator[Bytes]:
            read = partial(reader.region, tensor)
            for part in ordered(read, regions, threads, "modelstore-verify", ahead=threads):
                yield part
                self.work.done(len(part))

        return name_of_pieces(parts())

    def _looked(self, check: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        threads = self._threads()
        return ordered(check, items, threads, "modelstore-verify", ahead=2 * threads)


def _places(manifest: Manifest) -> NDArray[np.uint8]:
    """One line a row: offset, length and digest, as bytes."""
    table = manifest.chunks
    offset, length = (np.frombuffer(column, np.uint8).reshape(-1, 8) for column in (table.offset, table.length))
    digest = np.frombuffer(table.digest, np.uint8).reshape(-1, DIGEST_BYTES)
    return np.ascontiguousarray(np.concatenate([offset, length, digest], axis=1))


def _jobs(manifest: Manifest, rows: Rows) -> Iterator[list[int]]:
    """Rows, in the order of their places, grouped so that each group is read as one range."""
    job: list[int] = []
    last, start, stop = -1, 0, 0
    columns = (manifest.pack[rows].tolist(), manifest.offset[rows].tolist(), manifest.length[rows].tolist())
    for row, pack, at, n in zip(rows.tolist(), *columns, strict=True):
        if job and (pack != last or at - stop > GAP or at + n - start > JOB_BYTES):
            yield job
            job = []
        if not job:
            last, start, stop = pack, at, at
        job.append(row)
        stop = max(stop, at + n)
    if job:
        yield job


def _check(storage: Storage, manifest: Manifest, job: Sequence[int]) -> list[tuple[int, ModelStoreError | None]]:
    """Read a job's range and check each row; where it cannot be read whole, row by row."""
    spans = [(int(manifest.offset[row]), int(manifest.offset[row] + manifest.length[row])) for row in job]
    start, stop = min(a for a, _ in spans), max(b for _, b in spans)
    key = pack_key(manifest.packs[int(manifest.pack[job[0]])])
    data = np.empty(stop - start, np.uint8)
    try:
        storage.read(key, start, view(data))
    except (NotFoundError, CorruptionError, StorageError) as error:
        if len(job) == 1 or not isinstance(error, CorruptionError):
            return [(row, error) for row in job]
        return [result for row in job for result in _check(storage, manifest, [row])]
    results: list[tuple[int, ModelStoreError | None]] = []
    for row, (a, b) in zip(job, spans, strict=True):
        good = matches(data[a - start : b - start], manifest.digest(row))
        results.append((row, None if good else CorruptionError("the bytes do not match their digest")))
    return results


def _chunk_problem(model: str, manifest: Manifest, row: int, owner: tuple[str, int], error: ModelStoreError) -> Problem:
    start, n = int(manifest.offset[row]), int(manifest.length[row])
    key = pack_key(manifest.packs[int(manifest.pack[row])])
    name, chunk = owner
    message = (
        f"chunk {chunk} of tensor {name!r} of model {model!r} is damaged: bytes {start} to {start + n} of {key} "
        f"are wrong ({error}); {_advice(model)}"
    )
    return Problem(error.kind, message, model, name, chunk, key)


def _advice(model: str) -> str:
    return f"run 'modelstore repair {model} --from URL' with another copy of the store"


class _Owners:
    """Which tensor, and which of its chunks, a row of the chunk table belongs to; made when the first is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._planes: list[tuple[int, int, str]] = []

    def of(self, row: int) -> tuple[str, int]:
        """The tensor's or file's name, and the chunk's index in its grid; ('', 0) for a row that nothing refers to."""
        if not self._planes:
            every = (*self._manifest.tensors, *self._manifest.files)
            self._planes = sorted((p.first, t.chunks, t.name) for t in every for p in t.planes)
        at = bisect_right(self._planes, row, key=lambda plane: plane[0])
        for first, n, name in reversed(self._planes[:at]):
            if row < first + n:
                return name, row - first
        return "", 0
