"""Whole hosts in one process, without Ray: they reach each other by their protocol alone."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from modelstore.cluster.control.directory import ClusterSettings
from modelstore.cluster.host.actor import StorageActor
from modelstore.cluster.host.node import NodeHost
from modelstore.cluster.host.protocol import Host
from modelstore.cluster.host.replicas import others
from modelstore.cluster.network.calls import HostGoneError
from modelstore.cluster.network.futures import in_thread
from modelstore.cluster.network.peers import Peers
from modelstore.cluster.network.wire import PieceClient
from modelstore.plan.placement import Member, View
from tests.cluster.test_host import World


class Near(Peers):
    """Hosts of this process, as their actors would answer; `told` hears which method was answered."""

    def __init__(self, view: View, secret: str, actors: dict[str, StorageActor], told: Callable[[str], None]) -> None:
        super().__init__(view, secret)
        self._actors = actors
        self._told = told

    def ask(self, member: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        def act() -> Any:
            if member not in self._actors:
                raise HostGoneError(f"host {member} is gone")
            try:
                return getattr(self._actors[member], method.__name__)(*arguments, **named)
            finally:
                self._told(method.__name__)

        return in_thread(act)


class Nodes:
    """Hosts of one cluster."""

    def __init__(self, world: World, secret: str = "") -> None:
        self.world, self.secret = world, secret
        self.settings = ClusterSettings(
            uuid.uuid4().hex[:8], 1 << 20, 1 << 20, replicas=2, pending=1 << 20, secret=secret
        )
        self.actors: dict[str, StorageActor] = {}
        self.hosts: dict[str, NodeHost] = {}
        self.copied = threading.Semaphore(0)

    def start(self, *names: str) -> View:
        view = View(1, tuple(Member(name, f"node-{name}") for name in names))
        for member in view.members:
            self.add(member, view)
        return view

    def add(self, member: Member, view: View) -> None:
        peers = Near(view, self.secret, self.actors, lambda method: self.copied.release() if method == "copy" else None)
        made = NodeHost(
            member,
            self.settings,
            peers,
            address=lambda: "127.0.0.1",
            join=lambda: None,
            show=lambda _: None,  # type: ignore[arg-type,return-value]
        )
        actor = StorageActor.__new__(StorageActor)
        actor._host, actor._problem = made, None
        self.hosts[member.id], self.actors[member.id] = made, actor

    def held(self, name: str) -> int:
        return sum(self.hosts[name].pieces.has([part.digest for part in self.world.parts]))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    world = World(tmp_path, disk=None)
    made = Nodes(world)
    yield made
    for host in made.hosts.values():
        host.close()
    world.host.close()
    assert not Path(made.settings.root).exists(), "nothing is left in shared memory"


def test_what_one_reads_the_other_gets_a_copy_of(nodes: Nodes) -> None:
    nodes.start("a", "b")
    nodes.world.check(nodes.hosts["a"].read(nodes.world.source, nodes.world.parts))
    assert nodes.copied.acquire(timeout=20)
    assert nodes.held("b") == len(nodes.world.parts)
    stats = nodes.hosts["b"].stats()
    assert (stats.from_storage, stats.from_peers) == (0, 20_000), "from the other host, not from the storage"
    assert stats.repaired == 20_000


def test_a_newer_view_moves_copies_and_an_older_one_nothing(nodes: Nodes) -> None:
    view = nodes.start("a", "b")
    nodes.hosts["a"].read(nodes.world.source, nodes.world.parts)
    assert nodes.copied.acquire(timeout=20)
    newer = View(2, (*view.members, Member("c", "node-c")))
    nodes.add(newer.members[-1], newer)
    due = len(others("a", newer, None, 2, nodes.world.parts).get("c", ()))
    for host in nodes.hosts.values():
        host.see(newer)
        host.see(view)
    assert nodes.hosts["a"].member().id == "a"
    while nodes.held("c") < due:
        assert nodes.copied.acquire(timeout=20)
    assert all(host._peers.view == newer for host in nodes.hosts.values())


def test_a_host_that_is_gone_is_done_without(nodes: Nodes) -> None:
    nodes.start("a", "b")
    del nodes.actors["b"]
    nodes.world.check(nodes.hosts["a"].read(nodes.world.source, nodes.world.parts))
    assert nodes.hosts["a"].stats().from_storage == 20_000
    with pytest.raises(HostGoneError):
        nodes.hosts["a"].left()  # which nobody can say while the other one is silent
    assert nodes.hosts["b"].left() == 0


def test_pieces_are_given_out_at_the_address_that_a_member_names(tmp_path: Path) -> None:
    world = World(tmp_path, disk=None)
    nodes = Nodes(world, secret="secret")
    nodes.start("a")
    member = nodes.actors["a"].member()
    world.check(PieceClient(member.address, b"secret").read(world.source, world.parts, True))
    asked = nodes.hosts["a"]._peers.ask("a", Host.ping)
    assert asked.result(20) is True
    nodes.hosts["a"].close()
    world.host.close()
