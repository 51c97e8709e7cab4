"""Records of versions and tags, read: what a reference names, and what there is.

A record that cannot be read keeps nothing else from being read; what it may say is not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby

from modelstore.errors import ModelStoreError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.names import Reference, is_model, is_word
from modelstore.format.objects import record as rec
from modelstore.format.objects.record import TagRecord, VariantEntry, VersionRecord
from modelstore.format.suggest import suggestion
from modelstore.storage.base import SMALL, Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.collect.condemned import never_was
from modelstore.store.damage import DAMAGED, UNREADABLE, Damaged, listed, naming, noting

_DOUBTFUL = 10_000_000  # a version from which on is looked at before its number counts: no model comes to have so many
_NEWEST = 64  # keys listed to find the newest live version; more are listed only where those are all of deleted ones


class Lookup:
    """The records in one store, for readers."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def models(self, *, closed: bool = False) -> list[str]:
        """Names of all models that have records, ascending.

        `closed`: a folder that cannot be listed is not an error, but named as a model; reading it then says why.
        """
        found = []
        for first in self._storage.folders(rec.MODELS):
            try:
                inner = set(self._storage.folders(f"{rec.MODELS}{first}/"))
            except StorageError:
                if not closed:
                    raise
                found.append(first)
                continue
            if "versions" in inner:
                found.append(first)
            found += [f"{first}/{second}" for second in inner - {"versions", "tags", "manifests"}]
        return sorted(filter(is_model, found))

    def recorded(self) -> list[str]:
        """Those of them that have a record: in a folder that is not a store, others may have such names."""
        return [model for model in self.models() if self.head(model) is not None]

    def versions(self, model: str, damaged: Damaged | None = None) -> list[VersionRecord]:
        """The newest record of every version of a model, deleted ones too, oldest version first.

        If one cannot be read, it is added to `damaged`, and the others are given; without that list it is an error.
        """
        keys = noting(damaged, lambda: [key for _, key in self._heads(model, None)]) or []
        found = ordered(
            lambda key: noting(damaged, lambda: self._version_at(key)), keys, REQUESTS, "modelstore-records"
        )
        return sorted((record for record in found if record is not None), key=lambda r: r.version)

    def live(self, model: str, damaged: Damaged | None = None) -> list[VersionRecord]:
        """The versions of a model that are not deleted, oldest first; `damaged` as for `versions`."""
        return [record for record in self.versions(model, damaged) if not record.deleted]

    def readable(self, model: str) -> Iterator[VersionRecord]:
        """The live versions of a model that can be read, newest first."""
        for _, key in self._heads(model, None):
            record = noting([], lambda key=key: self._version_at(key))  # type: ignore[misc]
            if record is not None and not record.deleted:
                yield record

    def newest(self, model: str) -> VersionRecord:
        """The newest live version of a model: one listing and one read, however many versions there are.

        If a record that may be it is damaged, the error names the newest version that can be read.
        """
        for limit in (_NEWEST, None):
            for _, key in self._heads(model, limit):
                try:
                    record = self._version_at(key)
                except DAMAGED as error:
                    raise self._not_known(model, error) from error
                if not record.deleted:
                    return record
        raise self._no_model(model)

    def _not_known(self, model: str, error: ModelStoreError) -> ModelStoreError:
        """Why it cannot be said which version is the newest, and which one can be read."""
        older = next((f"{model}@{record.version}" for record in self.readable(model)), None)
        advice = f": name a version, such as {older}, the newest that can be read" if older else ""
        return type(error)(f"{error}{advice}", model=model, object=error.object)

    def highest(self, model: str) -> int:
        """The highest number that a version of a model ever had, 0 if it never had one.

        Told by the keys alone, so that a damaged record's number is not used again. One that is so high that it would end the
        numbering counts only if a valid record tells that it was a version.
        """
        highest = next((version for version, _ in self._heads(model, 1)), 0)
        return highest if highest < _DOUBTFUL else self._highest_made(model)

    def _highest_made(self, model: str) -> int:
        prefix = rec.versions_prefix(model)
        keys = self._keys(prefix, None)
        for folder, group in groupby(keys, key=lambda key: key[len(prefix) :].partition("/")[0]):
            version = rec.ascending(folder)
            if version is not None and (version < _DOUBTFUL or (version <= rec.LAST and any(map(self._made, group)))):
                return version
        return 0

    def _made(self, key: str) -> bool:
        """Whether a record is of a version that was there: one that was deleted unread, or voided, has its number alone."""
        try:
            record = self._version_at(key)
        except (NotFoundError, UnsupportedError, *DAMAGED):
            return False
        return bool(record.variants) and not never_was(record)

    def first(self, model: str, version: int) -> VersionRecord:
        """The record by which a version became visible."""
        key = rec.version_key(model, version, 1)
        with naming(f"version {version}", model):
            return rec.parse_version(self._storage.get(key, SMALL), key)

    def version(self, model: str, version: int) -> VersionRecord:
        """The newest record of one version, deleted or not."""
        for key in self._keys(rec.version_prefix(model, version), 1):
            return self._version_at(key)
        if not any(self._heads(model, 1)):
            raise self._no_model(model)
        raise NotFoundError(
            f"model {model!r} has no version {version}: list them with 'modelstore ls {model}'", model=model
        )

    def changed(self, model: str, numbers: Mapping[int, int]) -> bool:
        """Whether one of these versions has not that newest record any more, as after a compaction or a deletion."""
        for version, number in numbers.items():
            with suppress(NotFoundError, *UNREADABLE):
                if self.version(model, version).number != number:
                    return True
        return False

    def resolve(self, ref: Reference) -> VersionRecord:
        """The live version that a reference names; its variant is not looked at."""
        if ref.is_newest:
            return self.newest(ref.name)
        version = ref.version if ref.version is not None else self.tag(ref.name, ref.tag or "")
        record = self.version(ref.name, version)
        if record.deleted:
            via = f" (tag {ref.tag!r})" if ref.tag else ""
            raise NotFoundError(
                f"version {version}{via} of model {ref.name!r} was deleted: choose another", model=ref.name
            )
        return record

    def entry(self, ref: Reference) -> tuple[VersionRecord, VariantEntry]:
        """The version that a reference names, and the entry of its variant."""
        record = self.resolve(ref)
        return record, self.variant(record, ref.variant)

    def variant(self, record: VersionRecord, variant: str) -> VariantEntry:
        """The entry of a version's variant; `NotFoundError` if it has none of that name."""
        if variant not in record.variants:
            known = ", ".join(record.variants)
            like = suggestion(variant, record.variants)
            if variant in self.tags(record.model, []):
                like = f" (it is a tag: write {record.model}@{variant})"
            raise NotFoundError(
                f"version {record.version} of model {record.model!r} has no variant {variant!r}{like}: it has {known}",
                model=record.model,
            )
        return record.variants[variant]

    def tag(self, model: str, tag: str) -> int:
        """The version that a tag names."""
        record = self._tag_head(model, tag)
        if record is None or not record.version:
            if not any(self._heads(model, 1)):
                raise self._no_model(model)
            tags = self.tags(model, [])
            known = f"its tags are {', '.join(sorted(tags))}" if tags else "it has none"
            raise NotFoundError(f"model {model!r} has no tag {tag!r}{suggestion(tag, tags)}: {known}", model=model)
        return record.version

    def tags(self, model: str, damaged: Damaged | None = None) -> dict[str, int]:
        """All tags of a model and the versions they name; `damaged` as for `versions`."""
        found = noting(damaged, lambda: self._storage.folders(rec.tags_prefix(model))) or ()
        names = [tag for tag in found if is_word(tag)]
        heads = [noting(damaged, lambda tag=tag: self._tag_head(model, tag)) for tag in names]  # type: ignore[misc]
        return {head.tag: head.version for head in heads if head and head.version}

    def head(self, model: str, tag: str | None = None) -> str | None:
        """The key of the newest record of a model, or of one of its tags; None if there is none.

        One request. As long as it is the same key, the newest version, or what the tag names, is the same.
        """
        prefix = rec.versions_prefix(model) if tag is None else rec.tag_prefix(model, tag)
        return next(iter(self._keys(prefix, 1)), None)

    def maker(self, model: str, version: int) -> str | None:
        """The maker of a version, None if it cannot be found: the version is damaged, or does not exist."""
        record = self._first(model, version)
        return record.writer if record is not None else None

    # ------------------------------------------------------------------ within

    def _first(self, model: str, version: int) -> VersionRecord | None:
        """The record that made a version visible, None if it cannot be read, or that number was left out by a copy."""
        with suppress(NotFoundError):
            return noting([], lambda: self.first(model, version))
        return None

    def _heads(self, model: str, limit: int | None) -> Iterator[tuple[int, str]]:
        """(version, key of its newest record), newest version first; all of them, or those within the first `limit` keys."""
        prefix = rec.versions_prefix(model)
        keys = self._keys(prefix, limit)
        for folder, group in groupby(keys, key=lambda key: key[len(prefix) :].partition("/")[0]):
            version = rec.ascending(folder)
            if version is not None:
                yield version, next(group)

    def _keys(self, prefix: str, limit: int | None) -> list[str]:
        """Keys of records of a version, a tag, or all versions; the first `limit`, or all where strange ones are among them."""
        found = [info.key for info in self._storage.list(prefix, limit=limit)]
        keys = [key for key in found if rec.is_record(key[len(prefix) :])]
        if len(keys) == len(found) or limit is None:
            return keys
        return self._keys(prefix, None)

    def _version_at(self, key: str) -> VersionRecord:
        """The record at a key that was listed."""
        model, _, rest = key.removeprefix(rec.MODELS).rpartition("/versions/")
        with naming(f"version {rec.ascending(rest.partition('/')[0])}", model):
            return rec.parse_version(listed(self._storage, key), key)

    def _tag_head(self, model: str, tag: str) -> TagRecord | None:
        for key in self._keys(rec.tag_prefix(model, tag), 1):
            with naming(f"tag {tag!r}", model):
                return rec.parse_tag(listed(self._storage, key), key)
        return None

    def _tag_number(self, model: str, tag: str) -> int:
        """The number of a tag's newest record, 0 if it has none."""
        prefix = rec.tag_prefix(model, tag)
        return next((rec.record_number(key, prefix) or 0 for key in self._keys(prefix, 1)), 0)

    def _lives(self, model: str) -> bool:
        """Whether a model has a live version, or one that cannot be read."""
        keys = noting([], lambda: [key for _, key in self._heads(model, None)])
        if keys is None:
            return True
        records = (noting([], lambda key=key: self._version_at(key)) for key in keys)  # type: ignore[misc]
        return any(record is None or not record.deleted for record in records)

    def _no_model(self, model: str) -> ModelStoreError:
        like = suggestion(model, self.models(closed=True), self._lives)
        return NotFoundError(
            f"there is no model {model!r} in {self._storage.url}{like}: list the models with 'modelstore ls'",
            model=model,
        )
