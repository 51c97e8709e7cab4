"""The publishing side of the handshake: a record is created only while all that it relies on is there and stays there.

Every record that names new variants is created through `Reliance`; see docs/design.md for why it holds.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import msgspec
import numpy as np

from modelstore.errors import ConflictError, NotFoundError, StorageError
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import manifest as man
from modelstore.format.objects.handshake import Claim, Condemned, Intent
from modelstore.format.objects.manifest import FORMAT, Manifest
from modelstore.format.objects.record import VariantEntry, VersionRecord, is_own, manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.compact.rehouse import Rehousing
from modelstore.store.damage import DAMAGED
from modelstore.store.place import OtherStoreError

log = logging.getLogger("modelstore")

_TRIES = 5
_MEND = "run 'modelstore repair', with '--from URL' where another copy of the store has it"
T = TypeVar("T")


class GoneError(ConflictError):
    """A publication relies on an object that is gone. Nothing is visible; the same work can be done again.

    `missing`: it was looked for and is not there; otherwise a collection is removing it.
    """

    def __init__(self, message: str, *, model: str, object: str, missing: bool) -> None:
        super().__init__(message, model=model, object=object)
        self.missing = missing

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(GoneError, model=str(self.model), object=str(self.object), missing=self.missing), (str(self),)


def again(work: Callable[[], T]) -> T:
    """Run an operation; if an object it relied on was removed meanwhile, run it again: it then finds that, and stores the
    object.

    If the same object is missing once more, nobody removed it meanwhile: it is missing for good, and the error says so.
    """
    lacking: str | None = None
    for left in reversed(range(_TRIES)):
        try:
            return work()
        except GoneError as error:
            if error.missing and error.object == lacking:
                raise _missing(error) from error
            if not left:
                raise
            lacking = error.object if error.missing else None
            log.warning("%s; trying again", error)
    raise AssertionError


def _missing(error: GoneError) -> GoneError:
    model, key = str(error.model), str(error.object)
    what = f"object {key}, which model {model!r} relies on, is missing or too short, and was so again at another try"
    return GoneError(f"{what}: nothing was published; {_MEND}", model=model, object=key, missing=True)


def objects_of(manifest: Manifest) -> dict[str, int]:
    """Keys of the packs of a manifest, and the least size in bytes that each must have."""
    ends = np.zeros(len(manifest.packs), np.uint64)
    np.maximum.at(ends, manifest.pack, manifest.offset + manifest.length)
    return {pack_key(digest): int(end) for digest, end in zip(manifest.packs, ends, strict=True)}


def relied_on(storage: Storage, model: str, entries: Iterable[VariantEntry]) -> dict[str, int]:
    """Keys of all that variants need, bases included, and the least size of each; manifests are read, and checked."""
    needed: dict[str, int] = {}
    for entry in entries:
        needed[pack_key(entry.copy)] = 1
        for key, size in base_objects(storage, model, entry.manifest).items():
            needed[key] = max(size, needed.get(key, 0))
    return needed


def base_objects(storage: Storage, model: str, digest: str) -> dict[str, int]:
    """The same of a manifest without its copy, and of those that it is stored against."""
    needed: dict[str, int] = {}
    at: tuple[str, str] | None = (model, digest)
    while at is not None and manifest_key(*at) not in needed:
        key = manifest_key(*at)
        try:
            data = storage.get(key)
        except NotFoundError:
            raise _gone(model, [key]) from None
        manifest = man.decode(data, at[1], key)
        needed[key] = len(data)
        for pack, size in objects_of(manifest).items():
            needed[pack] = max(size, needed.get(pack, 0))
        at = (manifest.base.model, manifest.base.manifest) if manifest.base else None
    return needed


class Reliance:
    """New variants that a record is to show, and all that they rely on.

    An object that a collection is removing is copied to another name, and the entries changed to it, so that nobody has to
    wait, and nothing is lost that was acknowledged before.
    """

    def __init__(
        self, storage: Storage, model: str, entries: Mapping[str, VariantEntry], *, only_copies: bool = False
    ) -> None:
        """`only_copies`: the manifests are those of the newest record already, which keeps all that they need."""
        self._storage = storage
        self._model = model
        self._only_copies = only_copies
        self._rehousing = Rehousing(storage, model)
        self.entries = dict(entries)
        self._needed = self._need()

    def create(self, record: VersionRecord, create: Callable[[VersionRecord], bool]) -> VersionRecord | None:
        """Create a record with these variants; None if its number is taken, in which case `create` is called no more.

        `GoneError` if something that it relies on is gone; nothing is visible then.
        """
        for _ in range(_TRIES):
            record = msgspec.structs.replace(record, variants={**record.variants, **self.entries})
            key = self._announce(record)
            try:
                taken = condemned_among(self._storage, self._needed)
                if not taken:
                    check_there(self._storage, self._model, self._needed)
            except BaseException:
                self._withdraw(key)
                raise
            if taken:
                self._rehouse(taken)
                self._withdraw(key)
                continue
            try:
                made = create(record)  # where this fails, the record may still come to be: then the intent stays
            except OtherStoreError:  # it was not tried
                self._withdraw(key)
                raise
            self._withdraw(key)
            return record if made else None
        raise _gone(self._model, sorted(taken), missing=False)

    def _need(self) -> dict[str, int]:
        if self._only_copies:
            return {pack_key(entry.copy): 1 for entry in self.entries.values()}
        return relied_on(self._storage, self._model, self.entries.values())

    def _announce(self, record: VersionRecord) -> str:
        key = hs.intent_key(uuid.uuid4().hex, record)
        claim = Claim(record.model, record.version, record.number, record.variants)
        self._storage.create(key, hs.encode(Intent(FORMAT, tuple(sorted(self._needed)), claim)))
        return key

    def _withdraw(self, key: str) -> None:
        try:
            self._storage.delete(key)
        except StorageError as error:  # garbage collection voids it later
            log.warning("object %s could not be removed: %s", key, error)

    def _rehouse(self, taken: set[str]) -> None:
        try:
            self.entries = {name: self._rehousing.entry(entry, taken) for name, entry in self.entries.items()}
        except NotFoundError as error:
            raise _gone(self._model, [error.object or "a pack"], missing=error.object not in taken) from error
        self._needed = self._need()


def hold(
    storage: Storage, model: str, id: str, needed: Mapping[str, int], coming: Callable[[], Collection[str]]
) -> None:
    """Keep what a record relies on whose number is not known yet, until `release`.

    `coming` says, once all is announced, which objects are yet to be stored: all others have to be there. `GoneError` if
    some of it is gone, or about to be removed; nothing is held then.
    """
    key = hs.intent_key(id)
    storage.create(key, hs.encode(Intent(FORMAT, tuple(sorted(needed)))))
    try:
        taken = condemned_among(storage, needed)
        if taken:
            raise _gone(model, sorted(taken), missing=False)
        later = coming()
        check_there(storage, model, {key: size for key, size in needed.items() if key not in later})
    except BaseException:
        release(storage, id)
        raise


def release(storage: Storage, id: str) -> None:
    """Hold no longer what `hold` did."""
    storage.delete(hs.intent_key(id))


def condemned_among(storage: Storage, needed: Collection[str]) -> set[str]:
    """Those of these objects that collections are removing. A collection that only thinks of it is stopped.

    So is one whose candidates are damaged; a damaged verdict is taken to name all its candidates, of which it is a part.
    """
    found: set[str] = set()
    listed = [info for info in storage.list(hs.CONDEMNED) if is_own(info.key)]
    for id_, group in groupby(listed, key=lambda info: info.key[len(hs.CONDEMNED) :].partition("/")[0]):
        keys = {info.key for info in group}
        verdict, candidates = hs.verdict_key(id_), hs.candidates_key(id_)
        if candidates not in keys:
            continue  # it is over, or began after the intent that this is looked at for was there
        if verdict not in keys:
            with suppress(*DAMAGED):
                wanted = _read(storage, candidates)
                if wanted is None or not any(key in needed for key in wanted.objects):
                    continue  # it is over, and its content stays; or it needs nothing of this
            storage.create(verdict, hs.encode(Condemned(FORMAT, uuid.uuid4().hex, ())))
        try:
            pronounced = _read(storage, verdict)
        except DAMAGED as error:
            log.warning("%s; all that was thought of is taken to be removed", error)
            pronounced = _read(storage, candidates)
        if pronounced is not None:
            found.update(key for key in pronounced.objects if key in needed)
    return found


def check_there(storage: Storage, model: str, needed: Mapping[str, int]) -> None:
    """`GoneError` unless all objects are there, with at least the size that is needed."""

    def missing(item: tuple[str, int]) -> str | None:
        info = storage.info(item[0])
        return item[0] if info is None or info.size < item[1] else None

    looked = ordered(missing, needed.items(), REQUESTS, "modelstore-publish")
    gone = [key for key in looked if key is not None]
    if gone:
        raise _gone(model, gone)


def _read(storage: Storage, key: str) -> Condemned | None:
    with suppress(NotFoundError):
        return hs.parse(storage.get(key), Condemned, key)
    return None


def _gone(model: str, keys: list[str], *, missing: bool = True) -> GoneError:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    what = f"object {keys[0]}{more}, which model {model!r} relies on"
    if missing:
        why = f"is missing or too short: nothing was published; do the same again, and if that says this too, {_MEND}"
    else:
        why = "is being removed by a garbage collection: nothing was published; do the same again"
    return GoneError(f"{what}, {why}", model=model, object=keys[0], missing=missing)
