"""The contract of every storage; each backend inherits it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modelstore.errors import CorruptionError, FormatError, NotFoundError, StorageError, UnsupportedError
from modelstore.storage.base import Storage
from modelstore.storage.remote.exclusive import prove_exclusive_create
from modelstore.storage.wrapping import ReadOnlyStorage
from modelstore.testing.faults import CountingStorage

HOSTILE = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "./a",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\tb",
    "x" * 300,
    "a/" * 500 + "b",
    "\ud800",
    ".tmp-1",
)
UNUSUAL = ("ü/ñ/漢字", "a b", "a%2Fb", "a+b&c=d?e#f", "a:b~[]{}", "%41", "x*y", "-", "...", "🦙.json", "a'b\"c")


class StorageContract:
    """Inherit, and give a fixture `storage`: an empty one, used by the test alone."""

    races_are_fair = True

    def read(self, storage: Storage, key: str, start: int, size: int) -> bytes:
        out = bytearray(size)
        storage.read(key, start, memoryview(out))
        return bytes(out)

    def leave_behind(self, storage: Storage) -> str | None:  # noqa: ARG002
        """Leave in an empty storage what a killed writer would, and give its name; None if nothing can be left."""
        return None

    def keys(self, storage: Storage, prefix: str = "", limit: int | None = None) -> list[str]:
        return [item.key for item in storage.list(prefix, limit=limit)]

    def test_what_was_written_is_read(self, storage: Storage) -> None:
        storage.put("packs/ab/one", [b"0123", memoryview(b"45"), np.arange(6, 10, dtype=np.uint8) + 48], 10)
        assert storage.get("packs/ab/one") == b"0123456789"
        assert self.read(storage, "packs/ab/one", 0, 10) == b"0123456789"
        assert self.read(storage, "packs/ab/one", 3, 4) == b"3456"
        assert self.read(storage, "packs/ab/one", 9, 1) == b"9"

    def test_empty_object(self, storage: Storage) -> None:
        assert storage.create("empty", b"")
        storage.put("also-empty", [], 0)
        assert storage.get("empty") == storage.get("also-empty") == b""
        info = storage.info("also-empty")
        assert info is not None
        assert info.size == 0

    def test_what_is_too_large_is_not_read(self, storage: Storage) -> None:
        storage.put("a", [b"0123456789"], 10)
        assert storage.get("a", 10) == b"0123456789"
        with pytest.raises(FormatError, match="object a has 10 bytes, at most 9 are read"):
            storage.get("a", 9)
        storage.put("empty", [], 0)
        assert storage.get("empty", 0) == b""

    def test_create_is_once(self, storage: Storage) -> None:
        assert storage.create("a/1.json", b"first") is True
        assert storage.create("a/1.json", b"second") is False
        assert storage.get("a/1.json") == b"first"
        storage.delete("a/1.json")
        assert storage.create("a/1.json", b"third") is True

    def test_exclusive_create_is_proved(self, storage: Storage) -> None:
        prove_exclusive_create(storage)
        assert self.keys(storage) == []

    def test_create_after_put(self, storage: Storage) -> None:
        storage.put("a", [b"x"], 1)
        assert storage.create("a", b"y") is False
        assert storage.get("a") == b"x"

    def test_one_of_many_creates_wins(self, storage: Storage) -> None:
        if not self.races_are_fair:
            pytest.skip("this server does not promise that a conditional write is atomic")
        writers = 12
        for attempt in range(4):
            together = threading.Barrier(writers)

            def write(number: int, key: str = f"race/{attempt}", together: threading.Barrier = together) -> bool:
                together.wait()
                return storage.create(key, b"%d" % number * 1000)

            with ThreadPoolExecutor(writers) as pool:
                won = list(pool.map(write, range(writers)))
            assert won.count(True) == 1
            assert storage.get(f"race/{attempt}") == b"%d" % won.index(True) * 1000

    def test_put_replaces(self, storage: Storage) -> None:
        storage.put("a", [b"long before"], 11)
        assert self.read(storage, "a", 0, 11) == b"long before"
        storage.put("a", [b"after"], 5)
        assert storage.get("a") == b"after"
        assert self.read(storage, "a", 0, 5) == b"after"

    @pytest.mark.parametrize("size", [10, 20 << 20])
    def test_put_that_breaks_leaves_nothing(self, storage: Storage, size: int) -> None:
        def pieces() -> Iterator[bytes]:
            yield b"x" * (size // 2)
            raise KeyError("the source broke")

        with pytest.raises(KeyError, match="the source broke"):
            storage.put("a/b", pieces(), size)
        assert storage.info("a/b") is None
        assert self.keys(storage) == []

    @pytest.mark.parametrize("pieces", [[b"abc"], [b"abc", b"defgh"], []])
    def test_put_of_another_size_leaves_nothing(self, storage: Storage, pieces: list[bytes]) -> None:
        with pytest.raises(StorageError, match="pieces of 'a/b'") as caught:
            storage.put("a/b", pieces, 6)
        assert caught.value.object == "a/b"
        assert storage.info("a/b") is None

    def test_big_put_takes_its_pieces_once(self, storage: Storage) -> None:
        size, piece = 40 << 20, np.random.default_rng(0).integers(0, 256, 5_000_011, dtype=np.uint8)
        whole = np.resize(piece, size)
        storage.put("big", (whole[at : at + piece.size] for at in range(0, size, piece.size)), size)
        info = storage.info("big")
        assert info is not None
        assert info.size == size
        out = np.empty(size, dtype=np.uint8)
        storage.read("big", 0, out.data)
        assert np.array_equal(out, whole)

    def test_absent(self, storage: Storage) -> None:
        acts: list[Callable[[], object]] = [
            lambda: storage.get("no/such"),
            lambda: self.read(storage, "no/such", 0, 1),
        ]
        for act in acts:
            with pytest.raises(NotFoundError, match="no/such") as caught:
                act()
            assert caught.value.object == "no/such"
        assert storage.info("no/such") is None
        storage.delete("no/such")
        assert self.keys(storage, "no/") == []
        assert storage.folders("no/") == ()

    @pytest.mark.parametrize(("start", "size"), [(0, 6), (3, 3), (5, 1), (100, 1)])
    def test_truncated(self, storage: Storage, start: int, size: int) -> None:
        storage.put("short", [b"12345"], 5)
        with pytest.raises(CorruptionError, match="short") as caught:
            self.read(storage, "short", start, size)
        assert caught.value.object == "short"

    def test_info(self, storage: Storage) -> None:
        before = time.time()
        storage.put("a/b", [b"12345"], 5)
        info = storage.info("a/b")
        assert info is not None
        assert (info.key, info.size) == ("a/b", 5)
        assert abs(info.modified - before) < 60
        assert storage.info("a") is None

    def test_list(self, storage: Storage) -> None:
        keys = ["a-b", "a/b/c", "a/b.c", "a0", "b/1", "b/10", "b/2", "ba/1", "é", "Z"]
        for key in keys:
            storage.create(key, key.encode())
        assert self.keys(storage) == sorted(keys)
        assert self.keys(storage, "a/") == ["a/b.c", "a/b/c"]
        assert self.keys(storage, "b/") == ["b/1", "b/10", "b/2"]
        for limit in range(len(keys) + 2):
            assert self.keys(storage, limit=limit) == sorted(keys)[:limit]
        assert [(item.key, item.size) for item in storage.list("b/", limit=1)] == [("b/1", 3)]
        for after in (*keys, "a/", "b", "zz"):
            expected = [key for key in sorted(keys) if key > after]
            assert [item.key for item in storage.list("", after=after)] == expected
            assert [item.key for item in storage.list("", after=after, limit=2)] == expected[:2]
        assert [item.key for item in storage.list("b/", after="b/1")] == ["b/10", "b/2"]

    def test_folders(self, storage: Storage) -> None:
        for key in ("m/b/1", "m/a/x/2", "m/c", "n/1", "top"):
            storage.create(key, b"x")
        assert storage.folders("") == ("m", "n")
        assert storage.folders("m/") == ("a", "b")
        assert storage.folders("m/a/") == ("x",)
        storage.delete("m/b/1")
        assert storage.folders("m/") == ("a",)

    @pytest.mark.parametrize("key", HOSTILE)
    def test_hostile_keys(self, storage: Storage, key: str) -> None:
        acts: list[Callable[[], object]] = [
            lambda: storage.get(key),
            lambda: self.read(storage, key, 0, 1),
            lambda: storage.create(key, b"x"),
            lambda: storage.put(key, [b"x"], 1),
            lambda: storage.info(key),
            lambda: storage.delete(key),
            lambda: storage.path(key),
        ]
        for act in acts:
            with pytest.raises(ValueError, match="invalid key"):
                act()

    @pytest.mark.parametrize("prefix", ["a", "/", "../", "a//", "a/../"])
    def test_hostile_prefixes(self, storage: Storage, prefix: str) -> None:
        with pytest.raises(ValueError, match="invalid"):
            list(storage.list(prefix))
        with pytest.raises(ValueError, match="invalid"):
            storage.folders(prefix)

    def test_unusual_keys(self, storage: Storage) -> None:
        for key in UNUSUAL:
            assert storage.create(f"u/{key}", key.encode())
        assert self.keys(storage) == sorted(f"u/{key}" for key in UNUSUAL)
        for key in UNUSUAL:
            assert storage.get(f"u/{key}") == key.encode()
            assert storage.info(f"u/{key}") is not None
            storage.delete(f"u/{key}")
        assert self.keys(storage) == []

    def test_path_is_the_object(self, storage: Storage) -> None:
        storage.create("a/b", b"x")
        path = storage.path("a/b")
        assert (path is not None) == storage.local
        assert path is None or (isinstance(path, Path) and path.read_bytes() == b"x")

    def test_a_wrapper_says_what_the_storage_says(self, storage: Storage) -> None:
        storage.create("a/b", b"x")
        for wrapped in (CountingStorage(storage), ReadOnlyStorage(storage)):
            assert wrapped.local == storage.local
            assert wrapped.path("a/b") == storage.path("a/b")
            assert wrapped.sweep(0.0, dry_run=True) == ()

    def test_a_storage_says_that_it_is_written_to(self, storage: Storage) -> None:
        for each in (storage, CountingStorage(storage)):
            each.check_writable("save")
        with pytest.raises(UnsupportedError, match="cannot save"):
            ReadOnlyStorage(storage).check_writable("save")

    def test_a_sweep_removes_no_object(self, storage: Storage) -> None:
        """And not what is being written, which is a part of an object while it is."""
        swept = []

        def pieces() -> Iterator[bytes]:
            yield b"one"
            swept.append(storage.sweep(time.time() + 3600))
            yield b"two"

        storage.create("a", b"x")
        storage.put("b/c", pieces(), 6)
        assert storage.sweep(time.time() + 3600, dry_run=True) == ()
        assert storage.sweep(time.time() + 3600) == ()
        assert swept == [()]
        assert storage.get("b/c") == b"onetwo"
        assert self.keys(storage) == ["a", "b/c"]

    def test_what_a_broken_write_left_is_swept(self, storage: Storage) -> None:
        def pieces() -> Iterator[bytes]:
            yield b"one"
            raise KeyError("the source broke")

        with pytest.raises(KeyError):
            storage.put("a/b", pieces(), 6)
        storage.sweep(time.time() + 3600)
        assert storage.sweep(time.time() + 3600, dry_run=True) == ()
        assert self.keys(storage) == []

    def test_what_a_killed_writer_left_is_swept(self, storage: Storage) -> None:
        """By every wrapper that may write, and a dry run of each names it."""
        left = self.leave_behind(storage)
        if left is None:
            pytest.skip("writers leave nothing here")
        later = time.time() + 3600
        for each in (storage, CountingStorage(storage), ReadOnlyStorage(storage)):
            assert [info.key for info in each.sweep(later, dry_run=True)] == [left]
            assert each.sweep(0.0, dry_run=True) == (), "it is younger"
        for each in (storage, CountingStorage(storage)):
            assert self.leave_behind(storage) == left
            assert [info.key for info in each.sweep(later)] == [left]
            assert storage.sweep(later, dry_run=True) == ()
        assert self.keys(storage) == []

    def test_threads_read_and_write(self, storage: Storage) -> None:
        def work(number: int) -> bool:
            key, data = f"t/{number}", b"%06d" % number * 1000
            storage.put(key, [data], len(data))
            return self.read(storage, key, 6, 600) == data[6:606] and storage.get(key) == data

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(64)))
        assert len(self.keys(storage, "t/")) == 64
