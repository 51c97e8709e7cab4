"""Readers ask holders: the home first, others when it is late, dead or wrong; nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from blake3 import blake3

from modelstore.cluster.pieces import Piece, StoreAddress, section_keys
from modelstore.cluster.read import hedging
from modelstore.cluster.read.hedging import Hedged
from modelstore.format.buffers import Bytes
from modelstore.plan.placement import Member, View, holders

SOURCE = StoreAddress("/nowhere")
VIEW = View(1, tuple(Member(f"m{i}", f"n{i}") for i in range(3)))


class Hosts:
    """Holders in this process: each answers, fails, or stays silent."""

    def __init__(self, data: dict[bytes, bytes]) -> None:
        self.data = data
        self.asked: list[tuple[str, bool, int]] = []
        self.dead: set[str] = set()
        self.silent: set[str] = set()
        self.slow: dict[str, threading.Event] = {}
        self.holds: dict[str, set[bytes]] = {}
        self._pending: list[Future[Sequence[Bytes | None]]] = []

    def ask(
        self, member: str, source: StoreAddress, parts: Sequence[Piece], fetch: bool
    ) -> Future[Sequence[Bytes | None]]:
        assert source == SOURCE
        self.asked.append((member, fetch, len(parts)))
        future: Future[Sequence[Bytes | None]] = Future()
        if member in self.dead:
            future.set_exception(RuntimeError(f"{member} is dead"))
        elif member in self.silent:
            self._pending.append(future)
        elif member in self.slow and fetch:
            event = self.slow[member]
            threading.Thread(target=lambda: (event.wait(30), self._answer(future, member, parts, fetch))).start()
        else:
            self._answer(future, member, parts, fetch)
        return future

    def _answer(self, future: Future[Sequence[Bytes | None]], member: str, parts: Sequence[Piece], fetch: bool) -> None:
        held = self.holds.get(member, set())
        future.set_result(
            [np.frombuffer(self.data[p.digest], np.uint8) if fetch or p.digest in held else None for p in parts]
        )

    def alive(self, member: str) -> Future[bool]:
        future: Future[bool] = Future()
        if member not in self.silent:
            future.set_result(True)
        return future


def world(n: int = 40) -> tuple[Hosts, list[Piece]]:
    data = [bytes([i % 251]) * (100 + i) for i in range(n)]
    parts = [Piece(blake3(d).digest(), f"{i % 4:064x}", i * 3_000_000, len(d)) for i, d in enumerate(data)]
    return Hosts({p.digest: d for p, d in zip(parts, data, strict=True)}), parts


def read(hosts: Hosts, parts: list[Piece], replicas: int = 2, **options: float) -> tuple[dict[bytes, bytes], Hedged]:
    asker = Hedged(hosts.ask, hosts.alive, **options)
    found = asker.read(VIEW, replicas, SOURCE, parts)
    return {digest: bytes(data) for digest, data in found.items()}, asker


def homes(parts: list[Piece]) -> list[str]:
    return [VIEW.members[i].id for i in holders(VIEW, section_keys(parts), 1)[:, 0]]


def test_each_home_is_asked_once_for_all_of_its_pieces() -> None:
    hosts, parts = world()
    found, asker = read(hosts, parts)
    assert found == hosts.data
    assert sorted(member for member, _, _ in hosts.asked) == sorted(set(homes(parts)))
    assert sum(n for _, _, n in hosts.asked) == len(parts)
    assert asker.counts.hedged == 0
    assert sum(asker.counts.bytes.values()) == sum(map(len, hosts.data.values()))


@pytest.mark.parametrize("victim", ["m0", "m1", "m2"])
def test_a_dead_holder_costs_no_wait(victim: str) -> None:
    hosts, parts = world()
    hosts.dead.add(victim)
    found, asker = read(hosts, parts, hedge=60.0)  # no hedge could come in time
    assert found == hosts.data
    assert asker.suspects() == [victim]
    hosts.asked.clear()
    assert {d: bytes(b) for d, b in asker.read(VIEW, 2, SOURCE, parts).items()} == hosts.data
    assert victim not in [member for member, _, _ in hosts.asked], "a suspect is asked last"


def test_a_silent_home_is_hedged_to_who_holds_a_copy() -> None:
    hosts, parts = world()
    hosts.silent.add("m1")
    hosts.holds = {m: set(hosts.data) for m in ("m0", "m2")}
    found, asker = read(hosts, parts, hedge=0.02)
    assert found == hosts.data
    assert asker.counts.hedged >= 1
    assert {fetch for member, fetch, _ in hosts.asked if member != "m1"} == {True, False}, "a hedge does not fetch"


def test_a_silent_holder_that_another_one_overtook_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedging, "_LIVES", 0.0)
    hosts, parts = world()
    hosts.silent.add("m1")
    hosts.holds = {m: set(hosts.data) for m in ("m0", "m2")}
    _, asker = read(hosts, parts, hedge=0.02)
    hosts.asked.clear()
    hedged = asker.counts.hedged
    assert {d: bytes(b) for d, b in asker.read(VIEW, 2, SOURCE, parts).items()} == hosts.data
    assert asker.suspects() == ["m1"]
    assert "m1" not in [member for member, _, _ in hosts.asked]
    assert asker.counts.hedged == hedged, "nobody waited"


def test_an_overtaken_holder_that_lives_is_no_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is only slow: whoever asked another one for what it is about to have would have it fetched twice."""
    monkeypatch.setattr(hedging, "_LIVES", 0.0)
    hosts, parts = world()
    hosts.slow["m1"] = threading.Event()
    hosts.holds = {m: set(hosts.data) for m in ("m0", "m2")}
    found, asker = read(hosts, parts, hedge=0.02)
    assert found == hosts.data
    assert asker.counts.hedged >= 1
    hosts.slow.pop("m1").set()
    hosts.asked.clear()
    asker.read(VIEW, 2, SOURCE, parts)
    assert asker.suspects() == []
    assert "m1" in [member for member, _, _ in hosts.asked], "it is asked first as before"


def test_a_slow_home_is_waited_for_rather_than_fetched_twice() -> None:
    hosts, parts = world()
    slow = hosts.slow["m1"] = threading.Event()
    asker = Hedged(hosts.ask, hosts.alive, hedge=0.02)
    waited = threading.Event()
    alive = hosts.alive

    def answers(member: str) -> Future[bool]:  # asked only after a hedge that brought nothing: then it is let go
        waited.set()
        slow.set()
        return alive(member)

    asker._alive = answers
    found = asker.read(VIEW, 2, SOURCE, parts)
    assert {d: bytes(b) for d, b in found.items()} == hosts.data
    assert waited.is_set()
    assert asker.suspects() == []
    fetched = sum(n for _, fetch, n in hosts.asked if fetch)
    assert fetched == len(parts), "nobody else fetched what the slow home was fetching"


def test_what_nobody_gives_is_missing() -> None:
    hosts, parts = world()
    hosts.dead = {"m0", "m1", "m2"}
    assert read(hosts, parts)[0] == {}
    assert read(hosts, [])[0] == {}
    asker = Hedged(hosts.ask, hosts.alive)
    assert asker.read(View(1), 2, SOURCE, parts) == {}


def test_an_answer_of_another_length_is_none() -> None:
    hosts, parts = world()
    wrong = parts[0]
    hosts.data[wrong.digest] += b"more"
    found, _ = read(hosts, parts)
    assert wrong.digest not in found
    assert len(found) == len(parts) - 1
