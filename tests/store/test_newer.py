"""Objects of a newer release, whose members have other shapes: they are no damage, and nothing of theirs is lost."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import zstandard

from modelstore.client import Store
from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.format.digest import name_of
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.sealed import seal
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.store.collect.condemned import Condemnation
from tests.helpers.stores import keys, open_on, weights

Json = dict[str, Any]
NEWEST, FIRST = rec.version_key("m", 1, 2), rec.version_key("m", 1, 1)
TAG = rec.tag_key("m", "prod", 2)
INTENT = hs.intent_key("a" * 32)
JOURNAL = f"{rec.JOBS}{'b' * 32}/{'c' * 32}.json"


def put(storage: Storage, key: str, data: bytes) -> None:
    storage.put(key, [data], len(data))


def sealed(members: Json) -> bytes:
    """The bytes of an object of any members, with its digest."""
    head = msgspec.json.encode(members)[:-1]
    return head + b',"blake3":"' + name_of(head).encode() + b'"}'


def of_later(storage: Storage, key: str) -> bytes:
    """Let an object be one of the next format, each of whose members has another shape; its bytes."""
    members = msgspec.json.decode(storage.get(key))
    members.pop("blake3", None)
    data = sealed({name: [value] for name, value in members.items() if name != "format"} | {"format": FORMAT + 1})
    put(storage, key, data)
    return data


@pytest.fixture
def storage() -> MemoryStorage:
    """A version of two records, a tag of two; an intent and a journal of works that are under way."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", weights(1), tag="prod")
    record = msgspec.structs.replace(store.repo.catalog.version("m", 1), number=2)
    put(storage, NEWEST, seal(record))
    store.save("m", weights(2))
    store.tag("m@2", "prod")
    store.tag("m@1", "prod")
    put(storage, INTENT, hs.encode(hs.Intent(FORMAT, ())))
    put(storage, JOURNAL, seal(hs.Intent(FORMAT, ())))
    return storage


def collect(store: Store) -> object:
    """Remove all that nothing refers to."""
    return store.gc(dry_run=False, grace=0)


REFUSED = [NEWEST, rec.version_key("m", 2, 1), rec.STORE_KEY, INTENT]


@pytest.mark.parametrize("key", [*REFUSED, FIRST, TAG, rec.tag_key("m", "prod", 3), JOURNAL])
def test_nothing_of_a_newer_release_is_mended_or_collected(key: str, storage: MemoryStorage) -> None:
    data = of_later(storage, key)
    kept = keys(storage) - {JOURNAL}
    for work in (collect, lambda s: s.repair(), collect):
        with suppress(UnsupportedError):
            work(open_on(storage))
        assert keys(storage) >= kept
        assert key == JOURNAL or storage.get(key) == data  # nobody writes such a journal any more
    if key in REFUSED:
        with pytest.raises(UnsupportedError, match="made by a newer modelstore") as caught:
            collect(open_on(storage))
        assert caught.value.object == key


@pytest.mark.parametrize("key", [NEWEST, FIRST, TAG])
def test_repair_and_verify_name_a_newer_record(key: str, storage: MemoryStorage) -> None:
    of_later(storage, key)
    for report in (open_on(storage).verify(), open_on(storage).repair()):
        assert [(problem.kind, problem.object) for problem in report.problems] == [("unsupported", key)]
        assert report.repaired == ()


def test_a_record_is_not_mended_by_passing_over_a_newer_one(storage: MemoryStorage) -> None:
    """Record 3 is damaged, 2 is of a newer release: what record 1 says may be long given up."""
    damaged = rec.version_key("m", 1, 3)
    put(storage, damaged, b"")
    data = of_later(storage, NEWEST)
    report = open_on(storage).repair()
    assert {problem.object for problem in report.problems} == {NEWEST, damaged}
    assert (storage.get(damaged), storage.get(NEWEST)) == (b"", data)


def test_a_store_of_newer_records_gets_no_record_of_this_release(storage: MemoryStorage) -> None:
    storage.delete(rec.STORE_KEY)
    of_later(storage, NEWEST)
    with pytest.raises(UnsupportedError, match="newer modelstore"):
        open_on(storage).repair()
    assert rec.STORE_KEY not in keys(storage)


@pytest.mark.parametrize("which", [hs.candidates_key, hs.verdict_key])
def test_a_condemnation_of_a_newer_release_stops_who_publishes(
    which: Callable[[str], str], storage: MemoryStorage
) -> None:
    with Condemnation(storage, [rec.pack_key("d" * 64)]) as condemned:
        assert condemned.pronounce([])
        id_ = next(iter(keys(storage, hs.CONDEMNED))).split("/")[1]
        if which is hs.candidates_key:
            storage.delete(hs.verdict_key(id_))
        of_later(storage, which(id_))
        with pytest.raises(UnsupportedError, match="newer modelstore"):
            open_on(storage).save("n", weights(3))
        assert "n" not in [m.name for m in open_on(storage).models()]


def test_a_manifest_of_a_newer_release(storage: MemoryStorage) -> None:
    store = open_on(storage)
    entry = store.repo.catalog.version("m", 2).variants["original"]
    text = sealed({"format": FORMAT + 1, "tensors": 7})
    digest = name_of(text)
    put(storage, rec.manifest_key("m", digest), zstandard.ZstdCompressor().compress(text))
    later = msgspec.structs.replace(entry, manifest=digest)
    head = store.repo.catalog.version("m", 2)
    put(storage, rec.version_key("m", 2, 1), seal(msgspec.structs.replace(head, variants={"original": later})))
    before = keys(storage)
    with pytest.raises(ModelStoreError, match="newer modelstore"):
        collect(open_on(storage))
    for report in (open_on(storage).verify(), open_on(storage).repair()):
        assert {problem.kind for problem in report.problems} >= {"unsupported"}
    assert keys(storage) >= before - {JOURNAL}
