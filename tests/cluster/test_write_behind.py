"""Saves acknowledged from the memory of two hosts: nothing that was acknowledged is lost when one of them goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

import modelstore as ms
from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.read import models
from modelstore.cluster.save import acknowledge, write_behind
from modelstore.cluster.save.keeper import Keeper
from modelstore.cluster.save.orders import keepers
from modelstore.cluster.save.write_behind import WriteBehind
from modelstore.errors import CorruptionError, NotFoundError, StorageError
from modelstore.execute.write import save as saving
from modelstore.format.objects.record import tag_key
from modelstore.plan.placement import Member, View
from modelstore.plan.work import Limits, Work
from modelstore.sources.open import open_source
from modelstore.storage.base import Storage
from modelstore.storage.open import open_storage
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.store.catalog import Catalog
from modelstore.store.relying import GoneError
from modelstore.store.repo import Repo
from tests.helpers.stores import open_on, overwrite

MODEL = {f"layer.{i}.weight": torch.full((257, 65), float(i)) for i in range(6)}


class Gate(WrappingStorage):
    """A storage whose writes fail as long as the gate is shut."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.open = threading.Event()
        self.open.set()

    def around(self, verb: Verb, key: str, act: Any) -> Any:
        if verb in ("put", "create") and not self.open.is_set():
            raise StorageError(f"the storage takes nothing now ({key})", object=key)
        return act()


class Nodes:
    """Hosts on nodes of their own, reached by calls; those that were killed answer nothing and do nothing."""

    def __init__(self, root: Path, names: str, limit: int = 1 << 30) -> None:
        self.root, self.limit, self.epoch = root, limit, 0
        self.hosts: dict[str, WriteBehind] = {}
        self.pool = ThreadPoolExecutor(32)
        self.refusing: set[Callable[..., Any]] = set()  # methods that find nobody
        self.members: tuple[Member, ...] = ()
        self.had = len(names)
        self.looks = self.comes_at = 0
        for name in names:
            self.join(name)

    def join(self, name: str) -> None:
        self.hosts[name] = WriteBehind(name, str(self.root / name), self.limit, self.tell)
        self.members = (*self.members, Member(name, f"node-{name}"))
        self._changed()

    def kill(self, name: str, *, seen: bool = True) -> None:
        """Gone with all it has; it does not even write to the storage any more."""
        self.hosts.pop(name).close()
        if seen:
            self.leave(name)

    def leave(self, name: str) -> None:
        self.members = tuple(member for member in self.members if member.id != name)
        self._changed()

    def _changed(self) -> None:
        self.epoch += 1
        for host in list(self.hosts.values()):
            host.see(self.view())

    def tell(self, member: str, method: Callable[..., Any], *arguments: Any) -> Any:
        if member not in self.hosts or method in self.refusing:
            raise ConnectionError(f"{member} is gone")
        return getattr(self.hosts[member], method.__name__)(*arguments)

    def view(self, *, fresh: bool = False) -> View:
        if fresh:
            self.looks += 1
            if self.looks == self.comes_at:
                self.join("new")
        return View(self.epoch, tuple(sorted(self.members, key=lambda m: m.id)))

    def nodes(self) -> int:
        return self.had

    def share(self, data: Any) -> Any:
        return np.array(data)

    def ask(self, member: str, method: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self.pool.submit(self.tell, member, method, *arguments)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """The storage that hosts write to, by whatever source."""
    url = str(tmp_path / "store")
    ms.open(url).save("other", {"x": torch.zeros(3)})
    made = Gate(open_storage(url))
    monkeypatch.setattr(models, "_store", lambda source: Repo.on(made))  # noqa: ARG005
    return made


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path / "hosts", "abc")
    yield made
    for name in list(made.hosts):
        made.kill(name, seen=False)
    made.pool.shutdown()
    assert not list((tmp_path / "hosts").rglob("pending/*")), "nothing is left"


def save(nodes: Nodes, gate: Gate, tensors: Any = None, *, model: str = "m", tag: str | None = None) -> Any:
    source = open_source(tensors or MODEL)

    def store(storage: Storage) -> saving.Outcome:
        return saving.store(
            Repo.on(storage),
            model,
            source,
            codec="lossless",
            grid="auto",
            parent=None,
            previous=None,
            work=Work(Limits(1 << 28)),
            resumable=False,
        )

    return acknowledge.save(nodes, ["a"], gate, StoreAddress(gate.url), model, tag, store)


def durable(nodes: Nodes, gate: Gate, *results: Any, seconds: float = 60.0) -> list[int]:
    orders = [result.order for result in results]
    found = acknowledge.wait_durable(nodes, gate, orders, seconds)
    return [found[order.save] for order in orders]


def equal(gate: Gate, ref: str, wanted: Any = None) -> bool:
    found = ms.open(gate.url).load(ref)
    wanted = wanted or MODEL
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_acknowledged_then_durable(nodes: Nodes, gate: Gate) -> None:
    gate.open.clear()
    result = save(nodes, gate, tag="best")
    assert result.version == 0
    with pytest.raises(NotFoundError):
        ms.open(gate.url).load("m")
    assert [nodes.hosts[name].stats().saves for name in "abc"] == [1, 0, 0], "a leads: it is on the saver's node"
    assert sum(nodes.hosts[name].stats().bytes > 0 for name in "abc") == 2
    with pytest.raises(StorageError, match=r"not in .* after 0\.1 s"):
        durable(nodes, gate, result, seconds=0.1)
    assert "takes nothing now" in str(nodes.hosts["a"].stats().problem)
    assert not nodes.hosts["a"].flush(0.01)
    gate.open.set()
    assert durable(nodes, gate, result) == [1]
    assert nodes.hosts["a"].flush(10)
    assert equal(gate, "m@best")
    assert ms.open(gate.url).verify(deep=True).ok


def test_both_let_go_of_what_is_stored(nodes: Nodes, gate: Gate) -> None:
    durable(nodes, gate, save(nodes, gate))
    for host in nodes.hosts.values():
        end = threading.Event()
        for _ in range(500):
            if host.stats().bytes == 0:
                break
            end.wait(0.01)
        assert host.stats().bytes == 0
        assert host.stats().saves == 0


@pytest.mark.parametrize("victim", ["first", "second"])
@pytest.mark.parametrize("then", ["", "the copy's"])
def test_any_one_host_may_die_after_the_acknowledgement(nodes: Nodes, gate: Gate, victim: str, then: str) -> None:
    gate.open.clear()
    result = save(nodes, gate)
    first, second = result.order.keepers
    nodes.kill(first if victim == "first" else second)
    left = second if victim == "first" else first
    third = next(name for name in nodes.hosts if name != left)
    waiting = threading.Event()
    for _ in range(1000):  # the one that is left finds another keeper
        if nodes.hosts[third].versions([result.order.save]):
            break
        waiting.wait(0.01)
    if then:
        nodes.kill(left)
    gate.open.set()
    assert durable(nodes, gate, result) == [1]
    assert equal(gate, "m")


def test_one_version_comes_of_a_save_that_two_hosts_publish(nodes: Nodes, gate: Gate) -> None:
    """As when the first keeper is cut off, but lives."""
    gate.open.clear()
    result = save(nodes, gate)
    first, _ = result.order.keepers
    nodes.leave(first)
    gate.open.set()
    assert durable(nodes, gate, result) == [1]
    for host in nodes.hosts.values():
        assert host.flush(30)
    assert [v.version for v in ms.open(gate.url).versions("m")] == [1]
    assert equal(gate, "m")


def test_versions_come_in_the_order_of_the_saves(nodes: Nodes, gate: Gate) -> None:
    gate.open.clear()
    models_ = [{"w": torch.full((500_000 // (i + 1),), float(i))} for i in range(5)]
    results = [save(nodes, gate, model) for model in models_]
    gate.open.set()
    assert durable(nodes, gate, *results) == [1, 2, 3, 4, 5]
    assert all(equal(gate, f"m@{i + 1}", model) for i, model in enumerate(models_))


@pytest.mark.parametrize("method", [Keeper.reserve, Keeper.write, Keeper.commit])
def test_where_hosts_fail_the_storage_is_saved_to(nodes: Nodes, gate: Gate, method: Callable[..., Any]) -> None:
    nodes.refusing.add(method)
    result = save(nodes, gate, tag="t")
    assert result.version == 1
    assert result.order is None
    assert equal(gate, "m@t")
    assert all(host.stats().saves == 0 for host in nodes.hosts.values())


def test_an_acknowledgement_of_one_host_waits_for_the_storage(nodes: Nodes, gate: Gate) -> None:
    _, second = keepers(nodes.view(), "m", "a")[:2]
    honest = nodes.tell

    def tell(member: str, method: Callable[..., Any], *arguments: Any) -> Any:
        if (member, method) == (second, Keeper.commit):
            raise ConnectionError("gone")
        return honest(member, method, *arguments)

    nodes.tell = tell  # type: ignore[method-assign]
    result = save(nodes, gate)
    assert result.version == 1
    assert equal(gate, "m")


def test_where_hosts_have_no_room_the_storage_takes_it(tmp_path: Path, gate: Gate) -> None:
    nodes = Nodes(tmp_path / "hosts", "ab", limit=1000)
    acknowledge_room, acknowledge._ROOM = acknowledge._ROOM, 0.05
    try:
        result = save(nodes, gate)
    finally:
        acknowledge._ROOM = acknowledge_room
    assert durable(nodes, gate, result) == [1]
    assert equal(gate, "m")


@pytest.mark.parametrize("had", [1, 2])
def test_where_one_node_has_a_host_the_storage_is_saved_to(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, had: int
) -> None:
    """At once where there never were two, else after a bounded wait for the one that is gone."""
    monkeypatch.setattr(acknowledge, "_REPLACED", 0.3)
    nodes = Nodes(tmp_path / "hosts", "a")
    nodes.had = had
    result = save(nodes, gate, tag="best")
    assert (result.version, result.order) == (1, None)
    assert equal(gate, "m@best")
    assert "hosts on two nodes" in caplog.text
    assert (nodes.looks > 0) == (had == 2)


def test_a_host_that_is_being_replaced_is_waited_for(tmp_path: Path, gate: Gate) -> None:
    nodes = Nodes(tmp_path / "hosts", "ab")
    nodes.kill("b")
    nodes.comes_at = 3
    result = save(nodes, gate)
    assert set(result.order.keepers) == {"a", "new"}
    assert durable(nodes, gate, result) == [1]


def test_a_save_that_fails_leaves_nothing(nodes: Nodes, gate: Gate) -> None:
    def store(storage: Storage) -> saving.Outcome:
        storage.put("packs/ab/" + "ab" * 32, [b"x" * 1000], 1000)
        raise ValueError("the source is broken")

    gate.open.clear()
    with pytest.raises(ValueError, match="broken"):
        acknowledge.save(nodes, ["a"], gate, StoreAddress(gate.url), "m", None, store)
    nodes.pool.submit(lambda: None).result()
    waiting = threading.Event()
    for _ in range(500):
        if not any(host.stats().bytes for host in nodes.hosts.values()):
            break
        waiting.wait(0.01)
    assert not any(host.stats().bytes for host in nodes.hosts.values())


def test_what_is_stored_before_the_other_keeper_has_it_is_no_failure(nodes: Nodes, gate: Gate) -> None:
    """The first keeper is quick: it has stored an object when the second one is still being sent it."""
    second = nodes.hosts["b"]
    source, data = StoreAddress(gate.url), np.arange(100, dtype=np.uint8)
    assert second.reserve("s", source, ("a", "b"), "packs/x", 100, 1.0)
    second.write("s", "packs/x", 0, data[:50])
    second.discard("s", "packs/x")
    second.write("s", "packs/x", 50, data[50:], blake3(data.tobytes()).digest())
    assert second.stats().bytes == 0
    assert not list((nodes.root / "b" / "pending").glob("*"))


def test_lost_with_both_hosts_is_said(nodes: Nodes, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acknowledge, "_UNKNOWN", 0.2)
    gate.open.clear()
    result = save(nodes, gate)
    for name in result.order.keepers:
        nodes.kill(name, seen=False)
    with pytest.raises(StorageError, match="both of its hosts are gone"):
        durable(nodes, gate, result)


def test_wrong_bytes_are_not_kept(nodes: Nodes, gate: Gate) -> None:
    host = nodes.hosts["a"]
    source = StoreAddress(gate.url)
    data = np.arange(100, dtype=np.uint8)
    assert host.reserve("s", source, ("a", "b"), "packs/x", 100, 1.0)
    with pytest.raises(CorruptionError, match="other bytes"):
        host.write("s", "packs/x", 0, data, blake3(b"else").digest())
    assert host.stats().bytes == 0
    with pytest.raises(NotFoundError, match="knows nothing"):
        host.write("t", "packs/x", 0, data)


def test_keepers_are_on_nodes_of_their_own() -> None:
    members = [Member(f"{node}{i}", node) for node in "xyz" for i in range(2)]
    view = View(1, tuple(members))
    for model in ("a", "b", "c"):
        chosen = keepers(view, model, "y1")
        assert chosen[0] == "y1"
        assert len({name[0] for name in chosen}) == len(chosen) == 3
        assert keepers(view, model, None) == keepers(view, model, None)
    draining = View(1, (Member("x0", "x", draining=True), Member("y0", "y")))
    assert keepers(draining, "m", "x0") == ["y0"]


def test_what_was_collected_between_its_storing_and_the_announcement_is_saved_again(
    nodes: Nodes, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = acknowledge._hold

    def late(storage: Storage, model: str, id: str, outcome: saving.Outcome, coming: Any) -> None:
        while not any(host.stored(id) for host in nodes.hosts.values()):
            threading.Event().wait(0.01)
        for host in nodes.hosts.values():
            for key in host.stored(id):
                gate.inner.delete(key)
        hold(storage, model, id, outcome, coming)

    monkeypatch.setattr(acknowledge, "_hold", late)
    assert save(nodes, gate).version == 1
    assert equal(gate, "m")
    assert ms.open(gate.url).verify(deep=True).ok


def test_a_save_that_cannot_be_published_holds_up_no_other(
    nodes: Nodes, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, blocked = Catalog.publish_version, threading.Event()

    def refused(self: Any, model: str, writer: str, *rest: Any, **named: Any) -> Any:
        if not blocked.is_set() and writer == first.order.save:
            raise GoneError("something is missing", model=model, object="packs/x", missing=True)
        return publish(self, model, writer, *rest, **named)

    monkeypatch.setattr(write_behind, "_AGAIN", (0.01, 0.02))
    gate.open.clear()
    first = save(nodes, gate)
    others = [save(nodes, gate, {"x": torch.full((9,), float(n))}) for n in range(6)]
    monkeypatch.setattr(Catalog, "publish_version", refused)
    gate.open.set()
    assert durable(nodes, gate, *others) == [1, 2, 3, 4, 5, 6]
    assert "missing" in str(nodes.hosts["a"].stats().problem)
    blocked.set()
    assert durable(nodes, gate, first) == [7]
    assert equal(gate, "m@7")


def test_a_torn_tag_holds_up_no_save(nodes: Nodes, gate: Gate) -> None:
    store = open_on(gate.inner)
    store.save("m", {"x": torch.zeros(3)}, tag="old")
    overwrite(gate.inner, tag_key("m", "old", 1), lambda data: data.clear())
    assert durable(nodes, gate, save(nodes, gate, tag="best"), seconds=5.0) == [2]
    assert store.describe("m@best").version == 2


def test_a_version_that_is_deleted_before_it_is_tagged_holds_up_no_save(
    nodes: Nodes, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tag = Catalog.set_tag

    def deleted(self: Any, model: str, tag: str, version: int, *rest: Any, **named: Any) -> Any:
        if tag == "late":
            self.delete(model, version, None, "another")
        return set_tag(self, model, tag, version, *rest, **named)

    monkeypatch.setattr(Catalog, "set_tag", deleted)
    assert durable(nodes, gate, save(nodes, gate, tag="late"), seconds=5.0) == [1]
    assert durable(nodes, gate, save(nodes, gate), seconds=5.0) == [2]
