"""A deterministic scheduler: actors on one storage, of which each operation is a step that is granted to it, one at a time.

`explore` goes from every state that interleavings lead to, once: what is stored, and what each actor has been answered, which is
all that tells what it does next; orders of steps that do not matter are left out. `at_random` runs one interleaving that a seed
chooses, in which actors may be killed.
"""

from __future__ import annotations

import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import pytest
from blake3 import blake3
from greenlet import getcurrent, greenlet

import modelstore.client  # noqa: F401  all that has threads
from modelstore.format.handshake import CONDEMNED
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage
from modelstore.testing.faults import Killed
from tests.helpers.partial_order import Dependence, Node, Op, Step, branch

T = TypeVar("T")
CLOCK = "jobs/clock-"
NOW = 1e9


class Inline:
    """An executor that does everything at once, in the thread that asks: so that an actor's steps have one order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, act: Callable[..., T], *arguments: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(act(*arguments))
        except BaseException as error:
            done.set_exception(error)
        return done

    def map(self, act: Callable[..., T], *items: Iterable[Any]) -> list[T]:
        return [act(*arguments) for arguments in zip(*items, strict=False)]

    def shutdown(self, *_: Any, **__: Any) -> None:
        pass

    def give_up(self) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Aged(MemoryStorage):
    """A storage in which everybody has always slept for longer than any grace: whatever was written, it was long ago."""

    def contents(self) -> list[tuple[str, bytes]]:
        """All objects, in the order of their keys."""
        return sorted((key, data) for key, (data, _) in self._shelf.objects.items())

    def info(self, key: str) -> ObjectInfo | None:
        info = super().info(key)
        return info and _aged(info)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        return map(_aged, super().list(prefix, limit=limit, after=after))


def _aged(info: ObjectInfo) -> ObjectInfo:
    return info._replace(modified=NOW if info.key.startswith((CLOCK, CONDEMNED)) else 1.0)


class Stepping(WrappingStorage):
    """The storage as one actor has it: each operation waits until it is granted."""

    def __init__(self, inner: Storage, actor: Actor) -> None:
        super().__init__(inner)
        self._actor = actor

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        self._actor.step(Op(verb, key))
        try:
            answer = act()
        except Exception as error:
            self._actor.heard(verb, key, type(error).__name__)  # what it says names the run
            raise
        self._actor.heard(verb, key, self.inner.get(key) if verb == "read" else answer)
        return answer

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        yield from self.around("list", prefix, lambda: list(self.inner.list(prefix, limit=limit, after=after)))


@dataclass
class Actor:
    """A work that waits before each of its operations; all are coroutines of one thread, which hand over at once."""

    work: Callable[[Storage], Any]
    waiting: Op | None = None
    over: bool = False
    killed: bool = False
    result: Any = None
    error: BaseException | None = None
    name: str = "actor"
    answers: Any = field(default_factory=blake3)  # of its operations, in order
    _self: greenlet = field(default_factory=greenlet)

    def start(self, storage: Storage) -> None:
        """Begin, up to the first operation."""

        def run() -> None:
            try:
                self.result = self.work(Stepping(storage, self))
            except BaseException as error:
                self.error = error
            self.over, self.waiting = True, None

        self._self = greenlet(run)
        self._self.name = self.name  # type: ignore[attr-defined]
        self.grant()

    def heard(self, verb: Verb, key: str, answer: Any) -> None:
        """Note what an operation gave."""
        self.answers.update(f"{verb} {key} {_plain(answer)}\n".encode())

    def step(self, op: Op) -> None:
        """To be called by the actor itself before an operation."""
        if not self.killed:
            self.waiting = op
            self._self.parent.switch()
        if self.killed:
            raise Killed("killed")

    def grant(self) -> None:
        """Let it do what it waits for, and all up to the next operation."""
        self._self.switch()

    def kill(self) -> None:
        """End it before its next operation, which never happens."""
        self.killed = True
        if not self.over:
            self.grant()


def _plain(answer: Any) -> str:
    """An answer without what is another one in each run: identities and times."""
    if isinstance(answer, bytes):
        return _digest(answer)
    if isinstance(answer, ObjectInfo):
        return f"{answer.key} {answer.size}"
    return repr([_plain(item) for item in answer]) if isinstance(answer, list | tuple) else repr(answer)


Check = Callable[[Storage], None]
Setup = Callable[[], Aged]


def inline(patch: pytest.MonkeyPatch) -> None:
    """Let works use no threads of their own."""
    for name, module in list(sys.modules.items()):
        for pool in ("Pool", "ThreadPoolExecutor"):
            if name.startswith("modelstore.") and hasattr(module, pool):
                patch.setattr(module, pool, Inline)


def seeded(patch: pytest.MonkeyPatch) -> None:
    """Let what is random, and the time, be the same in each run: an actor's names do not depend on the others."""
    names: dict[str, random.Random] = {}

    def bits(count: int) -> int:
        me = getattr(getcurrent(), "name", "none")
        return names.setdefault(me, random.Random(me)).getrandbits(count)

    patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=bits(128)))
    patch.setattr(secrets, "token_hex", lambda n=16: bits(8 * n).to_bytes(n, "big").hex())
    patch.setattr(time, "time", lambda: NOW)


class Explored(NamedTuple):
    """How many runs there were, to how many states they led, and how many different things were stored in these."""

    runs: int
    states: int
    stored: int


def explore(
    setup: Setup,
    works: list[Callable[[Storage], Any]],
    check: Check,
    finish: Callable[[Storage, list[Actor]], None],
    visible: Callable[[str], bool] = lambda _: True,
) -> Explored:
    """Run all interleavings, but for those that lead to nothing that another one does not lead to.

    `visible` tells the objects that say to readers which others there are.

    `check` looks at what is stored after each write, `finish` at the end of a run that no other one was the same as.
    """
    explorer = Explorer(works, check, finish, Dependence(visible))
    while explorer.path or not explorer.runs:
        with pytest.MonkeyPatch.context() as patch:
            seeded(patch)
            storage = setup()
            explorer.run(storage)
            for key, _ in storage.contents():
                storage.delete(key)
    return Explored(explorer.runs, len(explorer.later), len(explorer.stored))


@dataclass
class Explorer:
    """Goes through the states that interleavings lead to, depth first; each run begins anew, as a work cannot be copied."""

    works: list[Callable[[Storage], Any]]
    check: Check
    finish: Callable[[Storage, list[Actor]], None]
    depend: Dependence
    runs: int = 0
    path: list[Node] = field(
        default_factory=list
    )  # from each of which a step was taken; the last one has another to take
    later: dict[bytes, set[Step]] = field(default_factory=dict)  # for each state that is done with, what comes after it
    stored: set[bytes] = field(default_factory=set)  # what was checked

    def run(self, storage: Aged) -> None:
        """Take the step that is next, and go on from there to the end, or to a state that is known; find what to do next."""
        self.runs += 1
        begin = max(len(self.path) - 1, 0)
        actors = [Actor(work, name=f"actor {number}") for number, work in enumerate(self.works)]
        try:
            for actor in actors:
                actor.start(storage)
            for node in self.path:
                assert node.ops == _waiting(actors), "a run is not the same again"
                self._grant(storage, actors, node)
            state = _state(storage, actors)
            while state not in self.later and (ops := _waiting(actors)):
                last = self.path[-1].begun[-1] if self.path else None
                node = Node(state, ops, begun=[last if last in ops else min(ops)])
                self.path.append(node)
                self._grant(storage, actors, node)
                state = _state(storage, actors)
            if state not in self.later:
                self.finish(storage, actors)
                self.later[state] = set()
        finally:
            for actor in actors:
                actor.kill()
        branch(self.path, begin, self.later[state], self.depend)
        self._back(self.later[state])

    def _grant(self, storage: Aged, actors: list[Actor], node: Node) -> None:
        actors[node.step.actor].grant()
        if node.step.op.verb in WRITES and not _is_known(_stored(storage), self.stored):
            self.check(storage)

    def _back(self, later: set[Step]) -> None:
        """Go back to the last state from which another step is to be taken, and choose that step."""
        while self.path:
            node = self.path[-1]
            node.later |= later | {node.step}
            if node.todo:
                node.begun.append(node.todo.pop())
                return
            later = self.later[node.state] = node.later
            self.path.pop()


def _waiting(actors: list[Actor]) -> dict[int, Op]:
    return {number: actor.waiting for number, actor in enumerate(actors) if actor.waiting is not None}


def _is_known(digest: bytes, seen: set[bytes]) -> bool:
    """Whether it was seen before; it is from now on."""
    count = len(seen)
    seen.add(digest)
    return len(seen) == count


def _stored(storage: Aged) -> bytes:
    """What is stored, whenever it was."""
    return blake3("".join(f"{key} {_digest(data)}\n" for key, data in storage.contents()).encode()).digest()


@lru_cache(4096)
def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def _state(storage: Aged, actors: list[Actor]) -> bytes:
    """What is stored, what each actor has been answered, and what it waits for."""
    hasher = blake3(_stored(storage))
    for actor in actors:
        hasher.update(f"{actor.waiting} {actor.over} ".encode() + actor.answers.digest())
    return hasher.digest()


def at_random(
    storage: Storage,
    works: list[Callable[[Storage], Any]],
    seed: int,
    check: Check,
    finish: Callable[[Storage, list[Actor]], None],
    mortal: bool = True,
) -> None:
    """One interleaving that a seed chooses: some long runs of one actor, some quick changes, sometimes a death if `mortal`."""
    choose = random.Random(seed)
    actors = [Actor(work) for work in works]
    mortal = mortal and choose.random() < 0.5
    steady = choose.choice([0.0, 0.5, 0.9, 0.97])
    last: Actor | None = None
    try:
        for actor in actors:
            actor.start(storage)
        while any(actor.waiting for actor in actors):
            if last is None or last.waiting is None or choose.random() >= steady:
                last = choose.choice([actor for actor in actors if actor.waiting])
            if mortal and choose.random() < 0.01:
                last.kill()
                continue
            write = last.waiting is not None and last.waiting.verb in WRITES
            last.grant()
            if write:
                check(storage)
        finish(storage, actors)
    finally:
        for actor in actors:
            actor.kill()
