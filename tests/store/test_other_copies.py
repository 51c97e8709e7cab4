"""`repair` from what is no copy of the store any more, or never was: what it has under the same keys is of other weights."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from modelstore.format.objects import record as rec
from modelstore.format.objects.record import StoreInfo
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import all_bits, copy_all, open_on, weights

M2, PROD = rec.version_key("m", 2, 1), rec.tag_key("m", "prod", 1)


def fresh() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def filled(storage: MemoryStorage, *numbers: int) -> MemoryStorage:
    for number in numbers:
        open_on(storage).save("m", weights(number))
    return storage


def snapshot(storage: MemoryStorage) -> MemoryStorage:
    """A copy of the store that was written to since: its second version is another."""
    copy_all(storage, other := fresh())
    return filled(other, 3)


def stranger(_: MemoryStorage) -> MemoryStorage:
    """Another store, which uses the same names."""
    return filled(fresh(), 1, 3)


def tear(storage: MemoryStorage, key: str, data: bytes) -> None:
    storage.put(key, [data], len(data))


def id_of(storage: MemoryStorage) -> str:
    return rec.parse(storage.get(rec.STORE_KEY), StoreInfo, rec.STORE_KEY).id


@pytest.mark.parametrize("made", [snapshot, stranger])
@pytest.mark.parametrize("data", [b"", b"\x00garbage"])
def test_a_version_does_not_become_another(made: Callable[[MemoryStorage], MemoryStorage], data: bytes) -> None:
    storage = filled(fresh(), 1)
    other = made(storage)
    filled(storage, 2)
    copy_all(storage, copy := fresh())
    good = all_bits(open_on(storage).load("m@2"))
    tear(storage, M2, data)
    report = open_on(storage).repair(source=other.url)
    assert [(p.model, p.object) for p in report.problems] == [("m", M2)]
    assert f"{other.url} has another m@2: it is not of what is stored here" in report.problems[0].message
    assert storage.get(M2) == data
    assert open_on(storage).repair(source=copy.url).ok  # nor was what it needs lost
    assert all_bits(open_on(storage).load("m@2")) == good


def test_a_version_is_not_deleted_because_the_snapshot_s_was() -> None:
    storage = filled(fresh(), 1, 2)
    copy_all(storage, other := fresh())
    open_on(other).delete("m@2")
    open_on(storage).compress("m@2", "int8", include=["*"])
    tear(storage, rec.version_key("m", 2, 2), b"")
    report = open_on(storage).repair(source=other.url)
    assert "again what its record 1 says" in report.notes[0]
    assert [one.version for one in open_on(storage).versions("m")] == [1, 2]


@pytest.mark.parametrize("made", [snapshot, stranger])
def test_a_tag_does_not_come_to_name_what_it_names_there(made: Callable[[MemoryStorage], MemoryStorage]) -> None:
    storage = filled(fresh(), 1)
    open_on(other := made(storage)).tag("m@2", "prod")
    open_on(storage).tag("m@1", "prod")
    tear(storage, PROD, b"")
    report = open_on(storage).repair(source=other.url)
    assert f"{other.url} has another tag 'prod'" in report.problems[0].message
    assert "set it anew with 'modelstore tag'" in report.problems[0].message


def test_a_tag_that_was_set_otherwise_in_the_snapshot() -> None:
    storage = filled(fresh(), 1, 2, 3)
    copy_all(storage, other := fresh())
    for at, versions in ((storage, (1, 2)), (other, (3, 3))):
        for version in versions:
            open_on(at).tag(f"m@{version}", "prod")
    tear(storage, rec.tag_key("m", "prod", 2), b"")
    open_on(storage).repair(source=other.url)
    assert [one.version for one in open_on(storage).versions("m") if "prod" in one.tags] == [
        1
    ]  # what it named before, and the note says so


def test_another_store_s_id_is_not_taken() -> None:
    storage = filled(fresh(), 1, 2)
    other = stranger(storage)
    tear(storage, rec.STORE_KEY, b"")
    assert open_on(storage).repair(source=other.url).repaired == (rec.STORE_KEY,)
    assert id_of(storage) != id_of(other)


def test_a_store_that_was_filled_by_copy_mends_what_it_has() -> None:
    storage = filled(fresh(), 1, 2)
    good = all_bits(open_on(storage).load("m@2"))
    other = fresh()
    open_on(storage).copy("m", open_on(other), all=True)
    tear(storage, M2, b"")
    assert open_on(storage).repair(source=other.url).ok
    assert all_bits(open_on(storage).load("m@2")) == good
