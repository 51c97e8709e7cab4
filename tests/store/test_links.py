"""Nothing outside of a store is read or removed through a link that lies in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

import modelstore
from modelstore.errors import CorruptionError, ModelStoreError, StorageError, UnsupportedError
from tests.helpers.stores import weights


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("a.json", ".tmp-1-aaaaaaaaaaaaaaaa"):
        (folder / name).write_text("precious")
        os.utime(folder / name, (0, 0))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> modelstore.Store:
    made = modelstore.open(tmp_path / "store")
    made.save("m", weights())
    return made


def untouched(outside: Path) -> bool:
    return {path.name: path.read_text() for path in outside.iterdir()} == dict.fromkeys(
        ("a.json", ".tmp-1-aaaaaaaaaaaaaaaa"), "precious"
    )


@pytest.mark.parametrize("grace", [0, 1000])
@pytest.mark.parametrize(
    "at",
    [
        f"jobs/{'0' * 32}/x",
        f"packs/00/{'0' * 64}.safetensors",
        f"models/m/manifests/{'0' * 64}.json.zst",
        *("jobs/x", "jobs/x/y", "packs/zz", "packs/x.safetensors", "models/m/manifests/x.json"),
    ],
)
@pytest.mark.parametrize("to", ["outside", "outside/a.json", "store", "nowhere"])
def test_garbage_collection_removes_links_and_not_what_they_lead_to(
    store: modelstore.Store, tmp_path: Path, outside: Path, at: str, to: str, grace: int
) -> None:
    link = tmp_path / "store" / at
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / to)
    store.gc(dry_run=False, grace=grace)
    assert untouched(outside)
    mine = "0" * 32 in at  # as old as the collection asks, it is an object that nothing refers to
    assert link.is_symlink() == (grace > 0 or not mine)
    assert store.load("m").keys() == weights().keys()
    assert store.verify().ok


@pytest.mark.parametrize("at", ["packs/b", "packs/00", "jobs/b", "models", "models/b", "intents/b", "condemned"])
def test_a_store_is_not_made_among_the_objects_of_another(store: modelstore.Store, tmp_path: Path, at: str) -> None:
    with pytest.raises(UnsupportedError, match="within the store"):
        modelstore.open(str(tmp_path / "store" / at)).save("x", weights())
    modelstore.open(str(tmp_path / "store" / "beside" / at)).save("x", weights())
    assert store.verify().ok


@pytest.mark.parametrize("at", ["packs/b", "packs/b/c", "jobs/b"])
def test_what_is_no_pack_of_the_store_is_not_collected(store: modelstore.Store, tmp_path: Path, at: str) -> None:
    modelstore.open(str(tmp_path / "other")).save("x", weights())
    inner = tmp_path / "store" / at
    inner.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "other").rename(inner)
    store.gc(dry_run=False, grace=0)
    assert modelstore.open(str(inner)).load("x").keys() == weights().keys()
    assert modelstore.open(str(inner)).verify().ok


@pytest.mark.parametrize("at", ["models", "models/m", "models/m/versions", "jobs", "packs"])
def test_a_folder_that_was_moved_behind_a_link_is_not_taken_for_empty(
    store: modelstore.Store, tmp_path: Path, at: str
) -> None:
    folder = tmp_path / "store" / at
    folder.mkdir(exist_ok=True)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(StorageError, match=f"{at} is a link, which is not followed: put what it leads to in its place"):
        store.gc(dry_run=False, grace=0)
    folder.unlink()
    (tmp_path / "moved").rename(folder)
    assert store.load("m").keys() == weights().keys()


@pytest.mark.parametrize("at", ["models/loop", "models/m/tags/loop", "packs/loop", "loop"])
def test_loops_of_links_raise_errors_of_the_store_alone(store: modelstore.Store, tmp_path: Path, at: str) -> None:
    link = tmp_path / "store" / at
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(link)
    for act in (store.models, lambda: store.versions("m"), lambda: store.load("m"), store.verify, store.gc):
        with contextlib.suppress(ModelStoreError):  # any other error is raw
            act()


def test_an_object_that_is_a_link_is_damaged_and_mended_from_a_copy(tmp_path: Path, outside: Path) -> None:
    store = modelstore.open(tmp_path / "store")
    copy = modelstore.open(tmp_path / "copy")
    for one in (store, copy):
        one.save("m", weights())
    for pack in (tmp_path / "store/packs").rglob("*.safetensors"):
        target = outside / pack.name
        pack.rename(target)
        pack.symlink_to(target)
    with pytest.raises(CorruptionError, match="is a link"):
        store.load("m")
    assert store.repair(source=copy.url).ok
    assert not any(path.is_symlink() for path in (tmp_path / "store/packs").rglob("*"))
    assert store.load("m").keys() == weights().keys()


def test_a_map_is_not_made_through_a_link(tmp_path: Path, outside: Path) -> None:
    store = modelstore.open(tmp_path / "store")
    store.save("m", weights(), codec="raw", grid="whole")
    for pack in (tmp_path / "store/packs").rglob("*.safetensors"):
        target = outside / pack.name
        pack.rename(target)
        pack.symlink_to(target)
    with pytest.raises(StorageError, match="is a link"):
        store.load("m", mmap=True)


@pytest.mark.parametrize("at", ["manifests", "packs"])
def test_a_link_in_the_place_of_an_object_is_read_from_a_mirror(tmp_path: Path, outside: Path, at: str) -> None:
    for name in ("store", "copy"):
        modelstore.open(tmp_path / name).save("m", weights())
    for path in [p for p in (tmp_path / "store").rglob("*") if p.is_file() and at in p.parts]:
        path.unlink()
        path.symlink_to(outside / "a.json")
    store = modelstore.open(tmp_path / "store", mirrors=[str(tmp_path / "copy")])
    assert store.load("m").keys() == weights().keys()
