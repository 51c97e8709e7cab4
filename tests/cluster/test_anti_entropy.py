"""What a host holds stays right, and other holders get what they lack, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from modelstore.cluster.host import anti_entropy
from modelstore.cluster.host.anti_entropy import AntiEntropy
from modelstore.cluster.host.file_tier import local_path
from modelstore.cluster.host.host import ShardHost
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.plan.placement import Member, View
from tests.cluster.test_host import World

VIEW = View(1, (Member("a", "n1"), Member("b", "n2")))


class Pair:
    """Two hosts that are to hold the same; one of them is looked after."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.first, self.second = world.host, world.open()
        self.sent: list[int] = []
        self.mending = AntiEntropy("a", self.first, self.held, lambda: VIEW, 2, self.lacks, self.fill)

    def held(self) -> list[tuple[StoreAddress, list[Piece]]]:
        there = self.first.has([part.digest for part in self.world.parts])
        return [(self.world.source, [part for part, held in zip(self.world.parts, there, strict=True) if held])]

    def lacks(self, member: str, parts: Sequence[Piece]) -> list[bytes]:
        assert member == "b"
        return self.second.lacks(parts)

    def fill(self, member: str, source: StoreAddress, parts: Sequence[Piece]) -> int:
        assert member == "b"
        self.sent.append(len(parts))
        return self.second.fill(source, parts)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(World(tmp_path, disk=None))
    yield made
    made.first.close()
    made.second.close()


def has(host: ShardHost, parts: Sequence[Piece]) -> int:
    return sum(host.has([part.digest for part in parts]))


def test_what_the_other_one_lacks_is_sent(pair: Pair) -> None:
    parts = pair.world.parts
    pair.first.hold(pair.world.source, parts[:12])
    pair.second.hold(pair.world.source, parts[:5])
    pair.mending.even()
    assert pair.sent == [7]
    assert has(pair.second, parts) == 12
    pair.mending.even()
    assert pair.sent == [7], "and only that"


def test_it_goes_round(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anti_entropy, "LOOKED", 5)
    parts = pair.world.parts
    pair.first.hold(pair.world.source, parts[:12])
    for held in (5, 10, 12):
        pair.mending.even()
        assert has(pair.second, parts) == held
    pair.second.evict()
    pair.mending.even()
    assert has(pair.second, parts) == 5


def test_nothing_has_to_go_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, disk=None, memory=10 * 4096)
    pair = Pair(world)
    pair.first.hold(world.source, world.parts[:8])
    pair.second.hold(world.source, world.parts[12:19])
    pair.mending.even()
    assert has(pair.second, world.parts[12:19]) == 7
    assert has(pair.second, world.parts[:8]) == 3, "as many as there was room for"
    pair.first.close()
    pair.second.close()


def test_one_that_takes_nothing_is_sent_no_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anti_entropy, "BATCH", 2000)
    pair.first.hold(pair.world.source, pair.world.parts)
    monkeypatch.setattr(pair.second, "fill", lambda *_: 0)
    pair.mending.even()
    assert pair.sent == [2]


def test_a_wrong_copy_is_dropped_and_comes_again(pair: Pair) -> None:
    part = pair.world.parts[3]
    for host in (pair.first, pair.second):
        host.hold(pair.world.source, [part])
    path = local_path(pair.second._settings.folder, part.digest)
    path.write_bytes(bytes(part.length))
    assert pair.second.scrub(1 << 20) == [part.digest]
    pair.mending.even()
    assert path.read_bytes() == pair.world.data[3]


def test_a_look_goes_over_what_is_held_and_what_others_lack(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = pair.world.parts
    pair.first.hold(pair.world.source, parts[:4])
    local_path(pair.first._settings.folder, parts[0].digest).write_bytes(b"wrong" * 200)
    pair.mending.look()
    assert has(pair.first, parts[:4]) == 3, "what is wrong is dropped"
    assert has(pair.second, parts[:4]) == 3, "and not sent"

    def fails(*_: object) -> int:
        raise OSError("that host is gone")

    pair.first.hold(pair.world.source, parts)
    monkeypatch.setattr(pair.second, "fill", fails)
    pair.mending.look()


def test_a_copy_that_the_disk_lost_comes_again_though_memory_has_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.hold(world.source, world.parts)
    path = local_path(str(tmp_path / "disk"), world.parts[2].digest)
    path.write_bytes(b"wrong" * 200)
    assert world.host.scrub(1 << 20) == [world.parts[2].digest]
    assert world.host.lacks(world.parts) == [world.parts[2].digest]
    assert world.host.fill(world.source, [world.parts[2]]) == world.parts[2].length
    assert path.read_bytes() == world.data[2]
    world.host.close()
