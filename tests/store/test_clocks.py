"""Names and copies made by a client whose clock is days off, beside a collection: the same result, and nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pytest

from modelstore.format.buffers import Buffer
from modelstore.format.objects import record as rec
from modelstore.format.objects.sealed import seal
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage
from modelstore.store.collect.condemned import VOID
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import open_on
from tests.store.helpers import Small, weights
from tests.store.test_handshake import At, Off

DAYS = 86_400
T = TypeVar("T")


@pytest.fixture(params=[-72, 0, 72], ids=["behind", "right", "ahead"])
def seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """This machine's clock is so many seconds ahead of the storages' (see `Off`)."""
    ahead, real = request.param * 3600.0, time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    return ahead


def nth_write(n: int) -> Callable[[Verb, str], bool]:
    """Whether it is the `n`-th write."""
    count = itertools.count(1)
    return lambda verb, key: verb in WRITES and "/clock-" not in key and next(count) == n


def beside_a_collection(
    make: Callable[[], Small], act: Callable[[Any, Small], Any], ahead: float, grace: float
) -> None:
    """Do it again and again, garbage being collected before each of its writes in turn; `act` checks what came of it."""
    for n in itertools.count(1):
        small = make()
        clock = Off(small.storage, -ahead)

        def sweep(small: Small = small, clock: Off = clock) -> None:
            for _ in range(2):  # what the first condemns the second removes
                small.sweep(grace=grace, on=clock)

        asleep = At(small, nth_write(n), sweep, on=clock)
        act(open_on(asleep), small)
        if not asleep.done:
            assert n > 5
            return


def old() -> Small:
    """Three versions, one of them deleted, and a tag; all of it is old."""
    small = Small.new()
    for seed in (1, 2, 3):
        small.store.save("m", weights(seed))
    small.store.tag("m@1", "prod")
    small.store.delete("m@2")
    small.age(9 * DAYS)
    return small


@pytest.mark.parametrize("grace", [0, 3600])
def test_a_model_is_renamed(seconds: float, grace: float) -> None:
    def rename(store: Any, small: Small) -> None:
        done = store.rename("m", "n")
        if grace:  # without, a collection takes numbers that are about to come
            assert done.versions == {1: 1, 3: 3}
        assert done.versions[1] < done.versions[3]
        assert {info.name: info.versions for info in small.store.models()} == {"n": 2}
        assert done.tags == ("prod",)
        for _ in range(2):
            small.sweep(grace=0)
        assert {info.name: info.tags for info in small.store.models()} == {"n": {"prod": done.versions[1]}}
        for seed in (1, 3):
            small.check(f"n@{done.versions[seed]}", weights(seed))
        assert small.store.verify(deep=True).ok

    beside_a_collection(old, rename, seconds, grace)


def test_versions_are_copied_again_to_where_they_were_deleted(seconds: float) -> None:
    source = old()

    def deleted() -> Small:
        target = Small.new()
        source.store.copy("m@1", target.store)
        source.store.copy("m@3", target.store)
        target.store.delete("m", all=True)
        target.age(9 * DAYS)
        return target

    def copy(store: Any, target: Small) -> None:
        for ref in ("m@1", "m@3"):
            (version,) = source.store.copy(ref, store, tags=True).versions
            target.check(f"m@{version.version}", source.store.load(ref))
        for _ in range(2):
            target.sweep(grace=0)
        found = target.store.models()
        assert [(info.name, info.versions) for info in found] == [("m", 2)]
        target.check("m@prod", weights(1))
        assert target.store.verify(deep=True).ok

    beside_a_collection(deleted, copy, seconds, 0)


class Takes(WrappingStorage):
    """Takes the numbers of some versions of "n" (counted from 1 in the order of the tries) just before they are made."""

    def __init__(self, inner: Storage, taken: tuple[int, ...]) -> None:
        super().__init__(inner)
        self._taken, self._made = taken, itertools.count(1)

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def create(self, key: str, data: Buffer) -> bool:
        if key.startswith("models/n/versions/") and next(self._made) in self._taken:
            record = rec.parse_version(bytes(data), key)
            void = msgspec.structs.replace(record, writer=f"{VOID}x", deleted=True)
            assert self.inner.create(key, seal(void))
        return super().create(key, data)


@pytest.mark.parametrize("taken", [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 4), (3, 5, 6), (1, 2, 3, 4)])
def test_versions_keep_their_order_where_numbers_are_taken(taken: tuple[int, ...]) -> None:
    small = old()
    small.store.save("m", weights(4))
    done = open_on(Takes(small.storage, taken)).rename("m", "n")
    assert list(done.versions) == [1, 3, 4]
    assert sorted(done.versions.values()) == list(done.versions.values())
    assert [one.version for one in small.store.versions("n")] == list(done.versions.values())
    assert (done.versions == {1: 1, 3: 3, 4: 4}) == (not taken)
    for seed, version in done.versions.items():
        small.check(f"n@{version}", weights(seed))
    small.check("n", weights(4))
    small.check("n@prod", weights(1))


@pytest.mark.parametrize("taken", [(1,), (3,), (2, 4)])
def test_a_renaming_that_was_interrupted_while_numbers_were_taken_goes_on_in_order(taken: tuple[int, ...]) -> None:
    for at in itertools.count(1):
        small = old()
        small.store.save("m", weights(4))
        killed = True
        try:
            open_on(FaultyStorage(Takes(small.storage, taken), kill_at=at)).rename("m", "n")
            killed = False
        except Killed:
            pass
        done = open_on(small.storage).rename("m", "n") if killed and small.store.models()[0].name == "m" else None
        found = [one.version for one in small.store.versions("n")]
        assert len(found) == 3
        for seed, version in zip((1, 3, 4), found, strict=True):
            small.check(f"n@{version}", weights(seed))
        small.check("n@prod", weights(1))
        assert [info.name for info in small.store.models()] == ["n"]
        if not killed:
            assert done is None
            return
