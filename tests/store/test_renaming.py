"""A model under another name: every version at every instant, and what refers to it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

import modelstore.client
from modelstore.errors import ConflictError, CorruptionError, NotFoundError
from modelstore.format.objects.record import manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage
from modelstore.store.relying import GoneError, again
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import open_on, pack_sizes
from tests.store.helpers import Small, weights

T = TypeVar("T")


def three() -> Small:
    """Three versions, two tags, and a delta of another model."""
    small = Small.new()
    for seed in (1, 2, 3):
        small.store.save("org/m", weights(seed))
    small.store.tag("org/m@1", "prod")
    small.store.tag("org/m@3", "test")
    small.store.save("tuned", {**weights(1), "mlp.bias": torch.arange(7) + 9}, codec="delta", parent="org/m@1")
    return small


def fresh(small: Small) -> modelstore.client.Store:
    """The store as a new process sees it."""
    return modelstore.client.open(small.store.url, memory="64MiB", threads=2)


def test_versions_tags_and_deltas_of_it_stay() -> None:
    small = three()
    packs = set(pack_sizes(small.storage))
    done = small.store.rename("org/m", "new")
    assert (done.versions, done.tags) == ({1: 1, 2: 2, 3: 3}, ("prod", "test"))
    assert set(pack_sizes(small.storage)) == packs, "no pack is written"
    assert [model.name for model in small.store.models()] == ["new", "tuned"]
    assert small.store.models()[0].tags == {"prod": 1, "test": 3}
    with pytest.raises(NotFoundError):
        small.store.load("org/m")
    small.age(1e6)
    small.sweep(grace=0)
    for seed in (1, 2, 3):
        small.check(f"new@{seed}", weights(seed))
    small.check("tuned", {**weights(1), "mlp.bias": torch.arange(7) + 9})
    assert fresh(small).verify(deep=True).ok
    assert small.store.save("new", weights(4)).version == 4


def test_there_and_back_again() -> None:
    small = three()
    small.store.rename("org/m", "new")
    assert small.store.rename("new", "org/m").versions == {1: 4, 2: 5, 3: 6}, "a number is never used for two things"
    assert small.store.rename("org/m", "new").versions == {4: 4, 5: 5, 6: 6}
    small.check("new@5", weights(2))
    assert small.store.models()[0].tags == {"prod": 4, "test": 6}


def test_killed_at_any_write_every_version_is_there_and_the_same_call_finishes() -> None:
    for at in range(1, 100):
        small = three()
        faulty = FaultyStorage(small.storage, kill_at=at, kill_after=bool(at % 2))
        with contextlib.suppress(Killed):
            open_on(faulty).rename("org/m", "new")
        found = fresh(small)
        for seed in (1, 2, 3):
            names = [m.name for m in found.models() if seed in {v.version for v in found.versions(m.name)}]
            assert {"org/m", "new"} & set(names)
        if "new" in {model.name for model in found.models()}:
            assert found.versions("new")[-1].version == 3, "the newest is the newest"
        assert found.rename("org/m", "new").versions == {1: 1, 2: 2, 3: 3}
        assert {m.name: m.tags for m in found.models()} == {"new": {"prod": 1, "test": 3}, "tuned": {}}
        for seed in (1, 2, 3):
            small.check(f"new@{seed}", weights(seed))
        if not faulty.dead:
            break
    assert at > 10


class Beside(WrappingStorage):
    """Does something just before the `at`-th write."""

    def __init__(self, inner: Storage, at: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self._left = at
        self._act = act

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if verb in WRITES:
            self._left -= 1
            if not self._left:
                self._act()
        return act()


@pytest.mark.parametrize("at", range(1, 14))
def test_a_save_a_tag_and_a_variant_beside_it_are_not_lost(at: int) -> None:
    small = three()

    def others() -> None:
        with contextlib.suppress(NotFoundError):
            fresh(small).tag("org/m@2", "late")
        with contextlib.suppress(NotFoundError):
            entry = small.entry("org/m@2")
            fresh(small).repo.catalog.publish_variants("org/m", 2, {"twin": entry}, "w")
        fresh(small).save("org/m", weights(9))

    open_on(Beside(small.storage, at, others)).rename("org/m", "new")
    found = fresh(small)
    where = {version: m.name for m in found.models() for version in (v.version for v in found.versions(m.name))}
    small.check(f"{where[4]}@4", weights(9))
    small.check("new@2", weights(2))
    assert found.verify(deep=True).ok


@pytest.mark.parametrize("at", range(1, 14))
@pytest.mark.parametrize("verb", ["list", "folders", "get", "create"])
def test_the_same_renaming_started_twice_makes_each_version_once(at: int, verb: Verb) -> None:
    small = three()
    left = at

    class Twice(WrappingStorage):
        def around(self, doing: Verb, key: str, act: Callable[[], T]) -> T:
            nonlocal left
            left -= doing == verb
            if doing == verb and left == 0:
                with contextlib.suppress(Killed):
                    open_on(FaultyStorage(small.storage, kill_at=9)).rename("org/m", "new")
            return act()

    open_on(Twice(small.storage)).rename("org/m", "new")
    found = fresh(small)
    assert [version.version for version in found.versions("new")] == [1, 2, 3]
    assert {m.name: m.tags for m in found.models()} == {"new": {"prod": 1, "test": 3}, "tuned": {}}


def test_a_name_that_is_taken_is_refused_and_nothing_changes() -> None:
    small = three()
    small.store.save("new", weights(5))
    before = small.objects()
    with pytest.raises(ConflictError, match="already"):
        small.store.rename("org/m", "new")
    assert small.objects() == before
    small.store.rename("org/m", "third")
    small.store.save("org/m", weights(6))
    with pytest.raises(ConflictError, match="already"):
        small.store.rename("org/m", "third")
    with pytest.raises(NotFoundError):
        small.store.rename("nobody", "else")
    with pytest.raises(ValueError, match="already"):
        small.store.rename("third", "third")
    with pytest.raises(ValueError, match="not valid"):
        small.store.rename("third", "../x")


def test_what_is_missing_for_good_is_said_with_what_mends_it() -> None:
    small = three()
    base = small.manifest("tuned").base
    assert base is not None
    key = manifest_key(base.model, base.manifest)
    small.storage.delete(key)
    with pytest.raises(ConflictError, match="is missing") as caught:
        fresh(small).rename("tuned", "other")
    assert caught.value.object == key
    assert "modelstore repair" in str(caught.value)
    assert "do the same again" not in str(caught.value)
    with pytest.raises(CorruptionError, match=r"is missing: run 'modelstore repair org/m'"):
        fresh(small).rename("org/m", "new")
    assert small.store.repair().ok
    assert fresh(small).rename("tuned", "other").versions == {1: 1}
    pack = pack_key(small.manifest("other").packs[0])
    data = small.storage.get(pack)
    small.storage.delete(pack)
    with pytest.raises(ConflictError, match="modelstore repair") as caught:
        fresh(small).rename("other", "third")
    assert caught.value.object == pack
    small.storage.put(pack, [data], len(data))
    assert fresh(small).rename("other", "third").versions == {1: 1}


def test_what_a_collection_removes_again_and_again_is_not_said_to_be_missing() -> None:
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise GoneError("being removed", model="m", object="packs/x", missing=False)

    with pytest.raises(GoneError, match="being removed"):
        again(work)
    assert len(tries) == 5
    raised = GoneError("gone", model="m", object="packs/x", missing=True)
    same = pickle.loads(pickle.dumps(raised))
    assert (str(same), same.model, same.object, same.missing) == ("gone", "m", "packs/x", True)


def test_a_name_that_never_was_is_not_found_whatever_the_new_one_is() -> None:
    small = three()
    for new in ("tuned", "other"):
        with pytest.raises(NotFoundError, match="'nada'"):
            small.store.rename("nada", new)
