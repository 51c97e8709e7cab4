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
from modelstore.testing.faults import Killed
from tests.helpers.actors import Actor, Ended, Work
from tests.helpers.behaviour import closed
from tests.helpers.interleaving import explore
from tests.helpers.stepping import Contents, Request, perform

KEYS = "a/1", "a/2", "b/1"
FIRST: Contents = {KEYS[0]: b"before"}
Act = tuple[str, str]
Part = list[Act]  # of several, all but the last answer is forgotten
acts = st.tuples(st.sampled_from(["get", "put", "create", "delete", "list", "info"]), st.sampled_from(KEYS))
calls = st.one_of(acts.map(lambda act: [act]), st.lists(acts, min_size=2, max_size=2))
programs = st.one_of(
    st.lists(st.lists(calls, min_size=1, max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(calls, min_size=1, max_size=1), min_size=3, max_size=3),
)


def working(program: list[Part]) -> Work:
    """Do all of a program; what is written tells all that is held of what was heard, and where it is written to depends on it."""

    def work(storage: Storage) -> str:
        heard: list[Any] = []

        def call(part: Part) -> Any:
            within = list(heard)
            for act in part:
                within.append(_do(storage, *act, within))
            return within[-1]

        for part in program:
            heard += [call(part) if len(part) == 1 else closed(call, "call", lambda result, *_: result)(part)]
        return repr(heard)

    return work


def _do(storage: Storage, verb: str, key: str, heard: list[Any]) -> Any:
    if verb == "list":
        return [info.key for info in storage.list(key[:2])]
    if verb == "get":
        try:
            return storage.get(key)
        except NotFoundError:
            return None
    if verb == "info":
        return storage.info(key) is None
    if verb == "delete":
        return storage.delete(key if heard[-1:] != [None] else KEYS[0])
    data = repr(heard).encode()
    return storage.create(key, data) if verb == "create" else storage.put(key, [data], len(data))


def orders(counts: list[int]) -> Iterator[list[int]]:
    """All orders of so many steps of each actor."""
    if not any(counts):
        yield []
    for actor, count in enumerate(counts):
        if count:
            for rest in orders([n - (i == actor) for i, n in enumerate(counts)]):
                yield [actor, *rest]


Found = tuple[set[Any], set[Any]]


def by_every_order(works: list[Work], counts: list[int]) -> Found:
    """What is stored at any time, and what there is at the end, over all orders."""
    stored, ends = {_as_set(FIRST)}, set()
    for order in orders(counts):
        now = FIRST
        actors = [Actor(work, number) for number, work in enumerate(works)]
        events = [actor.step() for actor in actors]
        for chosen in order:
            request = events[chosen]
            assert isinstance(request, Request)
            now, answer = perform(now, request)
            events[chosen] = actors[chosen].step(answer)
            stored.add(_as_set(now))
        assert all(isinstance(event, Ended) for event in events)
        ends.add(_end(now, [event for event in events if isinstance(event, Ended)]))
    return stored, ends


def by_exploring(works: list[Work]) -> Found:
    """The same by the explorer."""
    stored, ends = {_as_set(FIRST)}, set()
    explore(FIRST, works, lambda s: stored.add(_as_set(s.stored)), lambda s, found: ends.add(_end(s.stored, found)))
    return stored, ends


def _as_set(stored: Contents) -> frozenset[tuple[str, bytes]]:
    return frozenset(stored.items())


def _end(stored: Contents, ends: list[Ended]) -> Any:
    return (_as_set(stored), *(end.result for end in ends))


@settings(max_examples=100, deadline=None)
@given(programs)
def test_it_finds_all_that_every_order_leads_to(listed: list[list[Part]]) -> None:
    works = [working(program) for program in listed]
    assert by_exploring(works) == by_every_order(works, [sum(map(len, program)) for program in listed])


def writing(storage: Storage) -> None:
    """What another work hears of, or not."""
    storage.put(KEYS[2], [b"there"], 5)


def telling(how: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Work:
    """Look for an object within a call, which notes in a list what it saw; tell that at last."""

    def work(storage: Storage) -> str:
        seen: list[bool] = []

        def look(noted: list[bool]) -> None:
            noted.append(storage.info(KEYS[2]) is None)

        how(look)(seen)
        storage.put(KEYS[1], [repr(seen).encode()], len(repr(seen)))
        return repr(seen)

    return work


def test_what_a_call_changes_of_what_it_was_given_is_left_behind() -> None:
    _, ends = by_exploring([telling(lambda look: closed(look, "look")), writing])
    assert {end[1] for end in ends} == {"[True]", "[False]"}


def test_what_a_call_leaves_behind_unsaid_is_noticed() -> None:
    with pytest.raises(AssertionError, match="look leaves behind more than was said"):
        by_exploring([telling(lambda look: closed(look, "look", lambda *_: None)), writing])


def test_it_is_noticed_at_whatever_step_it_shows() -> None:
    """Here not at the next one: so it is histories followed to the end that tell."""

    def work(storage: Storage) -> None:
        seen: list[bool] = []
        closed(lambda: seen.append(storage.info(KEYS[2]) is None), "look", lambda *_: None)()
        for _ in range(3):
            storage.info(KEYS[0])
        storage.delete(KEYS[seen[0]])

    with pytest.raises(AssertionError, match="look leaves behind more than was said"):
        by_exploring([work, writing])


def test_what_cannot_be_looked_into_is_an_error() -> None:
    _, ends = by_exploring([lambda storage: closed(lambda _: storage.info(KEYS[0]), "look")(iter([]))])
    assert ends == {(_as_set(FIRST), None)}


def test_names_drawn_within_a_call_are_not_drawn_again_after_it() -> None:
    """However many they were, what comes later has the same name in both histories, and another one than those."""

    def name(storage: Storage) -> str:
        key = f"c/{uuid.uuid4().hex}"
        assert storage.create(key, b"")
        return key

    def maybe(storage: Storage) -> None:
        if storage.info(KEYS[2]):
            name(storage)

    _, ends = by_exploring([lambda storage: (closed(maybe, "maybe")(storage), name(storage))[1], writing])
    assert sorted(len(stored) for stored, *_ in ends) == [3, 4]
    assert len({name for _, name, _ in ends}) == 1


def test_one_of_the_works_dies_before_any_of_its_steps() -> None:
    program = [[("put", key)] for key in KEYS[:2]]
    ends: set[Any] = set()
    works = [working(program), working([[("info", KEYS[2])]])]
    found = explore(FIRST, works, lambda _: None, lambda s, e: ends.add((len(s.stored), *map(_died, e))), mortal=True)
    assert ends == {(2, False, False), (2, False, True), (1, True, False)}
    assert found.ends == 4  # what the first put replaces was there still when it died, or not


def _died(end: Ended) -> bool:
    return isinstance(end.error, Killed)
