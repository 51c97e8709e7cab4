"""The explorer of interleavings finds all that there is to find: the same as every order of steps, one after the other."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import NotFoundError
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import WRITES
from tests.helpers.interleaving import Actor, Aged, explore

KEYS = "a/1", "a/2", "b/1"
Act = tuple[str, str]
acts = st.tuples(st.sampled_from(["get", "put", "create", "delete", "list", "info"]), st.sampled_from(KEYS))
programs = st.one_of(
    st.lists(st.lists(acts, min_size=1, max_size=4), min_size=2, max_size=2),
    st.lists(st.lists(acts, min_size=1, max_size=2), min_size=3, max_size=3),
)


def working(program: list[Act]) -> Callable[[Storage], Any]:
    """Do all of a program; what is written tells all that was heard before, and where it is written to depends on it."""

    def work(storage: Storage) -> None:
        heard: list[Any] = []
        for verb, key in program:
            if verb == "list":
                heard.append([info.key for info in storage.list(key[:2])])
            elif verb == "get":
                try:
                    heard.append(storage.get(key))
                except NotFoundError:
                    heard.append(None)
            elif verb == "info":
                heard.append(storage.info(key) is None)
            elif verb == "delete":
                storage.delete(key if heard[-1:] != [None] else KEYS[0])
            else:
                data = repr(heard).encode()
                heard.append(storage.create(key, data) if verb == "create" else storage.put(key, [data], len(data)))

    return work


def fresh() -> Aged:
    storage = Aged(uuid.uuid4().hex)
    storage.put(KEYS[0], [b"before"], 6)
    return storage


def orders(counts: list[int]) -> Iterator[list[int]]:
    """All orders of so many steps of each actor."""
    if not any(counts):
        yield []
    for actor, count in enumerate(counts):
        if count:
            for rest in orders([n - (i == actor) for i, n in enumerate(counts)]):
                yield [actor, *rest]


Found = tuple[set[Any], set[Any]]
Works = list[Callable[[Storage], Any]]


def by_every_order(works: Works, counts: list[int], visible: Callable[[str], bool]) -> Found:
    """What is stored at any visible write, and what there is at the end, over all orders."""
    stored, ends = set(), set()
    for order in orders(counts):
        storage = fresh()
        actors = [Actor(work) for work in works]
        for actor in actors:
            actor.start(storage)
        for chosen in order:
            op = actors[chosen].waiting
            actors[chosen].grant()
            if op is not None and op.verb in WRITES and visible(op.key):
                stored.add(tuple(storage.contents()))
        assert all(actor.over for actor in actors)
        ends.add(_end(storage, actors))
    return stored, ends


def _end(storage: Aged, actors: list[Actor]) -> Any:
    return (tuple(storage.contents()), *(actor.answers.digest() for actor in actors))


@pytest.mark.parametrize("prefix", ["", "b/", "none"])
@settings(max_examples=40, deadline=None)
@given(programs)
def test_it_finds_all_that_every_order_leads_to(prefix: str, listed: list[list[Act]]) -> None:
    def visible(key: str) -> bool:
        return key.startswith(prefix)

    works = [working(program) for program in listed]
    stored, ends = set(), set()
    explore(fresh, works, lambda s: stored.add(tuple(s.contents())), lambda *end: ends.add(_end(*end)), visible)  # type: ignore
    expected, last = by_every_order(works, [len(program) for program in listed], visible)
    assert stored >= expected
    assert ends == last


def test_steps_that_do_not_touch_each_other_are_run_in_one_order() -> None:
    works = [working([("get", key)] * 20) for key in KEYS]
    assert explore(fresh, works, lambda _: None, lambda *_: None).runs == 1
