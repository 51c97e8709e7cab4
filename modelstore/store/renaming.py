"""Gives a model another name: new records under it, then the old ones are deleted. No pack is written.

Each version is made under the new name before it is deleted under the old one, the newest first: at every instant every
version is there under one name or both, and the newest of the new name is the newest. An interrupted renaming continues when
it is started again: versions made by it are known by their writer, which is made of both names and the old number.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import msgspec

from modelstore.errors import ConflictError, CorruptionError, NotFoundError
from modelstore.format.answers.inventory import Renamed
from modelstore.format.digest import name_of
from modelstore.format.objects import manifest as man
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key
from modelstore.store.repo import Repo

_ROUNDS = 1000  # how often what others did meanwhile is looked for again


def rename(repo: Repo, old: str, new: str) -> Renamed:
    """Give all live versions of `old`, and its tags, to `new`.

    Versions keep their numbers where `new` was never used, else all move up by as much as is needed. `ConflictError` if
    `new` has live versions that are not of this very work; `NotFoundError` if there is no `old`.
    """
    if old == new:
        raise ValueError(f"model {old!r} has that name already: give another")
    work = _Renaming(repo, old, new)
    live = repo.catalog.live(old)
    made = work.made()
    if not live and not any(made.values()):
        repo.catalog.newest(old)  # says what is wrong
    if live and made and not any(record.version in work.moved for record in live):
        raise ConflictError(f"there is a model {new!r} already: choose another name, or delete it first", model=new)
    tags: dict[str, None] = {}
    for _ in range(_ROUNDS):
        live = repo.catalog.live(old)
        if not live:
            return Renamed(old, new, dict(sorted(work.moved.items())), tuple(sorted(tags)))
        work.make(live)
        tags |= dict.fromkeys(work.move_tags())
        work.delete(live)
    raise ConflictError(f"{_ROUNDS} writers changed model {old!r} meanwhile: try again when fewer write", model=old)


class _Renaming:
    """One renaming, and the versions that it made so far, as {before: now}."""

    def __init__(self, repo: Repo, old: str, new: str) -> None:
        self._storage = repo.storage
        self._catalog = repo.catalog
        self._old = old
        self._new = new
        self._id = repo.catalog.open().id
        self.moved: dict[int, int] = {}
        self._highest = 0  # number of the new name, before what this renaming made was looked for
        self._up: int | None = None  # by how much numbers change, unless they are taken
        self._twice: list[int] = []  # numbers of the new name whose versions were made again under higher ones

    def made(self) -> dict[int, int]:
        """Live versions of the new name, and which old number each has that a renaming like this one made; 0: another's."""
        self._highest = self._catalog.highest(self._new)
        found = {}
        highest = self._catalog.highest(self._old)
        writers = {self._writer(number): number for number in range(1, highest + 1)}
        for record in self._catalog.live(self._new):
            found[record.version] = writers.get(self._catalog.maker(self._new, record.version) or "", 0)
        for now, before in sorted(found.items()):
            if before:
                self._note(before, now)
        return found

    def make(self, live: Iterable[VersionRecord]) -> None:
        """Make the versions under the new name that are not there yet, the newest first."""
        records = sorted(live, key=lambda record: -record.version)
        if self._up is None and records:
            # Not by what is there now: the same renaming, started twice, makes the same numbers of the same versions.
            offsets = [now - before for before, now in self.moved.items()]
            self._up = min(offsets) if offsets else max(0, self._highest + 1 - records[-1].version)
        rounds = iter(range(_ROUNDS))
        for record in records:
            if record.version not in self.moved:
                self._make(record, self._number(record.version), records, rounds)
        for number in self._twice:
            self._drop(number)
        self._twice.clear()

    def _number(self, version: int) -> int:
        """The number that a version is to have, above that of the next older one that is made already."""
        older = max((before for before in self.moved if before < version), default=None)
        assert self._up is not None
        return version + (self._up if older is None else max(self._up, self.moved[older] - older))

    def _make(
        self, record: VersionRecord, number: int, records: Sequence[VersionRecord], rounds: Iterator[int]
    ) -> None:
        """Make a version; where its number is taken, as a collection does with one that was about to come, this one and all
        newer ones get numbers above all that there are, so that their order stays."""
        left = [(record, number)]  # the last one is made next
        while left:
            one, number = left.pop()
            if self._publish(one, number):
                self._note(one.version, number)
                continue
            if next(rounds, None) is None:
                raise ConflictError(f"{_ROUNDS} writers of model {self._new!r} came first: try again", model=self._new)
            up = self._catalog.highest(self._new) + 1 - one.version
            left += [(newer, newer.version + up) for newer in reversed(records) if newer.version >= one.version]

    def _publish(self, record: VersionRecord, number: int) -> bool:
        """Make a version under the new name; False if the number is another's."""
        self._write_manifests(record.variants.values())
        made = msgspec.structs.replace(
            record,
            model=self._new,
            version=number,
            number=1,
            writer=self._writer(record.version),
            created=time.time(),
        )
        if self._catalog.publish_made(made):
            return True
        same = self._catalog.maker(self._new, number) == made.writer  # the same renaming, started twice
        return same and not self._catalog.version(self._new, number).deleted

    def _note(self, before: int, now: int) -> None:
        there = self.moved.get(before, now)
        self.moved[before] = max(there, now)
        if there != now:
            self._twice.append(min(there, now))

    def _drop(self, number: int) -> None:
        """Delete a version that was made again under a higher number, unless somebody has used it."""
        with suppress(NotFoundError, ConflictError):  # gone already; changed, or tagged
            self._catalog.delete(self._new, number, None, self._writer(number), only=1)

    def move_tags(self) -> list[str]:
        """Let tags name the new versions, then remove the old ones."""
        moved = []
        for tag, version in self._catalog.tags(self._old).items():
            if version not in self.moved:
                continue  # of a version that is being saved: the next round makes it
            self._catalog.set_tag(self._new, tag, self.moved[version], self._writer(version))
            self._catalog.set_tag(self._old, tag, 0, self._writer(version), instead_of=version)
            moved.append(tag)
        return moved

    def delete(self, live: Iterable[VersionRecord]) -> None:
        """Delete versions that are there under the new name, unless they changed since they were made there."""
        for record in live:
            try:
                head = self._catalog.version(self._old, record.version)
                self._take_over(head)
                self._catalog.delete(self._old, record.version, None, self._writer(record.version), only=head.number)
            except NotFoundError:
                continue  # deleted meanwhile, by another renaming
            except ConflictError:
                continue  # changed, or tagged, meanwhile: the next round looks again

    def _take_over(self, head: VersionRecord) -> None:
        """Bring variants that were made or replaced since the version was made under the new name."""
        there = self._catalog.version(self._new, self.moved[head.version])
        if there.deleted:
            return  # by a process that no longer needs it
        first = self._catalog.first(self._new, there.version)
        ours = there.writer == self._writer(head.version)  # nobody has changed it since this renaming did
        fresh = {
            variant: entry
            for variant, entry in head.variants.items()
            if _changed(entry, first.variants.get(variant), there.variants.get(variant), ours=ours)
        }
        if fresh:
            self._write_manifests(fresh.values())
            old = {variant: entry.manifest for variant, entry in there.variants.items()}
            self._catalog.publish_variants(self._new, there.version, fresh, self._writer(head.version), instead_of=old)

    def _write_manifests(self, entries: Iterable[VariantEntry]) -> None:
        for entry in entries:
            key = manifest_key(self._old, entry.manifest)
            try:
                data = self._storage.get(key)
            except NotFoundError as error:
                raise CorruptionError(
                    f"object {key}, a manifest of model {self._old!r}, is missing: run 'modelstore repair {self._old}', then "
                    f"rename it again",
                    model=self._old,
                    object=key,
                ) from error
            man.decode(data, entry.manifest, key)
            self._storage.put(manifest_key(self._new, entry.manifest), [data], len(data))

    def _writer(self, number: int) -> str:
        return name_of(f"rename\0{self._id}\0{self._old}\0{self._new}\0{number}".encode())[:32]


def _changed(old: VariantEntry, copied: VariantEntry | None, new: VariantEntry | None, *, ours: bool) -> bool:
    """Whether a variant of the old name must be brought to the new one: it is not what was `copied`, and `new` is.

    Told by what the records name, since the clocks of those who made them may differ. If both names changed, the new name's
    change counts.
    """
    if copied is not None and old.manifest == copied.manifest:
        return False  # as it was copied: what the new name has, or has no more, is later
    if new is None:
        return True
    return new.manifest != old.manifest and (ours or (copied is not None and new.manifest == copied.manifest))
