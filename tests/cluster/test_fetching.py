"""How a host gets what it does not hold: once, in long runs, within bounded memory, and whoever fails."""

from __future__ import annotations

import logging
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

import modelstore as ms
from modelstore.cluster.host import host as host_module
from modelstore.cluster.host import origin
from modelstore.cluster.host.file_tier import local_path
from modelstore.cluster.host.host import HostSettings, ShardHost
from modelstore.cluster.host.singleflight import SingleFlight
from modelstore.cluster.node.folders import ROOT
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.format.buffers import Bytes
from modelstore.format.objects.record import pack_key
from modelstore.plan.read import GAP
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.testing.faults import FaultyStorage
from tests.helpers.hostile import little_memory

T = TypeVar("T")
PACKS = ("ab" * 32, "cd" * 32)


class Watching(WrappingStorage):
    """Counts reads and their bytes; runs `before` ahead of each."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.reads: list[tuple[str, int, int]] = []
        self.before: Callable[[int], None] = lambda _: None

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()

    def read(self, key: str, start: int, out: memoryview) -> None:
        self.reads.append((key, start, out.nbytes))
        self.before(len(self.reads))
        super().read(key, start, out)


class World:
    """Two packs of pieces in a storage that is watched, and hosts before it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int]) -> None:
        self.root = root
        self.storage = Watching(MemoryStorage(str(root)))
        random = np.random.default_rng(0)
        self.data = [random.integers(0, 256, n, np.uint8).tobytes() for n in sizes]
        self.parts = []
        for at, pack in enumerate(PACKS):
            mine = self.data[at::2]
            starts = np.cumsum([0, *map(len, mine)])
            self.parts += [Piece(blake3(d).digest(), pack, int(o), len(d)) for d, o in zip(mine, starts, strict=False)]
            self.storage.put(pack_key(pack), mine, sum(map(len, mine)))
        self.data = self.data[0::2] + self.data[1::2]
        self.source = StoreAddress("watched://")
        self.hosts: list[ShardHost] = []
        monkeypatch.setattr(StoreAddress, "open", lambda _: self.storage)

    def host(self, name: str = "h", *, peers: Any = None, **settings: Any) -> ShardHost:
        folder = str(self.root / f"{ROOT}x" / name)
        made = ShardHost(HostSettings(name, "n", folder, **{"memory": 64 << 20, **settings}), peers)
        self.hosts.append(made)
        return made

    def right(self, found: Sequence[Bytes | None], which: Sequence[int] | None = None) -> bool:
        wanted = self.data if which is None else [self.data[i] for i in which]
        return [None if data is None else bytes(data) for data in found] == wanted

    def flip(self, which: int) -> None:
        """Change a piece in the storage for good."""
        part = self.parts[which]
        data = bytearray(self.storage.get(part.key))
        data[part.offset] ^= 1
        self.storage.put(part.key, [bytes(data)], len(data))

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.data))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch, [1000 + i for i in range(40)])
    yield made
    for host in made.hosts:
        host.close()
    assert not list(tmp_path.glob(f"{ROOT}*")), "nothing is left in shared memory"


# ---------------------------------------------------------------------- runs


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 100 << 20), st.integers(1, 40 << 20)), max_size=30),
    st.integers(1, 16),
)
def test_runs_cover_all_and_are_bounded(places: list[tuple[int, int, int]], threads: int) -> None:
    parts = [Piece(i.to_bytes(32, "big"), PACKS[pack], offset, size) for i, (pack, offset, size) in enumerate(places)]
    made = list(origin.runs(parts, threads))
    assert sorted(part for run in made for part in run) == sorted(parts)
    for run in made:
        assert len({part.pack for part in run}) == 1
        start, stop = run[0].offset, max(part.offset + part.length for part in run)
        assert stop - start <= max(origin.RUN, *(part.length for part in run))
        reached = run[0].offset
        for part in run:
            assert part.offset - reached <= GAP
            reached = max(reached, part.offset + part.length)


def test_neighbours_are_one_request_and_all_threads_have_work() -> None:
    parts = [Piece(i.to_bytes(32, "big"), PACKS[0], i << 20, 1 << 20) for i in range(256)]
    assert [len(run) for run in origin.runs(parts, 8)] == [32] * 8
    assert [len(run) for run in origin.runs(parts[:64], 8)] == [8] * 8
    assert [len(run) for run in origin.runs(parts[:4], 8)] == [4], "but no request is made short for it"


def test_a_gap_is_read_over_only_if_it_is_short(world: World) -> None:
    host = world.host()
    host.read(world.source, [world.parts[i] for i in (0, 2, 19)])
    assert len(world.storage.reads) == 1
    far = Piece(world.parts[3].digest, world.parts[3].pack, world.parts[3].offset + GAP + 2000, 1000)
    assert len(list(origin.runs([world.parts[2], far], 1))) == 2


# ---------------------------------------------------------------------- once


def test_threads_with_overlapping_wishes_fetch_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch, [GAP + 1000 + i for i in range(40)])  # no piece is read over
    world.storage.inner = FaultyStorage(world.storage.inner, delay=0.002)  # so that there is something to wait for
    host = world.host()
    random = np.random.default_rng(1)
    wishes = [random.permutation(40)[: random.integers(1, 40)].tolist() for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda w: host.read(world.source, [world.parts[i] for i in w]), wishes))
    assert all(world.right(data, wish) for data, wish in zip(found, wishes, strict=True))
    wanted = {i for wish in wishes for i in wish}
    assert host.stats().in_flight == 0
    assert host.stats().from_storage == sum(size for _, _, size in world.storage.reads)
    assert host.stats().from_storage == sum(len(world.data[i]) for i in wanted)
    host.close()


def test_hits_are_counted_of_what_readers_ask_for(world: World) -> None:
    host = world.host()
    host.read(world.source, world.parts[:4], fetch=False)
    assert (host.stats().asked, host.stats().hits) == (0, 0), "whoever only looks asks for nothing"
    host.read(world.source, world.parts[:4])
    assert (host.stats().asked, host.stats().hits) == (4, 0)
    host.read(world.source, world.parts[2:6])
    assert (host.stats().asked, host.stats().hits) == (8, 2)


def test_a_piece_that_came_in_meanwhile_is_not_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and claiming another thread may have fetched it: the claim looks again."""
    host = world.host()
    claim = SingleFlight.claim

    def late(self: SingleFlight, digests: Any) -> Any:
        monkeypatch.setattr(SingleFlight, "claim", claim)
        host.read(world.source, world.parts)
        return claim(self, digests)

    monkeypatch.setattr(SingleFlight, "claim", late)
    assert world.right(host.read(world.source, world.parts))
    assert host.stats().from_storage == world.nbytes


def test_what_lies_in_one_tier_is_not_fetched_for_another(world: World) -> None:
    host = world.host(disk=str(world.root / "disk"), disk_bytes=1 << 20, device="cpu", device_bytes=1 << 20)
    assert host.hold(world.source, world.parts, tier="disk") == world.nbytes
    for tier in ("memory", "gpu"):
        assert host.stats().tiers[tier].pieces == 0 or tier == "gpu"
        assert host.hold(world.source, world.parts, tier=tier) == world.nbytes
    assert host.stats().from_storage == world.nbytes


def test_nothing_wrong_enters_another_tier(world: World) -> None:
    host = world.host(device="cpu", device_bytes=1 << 20)
    host.hold(world.source, world.parts)
    path = local_path(str(world.root / f"{ROOT}x" / "h"), world.parts[7].digest)
    path.write_bytes(b"x" * world.parts[7].length)
    assert host.hold(world.source, world.parts, tier="gpu") == world.nbytes
    host._memory.evict()
    assert world.right(host.read(world.source, world.parts))
    assert host.stats().wrong == 1
    assert host.stats().from_storage == world.nbytes + world.parts[7].length


def test_peers_are_asked_once_and_believed_only_where_right(world: World) -> None:
    other = world.host("other")
    other.hold(world.source, world.parts[:30])
    before = len(world.storage.reads)
    asked: list[int] = []

    def peers(source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        asked.append(len(parts))
        held = zip(parts, other.read(source, parts, fetch=False), strict=True)
        return {part.digest: data for part, data in held if data is not None}

    host = world.host(peers=peers)
    assert world.right(host.read(world.source, world.parts))
    assert world.right(host.read(world.source, world.parts))
    assert asked == [40]
    assert host.stats().from_peers == sum(map(len, world.data[:30]))
    assert sum(size for _, _, size in world.storage.reads[before:]) == sum(map(len, world.data[30:]))


def test_who_waits_is_given_what_no_tier_has_room_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    host = world.host(memory=0)
    claim, claims, all_wait = SingleFlight.claim, threading.Semaphore(0), threading.Event()

    def counted(self: SingleFlight, digests: Any) -> Any:
        found = claim(self, digests)
        claims.release()
        return found

    def hold_up(_: int) -> None:
        assert all_wait.wait(20)

    monkeypatch.setattr(SingleFlight, "claim", counted)
    world.storage.before = hold_up
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(host.read, world.source, world.parts) for _ in range(4)]
        assert all(claims.acquire(timeout=20) for _ in readers)
        all_wait.set()
        assert all(world.right(reader.result(30)) for reader in readers)
    assert host.stats().from_storage == world.nbytes
    assert host.stats().tiers["memory"].pieces == 0


def test_what_a_tier_cannot_have_is_not_fetched_for_it(world: World) -> None:
    host = world.host(memory=10 * 4096)
    host.hold(world.source, world.parts[:5])
    assert host.hold(world.source, world.parts) == sum(map(len, world.data[:10]))
    assert host.stats().from_storage == sum(map(len, world.data[:10]))
    assert host.stats().tiers["memory"].evicted == 0


# ---------------------------------------------------------------------- failures


def test_peers_that_fail_cost_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def peers(source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        raise ConnectionError("the wire is cut")

    host = world.host(peers=peers)
    with caplog.at_level(logging.WARNING, "modelstore"):
        assert world.right(host.read(world.source, world.parts))
    assert "could not ask its peers" in caplog.text


def test_one_wrong_piece_costs_no_other(world: World) -> None:
    host = world.host()
    world.flip(5)
    with pytest.raises(ms.errors.CorruptionError, match="do not match") as caught:
        host.read(world.source, world.parts)
    assert caught.value.object == world.parts[5].key
    digests = [part.digest for part in world.parts]
    assert host.has(digests) == [i != 5 for i in range(40)]
    world.flip(5)
    assert world.right(host.read(world.source, world.parts))


def test_a_flip_on_the_way_is_mended_by_asking_again(world: World) -> None:
    faulty = FaultyStorage(world.storage.inner, flipped=[world.parts[0].key])
    world.storage.inner = faulty

    def heal(reads: int) -> None:
        if reads > 1:
            faulty.flipped.clear()

    world.storage.before = heal
    host = world.host()
    assert world.right(host.read(world.source, world.parts[:20]), range(20))
    assert (host.stats().wrong, len(world.storage.reads)) == (0, 2)


def test_a_leader_that_fails_lets_another_one_try(world: World) -> None:
    host = world.host()
    waiting = threading.Event()

    def fail_first(reads: int) -> None:
        if reads == 1:
            waiting.wait(20)
            raise ms.errors.StorageError("the first request fails")

    world.storage.before = fail_first
    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(host.read, world.source, world.parts[:20]) for _ in range(6)]
        waiting.set()
        errors = [reader.exception(timeout=30) for reader in readers]
    assert [type(error) for error in errors if error] == [ms.errors.StorageError]
    assert all(world.right(r.result(), range(20)) for r, e in zip(readers, errors, strict=True) if e is None)
    assert (len(world.storage.reads), host.stats().in_flight) == (2, 0)


def test_nobody_waits_for_ever_for_a_leader_that_hangs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_WAIT", 0.05)
    host = world.host()
    began, release = threading.Event(), threading.Event()

    def hang_first(reads: int) -> None:
        if reads == 1:
            began.set()
            assert release.wait(20), "the other reader waited for this one"

    world.storage.before = hang_first
    with ThreadPoolExecutor(1) as pool:
        try:
            hanging = pool.submit(host.read, world.source, world.parts[:20])
            assert began.wait(20)
            assert world.right(host.read(world.source, world.parts[:20]), range(20))
            assert not hanging.done()
        finally:
            release.set()
        assert world.right(hanging.result(30), range(20))
    assert host.stats().in_flight == 0
    assert host.stats().tiers["memory"].pieces == 20


def test_a_storage_that_often_fails_is_got_through(world: World) -> None:
    world.storage.inner = FaultyStorage(world.storage.inner, seed=3, failing=0.4)
    host = world.host(threads=3)

    def patient(seed: int) -> int:
        which = np.random.default_rng(seed).permutation(40)[:15].tolist()
        failures = 0
        while True:
            try:
                assert world.right(host.read(world.source, [world.parts[i] for i in which]), which)
                return failures
            except ms.errors.StorageError:
                failures += 1

    with ThreadPoolExecutor(6) as pool:
        failures = sum(pool.map(patient, range(30)))
    assert failures > 0
    assert host.stats().in_flight == 0
    assert host.stats().wrong == 0


def test_an_absent_pack_is_named(world: World) -> None:
    host = world.host()
    gone = Piece(bytes(32), "ef" * 32, 0, 10)
    with pytest.raises(ms.errors.NotFoundError) as caught:
        host.read(world.source, [*world.parts, gone])
    assert caught.value.object == gone.key
    assert all(host.has([part.digest for part in world.parts])), "the other requests went on"


@pytest.mark.parametrize("length", [1 << 33, 1 << 50, 1 << 62])
def test_a_length_that_cannot_be_takes_no_memory(world: World, length: int) -> None:
    host = world.host()
    with little_memory(256 << 20), pytest.raises(ms.errors.CorruptionError, match="ends before byte"):
        host.read(world.source, [Piece(world.parts[0].digest, PACKS[0], 0, length)])


def test_a_piece_asked_for_with_another_length_is_refused_and_stays(world: World) -> None:
    host = world.host()
    host.read(world.source, world.parts)
    part = world.parts[3]
    with pytest.raises(ms.errors.CorruptionError):
        host.read(world.source, [part._replace(length=part.length - 1)])
    assert host.has([part.digest]) == [True]


def test_a_closed_host_says_so(world: World) -> None:
    host = world.host()
    host.close()
    host.close()
    with pytest.raises(ms.errors.StorageError, match="host h is closed"):
        host.read(world.source, world.parts)


def test_closing_ends_what_is_under_way(world: World) -> None:
    host = world.host(threads=1)
    began, release = threading.Event(), threading.Event()

    def hang(_: int) -> None:
        began.set()
        release.wait(30)

    world.storage.before = hang
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(host.read, world.source, world.parts)  # two packs, one thread
        assert began.wait(20)
        host.close()
        release.set()
        assert isinstance(reading.exception(30), ms.errors.StorageError)


def test_a_disk_that_another_host_uses_is_left_to_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    disk = str(world.root / "disk")
    first = world.host("first", disk=disk, disk_bytes=1 << 20)
    with caplog.at_level(logging.WARNING, "modelstore"):
        second = world.host("second", disk=disk, disk_bytes=1 << 20)
    assert "keeps nothing on disk" in caplog.text
    for host in (first, second):
        assert world.right(host.read(world.source, world.parts))
    assert (list(first.stats().tiers), list(second.stats().tiers)) == (["memory", "disk"], ["memory"])
    first.close()
    third = world.host("third", disk=disk, disk_bytes=1 << 20)
    assert third.stats().tiers["disk"].pieces == 40


# ---------------------------------------------------------------------- memory


def test_working_memory_is_bounded_by_threads_not_by_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "RUN", 1 << 20)
    monkeypatch.setattr(origin, "_SHORT", 1 << 20)
    world = World(tmp_path, monkeypatch, [300_000] * 160)  # 48 MB
    host = world.host(threads=2)
    try:
        tracemalloc.start()
        assert host.hold(world.source, world.parts) == world.nbytes
        held = tracemalloc.get_traced_memory()[1]
        host.evict()
        tracemalloc.reset_peak()
        found = host.read(world.source, world.parts)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert world.right(found)
    for peak in (held, read):
        assert peak < 6 << 20, "two requests of a MiB, and what names the pieces"
    host.close()
