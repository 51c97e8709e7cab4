"""The small objects of a store, looked at one by one: records, tags, journals, `modelstore.json`; and their repair.

A damaged record is replaced by the same one of another copy of the store, else by what the record before it says (or, where
there is none before it, the one after it): that is known, and what the damaged one said beyond it is not. The newest record of
a version becomes what an earlier one says only where all that this names is still there: a compaction moves what a version
needs, and what earlier records name is collected then.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import msgspec

from modelstore.errors import FormatError, ModelStoreError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.answers.results import Problem
from modelstore.format.names import check_word
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.record import StoreInfo, TagRecord, VersionRecord
from modelstore.format.objects.sealed import intact, seal
from modelstore.storage.base import LARGEST, SMALL, Storage
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.damage import DAMAGED, listed, noting
from modelstore.store.lookup import Lookup
from modelstore.store.mend.copies import Taken, store_record, tag_record, version_record

StoredRecord = VersionRecord | TagRecord
# Why what a record names cannot be relied on, "" where all of it is there; it stays there until the end of the block.
KeepFor = Callable[[VersionRecord], AbstractContextManager[str]]


@dataclass(frozen=True, slots=True)
class Series:
    """All records of one version, or of one tag, by their numbers: those that can be read, and why others cannot."""

    model: str
    what: str  # as in "version 3"
    keys: dict[int, str]
    good: dict[int, StoredRecord]
    bad: dict[int, ModelStoreError]

    @property
    def is_version(self) -> bool:
        """Whether they are of a version, not of a tag."""
        return self.what.startswith("version ")

    def problem(self, number: int) -> Problem:
        """The problem of a record that cannot be read."""
        error = self.bad[number]
        which = "newest record" if number == max(self.keys) else f"record {number}"
        message = f"the {which} of {self.what} of model {self.model!r} cannot be read: {error}"
        return Problem(error.kind, message, self.model, object=self.keys[number])


def series(storage: Storage, model: str) -> Iterator[Series]:
    """The records of a model: of each version, of each tag."""
    prefix = rec.versions_prefix(model)
    keys = [info.key for info in storage.list(prefix)]
    for folder, group in groupby(keys, key=lambda key: key[len(prefix) :].partition("/")[0]):
        version = rec.ascending(folder)
        if version is not None:
            yield _read(storage, model, f"version {version}", f"{prefix}{folder}/", group, rec.parse_version)
    for tag in storage.folders(rec.tags_prefix(model)):
        try:
            prefix = f"{rec.tags_prefix(model)}{check_word(tag, 'tag')}/"
        except ValueError:
            continue  # not ours
        group = iter([info.key for info in storage.list(prefix)])
        yield _read(storage, model, f"tag {tag!r}", prefix, group, rec.parse_tag)


def _open_series(storage: Storage, model: str, closed: list[Problem]) -> Iterator[Series]:
    """The records of a model as far as they can be listed; why not further, such as a folder that is another user's, in `closed`.

    A storage that cannot be reached is an error.
    """
    try:
        yield from series(storage, model)
    except StorageError as error:
        if any(isinstance(one, TransientStorageError) for one in (error, error.__cause__)):
            raise
        closed.append(Problem(error.kind, str(error), model, object=error.object))


def _read(
    storage: Storage,
    model: str,
    what: str,
    prefix: str,
    keys: Iterator[str],
    parse: Callable[[bytes, str], StoredRecord],
) -> Series:
    numbered = {number: key for key in keys if (number := rec.record_number(key, prefix)) is not None}
    found = Series(model, what, numbered, {}, {})

    def read(number: int) -> StoredRecord | ModelStoreError:
        key = numbered[number]
        for last in (False, True):  # what is wrong only once was wrong on its way here
            try:
                return parse(listed(storage, key), key)
            except ModelStoreError as error:
                if last or not isinstance(error, DAMAGED):
                    return error
        raise AssertionError

    for number, one in zip(numbered, ordered(read, numbered, REQUESTS, "modelstore-records"), strict=True):
        if isinstance(one, ModelStoreError):
            found.bad[number] = one
        else:
            found.good[number] = one
    return found


def damage(storage: Storage, models: Sequence[str], *, journals: bool) -> list[Problem]:
    """Everything small that cannot be read: records of these models, and of no model's the journals; tags that lead nowhere."""
    found: list[Problem] = []
    for model in models:
        gone: set[int] = set()
        for one in _open_series(storage, model, found):  # versions before tags
            found += [one.problem(number) for number in sorted(one.bad)]
            lost = _leads_nowhere(one, gone)
            if lost is not None:
                advice = f"run 'modelstore repair {model}', or set it anew with 'modelstore tag'"
                message = f"{one.what} of model {model!r} names version {lost.version}, which was deleted: {advice}"
                found.append(Problem("conflict", message, model, object=one.keys[lost.number]))
    if journals:
        found += [Problem(error.kind, str(error), object=error.object) for error in torn_journals(storage)]
    return found


def _leads_nowhere(one: Series, gone: set[int]) -> TagRecord | None:
    """The newest record of a tag, where it names a deleted version, as who set it was killed while that was deleted.

    `gone` gets the versions that are.
    """
    head = one.good.get(max(one.keys, default=0))
    if isinstance(head, VersionRecord) and head.deleted:
        gone.add(head.version)
    return head if isinstance(head, TagRecord) and head.version in gone else None


def _is_note(key: str) -> bool:
    return key.endswith(".json") and rec.is_own(key)


def torn_journals(storage: Storage, keys: Sequence[str] | None = None) -> list[ModelStoreError]:
    """The journals, and what writers and collections tell each other, that cannot be read: of those at `keys` or of all."""
    closed: list[ModelStoreError] = []
    if keys is None:
        keys = []
        for folder in (rec.JOBS, hs.INTENTS, hs.CONDEMNED):
            noting(closed, lambda folder=folder: keys.extend([info.key for info in storage.list(folder)]))  # type: ignore[misc]

    def look(key: str) -> ModelStoreError | None:
        try:
            if intact(storage.get(key, LARGEST)):
                return None
        except NotFoundError:
            return None  # its work was done meanwhile
        except ModelStoreError as error:
            return error
        if key.startswith(rec.JOBS):
            advice = "its work stores anew what it spoke of; 'modelstore repair' removes it"
        else:
            advice = hs.advice(key)
        return FormatError(f"object {key} is damaged: {advice}", object=key)

    looked = ordered(look, filter(_is_note, keys), REQUESTS, "modelstore-records")
    return [*closed, *(error for error in looked if error is not None)]


# ---------------------------------------------------------------------- repairing


@dataclass(frozen=True, slots=True)
class Mended:
    """The repairs: keys, remarks on them, and the problems that stay."""

    repaired: list[str]
    notes: list[str]
    problems: list[Problem]


def mend(
    storage: Storage, sources: Sequence[Storage], models: Sequence[str], *, journals: bool, keep: KeepFor
) -> Mended:
    """Put right what `damage` finds, as far as another copy of the store, or the records beside it, tell."""
    made = Mended([], [], [])
    for model in models:
        live: set[int] = set()
        gone: set[int] = set()
        for one in _open_series(storage, model, made.problems):  # versions before tags
            work = _Mending(storage, sources, one, made, keep, live)
            for number in sorted(one.bad):
                work.record(number)
            head = one.good.get(max(one.keys, default=0))
            if isinstance(head, VersionRecord) and not head.deleted:
                live.add(head.version)
            lost = _leads_nowhere(one, gone)
            if lost is not None:
                _set_back(storage, lost, one, live, made)
    if journals:
        for error in torn_journals(storage):
            if isinstance(error, DAMAGED) and error.object and error.object.startswith(rec.JOBS):
                storage.delete(error.object)
                made.repaired.append(error.object)
            else:
                made.problems.append(Problem(error.kind, str(error), object=error.object))
    return made


def _set_back(storage: Storage, lost: TagRecord, one: Series, live: set[int], made: Mended) -> None:
    """Let a tag that leads nowhere name what it named before, if that is live, or nothing; unless it was set again meanwhile."""
    before = one.good.get(lost.number - 1)
    version = before.version if isinstance(before, TagRecord) and before.version in live else 0
    record = msgspec.structs.replace(lost, number=lost.number + 1, version=version)
    key = rec.tag_key(lost.model, lost.tag, record.number)
    if storage.create(key, seal(record)):
        made.repaired.append(key)
        now = f"names version {version} again" if version else "is gone"
        made.notes.append(
            f"tag {lost.tag!r} of model {lost.model!r} {now}: it named version {lost.version}, which was deleted"
        )


@dataclass(frozen=True, slots=True)
class _Mending:
    """The records of one version or tag, during their repair; `live`: the versions that a tag may name."""

    storage: Storage
    sources: Sequence[Storage]
    one: Series
    made: Mended
    keep: KeepFor
    live: set[int]

    def record(self, number: int) -> None:
        """Mend one damaged record."""
        one, key, error = self.one, self.one.keys[number], self.one.bad[number]
        if not isinstance(error, DAMAGED) or self.storage.info(key) is None:  # not read; or a folder lies there
            self.made.problems.append(one.problem(number))
            return
        copy = self._copy(key)
        if copy.data:
            one.good[number] = (rec.parse_version if one.is_version else rec.parse_tag)(copy.data, key)
            self._put(key, copy.data)
            return
        if number < max(one.keys):  # nobody reads it any more, but it tells when what it names was given up
            beside = sorted((n for n in one.good if n < number), reverse=True) or sorted(one.good)
            if beside:
                self._become(number, beside[0])
                return
        why = self._go_back(number)
        if why:
            self._left(number, f"{copy.refused}, and {why}" if copy.refused else why)

    def _copy(self, key: str) -> Taken:
        if self.one.is_version:
            return version_record(self.storage, self.sources, self.one.model, key)
        good = {number: record for number, record in self.one.good.items() if isinstance(record, TagRecord)}
        return tag_record(self.storage, self.sources, good, key, self.live)

    def _go_back(self, number: int) -> str:
        """Let the newest record say what an earlier one says; why that cannot be, "" where it was done."""
        lost = ""
        for earlier in sorted((n for n in self.one.keys if n < number), reverse=True):
            error = self.one.bad.get(earlier)
            if error is not None and not isinstance(
                error, DAMAGED
            ):  # it says something, which is not to be passed over
                return f"its record {earlier} cannot be read by this release, or now ({error})"
            said = self.one.good.get(earlier)
            if said is None:
                continue
            if isinstance(said, TagRecord):
                if said.version and said.version not in self.live:
                    return f"its record {earlier} names version {said.version}, which is not there any more"
                self._become(number, earlier)
                return ""
            if said.deleted:
                self._become(number, earlier)
                return ""
            with self.keep(said) as why:
                if not why:
                    self._become(number, earlier)
                    return ""
            lost = lost or f"its record {earlier} cannot stand in for it ({why})"
        return lost or "no other record tells of it"

    def _become(self, number: int, other: int) -> None:
        one = self.one
        record = one.good[number] = msgspec.structs.replace(one.good[other], number=number)
        self._put(one.keys[number], seal(record))
        if number == max(one.keys):
            self.made.notes.append(
                f"{one.what} of model {one.model!r} is again what its record {other} says: what record {number}, which was "
                f"damaged, changed is lost{_changed(record)}"
            )

    def _put(self, key: str, data: bytes) -> None:
        self.storage.put(key, [data], len(data))
        self.made.repaired.append(key)

    def _left(self, number: int, why: str) -> None:
        one = self.one
        problem = one.problem(number)
        advice = f"run 'modelstore repair {one.model} --from URL' with another copy of the store"
        name = one.what.split(" ")[1].replace("'", "")
        text = f"{one.what} of model {one.model!r} is lost: object {one.keys[number]} is damaged, and {why}"
        if one.is_version:
            known = Lookup(self.storage).tags(one.model, [])
            tags = [f"modelstore untag {one.model} {tag}" for tag, version in known.items() if str(version) == name]
            first = f"after {' and '.join(map(repr, tags))} " if tags else ""
            text += "; its tensors are not reached without it, and other versions are as they were"
            last = (
                f"save the model again, as a version of its own (what is stored of it still is not stored twice), or delete it "
                f"{first}with 'modelstore rm {one.model}@{name}'"
            )
        else:
            last = "set it anew with 'modelstore tag'"
        self.made.problems.append(msgspec.structs.replace(problem, message=f"{text}: {advice}, or {last}"))


def _changed(record: StoredRecord) -> str:
    if isinstance(record, TagRecord):
        return (
            f" (it names version {record.version}; set it anew if that is wrong)" if record.version else " (it is gone)"
        )
    return " (a variant that was added or deleted; or the version was deleted: delete it again then)"


def mend_store(
    storage: Storage, sources: Sequence[Storage], models: Callable[[], list[str]], known: StoreInfo | None = None
) -> bool:
    """Put `modelstore.json` right where it is damaged, or missing though there are models; whether it was.

    It says the format, which every record says too, and the store's id, which is random: where no copy has it, and this process
    has not `known` it before, a new one is made. `FormatError` if nothing tells the format.
    """
    try:
        rec.parse(storage.get(rec.STORE_KEY, SMALL), StoreInfo, rec.STORE_KEY)
        return False
    except UnsupportedError:
        return False
    except (NotFoundError, *DAMAGED) as error:
        found = models()
        if isinstance(error, NotFoundError) and not found:
            return False  # there is no store
        said = [one for model in found for one in series(storage, model)]
        copy = store_record(storage, sources, [one.keys[number] for one in said for number in one.good])
        newer = next((bad for one in said for bad in one.bad.values() if isinstance(bad, UnsupportedError)), None)
        if copy is None and newer is not None:  # so is what it was
            raise newer from error
        if copy is None and found and not any(one.good for one in said):
            raise FormatError(
                f"{error}; no record in {storage.url} can be read either", object=rec.STORE_KEY
            ) from error
        data = copy or seal(known or StoreInfo(FORMAT, uuid.uuid4().hex))
        storage.put(rec.STORE_KEY, [data], len(data))
        return True
