"""Small objects from another copy of the store, taken only where nothing that is stored here says otherwise.

A copy may have gone its own way since, as a snapshot does that is written to, and a URL may be of another store altogether:
what these have under the same key tells of other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from modelstore.errors import ModelStoreError
from modelstore.format.objects import record as rec
from modelstore.format.objects.record import StoreInfo, TagRecord
from modelstore.storage.base import SMALL, Storage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Taken:
    """A good record of another copy of the store, and its bytes; or why those that others have are not believed."""

    data: bytes = b""
    refused: str = ""


def good_bytes(source: Storage, key: str, parse: Callable[[bytes, str], T]) -> tuple[bytes, T] | None:
    """A small object's bytes, and what they say; None if they cannot be had."""
    try:
        data = source.get(key, SMALL)
        return data, parse(data, key)
    except ModelStoreError:
        return None


def version_record(storage: Storage, sources: Sequence[Storage], model: str, key: str) -> Taken:
    """The record of a version as another copy of the store has it.

    The store itself tells whether it can be that one: by a manifest that is here, and that no record which can be read names.
    If there is such a manifest, the damaged record named it, as far as is known.
    """
    refused = ""
    for source in sources:
        found = good_bytes(source, key, rec.parse_version)
        if found is None:
            continue
        here, explained = _manifests(storage, model), _named(storage, model)
        refused = _objection({e.manifest for e in found[1].variants.values()}, here, explained, _other(storage, source))
        if not refused:
            return Taken(found[0])
        refused = f"{source.url} has another {model}@{found[1].version}: {refused}"
    return Taken(refused=refused)


def _objection(named: set[str], here: set[str], explained: set[str], other: bool) -> str:
    """Why a record that names these manifests is not the one that was here; "" where it may be."""
    unexplained = here - explained
    if unexplained and not named & unexplained:
        return "it is not of what is stored here"
    if other and not (named and named <= here):
        return "it is not a copy of this store"
    return ""


def tag_record(
    storage: Storage, sources: Sequence[Storage], good: Mapping[int, TagRecord], key: str, live: set[int]
) -> Taken:
    """The record of a tag as another copy of the store has it, whose other records of the tag are the same.

    It names a version that is `live` here.
    """
    refused = ""
    for source in sources:
        found = good_bytes(source, key, rec.parse_tag)
        if found is None:
            continue
        record = found[1]
        other = f"{source.url} has another tag {record.tag!r}: "
        if _other(storage, source):
            refused = f"{other}it is not a copy of this store"
        elif any(_differs(source, one) for one in good.values()):
            refused = f"{other}it was set otherwise there since the copy was made"
        elif record.version and record.version not in live:
            refused = f"{other}it names version {record.version}, which is not here"
        else:
            return Taken(found[0])
    return Taken(refused=refused)


def _differs(source: Storage, mine: TagRecord) -> bool:
    found = good_bytes(source, rec.tag_key(mine.model, mine.tag, mine.number), rec.parse_tag)
    return found is not None and found[1].version != mine.version


def store_record(storage: Storage, sources: Sequence[Storage], records: Sequence[str]) -> bytes | None:
    """`modelstore.json` of another copy of the store, which has one of the `records` that are here, or where none can be read."""
    for source in sources:
        found = good_bytes(source, rec.STORE_KEY, _info)
        if found is not None and (not records or any(_same(storage, source, key) for key in records)):
            return found[0]
    return None


def _same(storage: Storage, source: Storage, key: str) -> bool:
    try:
        return source.get(key, SMALL) == storage.get(key, SMALL)
    except ModelStoreError:
        return False


def _info(data: bytes, key: str) -> StoreInfo:
    return rec.parse(data, StoreInfo, key)


def _other(storage: Storage, source: Storage) -> bool:
    """Whether two stores are known to be no copies of each other."""
    ids = [good_bytes(at, rec.STORE_KEY, _info) for at in (storage, source)]
    return None not in ids and len({found[1].id for found in ids if found}) > 1


def _manifests(storage: Storage, model: str) -> set[str]:
    """The digests of all manifests of a model in this store."""
    prefix = rec.manifests_prefix(model)
    return {info.key[len(prefix) :].partition(".")[0] for info in storage.list(prefix) if rec.is_own(info.key)}


def _named(storage: Storage, model: str) -> set[str]:
    """The digests of the manifests that records of a model name, as far as these can be read."""
    named: set[str] = set()
    for info in storage.list(rec.versions_prefix(model)):
        with suppress(ModelStoreError):
            record = rec.parse_version(storage.get(info.key, SMALL), info.key)
            named |= {entry.manifest for entry in record.variants.values()}
    return named
