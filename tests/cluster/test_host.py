"""A host without Ray: tiers, bounds, one fetch however many ask, and no wrong byte from any tier."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import modelstore as ms
from modelstore.cluster.host import file_tier, host
from modelstore.cluster.host.file_tier import FileTier, local_path
from modelstore.cluster.host.host import HostSettings, ShardHost
from modelstore.cluster.host.lru import SegmentedLRU
from modelstore.cluster.node import folders
from modelstore.cluster.node.folders import claim, sweep
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.format.buffers import Bytes
from modelstore.format.objects.record import pack_key
from modelstore.storage.local import LocalStorage
from modelstore.storage.wrapping import Verb, WrappingStorage

T = TypeVar("T")


def digest(i: int) -> bytes:
    return blake3(str(i).encode()).digest()


PIECES = st.integers(0, 27)
TIERS = st.sampled_from(["memory", "disk", "gpu"])
PINS = st.sampled_from([None, None, "p", "q"])


class World:
    """A folder with one pack of pieces, and a host before it."""

    def __init__(self, root: Path, sizes: Sequence[int] = (1000,) * 20, **limits: int | str | None) -> None:
        self.root = root
        random = np.random.default_rng(0)
        self.data = [random.integers(0, 256, n, np.uint8).tobytes() for n in sizes]
        pack = "ab" * 32
        at = np.cumsum([0, *sizes])
        self.parts = [
            Piece(blake3(d).digest(), pack, int(start), len(d)) for d, start in zip(self.data, at, strict=False)
        ]
        self.pack = root / "store" / pack_key(pack)
        self.pack.parent.mkdir(parents=True, exist_ok=True)
        self.pack.write_bytes(b"".join(self.data))
        self.source = StoreAddress(str(root / "store"))
        self.limits = {"memory": 1 << 20, "disk": str(root / "disk"), "disk_bytes": 1 << 20, **limits}
        self.host = self.open()

    def open(self, peers: host.FromPeers | None = None) -> ShardHost:
        shm = self.root / f"{folders.ROOT}x" / f"h{len(list(self.root.glob('*')))}-{os.urandom(3).hex()}"
        return ShardHost(HostSettings("h", "n", str(shm), **self.limits), peers)  # type: ignore[arg-type]

    def check(self, found: Sequence[Bytes | None]) -> None:
        assert [None if f is None else bytes(f) for f in found] == self.data[: len(found)]


class Counting(WrappingStorage):
    """Counts reads, and can hold them up."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalStorage(root))
        self.reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if verb == "read":
            self.reads += 1
            self.gate.wait(20)
        return act()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.host.close()


def test_pieces_come_from_the_storage_once_then_from_memory(world: World) -> None:
    world.check(world.host.read(world.source, world.parts))
    stats = world.host.stats()
    assert stats.from_storage == sum(map(len, world.data))
    assert stats.requests == 1, "neighbours are fetched together"
    world.pack.unlink()
    world.check(world.host.read(world.source, world.parts))
    assert world.host.stats().tiers["memory"].hits == len(world.parts)
    assert all(world.host.has([p.digest for p in world.parts]))


def test_what_is_not_held_is_none_without_fetching(world: World) -> None:
    assert world.host.read(world.source, world.parts, fetch=False) == [None] * len(world.parts)
    assert world.host.stats().from_storage == 0


def test_many_threads_fetch_each_piece_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Counting(world.root / "store")
    monkeypatch.setattr(StoreAddress, "open", lambda _: storage)
    storage.gate.clear()
    found: list[list[Bytes | None]] = []
    threads = [
        threading.Thread(target=lambda: found.append(world.host.read(world.source, world.parts))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while world.host.stats().in_flight < len(world.parts):
        threading.Event().wait(0.01)
    storage.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    for one in found:
        world.check(one)
    assert storage.reads == 1


def test_a_failed_fetch_lets_the_next_one_try(world: World) -> None:
    good = world.pack.read_bytes()
    world.pack.unlink()
    with pytest.raises(ms.errors.NotFoundError):
        world.host.read(world.source, world.parts[:3])
    world.pack.write_bytes(good)
    world.check(world.host.read(world.source, world.parts[:3]))
    assert world.host.stats().in_flight == 0


def test_wrong_bytes_in_the_storage_are_named(world: World) -> None:
    bad = bytearray(world.pack.read_bytes())
    bad[1500] ^= 1
    world.pack.write_bytes(bad)
    with pytest.raises(ms.errors.CorruptionError, match="bytes 1000 to 2000 of packs/ab"):
        world.host.read(world.source, world.parts)
    assert world.host.stats().wrong == 1
    assert not any(world.host.has([world.parts[1].digest]))


def test_wrong_bytes_in_a_tier_are_found(world: World) -> None:
    world.host.read(world.source, world.parts)
    folder = next((world.root / f"{folders.ROOT}x").glob("*"))
    part = world.parts[4]
    for place in (local_path(str(folder), part.digest), local_path(str(world.root / "disk"), part.digest)):
        data = bytearray(place.read_bytes())
        data[7] ^= 255
        place.write_bytes(data)
    world.host.drop(part.digest)
    assert world.host.has([part.digest]) == [False]
    assert world.host.stats().wrong == 2, "in memory and on disk"
    world.host.drop(world.parts[5].digest)
    assert world.host.has([world.parts[5].digest]) == [True], "a good piece that somebody called wrong stays"
    world.check(world.host.read(world.source, world.parts))


def test_scrubbing_finds_what_nobody_reads(world: World) -> None:
    world.host.read(world.source, world.parts)
    folder = next((world.root / f"{folders.ROOT}x").glob("*"))
    path = local_path(str(folder), world.parts[9].digest)
    path.write_bytes(b"x" * 1000)
    assert world.host.scrub(1 << 20) == [world.parts[9].digest]
    world.check(world.host.read(world.source, world.parts))


def test_the_disk_is_found_again_and_checked(world: World) -> None:
    world.host.read(world.source, world.parts)
    world.host.close()
    path = local_path(str(world.root / "disk"), world.parts[2].digest)
    path.write_bytes(b"y" * 1000)
    half = path.with_name(f"{path.name}.1.part")
    half.write_bytes(b"half")
    world.host = world.open()
    assert not half.exists()
    world.check(world.host.read(world.source, world.parts))
    assert world.host.stats().from_storage == 1000, "only the wrong one is fetched"


def test_peers_are_asked_before_the_storage_and_not_believed(world: World) -> None:
    def peers(source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        assert source == world.source
        given = {p.digest: np.frombuffer(world.data[world.parts.index(p)], np.uint8) for p in parts[::2]}
        given[parts[0].digest] = np.zeros(1000, np.uint8)
        return given

    world.host = world.open(peers)
    world.limits["disk"] = None
    world.check(world.host.read(world.source, world.parts))
    stats = world.host.stats()
    assert (stats.from_peers, stats.wrong) == (9000, 1)
    assert stats.from_storage >= 11000


def test_a_full_memory_is_no_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if folders.ROOT in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    world.check(world.host.read(world.source, world.parts))
    stats = world.host.stats().tiers
    assert (stats["memory"].bytes, stats["memory"].refused) == (0, 20)
    assert stats["disk"].pieces == 20
    world.pack.unlink()
    world.check(world.host.read(world.source, world.parts))


def test_more_than_a_tier_takes_passes_through(tmp_path: Path) -> None:
    world = World(tmp_path, [50_000] * 30, memory=200_000, disk=None)
    hot = world.parts[:3]
    world.host.read(world.source, hot)
    world.check(world.host.read(world.source, world.parts))
    stats = world.host.stats().tiers["memory"]
    assert stats.evicted == 0
    assert world.host.has([p.digest for p in hot]) == [True] * 3, "what is read now does not flush what was there"
    for part in world.parts:  # one by one: each of them would fit
        world.host.read(world.source, [part])
    stats = world.host.stats().tiers["memory"]
    assert stats.bytes <= 200_000
    assert stats.evicted > 0
    assert world.host.hold(world.source, world.parts) <= 200_000
    big = World(tmp_path / "big", [300_000], memory=200_000, disk=None)
    big.check(big.host.read(big.source, big.parts))
    assert big.host.stats().tiers["memory"].pieces == 0


def test_pins(world: World) -> None:
    first, rest = world.parts[:5], world.parts[5:]
    assert world.host.hold(world.source, first, pin="mine") == 5000
    world.host.hold(world.source, rest)
    world.host.evict()
    assert world.host.has([p.digest for p in world.parts]) == [True] * 5 + [False] * 15
    world.host.unpin("mine")
    assert world.host.evict() > 0
    assert not any(world.host.has([p.digest for p in world.parts]))


def test_a_device_as_a_tier(tmp_path: Path) -> None:
    world = World(tmp_path, device="cpu", device_bytes=5000)
    assert world.host.hold(world.source, world.parts, tier="gpu") == 5000, "as many as fit"
    assert world.host.hold(world.source, world.parts[:5], tier="gpu") == 5000
    world.host._memory.evict()
    world.check(world.host.read(world.source, world.parts))
    with pytest.raises(ValueError, match="no tier 'tape'"):
        world.host.hold(world.source, world.parts, tier="tape")


def test_only_what_nobody_claims_is_swept(tmp_path: Path) -> None:
    live, dead = (tmp_path / f"{folders.ROOT}c" / name for name in ("live", "dead"))
    held = claim(str(live))
    os.close(claim(str(dead)))
    (dead / "ab").mkdir()
    (dead / "ab" / "cd").write_bytes(b"12345")
    assert sweep(str(tmp_path)) == 5
    assert live.exists()
    assert not dead.exists()
    os.close(held)
    sweep(str(tmp_path))
    assert not live.parent.exists()


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.sampled_from("tarpu"), st.integers(0, 12), st.integers(1, 40)), max_size=80),
)
def test_the_lru_counts_right(limit: int, steps: list[tuple[str, int, int]]) -> None:
    lru = SegmentedLRU(limit)
    sizes: dict[bytes, int] = {}
    pinned: set[bytes] = set()
    for what, i, size in steps:
        name = digest(i)
        if what == "t":
            lru.touch(name)
        elif what == "a" and name not in lru:
            going = lru.room(size)
            held = sum(s for n, s in sizes.items() if n in pinned)
            assert (going is None) == (size > limit - held)
            for old in going or ():
                assert old not in pinned
                assert lru.remove(old) == sizes.pop(old)
            if going is not None:
                lru.add(name, size)
                sizes[name] = size
        elif what == "r":
            assert lru.remove(name) == sizes.pop(name, 0)
        elif what == "p":
            lru.pin([name], "p")
            pinned.add(name)
        elif what == "u":
            lru.unpin("p")
            pinned.clear()
        assert lru.nbytes == sum(sizes.values()) <= limit
        assert lru.pinned == sum(s for n, s in sizes.items() if n in pinned)
        assert sorted(lru.digests()) == sorted(sizes)


def test_a_long_scan_does_not_flush_what_is_read_again(tmp_path: Path) -> None:
    tier = FileTier(str(tmp_path), 40_960, trusted=True)
    hot = [digest(i) for i in range(5)]
    for name in hot:
        tier.put(name, np.zeros(1000, np.uint8))
        tier.get(name)
    for i in range(100, 300):
        tier.put(digest(i), np.zeros(1000, np.uint8))
    assert all(tier.has(name) for name in hot)


class HostAgainstDict(RuleBasedStateMachine):
    """Whatever is done to a host and behind its back, it hands out the right bytes or says that it has none."""

    LIMITS: ClassVar = {"memory": 24 * 4096, "disk_bytes": 30 * 4096, "device_bytes": 9000}

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ms-host-")
        sizes = [400 + 37 * i for i in range(24)] + [30_000 + i for i in range(4)]
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(file_tier, "_MAPPED", 800)  # so that about half of them are mapped
        self.world = World(Path(self.folder.name), sizes, device="cpu", **self.LIMITS)
        self.pinned: dict[str, set[int]] = {}

    def parts(self, which: Iterable[int]) -> list[Piece]:
        return [self.world.parts[i] for i in which]

    @rule(which=st.lists(PIECES, max_size=8), fetch=st.booleans())
    def read(self, which: list[int], fetch: bool) -> None:
        found = self.world.host.read(self.world.source, self.parts(which), fetch=fetch)
        for i, data in zip(which, found, strict=True):
            assert data is not None or not fetch
            if data is not None and bytes(data) != self.world.data[i]:  # memory is checked by who reads
                self.world.host.drop(self.world.parts[i].digest)
                again = self.world.host.read(self.world.source, self.parts([i]))[0]
                assert again is not None
                assert bytes(again) == self.world.data[i]

    @rule(which=st.lists(PIECES, max_size=6), tier=TIERS, pin=PINS)
    def hold(self, which: list[int], tier: str, pin: str | None) -> None:
        self.world.host.hold(self.world.source, self.parts(which), tier=tier, pin=pin)
        if pin:
            self.pinned.setdefault(pin, set()).update(which)

    @rule(which=st.lists(PIECES, max_size=6) | st.none())
    def evict(self, which: list[int] | None) -> None:
        kept = set().union(*self.pinned.values())
        held = {i for i in kept if self.world.host.has([self.world.parts[i].digest])[0]}
        self.world.host.evict(None if which is None else [part.digest for part in self.parts(which)])
        left = range(len(self.world.parts)) if which is None else which
        has = self.world.host.has([part.digest for part in self.parts(left)])
        assert [i for i, there in zip(left, has, strict=True) if there] == [i for i in left if i in held]

    @rule(pin=PINS.filter(bool))
    def unpin(self, pin: str) -> None:
        self.world.host.unpin(pin)
        self.pinned.pop(pin, None)

    @rule(which=PIECES, harm=st.sampled_from(["flip", "cut", "lose"]), tier=TIERS)
    def harm(self, which: int, harm: str, tier: str) -> None:
        digest = self.world.parts[which].digest
        if tier == "gpu":
            device = self.world.host._device
            tensor = device.tensor(digest) if device else None
            if tensor is not None:
                tensor[3] ^= 9
            return
        folder = str(self.world.root / "disk") if tier == "disk" else self.world.host._settings.folder
        path = local_path(folder, digest)
        if path.exists():
            data = bytearray(path.read_bytes())
            path.unlink()  # maps that are out keep the old bytes
            if harm != "lose":
                data[3] ^= 9
                path.write_bytes(data[: len(data) // (2 if harm == "cut" else 1)])

    @rule()
    def restart(self) -> None:
        self.world.host.close()
        self.world.host = self.world.open()
        self.pinned.clear()

    @rule(limit=st.sampled_from([4000, 1 << 20]))
    def scrub(self, limit: int) -> None:
        self.world.host.scrub(limit)
        if limit == 1 << 20:
            assert self.world.host.scrub(limit) == []

    @invariant()
    def bounded(self) -> None:
        if not hasattr(self, "world"):
            return
        stats = self.world.host.stats()
        for name, limit in zip(("memory", "disk", "gpu"), self.LIMITS.values(), strict=True):
            assert stats.tiers[name].pinned <= stats.tiers[name].bytes <= limit
        folders = {"memory": self.world.host._settings.folder, "disk": str(self.world.root / "disk")}
        for name, folder in folders.items():
            files = [path.stat().st_size for path in Path(folder).glob("??/*")]
            assert sum(map(file_tier.cost, files)) <= stats.tiers[name].bytes, "no file that is not counted"
        assert stats.in_flight == 0

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.host.close(keep_disk=False)
            assert not list((self.world.root / "disk").glob("??/*"))
            self.folder.cleanup()
            self.patch.undo()


TestHostAgainstDict = HostAgainstDict.TestCase
TestHostAgainstDict.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_host_takes_a_device_where_there_is_one() -> None:
    pytest.importorskip("ray")
    from modelstore.cluster.control.directory import ClusterSettings
    from modelstore.cluster.control.supervisor import device_of

    def of(device_bytes: int, device: str, **resources: float) -> str | None:
        return device_of(ClusterSettings("c", 1, 1, device_bytes=device_bytes, device=device), resources)

    assert of(0, "cuda", GPU=8) is None
    assert of(1, "cuda", CPU=8) is None
    assert of(1, "cuda", GPU=1) == "cuda:0"
    assert of(1, "cpu", CPU=8) == "cpu"
