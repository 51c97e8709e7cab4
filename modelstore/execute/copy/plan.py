"""The plan of a copy: the versions that the other store has already, under which number, and the parts they lack there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from modelstore.errors import ConflictError, CorruptionError, NotFoundError
from modelstore.format.digest import name_of
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import form
from modelstore.format.objects.record import PACKS, VariantEntry, VersionRecord, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.damage import DAMAGED, UNREADABLE
from modelstore.store.relying import GoneError, relied_on
from modelstore.store.repo import Repo
from modelstore.store.shelf import is_good

_ONE_LISTING = 256  # packs from which one listing is quicker than a look at each


@dataclass(frozen=True)
class Wanted:
    """A version to be copied: which of its variants, and tags, and the name that it gets."""

    record: VersionRecord
    variants: tuple[str, ...]
    name: str
    tags: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """Its reference in the store that it comes from."""
        return f"{self.record.model}@{self.record.version}"


@dataclass(frozen=True)
class CopyPlan:
    """The plan for a version: its place there, the entries it still lacks, and their manifests."""

    wanted: Wanted
    there: VersionRecord | None
    entries: tuple[str, ...] = ()
    needs: tuple[
        tuple[str, str, str], ...
    ] = ()  # (model there, model here, manifest), what deltas are stored against first
    left_out: tuple[str, ...] = ()
    nothing: bool = False  # the version as a whole is left out


class Planner:
    """Makes the plans for versions; looks, and writes nothing.

    `everything`: they are many, and what was deleted there, or does not fit, is left out.
    """

    def __init__(self, source: Repo, target: Repo, everything: bool) -> None:
        self._source = source
        self._target = target
        self._everything = everything
        self._source_id = source.catalog.open().id

    def plan(self, wanted: Wanted) -> CopyPlan:
        """The plan for a version, in its current state if it was compacted or deleted since it was looked at."""
        try:
            if wanted.record.deleted:
                which = f"version {wanted.record.version} of model {wanted.record.model!r}"
                raise NotFoundError(f"{which} was deleted meanwhile: it is not copied", model=wanted.record.model)
            return self._plan(wanted)
        except (*UNREADABLE, NotFoundError) as error:
            now = self.now(wanted)
            if now is not None:
                return self.plan(now)
            if not self._everything:
                raise
            return CopyPlan(wanted, None, left_out=(f"{wanted.at}: {error}",), nothing=True)

    def now(self, wanted: Wanted) -> Wanted | None:
        """A version as it is in the store that it comes from; None if that has not changed, or cannot be told."""
        try:
            record = self._source.catalog.version(wanted.record.model, wanted.record.version)
        except (*UNREADABLE, NotFoundError):
            return None
        if record.number == wanted.record.number:
            return None
        return replace(wanted, record=record, variants=tuple(v for v in wanted.variants if v in record.variants))

    def _plan(self, wanted: Wanted) -> CopyPlan:
        there = self.there(wanted)
        if there is not None and there.deleted:
            at = f"{wanted.name}@{there.version}"
            said = f"{wanted.at}: {at} was deleted in {self._target.storage.url}"
            return CopyPlan(wanted, there, left_out=(said,), nothing=True)
        entries: list[str] = []
        again: list[str] = []
        left_out: list[str] = []
        for variant in wanted.variants:
            entry = wanted.record.variants[variant]
            old = there.variants.get(variant) if there else None
            same = old is not None and old.manifest == entry.manifest
            try:
                if old is None or (not same and self._differs(wanted, variant, entry, old)):
                    entries.append(variant)
                elif not self._is_whole(wanted.name, old, same=same):
                    (again if same else entries).append(variant)
            except ConflictError as error:
                if not self._everything:
                    raise
                left_out.append(f"{wanted.at}:{variant}: {error}")
        needs: list[tuple[str, str, str]] = []
        for variant in (*entries, *again):
            needs += self._needs(wanted, wanted.record.variants[variant].manifest)
        return CopyPlan(wanted, there, tuple(entries), tuple(dict.fromkeys(needs)), tuple(left_out))

    def there(self, wanted: Wanted) -> VersionRecord | None:
        """The version that an earlier copy made of this one, or that it was copied from; one that is deleted only where that
        counts."""
        catalog, record = self._target.catalog, wanted.record
        highest = catalog.highest(wanted.name)
        try:
            same = catalog.version(wanted.name, record.version)
        except NotFoundError:
            return None  # its number is free, and never was another's
        if self._is(same, record, wanted.name) and (not same.deleted or self._everything):
            return same
        deleted = None
        for version in range(highest, 0, -1):
            if catalog.maker(wanted.name, version) == self.writer(record):
                head = catalog.version(wanted.name, version)
                if not self._is(head, record, wanted.name):
                    continue  # of a snapshot of this store that was written to since
                if not head.deleted:
                    return head
                deleted = deleted or head
        return deleted if self._everything else None

    def _is(self, one: VersionRecord, record: VersionRecord, name: str) -> bool:
        """Whether a version of the other store is this one: of the same values and files, or, where it cannot be read, made by
        a copy of it."""
        mine, others = record.variants[ORIGINAL], one.variants[ORIGINAL]
        if mine.manifest == others.manifest:
            return True
        try:
            a = self._source.manifests.entry(record.model, mine)
            b = self._target.manifests.entry(name, others)
        except CorruptionError:
            return self._target.catalog.maker(name, one.version) == self.writer(record)
        files = [{(file.name, file.digest) for file in m.files} for m in (a, b)]
        return a.content == b.content and files[0] == files[1]

    def _is_whole(self, model: str, entry: VariantEntry, *, same: bool) -> bool:
        """Whether all is there of a variant that the other store has already, with the sizes that its chunks need.

        If it is copied as one of many, that is enough; else its bytes are checked too: with those of the packs to send, if
        they are the `same` ones.
        """
        if same and not self._everything:
            return False
        try:
            needed = relied_on(self._target.storage, model, [entry])
        except (GoneError, *DAMAGED):
            return False
        packs = {
            key.rpartition("/")[2].partition(".")[0]: size for key, size in needed.items() if key.startswith(PACKS)
        }
        if self._everything:
            sizes = self._sizes((self._target.storage,), list(packs))
            return all((sizes[pack] or 0) >= size for pack, size in packs.items())
        return all(is_good(self._target.storage, pack) for pack in packs)

    def _differs(self, wanted: Wanted, variant: str, entry: VariantEntry, old: VariantEntry) -> bool:
        """Whether this variant must replace the one that is there, of the same values in other chunks or with other metrics;
        `ConflictError` if its values are others.
        """
        mine = self._source.manifests.entry(wanted.record.model, entry)
        others = self._target.manifests.entry(wanted.name, old)
        if mine.content != others.content:
            raise ConflictError(
                f"{self._target.storage.url} has a variant {variant!r} of {wanted.name}@{wanted.record.version} with other "
                f"values: delete it there first, or leave the variant out",
                model=wanted.name,
            )
        return form(mine) != form(others)

    def _needs(self, wanted: Wanted, digest: str) -> list[tuple[str, str, str]]:
        """The manifests under a variant's, and its own, last."""
        found = [(wanted.name, wanted.record.model, digest)]
        manifest = self._source.manifests.read(wanted.record.model, digest)
        while manifest.base is not None:
            base = manifest.base
            try:
                manifest = self._source.manifests.read(base.model, base.manifest)
            except CorruptionError as error:
                raise CorruptionError(
                    f"{wanted.at} is stored as the difference to a version of {base.model!r} that cannot be read, and is "
                    f"not copied without it: {error}",
                    model=wanted.record.model,
                    object=error.object,
                ) from error
            found.append((base.model, base.model, base.manifest))
        return found[::-1]

    def packs_of(self, plan: CopyPlan) -> Iterator[str]:
        """The packs that a version needs there, in their order; some more than once."""
        for _, model, digest in plan.needs:
            yield from self._source.manifests.read(model, digest).packs

    def missing(self, needed: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        """The packs to send, and those that are there, with their sizes."""
        wanted = sorted(set(needed))
        found = self._sizes((self._target.storage,), wanted)
        right = self._sizes((self._source.storage, *self._source.mirrors), wanted)
        there = {pack: size for pack, size in found.items() if size is not None and size == (right[pack] or size)}
        missing = {pack: size for pack, size in right.items() if pack not in there}
        lost = [pack for pack, size in missing.items() if size is None]
        if lost and not self._everything:
            raise CorruptionError(
                f"{self._source.storage.url} has lost {len(lost)} packs, the first of them {pack_key(lost[0])}: nothing was "
                f"copied; run 'modelstore verify' to see which models need them",
                object=pack_key(lost[0]),
            )
        return {pack: size or 0 for pack, size in missing.items()}, there

    @staticmethod
    def _sizes(storages: Sequence[Storage], wanted: Sequence[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(wanted)
        for storage in storages:
            left = [pack for pack, size in found.items() if size is None]
            if len(left) > _ONE_LISTING:
                sizes = {info.key: info.size for info in storage.list(PACKS)}
                found |= {pack: sizes.get(pack_key(pack)) for pack in left}
            elif left:
                look = partial(_size, storage)
                found |= dict(zip(left, ordered(look, left, REQUESTS, "modelstore-copy"), strict=True))
        return found

    def writer(self, record: VersionRecord) -> str:
        """The writer that all copies of a version have in common, so that they know what one of them made."""
        return name_of(f"copy\0{self._source_id}\0{record.model}\0{record.version}".encode())[:32]


def _size(storage: Storage, pack: str) -> int | None:
    info = storage.info(pack_key(pack))
    return None if info is None else info.size
