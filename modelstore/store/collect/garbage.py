"""Garbage collection: marks what any record still needs, sweeps what is unmarked and older than a grace period.

Nothing that a writer is about to publish is lost: see `condemned`. The grace period, by the storage's own clock, spares those
at work the trouble: an object younger than it is not touched; what a record gave up less than the grace period ago is marked as
if it were still named, so that its readers lose nothing; and what a journal names is kept while it is being written.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby

from modelstore.errors import ConflictError, ModelStoreError, NotFoundError
from modelstore.format.answers.inventory import Swept, SweptObject
from modelstore.format.names import check_model
from modelstore.format.objects import record as rec
from modelstore.format.progress import Advance
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.clock import now
from modelstore.store.collect.condemned import Condemnation, forget_dead, held_by_writers
from modelstore.store.collect.marking import Doubt, needed_manifests
from modelstore.store.damage import DAMAGED
from modelstore.store.mend.records import torn_journals
from modelstore.store.repo import Repo

_ROUNDS = 5  # how often a collection begins again that writers have stopped
_BATCH = 256  # objects removed between two looks at whether that is still allowed
_ONE_LISTING = 1000  # packs up to which one listing is quicker than one a folder
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def collect(
    repo: Repo,
    *,
    dry_run: bool,
    grace: float,
    progress: Advance | None = None,
) -> Swept:
    """Remove the objects that nothing refers to and that are at least `grace` seconds old; with `dry_run` only say which.

    If something cannot be read, everything that it may refer to is kept, and `problems` names it: for a record, all that its
    model's manifests need; for a manifest without its copy, or a journal of a running job, every manifest and pack.

    May be killed at any point and run again. Superseded records, and those of deleted versions, are kept: they are small, and
    keep numbers from being used twice. `progress` hears of the bytes freed.
    """
    if not grace >= 0:
        raise ValueError(f"grace={grace} is not a number of seconds from 0 on")
    now_ = now_of(repo.storage, dry_run)
    limit = now_ - grace
    doubt = Doubt()
    live: set[str] = set()
    marked = _mark(repo, limit, doubt, live)
    found = _unmarked(repo.storage, marked, live, limit, doubt)
    if dry_run:
        found.spare(_held(repo.storage, limit, now_, doubt, dry_run=True))
        found.spare_in(doubt)
        gone = [SweptObject(info.key, info.size) for stage in found.stages for info in stage]
    else:
        forget_dead(repo.storage, now_)
        gone = _remove(repo, found, limit, now_, doubt, progress)
    gone += _temporaries(repo.storage, limit, dry_run)
    freed = sum(one.size for one in gone)
    young = found.young + sum(info.size for info in repo.storage.sweep(math.inf, dry_run=True) if info.modified > limit)
    return Swept(tuple(gone), freed, found.kept, dry_run, tuple(doubt.problems.values()), young=young)


def _remove(
    repo: Repo,
    found: _Removable,
    limit: float,
    now_: float,
    doubt: Doubt,
    progress: Advance | None,
) -> list[SweptObject]:
    """Remove what can go, but for what writers turn out to rely on."""
    found.spare_in(doubt)
    if not found.condemned:
        _held(repo.storage, limit, now_, doubt)
        return _sweep_all(repo.storage, None, found, limit, progress)
    for _ in range(_ROUNDS):
        with Condemnation(repo.storage, found.condemned) as condemned:
            held = _held(repo.storage, limit, now_, doubt)
            found.spare(held | _mark(repo, limit, doubt))
            found.spare_in(doubt)
            if condemned.pronounce(found.condemned):
                return _sweep_all(repo.storage, condemned, found, limit, progress)
    raise ConflictError("saves under way rely on what was to be removed: nothing was removed; run it again")


def _sweep_all(
    storage: Storage, condemned: Condemnation | None, found: _Removable, limit: float, progress: Advance | None
) -> list[SweptObject]:
    gone = []
    for stage in found.stages:
        for start in range(0, len(stage), _BATCH):
            if condemned is not None:
                condemned.check()
            some = stage[start : start + _BATCH]
            for swept in ordered(lambda info: _sweep(storage, info, limit), some, REQUESTS, "modelstore-gc"):
                found.kept += swept is None
                if swept is not None:
                    gone.append(swept)
                    if progress:
                        progress(swept.size)
    return gone


def now_of(storage: Storage, dry_run: bool) -> float:
    """The time by the storage's clock, which may differ from this machine's.

    That takes a write, so a dry run goes by this machine's: what it says may be off by what the clocks differ.
    """
    return time.time() if dry_run else now(storage)


def _mark(
    repo: Repo,
    limit: float,
    doubt: Doubt,
    live: set[str] | None = None,
) -> set[str]:
    """Keys of every manifest and pack that a record needs, or needed until after `limit`; `live` gets those it needs now."""
    marked: set[str] = set()
    for one in needed_manifests(repo, limit, doubt):
        keys = {rec.manifest_key(one.model, one.digest), *map(rec.pack_key, one.copies)}
        keys |= {rec.pack_key(pack) for pack in one.manifest.packs}
        marked |= keys
        if live is not None and one.live:
            live |= keys
    return marked


def _held(storage: Storage, limit: float, now_: float, doubt: Doubt, *, dry_run: bool = False) -> set[str]:
    """Keys of what writers are about to publish, or may be."""
    damaged: list[ModelStoreError] = []
    held = held_by_writers(storage, stale_before=limit, now=now_, damaged=damaged, dry_run=dry_run)
    for error in damaged:
        doubt.add(error, everything=True)
    return held


# ---------------------------------------------------------------------- sweeping


@dataclass
class _Removable:
    """The objects that can go, in the order in which they go: objects that refer to others before these; how many objects
    stay.
    """

    stages: tuple[list[ObjectInfo], ...]
    kept: int = 0
    young: int = 0  # bytes of what nothing refers to, but is too young to go
    journals: list[str] = field(default_factory=list)

    @property
    def condemned(self) -> set[str]:
        """Keys of the manifests and packs that can go."""
        return {info.key for stage in self.stages[1:] for info in stage}

    def spare_in(self, doubt: Doubt) -> None:
        """Take all of them out where anything may be needed."""
        if doubt.everything:
            self.spare(self.condemned)

    def spare(self, keys: Collection[str]) -> None:
        """Take manifests and packs out of what can go."""
        for stage in self.stages[1:]:
            left = [info for info in stage if info.key not in keys]
            self.kept += len(stage) - len(left)
            stage[:] = left


def _unmarked(storage: Storage, marked: set[str], live: set[str], limit: float, doubt: Doubt) -> _Removable:
    """Journals, manifests and packs that are unmarked, were last written before `limit`, and in no running work's journal."""
    jobs: list[ObjectInfo] = []
    found = _Removable((jobs, [], []))
    listed = storage.list(rec.JOBS)
    for _, group in groupby(listed, key=lambda info: info.key[len(rec.JOBS) :].partition("/")[0]):
        job = [info for info in group if rec.is_own(info.key)]
        if not job:
            continue
        if any(info.key.endswith(f"/{rec.STORE_KEY}") for info in job):
            found.kept += len(job)  # a store of its own
        elif max(info.modified for info in job) <= limit:
            jobs += job
        else:  # a work that goes on: its oldest pages count too
            found.kept += len(job)
            found.journals += [
                info.key for info in job if info.key.endswith(".json")
            ]  # a training's state names nothing
    for stage, infos in zip(found.stages[1:], (_manifests(storage), _packs(storage)), strict=True):
        for info in infos:
            if info.key in marked or info.modified > limit:
                found.kept += 1
                found.young += info.size * (info.key not in live)
            else:
                stage.append(info)
    _spare(storage, found, doubt)
    return found


def _spare(storage: Storage, found: _Removable, doubt: Doubt) -> None:
    """Take what the journals of running works name out of what can go."""
    names = {key.rpartition("/")[2].partition(".")[0].encode(): key for key in found.condemned}
    if not names:
        return
    for error in torn_journals(storage, found.journals):
        doubt.add(error, everything=True)
    spared: set[str] = set()
    for key in found.journals:
        # Gone: the work was finished meanwhile, and what it published is marked.
        with suppress(NotFoundError, *DAMAGED):
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
            yield from (info for info in storage.list(prefix) if rec.is_own(info.key))


def _packs(storage: Storage) -> Iterable[ObjectInfo]:
    """Every pack; many of them folder by folder, side by side."""
    return (info for info in _under_packs(storage) if rec.is_own(info.key))


def _under_packs(storage: Storage) -> list[ObjectInfo]:
    few = list(storage.list(rec.PACKS, limit=_ONE_LISTING))
    if len(few) < _ONE_LISTING:
        return few

    def folder(name: str) -> list[ObjectInfo]:
        return list(storage.list(f"{rec.PACKS}{name}/"))

    folders = ordered(folder, storage.folders(rec.PACKS), REQUESTS, "modelstore-gc")
    return [info for infos in folders for info in infos]


def _sweep(storage: Storage, info: ObjectInfo, limit: float) -> SweptObject | None:
    """Remove an object, unless a writer that needs it has written it again meanwhile; None if it stays, or was gone."""
    there = storage.info(info.key)
    if there is None or there.modified > limit:
        return None
    storage.delete(info.key)
    return SweptObject(info.key, info.size)


def _temporaries(storage: Storage, limit: float, dry_run: bool) -> list[SweptObject]:
    """Leftovers of killed writers."""
    return [SweptObject(info.key, info.size) for info in storage.sweep(limit, dry_run=dry_run)]
