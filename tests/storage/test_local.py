"""What only files can do wrong."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelstore.errors import CorruptionError, NotFoundError, StorageError, UnsupportedError
from modelstore.storage import local
from modelstore.storage.base import ObjectInfo
from modelstore.storage.descriptors import Descriptors
from modelstore.storage.local import LocalStorage
from tests.helpers.users import as_a_user


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
    old, new = tmp_path / "a/.tmp-1-dddddddddddddddd", tmp_path / "left/.tmp-2-dddddddddddddddd"
    new.parent.mkdir()
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 1000,) * 2)
    assert [item.key for item in storage.list("")] == ["a/1"]
    assert storage.folders("") == ("a",)
    assert names(storage.sweep(time.time() - 500, dry_run=True)) == [old.relative_to(tmp_path).as_posix()]
    assert old.exists()
    assert names(storage.sweep(time.time() - 500)) == [old.relative_to(tmp_path).as_posix()]
    assert (old.exists(), new.exists()) == (False, True)
    assert storage.get("a/1") == b"x"


def names(swept: tuple[ObjectInfo, ...]) -> list[str]:
    return [info.key for info in swept]


def test_a_file_that_a_writer_holds_is_not_swept(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    swept = []

    def pieces() -> Iterator[bytes]:
        yield b"x"
        swept.append(LocalStorage(tmp_path).sweep(time.time() + 9))
        yield b"y"

    storage.put("a/1", pieces(), 2)
    assert swept == [()]
    assert storage.get("a/1") == b"xy"
    left = tmp_path / "a/.tmp-1-dddddddddddddddd"
    left.touch()
    assert names(storage.sweep(time.time() + 9)) == [left.relative_to(tmp_path).as_posix()]


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    lock, looks = local._lock, iter([True, False, False])

    def late(descriptor: int) -> bool:
        if next(looks):
            assert len(LocalStorage(tmp_path).sweep(time.time() + 9)) == 1
        return lock(descriptor)

    monkeypatch.setattr(local, "_lock", late)
    storage.put("a/1", [b"x"], 1)
    assert storage.get("a/1") == b"x"


def test_a_file_is_locked_in_a_way_that_nfs_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def as_nfs(descriptor: int, kind: int) -> None:
        """A shared lock needs a file that is open for reading, an exclusive one a file that is open for writing."""
        without = os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == without:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    storage = LocalStorage(tmp_path)

    def pieces() -> Iterator[bytes]:
        assert LocalStorage(tmp_path).sweep(time.time() + 9) == ()
        yield b"x"

    storage.put("a/1", pieces(), 1)
    assert storage.get("a/1") == b"x"


def test_a_file_that_is_looked_at_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, flock, held = LocalStorage(tmp_path), fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not held:
            (temporary,) = tmp_path.glob("a/.tmp-*")
            held.append(os.open(temporary, os.O_RDWR))
            flock(held[0], fcntl.LOCK_EX)
        flock(descriptor, kind)

    def pieces() -> Iterator[bytes]:
        os.close(held[0])
        assert LocalStorage(tmp_path).sweep(time.time() + 9) == ()
        yield b"x"

    monkeypatch.setattr(fcntl, "flock", late)
    storage.put("a/1", pieces(), 1)
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
    with pytest.raises(StorageError, match=r"'a/b' in file://.*: no space left on device: free some, and run"):
        storage.create("a/b", b"x") if write == "create" else storage.put("a/b", [b"x"], 1)
    monkeypatch.undo()
    assert list(storage.list("")) == []
    assert storage.sweep(time.time()) == ()


REFUSED = {
    "create": lambda storage: storage.create("a/b", b"x"),
    "write": lambda storage: storage.put("a/b", [b"x"], 1),
    "read": lambda storage: storage.get("a/b"),
    "list": lambda storage: list(storage.list("a/")),
    "look at": lambda storage: storage.info("a/b"),
    "delete": lambda storage: storage.delete("a/b"),
}


@pytest.mark.parametrize("doing", REFUSED)
def test_what_the_system_refuses_is_said_with_the_store_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    storage = LocalStorage(tmp_path)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "b")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError) as caught:
        REFUSED[doing](storage)
    said = str(caught.value)
    assert said.startswith(f"cannot {doing} 'a/")
    assert said.endswith(f"in {storage.url}: permission denied: check who may read and write there")


@pytest.mark.parametrize(
    ("closed", "named"),
    [("store", "{url}"), ("store/packs", "{root}/packs, for {url}"), (".", "{above}, for {url}")],
    ids=["the store", "a folder of it", "the folder it is to be made in"],
)
def test_where_nothing_may_be_written_the_folder_is_told_and_no_object(closed: str, named: str) -> None:
    with tempfile.TemporaryDirectory() as above:
        root = Path(above) / "store"
        (Path(above) / closed).mkdir(parents=True, exist_ok=True)
        for folder in (Path(above), root):
            if folder.exists():
                folder.chmod(0o777)
        (Path(above) / closed).chmod(0o555)
        storage = LocalStorage(root)
        told = named.format(url=storage.url, root=root, above=above)
        for write in (lambda: storage.put("packs/x", [b"x"], 1), lambda: storage.create("packs/y", b"y")):
            with as_a_user(), pytest.raises(StorageError) as caught:
                write()
            assert (
                str(caught.value) == f"cannot write into {told}: permission denied: check who may read and write there"
            )
            assert str(caught.value.object).startswith("packs/")


def test_a_folder_that_may_not_be_written_says_so_before_work() -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        storage = LocalStorage(root)
        with (
            as_a_user(),
            pytest.raises(StorageError, match=f"cannot keep it: this user may not write into {storage.url}"),
        ):
            storage.check_writable("keep it")
        Path(root).chmod(0o777)
        with as_a_user():
            storage.check_writable("keep it")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_folder_that_cannot_be_read_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("models/a/x", b"x")
    storage.create("models/b/x", b"x")
    real = os.open

    def refuse(path: object, *args: object, **kwargs: object) -> int:
        if path == "a":
            raise OSError(code, os.strerror(code), path)
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    assert storage.folders("models/") == ("a", "b")
    with pytest.raises(StorageError, match=os.strerror(code).lower()):
        list(storage.list("models/a/"))


def test_no_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UnsupportedError, match="hard links"):
        LocalStorage(tmp_path).create("a", b"x")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a", b"x")
    with pytest.raises(StorageError, match="/a is a file, where a folder is needed: give another place"):
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
    files = Descriptors(3, lambda name: os.open(name, os.O_RDONLY))
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


# ---------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "x").write_bytes(b"precious")
    (folder / ".tmp-1-0000000000000000").write_bytes(b"precious")
    os.utime(folder / ".tmp-1-0000000000000000", (0, 0))
    return folder


@pytest.mark.parametrize("at", ["jobs", "jobs/a", "jobs/a/b"])
def test_no_folder_is_reached_through_a_link(tmp_path: Path, outside: Path, at: str) -> None:
    storage = LocalStorage(tmp_path / "store")
    storage.create("kept/x", b"x")
    (tmp_path / "store" / at).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "store" / at).symlink_to(outside)
    key = f"{at}/x"
    for act in (
        lambda: storage.get(key),
        lambda: storage.read(key, 0, memoryview(bytearray(1))),
        lambda: storage.info(key),
        lambda: storage.create(f"{at}/new", b"x"),
        lambda: storage.put(key, [b"x"], 1),
        lambda: storage.delete(key),
        lambda: list(storage.list(f"{at}/")),
        lambda: storage.folders(f"{at}/"),
    ):
        with pytest.raises(StorageError, match="is a link, which is not followed"):
            act()
    assert storage.sweep(0) == ()
    assert [info.key for info in storage.list("")] == sorted(["kept/x", at])
    storage.delete(at)
    assert [info.key for info in storage.list("")] == ["kept/x"]
    assert (outside / "x").read_bytes() == b"precious"
    assert (outside / ".tmp-1-0000000000000000").exists()


@pytest.mark.parametrize("to", ["outside/x", "outside", "store/a/loop", "nowhere", "/dev/zero"])
def test_a_link_in_the_place_of_an_object_is_itself(tmp_path: Path, outside: Path, to: str) -> None:
    storage = LocalStorage(tmp_path / "store")
    storage.create("a/1", b"x")
    (tmp_path / "store/a/loop").symlink_to(tmp_path / to)
    assert [info.key for info in storage.list("a/")] == ["a/1", "a/loop"]
    assert storage.folders("a/") == ("loop",)  # may be one that was moved: what is below it is not taken for missing
    with pytest.raises(CorruptionError, match="is a link"):
        storage.get("a/loop")
    with pytest.raises(StorageError, match="is a link"):
        list(storage.list("a/loop/"))
    assert not storage.create("a/loop", b"y")
    storage.put("a/loop", [b"y"], 1)  # replaces the link
    assert storage.get("a/loop") == b"y"
    assert (outside / "x").read_bytes() == b"precious"


def test_a_link_that_is_put_there_between_two_steps_is_met_as_one(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "store")
    storage.create("jobs/a/x", b"x")
    folder, unlink = tmp_path / "store/jobs/a", os.unlink

    def swap(name: str, *, dir_fd: int) -> None:
        folder.rename(tmp_path / "store/jobs/moved")
        folder.symlink_to(outside)
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", swap)
        storage.delete("jobs/a/x")
    assert (outside / "x").read_bytes() == b"precious"
    assert not (tmp_path / "store/jobs/moved/x").exists()


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "real")
    storage = LocalStorage(tmp_path / "store")
    assert storage.create("a/x", b"x")
    assert [info.key for info in storage.list("")] == ["a/x"]
    assert (tmp_path / "real/a/x").read_bytes() == b"x"


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a/x", b"x")
    os.mkfifo(tmp_path / "a/pipe")
    for read in (lambda: storage.get("a/pipe"), lambda: storage.read("a/pipe", 0, memoryview(bytearray(1)))):
        with pytest.raises(CorruptionError, match="where a file should be"):
            read()
