"""A deterministic scheduler: actors on one storage, of which each operation is a step that is granted to it, one at a time.

`explore` takes every step of every actor from every state that interleavings lead to: no order of steps is left out. A state is
what is stored, and where each actor is; each is gone on from once. `at_random` runs one interleaving that a seed chooses, in
which actors may be killed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from modelstore.storage.wrapping import WRITES
from tests.helpers.actors import HOURS, Actor, Ended, Work, seeded
from tests.helpers.behaviour import Behaviour
from tests.helpers.stepping import Aged, Contents, Request, perform

Check = Callable[[Aged], None]
Finish = Callable[[Aged, list[Ended]], None]
State = tuple[int, ...]  # the number of what is stored, and that of each actor's node


class Explored(NamedTuple):
    """To how many states the interleavings led, by how many different steps; how many different things were stored in them; how
    many different ends there were; and how often a work had to be run."""

    states: int
    steps: int
    stored: int
    ends: int
    runs: int


def explore(stored: Contents, works: Sequence[Work], check: Check, finish: Finish, *, mortal: bool = False) -> Explored:
    """Run all interleavings of works that begin with this stored; where they are `mortal`, one of them may die before any step.

    `check` looks at what is stored after each write, `finish` at the end of all works. What either of them raises, says by which
    steps it came to that.
    """
    with pytest.MonkeyPatch.context() as patch:
        seeded(patch)
        explorer = _Explorer([Behaviour(work, number) for number, work in enumerate(works)], check, finish, mortal)
        explorer.run(stored)
        for work in explorer.works:
            work.look()
    return Explored(
        len(explorer.before),
        explorer.steps,
        len(explorer.contents),
        explorer.ends,
        sum(work.runs for work in explorer.works),
    )


@dataclass
class _Explorer:
    """Goes through the states, depth first."""

    works: list[Behaviour]
    check: Check
    finish: Finish
    mortal: bool
    steps: int = 0
    ends: int = 0
    contents: list[Contents] = field(default_factory=list)  # all that was ever stored, each once
    before: dict[State, State | None] = field(default_factory=dict)  # from where each state was come to first
    _numbers: dict[frozenset[tuple[str, bytes]], int] = field(default_factory=dict)
    _known: list[dict[tuple[int, int], tuple[int, int]]] = field(default_factory=list)  # for each actor: its steps

    def run(self, stored: Contents) -> None:
        """Go from every state on."""
        self._known = [{} for _ in self.works]
        first = (self._number(stored), *(work.root.number for work in self.works))
        self.before[first] = None
        todo = [first]
        while todo:
            state = todo.pop()
            ended = True
            all_live = all(work.dead.number != node for work, node in zip(self.works, state[1:], strict=True))
            for actor, work in enumerate(self.works):
                if work.nodes[state[actor + 1]].request is not None:
                    ended = False
                    self._go(state, actor, todo)
                    if self.mortal and all_live:
                        self._come(state, actor, (state[0], work.dead.number), todo)
            if ended:
                self._end(state)

    def _go(self, state: State, actor: int, todo: list[State]) -> None:
        at = state[0], state[actor + 1]
        known = self._known[actor]
        if at not in known:
            known[at] = self._step(state, actor)
        self._come(state, actor, known[at], todo)

    def _come(self, state: State, actor: int, to: tuple[int, int], todo: list[State]) -> None:
        """Note to what an actor's step leads: to what is stored, and to the actor's node."""
        self.steps += 1
        stored, node = to
        after = (stored, *state[1 : actor + 1], node, *state[actor + 2 :])
        if after not in self.before:
            self.before[after] = state
            todo.append(after)

    def _step(self, state: State, actor: int) -> tuple[int, int]:
        """What is stored after an actor's next step, and where it is then."""
        work = self.works[actor]
        node = work.nodes[state[actor + 1]]
        assert node.request is not None
        stored, answer = perform(self.contents[state[0]], node.request)
        try:
            return self._number(stored), work.next(node, answer).number
        except BaseException as error:
            self._tell(error, state, f"actor {actor}: {node.request.verb} {node.request.key}")
            raise

    def _number(self, stored: Contents) -> int:
        key = frozenset(stored.items())
        if key not in self._numbers:
            self._numbers[key] = len(self.contents)
            self.contents.append(stored)
            if len(self.contents) > 1:
                self.check(Aged(stored))
        return self._numbers[key]

    def _end(self, state: State) -> None:
        self.ends += 1
        try:
            ends = (work.nodes[number].ended for work, number in zip(self.works, state[1:], strict=True))
            self.finish(Aged(self.contents[state[0]]), [end for end in ends if end is not None])
        except BaseException as error:
            self._tell(error, state)
            raise

    def _tell(self, error: BaseException, state: State, *last: str) -> None:
        """Let an error say after which steps it was."""
        steps: list[str] = []
        at: State | None = state
        while at is not None and (before := self.before[at]) is not None:
            actor = next(n for n, (one, other) in enumerate(zip(before[1:], at[1:], strict=True)) if one != other)
            request = self.works[actor].nodes[before[actor + 1]].request
            assert request is not None
            steps.append(f"actor {actor}: {request.verb} {request.key}")
            at = before
        error.add_note("\n".join((*reversed(steps), *last)))


def at_random(
    stored: Contents, works: Sequence[Work], seed: int, check: Check, finish: Finish, mortal: bool = True
) -> None:
    """One interleaving that a seed chooses: some long runs of one actor, some quick changes, sometimes a death if `mortal`.

    Each actor's clock is chosen, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        seeded(patch)
        _run_at_random(stored, works, random.Random(seed), check, finish, mortal)


def _run_at_random(
    stored: Contents, works: Sequence[Work], choose: random.Random, check: Check, finish: Finish, mortal: bool
) -> None:
    storage = Aged(stored)
    actors = [Actor(work, number, choose.choice(HOURS)) for number, work in enumerate(works)]
    events = [actor.step() for actor in actors]
    mortal = mortal and choose.random() < 0.5
    steady = choose.choice([0.0, 0.5, 0.9, 0.97])
    last: int | None = None
    while waiting := [number for number, event in enumerate(events) if isinstance(event, Request)]:
        if last not in waiting or choose.random() >= steady:
            last = choose.choice(waiting)
        request = events[last]
        assert isinstance(request, Request)
        if mortal and choose.random() < 0.01:
            events[last] = actors[last].kill()
            continue
        storage.stored, answer = perform(storage.stored, request)
        events[last] = actors[last].step(answer)
        if request.verb in WRITES:
            check(storage)
    finish(storage, [event for event in events if isinstance(event, Ended)])
