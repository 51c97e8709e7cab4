"""Placement against an oracle in plain Python, its properties, and what moves as members come and go."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelstore.plan.placement import Member, View, balanced, draining, holders, joined, left, loads, moved

MASK = 2**64 - 1
GOLDEN = ["7070dab729a22eb4", "a24e7d7901fe3256"]  # BLAKE3 of tables
KEYS: NDArray[np.uint64] = np.random.default_rng(7).integers(0, 2**64, 400, np.uint64)
MANY: NDArray[np.uint64] = np.random.default_rng(8).integers(0, 2**64, 30_000, np.uint64)


@st.composite
def views(draw: st.DrawFn, least: int = 0, most: int = 9, weights: bool = True) -> View:
    """Members on nodes in zones; several may share a node, and some may be heavier."""
    ids = draw(st.lists(st.text(min_size=1, max_size=6), min_size=least, max_size=most, unique=True))
    zones = draw(st.integers(1, 4))
    nodes = draw(st.integers(1, 10))
    members = []
    for name in ids:
        node = draw(st.integers(0, nodes - 1))
        weight = draw(st.sampled_from([1.0, 1.0, 0.3, 2.5])) if weights else 1.0
        members.append(Member(name, f"n{node}", f"z{node % zones}", weight))
    return View(draw(st.integers(0, 2**40)), tuple(sorted(members, key=lambda m: m.id)))


def oracle(view: View, key: int, replicas: int) -> list[int]:
    """The definition, one member at a time: the best score of the best kind, again and again."""
    scores = []
    for member in view.members:
        h = key ^ int.from_bytes(blake3(member.id.encode()).digest()[:8], "little")
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK  # the end of splitmix64
        h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
        u = (((h ^ h >> 31) >> 12) + 0.5) / 2**52
        scores.append(member.weight * member.correction / -math.log(u))
    free = [at for at, m in enumerate(view.members) if not m.draining] or list(range(len(view.members)))
    chosen: list[int] = []
    for _ in range(replicas):
        rest = [at for at in free if at not in chosen]
        taken = [view.members[at] for at in chosen if at >= 0]
        zones, nodes = {m.zone for m in taken}, {(m.zone, m.node) for m in taken}

        def kind(at: int, zones: set[str] = zones, nodes: set[tuple[str, str]] = nodes) -> int:
            member = view.members[at]
            return 2 if member.zone not in zones else int((member.zone, member.node) not in nodes)

        chosen.append(max(rest, key=lambda at: (kind(at), scores[at])) if rest else -1)
    return chosen


def names(view: View, keys: NDArray[np.uint64], replicas: int) -> list[list[str | None]]:
    """Holders by name, None where there is none."""
    return [[view.members[i].id if i >= 0 else None for i in row] for row in holders(view, keys, replicas).tolist()]


def even(count: int, *, zones: int = 1, weight: float = 1.0) -> View:
    """That many members, each on a node of its own."""
    return View(1, tuple(Member(f"m{i:05}", f"n{i}", f"z{i % zones}", weight) for i in range(count)))


@settings(deadline=None)
@given(view=views(), replicas=st.integers(0, 5), drained=st.sets(st.integers(0, 8)))
def test_holders_are_those_of_the_definition(view: View, replicas: int, drained: set[int]) -> None:
    changed = [msgspec.structs.replace(m, draining=at in drained) for at, m in enumerate(view.members)]
    view = View(view.epoch, tuple(changed))
    keys = KEYS[:40]
    found = holders(view, keys, replicas)
    assert found.shape == (len(keys), replicas)
    assert found.dtype == np.int32
    assert found.tolist() == [oracle(view, int(key), replicas) for key in keys]


@settings(deadline=None)
@given(view=views(least=1), replicas=st.integers(1, 4), order=st.randoms(use_true_random=False))
def test_order_and_neighbours_do_not_matter(view: View, replicas: int, order: Any) -> None:
    shuffled = list(view.members)
    order.shuffle(shuffled)
    keys = np.repeat(KEYS[:50], 2)  # each twice, side by side
    mixed = keys[np.argsort(np.arange(100) % 7, kind="stable")]
    expected = dict(zip(KEYS.tolist(), names(view, KEYS[:50], replicas), strict=False))
    other = View(view.epoch + 3, tuple(shuffled))
    assert names(other, keys, replicas) == [expected[key] for key in keys.tolist()]
    assert names(other, mixed, replicas) == [expected[key] for key in mixed.tolist()]


@settings(deadline=None)
@given(view=views(least=1), replicas=st.integers(1, 5))
def test_holders_are_as_far_apart_as_can_be(view: View, replicas: int) -> None:
    zones, nodes = {m.zone for m in view.members}, {m.node for m in view.members}
    for row in holders(view, KEYS[:40], replicas).tolist():
        chosen = [view.members[at] for at in row if at >= 0]
        assert len({m.id for m in chosen}) == len(chosen) == min(replicas, len(view.members))
        assert len({m.zone for m in chosen}) == min(replicas, len(zones))
        assert len({m.node for m in chosen}) == min(replicas, len(nodes))


@settings(deadline=None)
@given(view=views(least=1), gone=st.integers(0, 8))
def test_who_leaves_moves_only_what_it_held(view: View, gone: int) -> None:
    lost = view.members[gone % len(view.members)].id
    after = left(view, [lost])
    assert (after.epoch, len(after.members)) == (view.epoch + 1, len(view.members) - 1)
    zones, nodes = {m.zone for m in view.members}, {m.node for m in view.members}
    free = len(zones) == 1 and len(nodes) in (1, len(view.members))  # nothing need be kept apart, or everything is
    for was, now in zip(names(view, KEYS, 3), names(after, KEYS, 3), strict=True):
        assert was[0] == lost or now[0] == was[0]
        if free:  # the others only move up, so the copy is where reads go next
            stay = [name for name in was if name and name != lost]
            assert now[: len(stay)] == stay


@settings(deadline=None)
@given(view=views(), weight=st.sampled_from([0.3, 1.0, 7.0]), replicas=st.integers(1, 3))
def test_who_joins_takes_keys_for_itself_only(view: View, weight: float, replicas: int) -> None:
    new = Member("a new one", "a node", "a zone", weight)
    after = joined(view, new)
    assert after.epoch == view.epoch + 1
    assert [m.id for m in after.members] == sorted([*(m.id for m in view.members), new.id])
    for was, now in zip(names(view, KEYS, replicas), names(after, KEYS, replicas), strict=True):
        assert now[0] in (was[0], new.id)
    if len({m.zone for m in view.members} - {""}) <= 1 and len({m.node for m in view.members}) == len(view.members):
        same = joined(view, msgspec.structs.replace(new, zone=view.members[0].zone if view.members else ""))
        for was, now in zip(names(view, KEYS, replicas), names(same, KEYS, replicas), strict=True):
            assert set(now) <= {*was, new.id}  # of many, too, where zones do not come in between


@settings(deadline=None)
@given(view=views(least=1), replicas=st.integers(1, 3), order=st.randoms(use_true_random=False), data=st.data())
def test_copies_that_are_made_are_just_those_that_are_missing(
    view: View, replicas: int, order: Any, data: st.DataObject
) -> None:
    after = view
    for member in data.draw(st.lists(st.sampled_from(view.members), max_size=4)):
        what = order.choice([0, 1, 2])
        if what == 0:
            after = left(after, [member.id])
        elif what == 1 and member in after.members:
            after = draining(after, member.id)
        elif what == 2:
            after = joined(after, Member(f"{member.id}'", member.node, member.zone))
    if order.random() < 0.3:  # a host that starts anew elsewhere under its name has nothing
        after = joined(after, msgspec.structs.replace(view.members[0], node="elsewhere"))
    keys = KEYS[:120]
    was, now = names(view, keys, replicas), names(after, keys, replicas)
    nodes = {m.id: m.node for m in view.members}
    alive = {m.id for m in after.members if nodes.get(m.id) == m.node}
    has = [[name for name in row if name in alive] for row in was]
    expected = {(at, name) for at, row in enumerate(now) for name in row if name and name not in has[at]}
    moves = moved(view, after, keys, replicas)
    assert {column.dtype for column in moves} == {np.dtype(np.int64), np.dtype(np.int32)}
    made = [(int(key), after.members[target].id) for key, target in zip(moves.key, moves.target, strict=True)]
    assert len(made) == len(set(made))
    assert set(made) == expected
    assert made == sorted(made, key=lambda one: one[0])
    for key, source in zip(moves.key, moves.source.tolist(), strict=True):
        assert (after.members[source].id if source >= 0 else None) == (has[key][0] if has[key] else None)


def test_names_are_hashed_the_same_everywhere() -> None:
    weighted = View(1, tuple(Member(f"h{i}", f"n{i}", f"z{i % 3}", 1 + i / 4) for i in range(20)))
    equal = even(20, zones=3)
    tables = [holders(view, MANY, 3).astype("<i4").tobytes() for view in (equal, weighted)]
    assert [blake3(table).hexdigest()[:16] for table in tables] == GOLDEN  # clusters of mixed versions must agree


@pytest.mark.parametrize("zones", [1, 3, 40])
def test_every_member_has_its_share(zones: int) -> None:
    view = even(40, zones=zones)
    table = holders(view, MANY, 2)
    mean = len(MANY) / 40
    for rank in (0, 1):
        counts = np.bincount(table[:, rank], minlength=40)
        assert np.abs(counts - mean).max() < 4.5 * math.sqrt(mean)


def test_weights_are_shares() -> None:
    weights = [0.25, 0.5, 1.0, 1.0, 2.0, 3.0, 4.25]
    view = View(1, tuple(Member(f"m{i}", f"n{i}", "", w) for i, w in enumerate(weights)))
    counts = np.bincount(holders(view, MANY, 1)[:, 0], minlength=len(weights))
    expected = np.array(weights) / sum(weights) * len(MANY)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_a_heavier_member_only_gains() -> None:
    view = even(12)
    heavier = joined(view, msgspec.structs.replace(view.members[5], weight=1.5))
    before, after = holders(view, MANY, 1)[:, 0], holders(heavier, MANY, 1)[:, 0]
    assert set(after[before != after].tolist()) == {5}


def test_who_drains_is_home_to_nothing_but_stays() -> None:
    view = even(5)
    after = draining(view, "m00003")
    assert (after.epoch, len(after.members)) == (2, 5)
    assert 3 not in holders(after, MANY, 4)
    assert (holders(after, KEYS, 5)[:, 4] == -1).all()
    moves = moved(view, after, KEYS, 1)
    assert set(moves.source.tolist()) == {3}  # it still serves what it has
    assert names(after, MANY, 2) == names(left(view, ["m00003"]), MANY, 2)
    for member in view.members:
        after = draining(after, member.id)
    assert holders(after, KEYS, 5).min() >= 0  # all of them: then all hold, for nobody else is there
    with pytest.raises(ValueError, match="no member 'x'"):
        draining(view, "x")


def test_leaving_twice_changes_nothing() -> None:
    view = left(even(3), ["m00001"])
    assert left(view, ["m00001", "never"]) is view
    assert [m.id for m in view.members] == ["m00000", "m00002"]


def test_views_without_members_or_keys() -> None:
    assert holders(View(1), KEYS, 2).tolist() == [[-1, -1]] * len(KEYS)
    assert holders(even(3), KEYS[:0], 2).shape == (0, 2)
    assert [len(column) for column in moved(View(1), View(2), KEYS, 2)] == [0, 0, 0]
    assert moved(View(1), even(3), KEYS, 2).source.tolist() == [-1] * (2 * len(KEYS))
    with pytest.raises(ValueError, match="-1 replicas"):
        holders(even(3), KEYS, -1)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e-10])
def test_weights_that_mean_nothing_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="member 'a' has weight"):
        Member("a", "n", weight=weight)
    with pytest.raises(ValueError, match="member 'a' has correction"):
        Member("a", "n", correction=weight)


def test_extreme_weights_still_place_everything() -> None:
    view = View(1, (Member("a", "n", weight=1e-9), Member("b", "o", weight=1e9), Member("c", "p", weight=1e-9)))
    table = holders(view, MANY, 3)
    assert (np.sort(table, axis=1) == [0, 1, 2]).all()
    assert (table[:, 0] == 1).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), replicas=st.integers(1, 2), heavy=st.booleans())
def test_corrections_make_loads_even(seed: int, replicas: int, heavy: bool) -> None:
    rng = np.random.default_rng(seed)
    view = View(1, tuple(Member(f"m{i:03}", f"n{i}", f"z{i % 4}", 1.0 + heavy * (i % 2)) for i in range(60)))
    keys = rng.integers(0, 2**64, 60 * 200, np.uint64)
    nbytes = rng.integers(4 << 20, 12 << 20, len(keys))
    shares = np.array([m.weight for m in view.members]) / sum(m.weight for m in view.members)
    after = balanced(view, keys, nbytes, replicas, within=0.1)
    by_chance, held = loads(view, keys, nbytes, replicas), loads(after, keys, nbytes, replicas)
    assert held.sum() == by_chance.sum() == replicas * nbytes.sum()
    assert (held / held.sum() / shares).max() <= 1.1
    assert after.epoch == view.epoch + ((by_chance / held.sum() / shares).max() > 1.1)  # most often it is
    assert balanced(after, keys, nbytes, replicas, within=0.1) is after
    changed = (holders(view, keys, 1) != holders(after, keys, 1)).mean()
    assert changed < 0.15  # far from a new deal
    weighted = sum(m.weight * m.correction for m in after.members)
    assert weighted == pytest.approx(sum(m.weight for m in after.members), rel=0.01)  # a newcomer gets its share


def test_what_cannot_be_made_even_is_left_at_its_best() -> None:
    lonely = View(1, (*(Member(f"m{i}", f"n{i}", "a") for i in range(9)), Member("x", "n", "b")))  # it gets every key
    nbytes = np.full(len(KEYS), 1 << 20)
    after = balanced(lonely, KEYS, nbytes, 2)
    assert loads(after, KEYS, nbytes, 2)[-1] == nbytes.sum()
    assert all(0.5 <= m.correction <= 2 for m in after.members)
    assert balanced(View(1), KEYS, nbytes, 2) == View(1)
    assert balanced(lonely, KEYS[:0], nbytes[:0], 2) is lonely
    drained = draining(even(8), "m00002")
    assert loads(balanced(drained, MANY, np.full(len(MANY), 1 << 20), 1), MANY, np.ones(len(MANY), np.int64), 1)[2] == 0


def test_threads_do_not_matter() -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, 50_000, np.uint64)
    assert (holders(even(30, zones=3), keys, 2, threads=1) == holders(even(30, zones=3), keys, 2, threads=3)).all()
