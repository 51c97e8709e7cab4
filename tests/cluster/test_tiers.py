"""Tiers of files and of tensors: bounded at every moment, whole or not there, and nobody else's files are touched."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from modelstore.cluster.host import file_tier
from modelstore.cluster.host.device_tier import DeviceTier
from modelstore.cluster.host.file_tier import FileTier, cost, local_path
from modelstore.cluster.host.lru import SegmentedLRU
from modelstore.cluster.node.folders import ROOT, claim, sweep
from modelstore.errors import ConflictError, StorageError
from modelstore.format.buffers import Bytes

PAGE = 4096


def piece(i: int, size: int = 1000) -> tuple[bytes, Bytes]:
    data = np.random.default_rng(i).integers(0, 256, size, np.uint8)
    return blake3(data.tobytes()).digest(), data


def fill(tier: FileTier | DeviceTier, n: int, size: int = 1000) -> list[bytes]:
    made = [piece(i, size) for i in range(n)]
    assert all(tier.put(digest, data) for digest, data in made)
    return [digest for digest, _ in made]


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB, where this process may make one."""
    folder = tmp_path / "shm"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only who may mount has a file system of a given size")
    yield folder
    subprocess.run(["umount", folder], check=True)


# ---------------------------------------------------------------------- bounds


def test_what_is_counted_is_what_the_memory_gives(small_memory: Path) -> None:
    """With the file system's own bound as the judge: within the limit nothing is ever refused by it."""
    tier = FileTier(str(small_memory / "t"), 900 << 10, trusted=True)  # inodes and folders take the rest
    made = [piece(i, 1 + 317 * (i % 70)) for i in range(400)]
    with ThreadPoolExecutor(6) as pool:
        held = list(pool.map(lambda one: tier.put(*one), made))
    assert all(held)
    stats = tier.stats()
    assert stats.refused == 0
    assert stats.evicted > 0
    files = [path for path in (small_memory / "t").rglob("*") if path.is_file()]
    assert sum(path.stat().st_blocks * 512 for path in files) == stats.bytes <= 900 << 10


def test_a_full_memory_is_a_miss(small_memory: Path) -> None:
    tier = FileTier(str(small_memory / "t"), 64 << 20, trusted=True)  # more than there is
    made = [piece(i, 100_000) for i in range(20)]
    held = [tier.put(*one) for one in made]
    assert held.count(True) == tier.stats().pieces < 11
    assert held.count(False) == tier.stats().refused
    for (digest, data), there in zip(made, held, strict=True):
        found = tier.get(digest)
        assert (found is not None) == there
        assert found is None or bytes(found) == bytes(data)
    assert not list((small_memory / "t").rglob("*.part"))
    tier.evict()
    assert tier.put(*made[-1]), "there is room again"


class Watched(SegmentedLRU):
    """Notes whether more than the limit was ever promised."""

    worst = 0

    def reserve(self, size: int) -> list[bytes] | None:
        found = super().reserve(size)
        self.worst = max(self.worst, self.nbytes + self.reserved)
        return found


def test_no_more_is_promised_than_there_is(tmp_path: Path) -> None:
    tier = FileTier(str(tmp_path), 20 * PAGE, trusted=True)
    lru = tier._lru = Watched(20 * PAGE)
    made = [piece(i, 500 + 97 * i) for i in range(60)]

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(150):
            digest, data = made[random.integers(60)]
            match random.integers(4):
                case 0 | 1:
                    tier.put(digest, data)
                case 2:
                    found = tier.get(digest)
                    assert found is None or bytes(found) == bytes(data)
                case _:
                    tier.evict([digest])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert 10 * PAGE < lru.worst <= 20 * PAGE
    assert lru.reserved == 0
    files = {path.name: cost(path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    assert {digest.hex() for digest in lru.digests()} == set(files)
    assert sum(files.values()) == tier.stats().bytes


@given(st.integers(1, 50), st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(1, 30)), max_size=50))
def test_what_is_set_aside_is_given_to_nobody_else(limit: int, steps: list[tuple[bool, int, int]]) -> None:
    lru, writing = SegmentedLRU(limit), {0: 0}
    writing.clear()
    for begin, i, size in steps:
        name = piece(i)[0]
        if begin and i not in writing and name not in lru:
            if lru.reserve(size) is not None:
                writing[i] = size
        elif not begin and i in writing:
            lru.release(writing[i])
            lru.add(name, writing.pop(i))
        assert lru.reserved == sum(writing.values())
        assert lru.nbytes + lru.reserved <= limit


# ---------------------------------------------------------------------- files


def test_a_piece_that_is_being_written_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = FileTier(str(tmp_path), 1 << 20, trusted=True)
    digest, data = piece(1)
    begun, go = threading.Event(), threading.Event()
    write = os.write

    def slow(fd: int, rest: memoryview) -> int:
        begun.set()
        go.wait(20)
        return write(fd, rest)

    monkeypatch.setattr(os, "write", slow)
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(tier.put, digest, data)
        assert begun.wait(20)
        assert (tier.has(digest), tier.get(digest), tier.put(digest, data)) == (False, None, False)
        go.set()
        assert putting.result()
    found = tier.get(digest)
    assert found is not None
    assert bytes(found) == bytes(data)


def test_files_are_private_and_maps_outlive_them(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    tier = FileTier(str(folder), 4 << 20, trusted=True)
    digest, data = piece(1, 300_000)
    tier.put(digest, data)
    path = local_path(str(folder), digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder, path.parent)} == {0o700}
    found = tier.get(digest)
    assert found is not None
    assert str(path) in Path("/proc/self/maps").read_text(), "mapped, not copied"
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    tier.evict()
    tier.close(keep=False)
    assert not folder.exists()
    assert bytes(found) == bytes(data)


def test_few_maps_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tier, "_MAPPED", 1000)
    monkeypatch.setattr(file_tier, "_MAPS", 5)
    tier = FileTier(str(tmp_path), 1 << 20, trusted=True)
    digests = fill(tier, 30)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    found = [tier.get(digest) for digest in digests]
    assert mapped() == 5
    assert [blake3(bytes(f)).digest() for f in found if f is not None] == digests
    del found
    assert mapped() == 0
    assert [tier.get(digest) is not None for digest in digests] == [True] * 30


def test_want_of_descriptors_is_a_miss_and_no_loss(tmp_path: Path) -> None:
    import resource

    tier = FileTier(str(tmp_path), 1 << 20, trusted=False)
    digest, data = piece(1)
    tier.put(digest, data)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert tier.get(digest) is None
        assert tier.check(digest)
        assert tier.has(digest)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tier.get(digest) is not None


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("harm", ["shorter", "longer", "empty", "gone", "folder", "link"])
def test_whatever_happens_to_a_file_is_found(tmp_path: Path, harm: str, trusted: bool) -> None:
    tier = FileTier(str(tmp_path / "t"), 1 << 20, trusted=trusted)
    digest, data = piece(1)
    tier.put(digest, data)
    path = local_path(str(tmp_path / "t"), digest)
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "link":
        (tmp_path / "x").write_bytes(bytes(data))
        path.symlink_to(tmp_path / "x")
    elif harm != "gone":
        path.write_bytes({"shorter": bytes(data)[:10], "longer": bytes(data) * 99, "empty": b""}[harm])
    if not trusted:
        assert tier.get(digest) is None
    assert tier.check(digest) == (harm == "gone" or not trusted)
    assert not tier.has(digest)
    assert tier.stats().bytes == 0
    if harm != "folder":
        assert tier.put(digest, data)
        assert tier.check(digest)


def test_what_lies_in_the_folder_and_is_not_ours_stays(tmp_path: Path) -> None:
    mine = ["ab/notes.txt", "cd/letter", "deep/er/file", "ab/" + "ab" * 31 + ".part", "ab/" + "cd" * 32]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    tier = FileTier(str(tmp_path), 1 << 20, trusted=False)
    fill(tier, 9)
    tier.close(keep=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(mine)


def test_the_newest_are_found_again_and_go_last(tmp_path: Path) -> None:
    digests = fill(FileTier(str(tmp_path), 1 << 20, trusted=False), 10)
    for age, digest in enumerate(digests):
        os.utime(local_path(str(tmp_path), digest), (1e9 - age, 1e9 - age))
    tier = FileTier(str(tmp_path), 6 * PAGE, trusted=False)
    assert [tier.has(digest) for digest in digests] == [True] * 6 + [False] * 4
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6
    tier.put(*piece(99))
    assert [tier.has(digest) for digest in digests[:6]] == [True] * 5 + [False]


def test_scrubbing_goes_round_and_is_no_use(tmp_path: Path) -> None:
    tier = FileTier(str(tmp_path), 40 * PAGE, trusted=True)
    digests = fill(tier, 20)
    order = tier._lru.digests()
    for digest in (digests[3], digests[11]):
        local_path(str(tmp_path), digest).write_bytes(b"bad")
    wrong: list[bytes] = []
    for _ in range(5):  # four pieces each
        found, checked = tier.scrub(4 * PAGE)
        assert checked == 4 * PAGE
        wrong += found
    assert sorted(wrong) == sorted([digests[3], digests[11]])
    assert tier._lru.digests() == [digest for digest in order if digest not in wrong]
    assert (tier.stats().hits, tier.stats().wrong) == (0, 2)
    assert tier.scrub(1 << 30) == ([], 18 * PAGE)


def test_a_tier_in_memory_begins_empty(tmp_path: Path) -> None:
    digests = fill(FileTier(str(tmp_path), 1 << 20, trusted=True), 9)
    tier = FileTier(str(tmp_path), 1 << 20, trusted=True)  # whoever wrote these files, nobody checked them
    assert not any(map(tier.has, digests))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("trusted", [True, False])
def test_a_closed_tier_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    tier = FileTier(str(tmp_path / "t"), 1 << 20, trusted=trusted)
    begun, go = threading.Event(), threading.Event()
    rename = Path.rename

    def slow(self: Path, target: Path) -> Path:
        begun.set()
        go.wait(20)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(tier.put, *piece(1))
        assert begun.wait(20)
        tier.close(keep=True)
        go.set()
        assert not putting.result()
    assert not tier.put(*piece(2))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------- folders


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    folder = tmp_path / f"{ROOT}c" / "h"
    fd = claim(str(folder))
    with pytest.raises(ConflictError, match="in use by another process"):
        claim(str(folder))
    os.close(fd)
    os.close(claim(str(folder)))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(StorageError, match="is a link, or another user's"):
        claim(str(tmp_path / "link"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        claim(str(tmp_path / "file" / "below"))


def test_who_is_killed_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / f"{ROOT}c" / "h"
    script = (
        "import sys; from modelstore.cluster.node.folders import claim; from modelstore.cluster.host.file_tier import FileTier\n"
        f"claim({str(folder)!r}); tier = FileTier({str(folder)!r}, 1 << 20, trusted=True)\n"
        "import numpy as np; tier.put(bytes(32), np.zeros(777, np.uint8)); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert sweep(str(tmp_path)) == 0
        assert local_path(str(folder), bytes(32)).exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sweep(str(tmp_path)) == 777
    assert not folder.parent.exists()


def test_what_is_made_while_a_folder_is_removed_is_swept_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"{ROOT}c" / "h"
    os.close(claim(str(folder)))
    (folder / "ab").mkdir()
    rglob = Path.rglob

    def meanwhile(self: Path, pattern: str) -> list[Path]:
        found = list(rglob(self, pattern))
        (self / "ab" / "late").write_text("late")
        return found

    monkeypatch.setattr(Path, "rglob", meanwhile)
    assert sweep(str(tmp_path)) == 0
    monkeypatch.undo()
    assert sweep(str(tmp_path)) == 4
    assert not folder.parent.exists()


def test_links_and_other_users_folders_are_not_swept(tmp_path: Path) -> None:
    precious = tmp_path / "home" / "me"
    precious.mkdir(parents=True)
    for name in ("lock", "thesis"):
        (precious / name).write_text("mine")
    trap = tmp_path / f"{ROOT}evil"
    trap.mkdir()
    (trap / "h").symlink_to(precious)
    (tmp_path / f"{ROOT}worse").symlink_to(precious.parent)
    os.close(claim(str(tmp_path / f"{ROOT}c" / "theirs")))
    if os.geteuid() == 0:
        os.chown(tmp_path / f"{ROOT}c" / "theirs", 12345, 12345)
    sweep(str(tmp_path))
    assert (precious / "thesis").exists()
    assert (tmp_path / f"{ROOT}c" / "theirs").exists() == (os.geteuid() == 0)


def test_what_is_claimed_while_others_sweep_is_not_lost(tmp_path: Path) -> None:
    stop = threading.Event()

    def sweeping() -> None:
        while not stop.is_set():
            sweep(str(tmp_path))

    folder = tmp_path / f"{ROOT}c" / "h"
    with ThreadPoolExecutor(2) as pool:
        sweepers = [pool.submit(sweeping) for _ in range(2)]
        try:
            for _ in range(200):
                fd = claim(str(folder))
                assert os.path.samestat(os.fstat(fd), (folder / "lock").stat()), "the lock that others will look at"
                os.close(fd)
        finally:
            stop.set()
    assert [sweeper.result() for sweeper in sweepers] == [None, None]


# ---------------------------------------------------------------------- devices


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    torch = pytest.importorskip("torch")
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def test_a_device_hands_out_copies(device: str) -> None:
    tier = DeviceTier(device, 10_000)
    digest, data = piece(1)
    assert tier.put(digest, data)
    for _ in range(2):
        found = tier.get(digest)
        assert found is not None
        assert bytes(found) == bytes(data)
        found[:] = 0
    assert tier.check(digest)
    held = tier.tensor(digest)
    assert held is not None
    assert str(held.device) == device
    held[5] ^= 1
    assert not tier.check(digest)
    assert (tier.get(digest), tier.stats().wrong, tier.stats().bytes) == (None, 1, 0)


def test_a_device_is_bounded_and_pins_hold(device: str) -> None:
    tier = DeviceTier(device, 10_000)
    first = piece(0)
    tier.pin([first[0]], "p")
    assert tier.put(*first)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: tier.put(*piece(i)), range(1, 40)))
    assert tier.stats().bytes == 10_000
    assert tier.stats().evicted == 30
    assert not tier.put(*piece(77, 9500)), "beside what is pinned there is no room"
    assert tier.evict() == 9000
    assert tier.has(first[0])
    tier.unpin("p")
    assert tier.evict() == 1000


@pytest.mark.gpu
def test_a_device_without_memory_is_a_miss() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        tier = DeviceTier("cuda:0", 1 << 40)
        held = [tier.put(*piece(i, 32 << 20)) for i in range(20)]
        assert held[0]
        assert not held[-1]
        assert tier.stats().bytes == held.count(True) << 25
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
