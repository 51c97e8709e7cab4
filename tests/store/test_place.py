"""A store is made in a place of its own: never among files of others, on any storage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore import paths
from modelstore.errors import ConflictError, NotFoundError
from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import open_on

WEIGHTS = {"w": torch.ones(4)}


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "place") if request.param == "local" else MemoryStorage(f"place-{tmp_path.name}")


@pytest.mark.parametrize(
    "key",
    [
        "README.md",
        "data/x.bin",
        ".git/config",
        "models/readme",
        "packs/x",
        "src/a/b/c.py",
        "jobs/train.py",
        "intents/x",
    ],
)
def test_files_of_others_are_left_alone(place: Storage, key: str) -> None:
    place.create(key, b"theirs")
    source = open_on(MemoryStorage(f"source-{id(place)}"))
    source.save("m", WEIGHTS)
    store = open_on(place)
    for act in (
        lambda: store.save("m", WEIGHTS),
        lambda: store.save_part("m", WEIGHTS, session="s", rank=0, ranks=1),
        lambda: source.copy("m", store),
        lambda: source.copy(None, store, all=True),
    ):
        with pytest.raises(ConflictError, match=r"is not empty, and no store: it holds .*/store, or the address"):
            act()
    assert [info.key for info in place.list("")] == [key]


@pytest.mark.parametrize(
    "key", ["lost+found/x", ".DS_Store", "jobs/probe-0123456789abcdef.json", "._x", "@eaDir/y", ".keep"]
)
def test_what_systems_and_writers_leave_is_no_obstacle(place: Storage, key: str) -> None:
    place.create(key, b"")
    assert open_on(place).save("m", WEIGHTS).version == 1


def test_empty_folders_and_those_that_are_not_there_become_stores(tmp_path: Path) -> None:
    (tmp_path / "empty/below").mkdir(parents=True)
    for where in ("empty", "not/there"):
        assert ms.open(tmp_path / where).save("m", WEIGHTS).version == 1


def test_what_lies_beside_a_store_is_no_obstacle(place: Storage) -> None:
    open_on(place).save("m", WEIGHTS)
    place.create("README.md", b"about this store")
    assert open_on(place).save("m", WEIGHTS).version == 2


def test_a_store_that_is_made_meanwhile_is_taken(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer makes it between the two looks: what lies there then is the store's own."""
    look = type(place).get

    def get(self: Storage, key: str, *args: int) -> bytes:
        monkeypatch.setattr(type(place), "get", look)
        try:
            return look(self, key, *args)
        finally:
            open_on(place).save("other", WEIGHTS)

    monkeypatch.setattr(type(place), "get", get)
    assert open_on(place).save("m", WEIGHTS).version == 1
    assert [model.name for model in open_on(place).models()] == ["m", "other"]


def test_a_file_is_not_taken_for_a_store_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="is a file, and a store is a folder"):
        ms.open(tmp_path / "file").models()


def test_a_place_of_others_is_not_advised_to_be_saved_to(place: Storage) -> None:
    place.create("README.md", b"theirs")
    with pytest.raises(NotFoundError, match=r"there is no store at .*, which holds 'README\.md': check the address"):
        open_on(place).models()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named closed or lost+found may not be listed, as those of root by others."""
    look = paths.entries

    def entries(root: str | Path, relative: str = "") -> list[paths.Entry]:
        if relative.rpartition("/")[2] in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), relative)
        return look(root, relative)

    monkeypatch.setattr(paths, "entries", entries)


@pytest.mark.usefixtures("closed")
def test_a_closed_folder_does_not_hide_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "a/closed").mkdir(parents=True)
    (tmp_path / "b").write_text("theirs")
    with pytest.raises(ConflictError, match="is not empty, and no store"):
        ms.open(tmp_path).save("m", WEIGHTS)


@pytest.mark.usefixtures("closed")
def test_the_root_of_a_volume_is_a_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    store = ms.open(tmp_path)
    store.save("m", WEIGHTS)
    assert store.gc().problems == ()
    assert store.du().problems == ()
    assert store.verify().ok
