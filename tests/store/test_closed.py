"""A folder in a store that this user may not read: it is named, and everything else works; nothing is collected."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeVar

import pytest

from modelstore.errors import NotFoundError, StorageError
from modelstore.format.objects import record as rec
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from tests.helpers.stores import all_bits, keys, open_on, weights

T = TypeVar("T")


class Closed(WrappingStorage):
    """What lies in one folder is another user's, as a local storage tells it."""

    def __init__(self, inner: Storage, folder: str) -> None:
        super().__init__(inner)
        self.folder = folder

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if key.startswith(self.folder):
            raise StorageError(f"cannot {verb} {key!r} in {self.url}: permission denied", object=key)
        return act()


@pytest.fixture
def storage() -> MemoryStorage:
    """Two models of different users, and a third in a folder of its own."""
    storage = MemoryStorage(uuid.uuid4().hex)
    for seed, name in enumerate(("alice", "bob", "group/carol")):
        open_on(storage).save(name, weights(seed), tag="prod")
    return storage


FOLDERS = ["models/bob/", "models/bob/versions/", "models/bob/tags/", "models/bob/manifests/", "jobs/", "models/group/"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_named_and_the_rest_is_read(folder: str, storage: MemoryStorage) -> None:
    store = open_on(Closed(storage, folder))
    infos = {info.name: info for info in store.models()}
    assert (infos["alice"].versions, infos["alice"].problems) == (1, ())
    for name in ("bob", "group"):
        if folder.startswith(f"models/{name}") and "manifests" not in folder:
            assert any(folder in str(problem.object) for problem in infos[name].problems)
    for report in (store.verify(), store.repair()):
        assert [problem.kind for problem in report.problems] == ["unreadable"]
        assert folder in report.problems[0].message
        assert report.repaired == ()
        assert report.tensors >= 12  # of the models that can be read
    assert all_bits(store.load("alice")) == all_bits(weights(0))
    with pytest.raises(NotFoundError, match="no model 'alise'"):
        store.load("alise")


@pytest.mark.parametrize("folder", [*(one for one in FOLDERS if "tags" not in one), "packs/", "intents/", "condemned/"])
def test_nothing_is_collected_beside_it(folder: str, storage: MemoryStorage) -> None:
    open_on(storage).save("dave", weights(7))
    open_on(storage).delete("dave@1")
    before = keys(storage)
    with pytest.raises(StorageError, match="permission denied"):
        open_on(Closed(storage, folder)).gc(dry_run=False, grace=0)
    assert keys(storage) - before <= keys(storage, rec.JOBS)
    assert before <= keys(storage)
