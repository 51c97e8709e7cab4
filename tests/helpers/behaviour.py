"""What a work does next follows from what it was answered so far: it is found out once for each history, and then known.

Histories that differ only within a call that is over, and left the same behind, count as one: `closing` says of which calls, and
what they leave behind. That is looked at again whenever two become one: both have to ask for the same next; and for some, chosen
at random, to the end.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from modelstore.store.shelf import _good
from modelstore.testing.faults import Killed
from tests.helpers.actors import Actor, Ended, Entered, Event, Returned, Work, me
from tests.helpers.holding import digest
from tests.helpers.stepping import Answer, Request

_ALIVE = 256  # actors that wait where they are, so that they need not be run again up to there
_LOOKED_AT = 5  # of the pairs of histories that became one at a call: so many are followed to the end
_Left = tuple[
    int, str, bytes
]  # the number of the call's beginning at its node, which call it is, and what it left behind
Holds = Callable[..., Any]


@dataclass(eq=False)
class Node:
    """Where a work waits for an answer, or has ended. `answers`: one of the histories that lead here."""

    number: int
    answers: tuple[Answer, ...]
    request: Request | None = None
    ended: Ended | None = None
    after: dict[Answer, Node] = field(default_factory=dict)
    within: list[tuple[dict[_Left, Node], int]] = field(
        default_factory=list
    )  # the calls that it is in: where each began
    over: dict[_Left, Node] = field(default_factory=dict)  # what follows calls that began here


class Behaviour:
    """A work as a function of what it is answered."""

    def __init__(self, work: Work, number: int) -> None:
        self.runs = 0
        self.nodes: list[Node] = []
        self.joined: Counter[str] = Counter()  # for each call, how many histories became one after it
        self._work, self._number = work, number
        self._alive: OrderedDict[int, Actor] = OrderedDict()
        self._ends: dict[bytes, Node] = {}
        self._samples: dict[str, list[tuple[tuple[Answer, ...], Node]]] = {}
        self._choose = random.Random(number)
        actor = self._new()
        self.root = self._settled(actor, actor.go(), (), [])
        self.dead = self._settled(actor, Ended(error=Killed("killed")), (), [])

    def next(self, node: Node, answer: Answer) -> Node:
        """Where the work is after an answer."""
        if answer not in node.after:
            answers = (*node.answers, answer)
            actor = self._alive.pop(node.number, None) or self._run(node.answers)
            node.after[answer] = self._settled(actor, actor.go(answer), answers, node.within)
        return node.after[answer]

    def look(self) -> None:
        """Follow some histories that became one with others: `AssertionError` where one does not go on as the other did."""
        for call, samples in self._samples.items():
            for answers, node in samples:
                actor = self._run(answers[:-1])
                event = actor.step(answers[-1])
                while node.request is not None and node.after:
                    self._same(call, event, node)
                    answer = self._choose.choice(list(node.after))
                    node, event = node.after[answer], actor.step(answer)
                self._same(call, event, node)
                actor.kill()

    def _new(self) -> Actor:
        self.runs += 1
        return Actor(self._work, self._number)

    def _run(self, answers: Iterable[Answer]) -> Actor:
        """The work, up to its request after these answers."""
        actor = self._new()
        event = actor.step()
        for answer in answers:
            assert isinstance(event, Request), "a work is not the same again"
            event = actor.step(answer)
        return actor

    def _settled(
        self, actor: Actor, event: Event, answers: tuple[Answer, ...], within: Iterable[tuple[dict[_Left, Node], int]]
    ) -> Node:
        """Where an event leads to: a new node, or one that other histories led to before."""
        node = Node(len(self.nodes), answers, within=list(within))
        count = 0
        closed: list[tuple[dict[_Left, Node], _Left]] = []
        while isinstance(event, Entered | Returned):
            count += 1
            if isinstance(event, Entered):
                node.within.append((node.over, count))
            else:
                over, number = node.within.pop()
                left = number, event.call, event.left
                if left in over:
                    return self._join(actor, event.call, answers, over[left], closed)
                closed.append((over, left))
            event = actor.go()
        if isinstance(event, Ended):
            node.ended = event
            node = self._ends.setdefault(digest(event.result, event.error, url=actor.url), node)
        else:
            node.request = event
            self._keep(node, actor)
        if node.number == len(self.nodes):
            self.nodes.append(node)
        for over, left in closed:
            over[left] = node
        return node

    def _join(
        self,
        actor: Actor,
        call: str,
        answers: tuple[Answer, ...],
        node: Node,
        closed: Iterable[tuple[dict[_Left, Node], _Left]],
    ) -> Node:
        """Let a history go on as the node does that another one led to."""
        self.joined[call] += 1
        for over, left in closed:
            over[left] = node
        samples = self._samples.setdefault(call, [])
        if len(samples) < _LOOKED_AT or self._choose.random() < 0.01:
            samples[_LOOKED_AT - 1 :] = [(answers, node)]
        self._same(call, actor.step(), node)
        if node.request is not None and node.number not in self._alive:
            self._keep(node, actor)
        else:
            actor.kill()
        return node

    def _keep(self, node: Node, actor: Actor) -> None:
        self._alive[node.number] = actor
        if len(self._alive) > _ALIVE:
            self._alive.popitem(last=False)[1].kill()

    @staticmethod
    def _same(call: str, event: Event, node: Node) -> None:
        """`AssertionError` unless an actor asks for what the node does, or has ended as it has."""
        same = event == node.request if node.request else _alike(event, node.ended)
        assert same, f"{call} leaves behind more than was said: {event} instead of {node.request or node.ended}"


def _alike(one: Event, other: Ended | None) -> bool:
    """Whether two ends are of one kind; what is only said to people may differ."""
    if not isinstance(one, Ended) or other is None:
        return False
    numbers = [end.result if isinstance(end.result, int) else type(end.result) for end in (one, other)]
    return numbers[0] == numbers[1] and type(one.error) is type(other.error)


def closing(patch: pytest.MonkeyPatch, calls: Mapping[str, Holds | None]) -> None:
    """Let what happened within these functions ("module.function" or "module.Class.method") be forgotten when they are over.

    Of each is given what it leaves behind, by its result and its arguments; None: all of those, as they are then. An error that
    it ended with is always left behind, and so is what this process remembers of a storage.
    """
    for name, holds in calls.items():
        module, _, last = name.rpartition(".")
        if module not in sys.modules:
            module, _, kind = module.rpartition(".")
            patch.setattr(
                f"{module}.{kind}.{last}", closed(getattr(vars(sys.modules[module])[kind], last), name, holds)
            )
            continue
        function = vars(sys.modules[module])[last]
        for one in list(sys.modules.values()):  # all that imported it
            if one.__name__.startswith(("modelstore.", "tests.")) and vars(one).get(last) is function:
                patch.setattr(one, last, closed(function, name, holds))


def closed(function: Callable[..., Any], name: str, holds: Holds | None = None) -> Callable[..., Any]:
    """A function as a call that is forgotten when it is over, but for what it leaves behind."""

    @functools.wraps(function)
    def act(*args: Any, **options: Any) -> Any:
        actor = me()
        if actor is None:
            return function(*args, **options)

        def leaves(result: Any, failure: Exception | None) -> bytes:
            held = (result, args, options) if holds is None else holds(result, *args, **options)
            remembered = [(key, info) for (url, key), info in _good.items() if url == actor.url]
            return digest(failure, held, remembered, url=actor.url)

        with actor.within(name) as left:
            try:
                result = function(*args, **options)
            except Exception as error:
                left.append(leaves(None, error))
                raise
            left.append(leaves(result, None))
        return result

    return act
