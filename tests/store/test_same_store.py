"""A store that goes away under who holds it open, or whose place another takes: nothing is written there as if it were."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modelstore
from modelstore.client import Store
from modelstore.errors import ConflictError, ModelStoreError
from modelstore.format.objects import handshake as hs
from modelstore.format.objects import record as rec
from modelstore.storage.memory import MemoryStorage
from modelstore.store.place import OtherStoreError
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import keys, open_on, weights

ONE, SEVEN = {"w": torch.full((9000,), 1.0)}, {"w": torch.full((9000,), 7.0)}


def other_store(at: Path) -> None:
    """Another store takes the place of the one that is there."""
    other = at.with_name("other")
    modelstore.open(other).save("a", SEVEN, tag="prod")
    shutil.rmtree(at)
    other.rename(at)


def unmounted(at: Path) -> None:
    """The folder is there, and empty, as the mount point is of what was unmounted."""
    shutil.rmtree(at)
    at.mkdir()


GONE: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "unmounted": unmounted,
    "moved away": lambda at: at.rename(at.with_name("elsewhere")),
    "its record removed": lambda at: (at / rec.STORE_KEY).unlink(),
    "another in its place": other_store,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = modelstore.open(tmp_path / "store")
    store.save("a", ONE, tag="prod")
    store.save("a", {"w": torch.full((9000,), 2.0)})
    return store


WORKS: dict[str, Callable[[Store], object]] = {
    "save": lambda s: s.save("b", ONE),
    "save of the same": lambda s: s.save("a", ONE, parent="a"),
    "tag": lambda s: s.tag("a@1", "next"),
    "untag": lambda s: s.untag("a", "prod"),
    "delete": lambda s: s.delete("a@1"),
    "delete all": lambda s: s.delete("a", all=True),
    "rename": lambda s: s.rename("a", "c"),
    "gc": lambda s: s.gc(dry_run=False, grace=0),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@pytest.mark.parametrize("gone", GONE.values(), ids=GONE)
def test_nothing_is_acknowledged(
    work: Callable[[Store], object], gone: Callable[[Path], object], store: Store, tmp_path: Path
) -> None:
    at = tmp_path / "store"
    gone(at)
    before = sorted(path for path in at.rglob("*.json"))
    with pytest.raises(ModelStoreError):
        work(store)
    assert sorted(path for path in at.rglob("*.json")) == before


def test_what_goes_between_the_packs_and_the_record_is_noticed() -> None:
    """Just before the record is created, after all that it relies on is stored."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", weights(1))
    announced = Announcing(storage)
    held = open_on(announced)
    held.models()
    before = keys(storage, rec.MODELS)
    with pytest.raises(OtherStoreError, match="nothing was published"):
        held.save("m", weights(2))
    assert {key for key in keys(storage, rec.MODELS) if "/versions/" in key} == {
        key for key in before if "/versions/" in key
    }
    assert not keys(storage, hs.INTENTS)  # its record never comes


class Announcing(CountingStorage):
    """The store's own record goes when a writer announces what it is about to publish."""

    def create(self, key: str, data: object) -> bool:
        made = super().create(key, data)  # type: ignore[arg-type]
        if key.startswith(hs.INTENTS):
            self.inner.delete(rec.STORE_KEY)
        return made


def test_a_model_never_gives_another_stores_values(store: Store, tmp_path: Path) -> None:
    held, read = store["a@1"], store["a@1"]
    read.load()
    other_store(tmp_path / "store")
    for model in (held, read):
        with pytest.raises(ModelStoreError):
            model.load()
    with pytest.raises(OtherStoreError, match="another store"):
        read.load()
    assert modelstore.open(tmp_path / "store").load("a")["w"][0] == 7


def test_a_model_never_gives_the_values_of_a_copy_that_went_on_by_itself(store: Store, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "store", tmp_path / "backup")
    store.save("a", SEVEN)
    model = store["a@3"]
    assert model.load()["w"][0] == 7
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "backup").rename(tmp_path / "store")
    modelstore.open(tmp_path / "store").save("a", ONE)
    with pytest.raises(ConflictError, match="other values"):
        model.load()


def test_a_watch_gives_no_versions_of_another_store(store: Store, tmp_path: Path) -> None:
    watch = store.watch("a")
    assert next(watch).version == 2
    other_store(tmp_path / "store")
    with pytest.raises(OtherStoreError):
        next(watch)


def test_repair_lets_the_store_be_the_one_that_it_was(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store" / rec.STORE_KEY).unlink()
    assert store.repair().repaired == (rec.STORE_KEY,)
    assert store.save("a", SEVEN).version == 3
