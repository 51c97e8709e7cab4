"""A copy while the store that it comes from is compacted, or loses a version, between any two of its requests."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeVar

import pytest

from modelstore.client import Store
from modelstore.errors import NotFoundError
from modelstore.plan.work import Limits, Work
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.store.compact.compaction import clean
from modelstore.store.repo import Repo
from tests.helpers.stores import all_bits, copy_all, open_on, shrink, weights

T = TypeVar("T")


class Meanwhile(WrappingStorage):
    """Does something before one of its operations."""

    def __init__(self, inner: Storage, at: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self.left, self.act = at, act

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        self.left -= 1
        if self.left == 0:
            self.act()
        return act()


def fresh() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def changed() -> dict[str, object]:
    """The second version: one tensor is another."""
    made = dict(weights(1))
    name = sorted(made)[0]
    made[name] = weights(7)[name]
    return made


def half_dead() -> MemoryStorage:
    """A version whose packs are half dead, and a delta of it."""
    storage = fresh()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        store = open_on(storage)
        store.save("m", weights(1))
        store.save("m", changed())
        store.save("d", weights(1), parent="m@2", codec="delta")
        store.delete("m@1")
    return storage


@pytest.fixture
def filled() -> MemoryStorage:
    return half_dead()


def at_every_request(
    filled: MemoryStorage, act: Callable[[Storage], object], copy: Callable[[Store, Store], object]
) -> None:
    """Copy with `act` on the source before each of its operations in turn; what is there afterwards is sound."""
    at, left = 0, 0
    while left <= 0:
        at += 1
        copy_all(filled, source := fresh())
        meanwhile = Meanwhile(source, at, lambda source=source: act(source))  # type: ignore[misc]
        target = fresh()
        copy(open_on(meanwhile), open_on(target))
        left = meanwhile.left
        report = open_on(target).verify(deep=True)
        assert report.ok, report.problems
    assert at > 10


def compact(storage: Storage) -> object:
    return clean(Repo.on(storage), dry_run=False, grace=0, bound=1.0, work=Work(Limits(64 << 20)))


def test_everything_is_copied_beside_a_compaction(filled: MemoryStorage) -> None:
    good = all_bits(open_on(filled).load("m@2"))

    def copy(source: Store, target: Store) -> None:
        done = source.copy(None, target, all=True)
        assert (len(done.versions), done.left_out) == (2, ())
        assert all_bits(target.load("m@2")) == good

    at_every_request(filled, compact, copy)


def test_a_version_is_copied_beside_a_compaction(filled: MemoryStorage) -> None:
    at_every_request(filled, compact, lambda source, target: source.copy("m@2", target))


def test_what_is_deleted_meanwhile_is_said_to_be(filled: MemoryStorage) -> None:
    def delete(storage: Storage) -> None:
        open_on(storage).delete("m@2")
        open_on(storage).gc(dry_run=False, grace=0)

    def copy(source: Store, target: Store) -> None:
        left_out = source.copy(None, target, all=True).left_out
        assert left_out in ((), ("m@2: version 2 of model 'm' was deleted meanwhile: it is not copied",))

    def one(source: Store, target: Store) -> None:
        try:
            source.copy("m@2", target)
        except NotFoundError as error:
            assert "deleted" in str(error)  # noqa: PT017
            target.save("other", weights(2))

    open_on(filled).delete("d", all=True)  # it needs what it is a delta of
    at_every_request(filled, delete, copy)
    at_every_request(filled, delete, one)
