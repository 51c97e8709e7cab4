"""The collecting side of the handshake: nothing is removed that a writer may be about to publish.

All code that removes packs or manifests does it in this way, and garbage collection is the example:

    candidates = …what looks unneeded…
    with Condemnation(storage, candidates) as condemned:
        held = held_by_writers(storage, catalog, stale_before)      # intents first …
        marked = …mark again from all records…                       # … and then the records
        condemned.pronounce(candidates - held - marked)              # False: a writer stopped it; start again
        for batch in …: condemned.check(); …remove…

It holds whatever the clocks say, and however long anybody sleeps between two of the steps; see docs/design.md.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from types import TracebackType

import msgspec

from modelstore.errors import ConflictError, FormatError, ModelStoreError, NotFoundError
from modelstore.format.names import ORIGINAL
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import record as rec
from modelstore.format.objects.handshake import Claim, Condemned, Intent
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.record import LAST, VersionRecord
from modelstore.format.objects.sealed import seal
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.store.damage import DAMAGED

FORGOTTEN = (
    30 * 86_400
)  # seconds by the storage's clock after which a collection, or a save from memory, is taken to be dead
VOID = "void-"  # the first part of the writer of a record that only takes a number, so that a sleeping writer cannot


class Condemnation:
    """One collection's announcement of what it may remove; withdrawn at the end of the block, unless that failed half-way."""

    def __init__(self, storage: Storage, objects: Iterable[str]) -> None:
        self._storage = storage
        self._id = uuid.uuid4().hex
        self._pronounced = False
        storage.create(hs.candidates_key(self._id), self._encoded(objects))

    def pronounce(self, objects: Iterable[str]) -> bool:
        """Create the verdict on the candidates to remove; False if a writer that needs one of them has stopped this."""
        key, data = hs.verdict_key(self._id), self._encoded(objects)
        if not self._storage.create(key, data) and self._storage.get(key) != data:
            return False
        self._pronounced = True
        # One that slept for weeks may have been taken to be dead, and writers do not see its candidates then.
        if self._storage.info(hs.candidates_key(self._id)) is None:
            raise self._too_late()
        return True

    def check(self) -> None:
        """To be called before each batch of removals: `ConflictError` if this was taken to be dead."""
        if self._storage.info(hs.verdict_key(self._id)) is None:
            raise self._too_late()

    def withdraw(self) -> None:
        """All removals were answered, or none was started: writers may rely on the objects that are there."""
        self._storage.delete(hs.candidates_key(self._id))
        self._storage.delete(hs.verdict_key(self._id))

    def __enter__(self) -> Condemnation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A removal that failed may still happen: what it was of stays condemned.
        if kind is None or not self._pronounced:
            self.withdraw()

    def _encoded(self, objects: Iterable[str]) -> bytes:
        return hs.encode(Condemned(FORMAT, self._id, tuple(sorted(objects))))

    @staticmethod
    def _too_late() -> ConflictError:
        return ConflictError("this garbage collection slept for weeks and was taken to be dead: run it again")


def forget_dead(storage: Storage, now: float) -> None:
    """Remove condemnations of collections that were killed more than 30 days ago.

    Until then they stay in force, since a collection that only sleeps may go on with what it has announced.
    """
    listed = (info for info in storage.list(hs.CONDEMNED) if rec.is_own(info.key))
    for _, group in groupby(listed, key=lambda info: info.key[len(hs.CONDEMNED) :].partition("/")[0]):
        infos = list(group)  # the candidates before the verdict, as they are listed
        if max(info.modified for info in infos) <= now - FORGOTTEN:
            for info in infos:
                storage.delete(info.key)


def never_was(record: VersionRecord) -> bool:
    """Whether a version's record only takes its number: a collection voided the intent of a writer that never came back."""
    return record.number == 1 and record.deleted and record.writer.startswith(VOID)


def held_by_writers(
    storage: Storage, *, stale_before: float, now: float, damaged: list[ModelStoreError], dry_run: bool = False
) -> set[str]:
    """Keys of the objects that intents name. To be called before the records are read.

    Intents that were written before `stale_before` (by the storage's clock) are voided first: their record is created in their
    writer's place, changing nothing, so that a writer that only sleeps has to start its last steps again. Which record that
    is, the intent's key tells too: one that is damaged is voided like any other, and until then the list gets it.
    """
    held: set[str] = set()
    for info in [info for info in storage.list(hs.INTENTS) if rec.is_own(info.key)]:
        wrong: ModelStoreError | None = None
        try:
            intent = hs.parse(storage.get(info.key), Intent, info.key)
        except NotFoundError:  # its record is there, and is read after this; or it was given up
            continue
        except DAMAGED as error:
            wrong, intent = error, Intent(FORMAT, (), hs.claimed(info.key))
        if not dry_run and info.modified <= stale_before and _void(storage, info, intent, now, whole=wrong is None):
            storage.delete(info.key)
        elif wrong is not None:
            damaged.append(wrong)
        else:
            held.update(intent.objects)
    return held


def _void(storage: Storage, info: ObjectInfo, intent: Intent, now: float, *, whole: bool) -> bool:
    """Whether nothing can be published with this intent any more."""
    claim = intent.claim
    if claim is None:
        return info.modified <= now - FORGOTTEN
    if whole and claim.number == 1 and ORIGINAL not in claim.variants:
        return False  # no writer's
    with suppress(ModelStoreError, ValueError):  # where that cannot be said, what it names is kept
        record = _unchanged(storage, claim)
        key = rec.version_key(record.model, record.version, record.number)
        storage.create(key, seal(record))
        return True  # whose record it is does not matter: a record at that key is final
    return False


def _unchanged(storage: Storage, claim: Claim) -> VersionRecord:
    """A record in the claim's place that changes nothing: the state before it again, or a version that never was."""
    writer = f"{VOID}{uuid.uuid4().hex}"
    if claim.number == 1:
        if not 1 <= claim.version <= LAST:
            raise FormatError(f"version {claim.version} of {claim.model!r} cannot be: remove the intent")
        created = time.time()  # for people
        return VersionRecord(FORMAT, claim.model, claim.version, 1, writer, created, claim.variants, deleted=True)
    key = rec.version_key(claim.model, claim.version, claim.number - 1)
    before = rec.parse_version(storage.get(key), key)
    return msgspec.structs.replace(before, number=claim.number, writer=writer)
