"""What only files can do wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelstore.errors import NotFoundError, StorageError, UnsupportedError
from modelstore.storage.descriptors import Descriptors
from modelstore.storage.local import LocalStorage


def _create(root: str, number: int, results: multiprocessing.Queue[int], together: threading.Barrier) -> None:
    storage = LocalStorage(root)
    for attempt in range(20):
        together.wait()
        if storage.create(f"race/{attempt}/x", b"%d" % number):
            results.put(attempt)


def test_one_of_many_processes_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results, together = context.Queue(), context.Barrier(4)
    processes = [
        context.Process(target=_create, args=(str(tmp_path), number, results, together)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(results.get(timeout=10) for _ in range(20)) == list(range(20))
    assert results.empty()


def test_create_survives_folders_pruned_under_it(tmp_path: Path) -> None:
    storage, done = LocalStorage(tmp_path), threading.Event()

    def prune() -> None:
        while not done.is_set():
            storage.create("a/b/c/other", b"x")
            storage.delete("a/b/c/other")

    with ThreadPoolExecutor(2) as pool:
        pruners = [pool.submit(prune) for _ in range(2)]
        try:
            for _ in range(100):
                assert storage.create("a/b/c/mine", b"x")
                assert storage.get("a/b/c/mine") == b"x"
                storage.delete("a/b/c/mine")
        finally:
            done.set()
        for pruner in pruners:
            pruner.result()


def test_delete_prunes_empty_folders_only(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "store")
    storage.create("a/b/1", b"x")
    storage.create("a/2", b"x")
    storage.delete("a/b/1")
    assert not (tmp_path / "store/a/b").exists()
    storage.delete("a/2")
    assert (tmp_path / "store").is_dir()
    assert list((tmp_path / "store").iterdir()) == []


def test_temporaries_are_hidden_and_swept(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a/1", b"x")
    old, new = tmp_path / "a/.tmp-1-dead", tmp_path / "left/.tmp-2-dead"
    new.parent.mkdir()
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 1000,) * 2)
    assert [item.key for item in storage.list("")] == ["a/1"]
    assert storage.folders("") == ("a",)
    assert storage.remove_temporaries(500, dry_run=True) == (old,)
    assert old.exists()
    assert storage.remove_temporaries(500) == (old,)
    assert (old.exists(), new.exists()) == (False, True)
    assert storage.get("a/1") == b"x"


def test_no_temporary_is_left(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a", b"x")
    storage.create("a", b"y")
    with pytest.raises(StorageError):
        storage.put("b", [b"x"], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("write", ["create", "put"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    storage = LocalStorage(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="'a/b': No space left on device"):
        storage.create("a/b", b"x") if write == "create" else storage.put("a/b", [b"x"], 1)
    monkeypatch.undo()
    assert list(storage.list("")) == []
    assert storage.remove_temporaries(0) == ()


def test_no_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UnsupportedError, match="hard links"):
        LocalStorage(tmp_path).create("a", b"x")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a", b"x")
    with pytest.raises(StorageError, match="a file lies where a folder is needed"):
        storage.create("a/b", b"x")
    with pytest.raises(NotFoundError):
        storage.get("a/b")
    storage.delete("a/b")
    assert storage.get("a") == b"x"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, whole = LocalStorage(tmp_path), os.urandom(1000)
    storage.create("a", whole)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
    out = bytearray(500)
    storage.read("a", 100, memoryview(out))
    assert bytes(out) == whole[100:600]


def test_what_another_process_replaced_or_removed_is_seen(tmp_path: Path) -> None:
    here, there, out = LocalStorage(tmp_path), LocalStorage(tmp_path), bytearray(3)
    here.put("a", [b"bad"], 3)
    here.read("a", 0, memoryview(out))
    there.put("a", [b"fit"], 3)
    here.read("a", 0, memoryview(out))
    assert out == b"fit"
    there.delete("a")
    with pytest.raises(NotFoundError):
        here.read("a", 0, memoryview(out))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_bounded_and_never_closed_under_a_reader(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%02d" % number)
    files = Descriptors(3)
    before = open_files()

    def read(number: int) -> bool:
        with files.borrow(str(paths[number % 20])) as descriptor:
            return os.pread(descriptor, 2, 0) == b"%02d" % (number % 20)

    with files.borrow(str(paths[0])) as kept:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(2000)))
        assert os.pread(kept, 2, 0) == b"00"
    assert open_files() <= before + 3
    files.close()
    assert open_files() <= before


def test_listing_a_little_looks_at_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, scans = LocalStorage(tmp_path), []
    for number in range(30):
        storage.create(f"{number:02}/x", b"x")
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
    assert [item.key for item in storage.list("", limit=2)] == ["00/x", "01/x"]
    assert len(scans) == 3
