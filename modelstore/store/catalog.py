"""Records of versions and tags: the one write that makes a change visible.

Nothing else in the package makes anything visible, so atomicity stands or falls here: each change is one create-only object.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from modelstore.errors import ConflictError, CorruptionError, ModelStoreError, NotFoundError
from modelstore.format.names import ORIGINAL, is_word
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import R, StoreInfo, TagRecord, VariantEntry, VersionRecord
from modelstore.format.objects.sealed import seal
from modelstore.storage.base import SMALL, Storage
from modelstore.store.damage import DAMAGED, UNREADABLE, listed, noting
from modelstore.store.lookup import Lookup
from modelstore.store.manifests import Manifests
from modelstore.store.place import check_place, same_store, told_of
from modelstore.store.relying import Reliance

log = logging.getLogger("modelstore")

_RACES = 1000  # how often a lost race is tried again before giving up; each loss means that another writer won
_Entries = Mapping[str, VariantEntry]


class Catalog(Lookup):
    """The records in one store."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._info: StoreInfo | None = None

    # ------------------------------------------------------------------ the store itself

    def open(self, *, create: bool = False, again: bool = False) -> StoreInfo:
        """The store's own record, read once; made where there is none and `create` allows it.

        `again`: if it was read before, it is read again. `OtherStoreError` if that store is not there any more.
        """
        if self._info is None:
            self._info = self._open(create)
        elif again:
            self._info = same_store(self._storage, self._info)
        if create:
            self._storage.hold_spare()
        return self._info

    @property
    def known(self) -> StoreInfo | None:
        """The store's own record as it was when this was opened, None if it was not."""
        return self._info

    def _publish(self, key: str, data: bytes) -> bool:
        """The one write that makes anything visible: only in the store that was opened, which may have gone since."""
        self._info = same_store(self._storage, self._info)
        return self._storage.create(key, data)

    def _open(self, create: bool) -> StoreInfo:
        with suppress(NotFoundError):
            return rec.parse(self._storage.get(rec.STORE_KEY, SMALL), StoreInfo, rec.STORE_KEY)
        models = None
        with suppress(ModelStoreError):  # not everything that can be read can be listed
            models = self.recorded()
        if models:  # and so was the store's own record, before them
            try:
                return rec.parse(self._storage.get(rec.STORE_KEY, SMALL), StoreInfo, rec.STORE_KEY)
            except NotFoundError:
                raise CorruptionError(
                    f"the store at {self._storage.url} has models and no {rec.STORE_KEY}, so it was removed or is not copied "
                    f"yet: run 'modelstore repair', which makes it again",
                    object=rec.STORE_KEY,
                ) from None
        if not create:
            raise NotFoundError(told_of(self._storage), object=rec.STORE_KEY)
        check_place(self._storage)
        self._storage.create(rec.STORE_KEY, seal(StoreInfo(FORMAT, uuid.uuid4().hex)))
        return rec.parse(self._storage.get(rec.STORE_KEY, SMALL), StoreInfo, rec.STORE_KEY)

    # ------------------------------------------------------------------ publishing

    def publish_version(
        self,
        model: str,
        writer: str,
        entry: VariantEntry,
        others: _Entries | None = None,
        *,
        after: int | None = None,
        onto: int | None = None,
        note: Note | None = None,
    ) -> VersionRecord:
        """Make a new version visible, `original` and `others`; the entries in the record are what became of these.

        `after`: a version above that one that this writer made, of the same content, is given back instead, so that several
        processes may publish one thing, or one process twice, and one version comes of it. `onto`: the highest number that
        there may be before it; `ConflictError` where there is another by now. `GoneError`, as of all that publishes, where
        something that the version relies on is gone. Nothing is visible then.
        """
        before = self.published(model, writer, entry, after=after) if after is not None else None
        if before is not None:
            return before
        version = self.highest(model)
        reliance = Reliance(self._storage, model, {ORIGINAL: entry, **(others or {})})
        for _ in range(_RACES):
            if onto is not None and version != onto:
                raise ConflictError(
                    f"version {version} of model {model!r} is there, where {onto} was the last one: nothing was saved; look "
                    "at what changed, and save again",
                    model=model,
                )
            version += 1
            self._check_number(model, version)
            record = VersionRecord(FORMAT, model, version, 1, writer, time.time(), reliance.entries, note=note)
            made = reliance.create(record, self._create_version)
            if made is not None:
                return made
            there = self._first(model, version) if after is not None else None
            if there is not None and self._is_of(there, writer, entry):
                return there
        raise self._busy(model)

    def publish_made(self, record: VersionRecord) -> bool:
        """Make a version visible that has its number already: it was made in another store, or under another name.

        False if that number is taken by another record.
        """
        self._check_number(record.model, record.version)
        if record.deleted:
            return self._create_version(record)
        return Reliance(self._storage, record.model, record.variants).create(record, self._create_version) is not None

    def published(self, model: str, writer: str, entry: VariantEntry, *, after: int) -> VersionRecord | None:
        """The version above `after` that a writer made of an entry's content; None if there is none.

        Each version is known by its first record.
        """
        for version in range(self.highest(model), after, -1):
            record = self._first(model, version)
            if record is not None and self._is_of(record, writer, entry):
                return record
        return None

    def _is_of(self, record: VersionRecord, writer: str, entry: VariantEntry) -> bool:
        """Whether a record was made by a writer of an entry; its manifest has another name where it had to be moved."""
        own = record.variants.get(ORIGINAL)  # a deleted version may be known by its number alone
        if record.writer != writer or own is None or own.manifest == entry.manifest:
            return record.writer == writer and own is not None
        read = Manifests(self._storage).read
        one, other = read(record.model, own.manifest), read(record.model, entry.manifest)
        files = [{(file.name, file.digest) for file in manifest.files} for manifest in (one, other)]
        return one.content == other.content and files[0] == files[1]

    def publish_variants(
        self,
        model: str,
        version: int,
        entries: Mapping[str, VariantEntry],
        writer: str,
        *,
        instead_of: Mapping[str, str] | None = None,
    ) -> VersionRecord:
        """Make variants of a live version visible, all at once.

        `instead_of`: the manifest that a variant had, if it must be replaced. `ConflictError` if a name is taken by another
        manifest, or the version went away.
        """
        reliance = Reliance(self._storage, model, _with_sketches(entries, self.version(model, version)))
        for _ in range(_RACES):
            head = self.version(model, version)
            if head.deleted:
                raise ConflictError(
                    f"version {version} of model {model!r} was deleted meanwhile: nothing was published", model=model
                )
            for variant, entry in entries.items():
                there = head.variants.get(variant)
                if there and there.manifest not in (entry.manifest, (instead_of or {}).get(variant)):
                    if variant == ORIGINAL:
                        raise ConflictError(
                            f"the original of {model}@{version} was stored again meanwhile: run this again", model=model
                        )
                    raise ConflictError(
                        f"version {version} of model {model!r} has a variant {variant!r} already: "
                        f"delete it first, or choose a name",
                        model=model,
                    )
            made = reliance.create(self._next(head, writer), self._create_version)
            if made is not None:
                return made
        raise self._busy(model)

    def replace_entry(
        self,
        model: str,
        version: int,
        variant: str,
        writer: str,
        entry: VariantEntry,
        *,
        instead_of: str | None = None,
    ) -> VersionRecord:
        """Point a variant of a live version at another manifest of the same tensors (repair, metrics).

        `ConflictError` if it no longer has the manifest `instead_of`.
        """
        for _ in range(_RACES):
            head = self.version(model, version)
            if head.deleted or variant not in head.variants:
                raise NotFoundError(
                    f"{model}@{version}:{variant} was deleted meanwhile: nothing was changed", model=model
                )
            if instead_of is not None and head.variants[variant].manifest != instead_of:
                raise ConflictError(
                    f"{model}@{version}:{variant} was changed meanwhile: try again with what it is now", model=model
                )
            same = head.variants[variant].manifest == entry.manifest
            entries = _with_sketches({variant: entry}, head)
            reliance = Reliance(self._storage, model, entries, only_copies=same)
            made = reliance.create(self._next(head, writer), self._create_version)
            if made is not None:
                return made
        raise self._busy(model)

    def delete(
        self, model: str, version: int, variant: str | None, writer: str, *, only: int | None = None
    ) -> VersionRecord:
        """Delete a version (for good), or one variant of it; `ConflictError` while a tag names the version.

        `only`: the number of the record that it must have still; `ConflictError` if it was changed since.
        """
        for _ in range(_RACES):
            head = self._to_delete(model, version) if variant is None else self.version(model, version)
            if head.deleted:
                raise NotFoundError(f"version {version} of model {model!r} was deleted already", model=model)
            if only not in (None, head.number):
                raise ConflictError(f"version {version} of model {model!r} was changed meanwhile", model=model)
            if variant is None:
                tags = sorted(tag for tag, at in self.tags(model).items() if at == version)
                if tags:
                    raise ConflictError(
                        f"version {version} of model {model!r} is tagged {', '.join(tags)}: move or remove the tag first",
                        model=model,
                    )
                record = self._next(head, writer, deleted=True)
            else:
                self.variant(head, variant)
                if variant == ORIGINAL:
                    raise ConflictError(
                        f"every version keeps its original: delete the whole version {model}@{version} instead",
                        model=model,
                    )
                record = self._next(head, writer, variants={k: v for k, v in head.variants.items() if k != variant})
            if self._create_version(record):
                if record.deleted:  # a tag that was set since the look above names nothing any more
                    for tag in [tag for tag, at in self.tags(model, []).items() if at == version]:
                        self._take_back(model, tag, version, writer)
                        log.warning(
                            "tag %r of model %r was set to version %d while that was deleted: it was taken back",
                            tag,
                            model,
                            version,
                        )
                return record
        raise self._busy(model)

    def delete_model(self, model: str, writer: str) -> None:
        """Remove every tag of a model, then delete every version; can be done again where it was interrupted."""
        gone = {record.version for record in self.versions(model, []) if record.deleted}
        left = [version for version, _ in self._heads(model, None) if version not in gone]
        if not left:
            raise self._no_model(model)
        for tag in filter(is_word, self._storage.folders(rec.tags_prefix(model))):
            head = noting([], lambda tag=tag: self._tag_head(model, tag))  # type: ignore[misc]
            if head is None or head.version:  # one that cannot be read is removed too
                self.set_tag(model, tag, 0, writer)
        for version in sorted(left):
            self.delete(model, version, None, writer)

    def set_tag(
        self, model: str, tag: str, version: int, writer: str, *, instead_of: int | None = None
    ) -> TagRecord | None:
        """Let a tag name a live version; version 0 removes the tag.

        A caller who deletes the version at the same instant looks at its tags after that, and the tag setter looks at the
        version after that: one of the two finds the other, and the tag names again what it named before. `NotFoundError` then.

        `instead_of`: the version that it must name still; None, and nothing is changed, where it names another.
        """
        self._check_live(model, version)
        for _ in range(_RACES):
            number = self._tag_number(model, tag) + 1  # told by the key, so that a damaged tag can be set again
            if instead_of is not None:
                head = self._tag_head(model, tag)
                if head is None or head.version != instead_of:
                    return None
                number = head.number + 1
            record = TagRecord(FORMAT, model, tag, number, writer, time.time(), version)
            key = rec.tag_key(model, tag, number)
            if self._publish(key, seal(record)) or self._own(key, TagRecord, record):
                try:
                    self._check_live(model, version)
                except NotFoundError:
                    self._take_back(model, tag, version, writer)
                    raise
                return record
        raise self._busy(model)

    def _check_live(self, model: str, version: int) -> None:
        if version and self.version(model, version).deleted:
            raise NotFoundError(f"version {version} of model {model!r} was deleted: tag another", model=model)

    def _take_back(self, model: str, tag: str, version: int, writer: str) -> None:
        """Let a tag that names a deleted version name what it named before, if that is live, or nothing."""
        for _ in range(_RACES):
            head = self._tag_head(model, tag)
            if head is None or head.version != version:
                return  # somebody else did, or set it again
            before = noting([], lambda number=head.number: self._tagged(model, tag, number - 1)) or 0  # type: ignore[misc]
            record = TagRecord(FORMAT, model, tag, head.number + 1, writer, time.time(), before)
            if self._publish(rec.tag_key(model, tag, record.number), seal(record)):
                if not before or not self.version(model, before).deleted:
                    return
                version = before  # and it was deleted meanwhile, too

    def _tagged(self, model: str, tag: str, number: int) -> int:
        """The version that a record of a tag names, 0 if there is none, or it is not live."""
        if number < 1:
            return 0
        key = rec.tag_key(model, tag, number)
        named = rec.parse_tag(listed(self._storage, key), key).version
        return named if named and not self.version(model, named).deleted else 0

    # ------------------------------------------------------------------ within

    @staticmethod
    def _check_number(model: str, version: int) -> None:
        if version > rec.LAST:
            raise ConflictError(
                f"model {model!r} has version {rec.LAST:,} already, the last that there can be: save it under another name",
                model=model,
            )

    def _create_version(self, record: VersionRecord) -> bool:
        """The one write that makes a version or variant visible; True also where it was ours and its answer was lost."""
        key = rec.version_key(record.model, record.version, record.number)
        data = seal(record)
        if len(data) > SMALL:
            raise ConflictError(
                f"version {record.version} of model {record.model!r} has {len(record.variants)} variants, more than a record "
                f"of {SMALL} bytes can name: delete some first",
                model=record.model,
            )
        return self._publish(key, data) or self._own(key, VersionRecord, record)

    def _own(self, key: str, kind: type[R], record: R) -> bool:
        try:
            return rec.parse(self._storage.get(key, SMALL), kind, key) == record
        except (NotFoundError, *UNREADABLE):  # something that is not a record takes the number
            return False

    def _to_delete(self, model: str, version: int) -> VersionRecord:
        """The newest record of a version; one that cannot be read is taken as saying nothing, which is enough to delete it."""
        try:
            return self.version(model, version)
        except DAMAGED:
            key = self._keys(rec.version_prefix(model, version), 1)[0]
            number = rec.record_number(key, rec.version_prefix(model, version)) or 0
            return VersionRecord(FORMAT, model, version, number, "", time.time(), {})

    @staticmethod
    def _next(
        head: VersionRecord, writer: str, *, variants: dict[str, VariantEntry] | None = None, deleted: bool = False
    ) -> VersionRecord:
        kept = head.variants if variants is None else variants
        number, now = head.number + 1, time.time()
        return VersionRecord(FORMAT, head.model, head.version, number, writer, now, kept, deleted, head.note)

    @staticmethod
    def _busy(model: str) -> ModelStoreError:
        return ConflictError(
            f"{_RACES} writers of model {model!r} came first: try again when fewer write at once", model=model
        )


def _with_sketches(entries: _Entries, before: VersionRecord) -> _Entries:
    """Entries that are stored anew, with the sketches that they had: a variant's values do not change."""
    had = {variant: entry.sketch for variant, entry in before.variants.items() if entry.sketch}
    return {
        variant: entry if entry.sketch or variant not in had else msgspec.structs.replace(entry, sketch=had[variant])
        for variant, entry in entries.items()
    }
