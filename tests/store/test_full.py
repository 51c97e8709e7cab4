"""A store that fills its file system: its own tools free it again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import modelstore
from modelstore.client import Store
from modelstore.errors import StorageError
from tests.helpers.stores import all_bits, weights


class Disk:
    """How many bytes files of a folder may have in all; beyond that a write fails as on a file system that is full."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.size = root, 1 << 40
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    @property
    def used(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def fill(self) -> None:
        """What is free is taken by others."""
        self.size = self.used

    def write(self, descriptor: int, data: memoryview) -> int:
        room = min(len(data), self.size - self.used)
        if room <= 0 < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, data[:room])


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


@pytest.fixture
def store(disk: Disk) -> Store:
    store = modelstore.open(disk.root)
    for n in (1, 2, 3):
        store.save("m", weights(n))
    return store


def test_a_dry_run_writes_nothing(store: Store, disk: Disk) -> None:
    store.delete("m@1")
    disk.fill()
    before = {path: path.stat().st_mtime_ns for path in disk.root.rglob("*")}
    assert store.gc(grace=0).bytes > 0
    assert {path: path.stat().st_mtime_ns for path in disk.root.rglob("*")} == before


def test_versions_are_deleted_and_collected_on_a_full_disk(store: Store, disk: Disk) -> None:
    disk.fill()
    with pytest.raises(StorageError, match="no space left"):
        store.save("m", weights(4))
    for n in (1, 2):
        store.delete(f"m@{n}")
        used = disk.used
        assert store.gc(dry_run=False, grace=0).bytes > 0
        assert disk.used < used
    assert all_bits(store.load("m")) == all_bits(weights(3))
    disk.size = 1 << 40
    store.save("m", weights(4))  # and what was used of the space that is held is held again
    disk.fill()
    store.delete("m", all=True)
    assert store.gc(dry_run=False, grace=0).bytes > 0


def test_the_space_that_is_held_is_no_object(store: Store, disk: Disk) -> None:
    held = [path for path in disk.root.iterdir() if path.name.startswith(".")]
    assert [path.stat().st_size for path in held] == [256 << 10]
    assert {info.key.partition("/")[0] for info in store.repo.storage.list("")} == {
        "modelstore.json",
        "models",
        "packs",
    }
    os.utime(held[0], (1, 1))
    assert store.gc(dry_run=False, grace=0).objects == ()
    assert held[0].exists()
