"""Works on a store that is compacted and collected, with no grace, between any two of their requests: nothing is damaged then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelstore.client import Store
from modelstore.format.objects.record import manifest_key
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.store.catalog import Catalog
from tests.client.test_copying_meanwhile import Meanwhile, compact, fresh, half_dead
from tests.helpers.stores import all_bits, copy_all, open_on, weights


@pytest.fixture(scope="module")
def filled() -> MemoryStorage:
    return half_dead()


def deleting(storage: Storage) -> None:
    open_on(storage).delete("d", all=True)
    open_on(storage).delete("m@2")
    open_on(storage).gc(dry_run=False, grace=0)


def verified(store: Store) -> None:
    assert store.verify().problems == ()


def verified_deep(store: Store) -> None:
    assert store.verify(deep=True).problems == ()


def one_verified(store: Store) -> None:
    assert store.verify("d").problems == ()


def repaired(store: Store) -> None:
    report = store.repair()
    assert report.problems == ()


def saved_as_a_difference(store: Store) -> None:
    store.save("e", weights(3), parent="m@2", codec="delta")
    assert all_bits(store.load("e")) == all_bits(weights(3))


@pytest.mark.parametrize("work", [verified, verified_deep, one_verified, repaired, saved_as_a_difference])
def test_a_compaction(work: Callable[[Store], None], filled: MemoryStorage) -> None:
    before_every_request(work, filled, compact)


@pytest.mark.parametrize("work", [verified, repaired])
def test_a_deletion(work: Callable[[Store], None], filled: MemoryStorage) -> None:
    before_every_request(work, filled, deleting)


def test_damage_is_told_of_all_the_same(filled: MemoryStorage) -> None:
    copy_all(filled, source := fresh())
    open_on(source).compress("m@2", "int8", include=["*"])
    lost = manifest_key("m", Catalog(source).newest("m").variants["original"].manifest)
    source.delete(lost)
    last = Meanwhile(source, 0, lambda: None)
    open_on(last).verify()
    for at in range(1, -last.left):
        copy_all(source, changing := fresh())
        found = open_on(Meanwhile(changing, at, lambda at=changing: open_on(at).delete("m@2:int8"))).verify()  # type: ignore[misc]
        assert [problem.object for problem in found.problems] == [lost]


def before_every_request(
    work: Callable[[Store], None], filled: MemoryStorage, act: Callable[[Storage], object]
) -> None:
    """Do a work with `act` on the store before each of its operations in turn."""
    at, left = 0, 0
    while left <= 0:
        at += 1
        copy_all(filled, source := fresh())
        meanwhile = Meanwhile(source, at, lambda source=source: act(source))  # type: ignore[misc]
        work(open_on(meanwhile))
        left = meanwhile.left
    assert at > 10
