"""Garbage collection: marks what any record still needs, sweeps what is unmarked and older than a grace period.

Nothing that a writer is about to publish is lost: see `condemned`. The grace period, by the storage's own clock, spares those
at work the trouble: an object younger than it is not touched; what a record gave up less than the grace period ago is marked as
if it were still named, so that its readers lose nothing; and what a journal names is kept while it is being written.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby

from modelstore.errors import ConflictError, CorruptionError, FormatError, NotFoundError, UnsupportedError
from modelstore.format import record as rec
from modelstore.format.manifest import Manifest
from modelstore.format.names import check_model
from modelstore.format.results import Swept, SweptObject
from modelstore.storage.base import SMALL, ObjectInfo, Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.pool import Pool
from modelstore.storage.wrapping import WrappingStorage
from modelstore.store.catalog import Catalog
from modelstore.store.clock import now
from modelstore.store.condemned import Condemnation, forget_dead, held_by_writers
from modelstore.store.manifests import Manifests
from modelstore.store.repair import copy_of, read_copy

_THREADS = 16
_ROUNDS = 5  # how often a collection begins anew that writers have stopped
_BATCH = 256  # objects removed between two looks at whether that is still allowed
_ONE_LISTING = 1000  # packs up to which one listing is quicker than one a folder
_LONGEST_CHAIN = 1000  # manifests of deltas upon one another; far beyond what is ever written
_DIGEST = re.compile(rb"[0-9a-f]{64}")

Progress = Callable[[int], None]
Needed = dict[
    tuple[str, str], str | None
]  # (model, manifest) → the pack that is its copy, None where no record says so


def collect(
    storage: Storage,
    catalog: Catalog,
    manifests: Manifests,
    *,
    dry_run: bool,
    grace: float,
    progress: Progress | None = None,
) -> Swept:
    """Remove the objects that nothing refers to and that are at least `grace` seconds old; with `dry_run` only say which.

    Stops with an error, before anything is removed, where a record or a manifest cannot be read: what it refers to is not
    known then. May be killed at any point and run again. Superseded records, and those of deleted versions, are kept: they
    are small, and keep numbers from being used twice. `progress` hears of the bytes freed.
    """
    if not grace >= 0:
        raise ValueError(f"grace={grace} is not a number of seconds from 0 on")
    now_ = _now(storage, dry_run)
    limit = now_ - grace
    marked = _mark(storage, catalog, manifests, limit)
    found = _unmarked(storage, marked, limit)
    if dry_run:
        found.spare(held_by_writers(storage, stale_before=limit, now=now_, dry_run=True))
        gone = [SweptObject(info.key, info.size) for stage in found.stages for info in stage]
    else:
        forget_dead(storage, now_)
        gone = _remove(storage, catalog, manifests, found, limit, now_, progress)
    gone += _temporaries(storage, limit, dry_run)
    return Swept(tuple(gone), sum(one.size for one in gone), found.kept, dry_run)


def _remove(
    storage: Storage,
    catalog: Catalog,
    manifests: Manifests,
    found: _Found,
    limit: float,
    now_: float,
    progress: Progress | None,
) -> list[SweptObject]:
    """Remove what can go, but for what writers turn out to rely on."""
    if not found.condemned:
        held_by_writers(storage, stale_before=limit, now=now_)
        return _sweep_all(storage, None, found, limit, progress)
    for _ in range(_ROUNDS):
        with Condemnation(storage, found.condemned) as condemned:
            held = held_by_writers(storage, stale_before=limit, now=now_)
            found.spare(held | _mark(storage, catalog, manifests, limit))
            if condemned.pronounce(found.condemned):
                return _sweep_all(storage, condemned, found, limit, progress)
    raise ConflictError("saves under way rely on what was to be removed: nothing was removed; run it again")


def _sweep_all(
    storage: Storage, condemned: Condemnation | None, found: _Found, limit: float, progress: Progress | None
) -> list[SweptObject]:
    gone = []
    with Pool(_THREADS, thread_name_prefix="modelstore-gc") as pool:
        for stage in found.stages:
            for start in range(0, len(stage), _BATCH):
                if condemned is not None:
                    condemned.check()
                for swept in pool.map(lambda info: _sweep(storage, info, limit), stage[start : start + _BATCH]):
                    found.kept += swept is None
                    if swept is not None:
                        gone.append(swept)
                        if progress:
                            progress(swept.size)
    return gone


def _now(storage: Storage, dry_run: bool) -> float:
    """The time by the storage's clock, which may differ from this machine's."""
    try:
        return now(storage)
    except UnsupportedError:
        if dry_run:  # a store open for reading only: what is said may be off by what the clocks differ
            return time.time()
        raise


# ---------------------------------------------------------------------- marking


def _mark(storage: Storage, catalog: Catalog, manifests: Manifests, limit: float) -> set[str]:
    """Keys of every manifest and pack that a record needs, or needed until after `limit`."""
    live: Needed = {}
    recent: Needed = {}
    with Pool(_THREADS, thread_name_prefix="modelstore-gc") as pool:
        for found, given_up in pool.map(lambda model: _needed(storage, model, limit), catalog.models()):
            live |= found
            recent |= given_up
        marked: set[str] = set()
        for needed, must_be_there in ((live, True), (recent, False)):
            for _ in range(_LONGEST_CHAIN):
                bases: Needed = {}
                read = pool.map(lambda item: _manifest(storage, manifests, item[0], item[1]), needed.items())
                for (model, digest), one in zip(needed, read, strict=True):
                    if isinstance(one, CorruptionError):
                        if must_be_there or storage.info(rec.manifest_key(model, digest)):
                            raise one
                        continue  # it was given up, and swept by an earlier collection of a shorter grace
                    manifest, copy = one
                    marked |= {rec.manifest_key(model, digest), rec.pack_key(copy), *map(rec.pack_key, manifest.packs)}
                    base = manifest.base
                    if base is not None and rec.manifest_key(base.model, base.manifest) not in marked:
                        bases[base.model, base.manifest] = None
                if not bases:
                    break
                needed = bases
            else:
                raise FormatError(
                    f"deltas of deltas are more than {_LONGEST_CHAIN} deep: nothing was swept; delete what made them"
                )
    return marked


def _needed(storage: Storage, model: str, limit: float) -> tuple[Needed, Needed]:
    """The manifests of a model that the newest record of a version names; and those of records given up after `limit`."""
    live: Needed = {}
    recent: Needed = {}
    prefix = rec.versions_prefix(model)
    for folder, infos in groupby(storage.list(prefix), key=lambda info: info.key[len(prefix) :].partition("/")[0]):
        if rec.ascending(folder) is None:
            continue
        superseded = math.inf
        for info in infos:
            if superseded <= limit:
                break
            record = rec.parse_version(storage.get(info.key, SMALL), info.key)
            if record.deleted and info.modified <= limit:
                break
            found = live if superseded == math.inf and not record.deleted else recent
            for entry in record.variants.values():
                found.setdefault((model, entry.manifest), entry.copy)
            superseded = info.modified
    return live, recent


def _manifest(
    storage: Storage, manifests: Manifests, name: tuple[str, str], copy: str | None
) -> tuple[Manifest, str] | CorruptionError:
    """A manifest, from its copy if need be, and the digest of the pack that is its copy; an error where there is none."""
    model, digest = name
    try:
        manifest = manifests.read(model, digest)
        if copy is not None:
            return manifest, copy
        return manifest, copy_of(storage, model, digest, manifest).digest
    except CorruptionError as error:
        if copy is not None:
            with suppress(NotFoundError, CorruptionError, FormatError):
                return read_copy(storage, copy, digest)[0], copy
        return CorruptionError(
            f"nothing was swept, because what it refers to is not known: {error}", model=model, object=error.object
        )


# ---------------------------------------------------------------------- sweeping


@dataclass
class _Found:
    """What can go, in the order in which it goes: what refers to other things before these; how many objects stay."""

    stages: tuple[list[ObjectInfo], ...]
    kept: int = 0
    journals: list[str] = field(default_factory=list)

    @property
    def condemned(self) -> set[str]:
        """Keys of the manifests and packs that can go."""
        return {info.key for stage in self.stages[1:] for info in stage}

    def spare(self, keys: Collection[str]) -> None:
        """Take manifests and packs out of what can go."""
        for stage in self.stages[1:]:
            left = [info for info in stage if info.key not in keys]
            self.kept += len(stage) - len(left)
            stage[:] = left


def _unmarked(storage: Storage, marked: set[str], limit: float) -> _Found:
    """Journals, manifests and packs that are unmarked, were last written before `limit`, and in no running work's journal."""
    jobs: list[ObjectInfo] = []
    found = _Found((jobs, [], []))
    listed = storage.list(rec.JOBS)
    for _, group in groupby(listed, key=lambda info: info.key[len(rec.JOBS) :].partition("/")[0]):
        job = list(group)
        if max(info.modified for info in job) <= limit:
            jobs += job
        else:  # a work that goes on: its oldest pages count too
            found.kept += len(job)
            found.journals += [info.key for info in job]
    for stage, infos in zip(found.stages[1:], (_manifests(storage), _packs(storage)), strict=True):
        for info in infos:
            if info.key in marked or info.modified > limit:
                found.kept += 1
            else:
                stage.append(info)
    _spare(storage, found)
    return found


def _spare(storage: Storage, found: _Found) -> None:
    """Take what the journals of running works name out of what can go."""
    names = {key.rpartition("/")[2].partition(".")[0].encode(): key for key in found.condemned}
    if not names:
        return
    spared: set[str] = set()
    for key in found.journals:
        # Gone: the work was finished meanwhile, and what it published is marked. A link: no writer makes one.
        with suppress(NotFoundError, CorruptionError):
            spared.update(names[name] for name in _DIGEST.findall(storage.get(key)) if name in names)
    found.spare(spared)


def _manifests(storage: Storage) -> Iterator[ObjectInfo]:
    """Every manifest, also of models that have no record yet."""
    for first in storage.folders(rec.MODELS):
        inner = storage.folders(f"{rec.MODELS}{first}/")
        for name in (first, *(f"{first}/{second}" for second in inner)):
            try:
                prefix = rec.manifests_prefix(check_model(name))
            except ValueError:
                continue  # no folder of a model: not ours
            yield from storage.list(prefix)


def _packs(storage: Storage) -> Iterable[ObjectInfo]:
    """Every pack; many of them folder by folder, side by side."""
    few = list(storage.list(rec.PACKS, limit=_ONE_LISTING))
    if len(few) < _ONE_LISTING:
        return few

    def folder(name: str) -> list[ObjectInfo]:
        return list(storage.list(f"{rec.PACKS}{name}/"))

    with Pool(_THREADS, thread_name_prefix="modelstore-gc") as pool:
        return [info for infos in pool.map(folder, storage.folders(rec.PACKS)) for info in infos]


def _sweep(storage: Storage, info: ObjectInfo, limit: float) -> SweptObject | None:
    """Remove an object, unless a writer that wants it has written it again meanwhile; None where it stays, or was gone."""
    there = storage.info(info.key)
    if there is None or there.modified > limit:
        return None
    storage.delete(info.key)
    return SweptObject(info.key, info.size)


def _temporaries(storage: Storage, limit: float, dry_run: bool) -> list[SweptObject]:
    """Files that killed writers left behind in a local store."""
    while isinstance(storage, WrappingStorage):
        storage = storage.inner
    if not isinstance(storage, LocalStorage):
        return []
    sizes = {}
    for path in storage.remove_temporaries(limit, dry_run=True):
        with suppress(FileNotFoundError):  # its writer is done with it
            sizes[path] = path.lstat().st_size
    paths = sizes if dry_run else storage.remove_temporaries(limit)
    return [SweptObject(path.relative_to(storage.root).as_posix(), sizes.get(path, 0)) for path in paths]
