"""Which orders of steps need not be run, as they lead to nothing that another one does not lead to.

Dynamic partial order reduction (Flanagan and Godefroid, POPL 2005); of a state seen before, what came after it then counts (Yang,
Chen, Gopalakrishnan, Kirby, "Efficient Stateful Dynamic Partial Order Reduction", SPIN 2008). No actor waits for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from modelstore.storage.wrapping import WRITES, Verb


class Op(NamedTuple):
    """A step: what an actor is about to do."""

    verb: Verb
    key: str


class Step(NamedTuple):
    """Whose step, and which."""

    actor: int
    op: Op


@dataclass(eq=False)
class Node:
    """A state on the way of a run."""

    state: bytes
    ops: dict[int, Op]  # the next one of each actor that has one
    begun: list[int] = field(default_factory=list)  # whose step was taken from here, the last one just now
    todo: list[int] = field(default_factory=list)  # whose step is to be taken from here too
    later: set[Step] = field(default_factory=set)  # all that was seen to come after it

    def add(self, actor: int) -> None:
        """Let the step of an actor be taken from here, too."""
        if actor not in self.begun and actor not in self.todo:
            self.todo.append(actor)

    @property
    def step(self) -> Step:
        """The one that was taken from here last."""
        return Step(self.begun[-1], self.ops[self.begun[-1]])


@dataclass(frozen=True)
class Dependence:
    """Whether the order of two steps of two actors may matter.

    It does if one writes what the other reads or writes. And it does if both write and one makes something visible: so all that
    is stored at the time of a visible write is seen; what is lost at another time is lost until then, or until the end.
    """

    visible: Callable[[str], bool]  # whether an object of this key says to readers which others there are

    @lru_cache(1 << 16)  # noqa: B019  it lives as long as one exploration
    def __call__(self, one: Op, other: Op) -> bool:
        write, rewrite = one.verb in WRITES, other.verb in WRITES
        if write and rewrite and (self.visible(one.key) or self.visible(other.key)):
            return True
        return (write or rewrite) and (_touches(one, other.key) or _touches(other, one.key))


def _touches(op: Op, key: str) -> bool:
    return key.startswith(op.key) if op.verb in ("list", "folders") else key == op.key


def branch(path: Sequence[Node], begin: int, later: Iterable[Step], depend: Dependence) -> None:
    """Note at the nodes of a run whose step is to be taken there too: one that could come before what it depends on.

    Steps before `begin` were looked at before. `later` are steps that may come after the run's last one.
    """
    steps = [node.step for node in path]
    causes = _causes(steps, depend)
    own: dict[int, int] = {}  # what the last step of each actor so far follows from
    for late, step in enumerate(steps):
        if late >= begin:
            _add(path, steps[:late], step, own.get(step.actor, 0), depend)
        own[step.actor] = causes[late]
    for step in later:
        _add(path, steps, step, own.get(step.actor, 0), depend)


def _add(path: Sequence[Node], before: Sequence[Step], step: Step, causes: int, depend: Dependence) -> None:
    for at, other in enumerate(before):
        if other.actor != step.actor and not causes >> at & 1 and depend(other.op, step.op):
            path[at].add(step.actor)


def _causes(steps: Sequence[Step], depend: Dependence) -> list[int]:
    """For each step, all that it follows from, and itself: bit k is step k."""
    causes: list[int] = []
    for at, (actor, op) in enumerate(steps):
        mine = 1 << at
        for k in range(at - 1, -1, -1):
            if not mine >> k & 1 and (steps[k].actor == actor or depend(steps[k].op, op)):
                mine |= causes[k]
        causes.append(mine)
    return causes
