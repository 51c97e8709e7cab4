"""A deterministic scheduler: actors on one storage, of which each operation is a step that is granted to it, one at a time.

`explore` runs every interleaving of actors that differs from the others in more than the order of steps that have nothing to do
with each other (sleep sets); `at_random` runs one that a seed chooses, in which actors may be killed.
"""

from __future__ import annotations

import random
import secrets
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import pytest

import modelstore.client  # noqa: F401  all that has threads
from modelstore.format.handshake import CONDEMNED
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.faults import Killed
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage

T = TypeVar("T")
CLOCK = "jobs/clock-"
NOW = 1e9
_PATIENCE = 60.0  # seconds of real time after which a step is thought to hang


class Op(NamedTuple):
    """A step: what an actor is about to do."""

    verb: Verb
    key: str


def independent(a: Op, b: Op) -> bool:
    """Whether two steps give the same in either order."""
    if a.verb not in WRITES and b.verb not in WRITES:
        return True
    for one, other in ((a, b), (b, a)):
        if one.verb in ("list", "folders") and other.verb in WRITES:
            return other.key.startswith(CLOCK) or not other.key.startswith(one.key)
    return a.key != b.key


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
        return act()

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        yield from self.around("list", prefix, lambda: list(self.inner.list(prefix, limit=limit, after=after)))


@dataclass
class Actor:
    """A thread that waits before each of its operations."""

    work: Callable[[Storage], Any]
    waiting: Op | None = None
    over: bool = False
    killed: bool = False
    result: Any = None
    error: BaseException | None = None
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _parked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, storage: Storage) -> None:
        """Begin, up to the first operation."""

        def run() -> None:
            try:
                self.result = self.work(Stepping(storage, self))
            except BaseException as error:
                self.error = error
            self.over, self.waiting = True, None
            self._parked.release()

        threading.Thread(target=run, daemon=True).start()
        self._park()

    def step(self, op: Op) -> None:
        """To be called by the actor's own thread before an operation."""
        if self.killed:
            raise Killed("killed")
        self.waiting = op
        self._parked.release()
        assert self._go.acquire(timeout=_PATIENCE)
        if self.killed:
            raise Killed("killed")

    def grant(self) -> None:
        """Let it do what it waits for, and all up to the next operation."""
        self._go.release()
        self._park()

    def kill(self) -> None:
        """End it before its next operation, which never happens."""
        self.killed = True
        if not self.over:
            self.grant()

    def _park(self) -> None:
        assert self._parked.acquire(timeout=_PATIENCE), f"hangs after {self.waiting}"


Check = Callable[[Storage], None]
Setup = Callable[[], Storage]


def inline(patch: pytest.MonkeyPatch) -> None:
    """Let works use no threads of their own."""
    for name, module in list(sys.modules.items()):
        for pool in ("Pool", "ThreadPoolExecutor"):
            if name.startswith("modelstore.") and hasattr(module, pool):
                patch.setattr(module, pool, Inline)


def seeded(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Let names that are random be the same in each run."""
    names = random.Random(seed)
    patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=names.getrandbits(128)))
    patch.setattr(secrets, "token_hex", lambda n=16: names.getrandbits(8 * n).to_bytes(n, "big").hex())


def explore(
    setup: Setup,
    works: list[Callable[[Storage], Any]],
    check: Check,
    finish: Callable[[Storage, list[Actor]], None],
    limit: int,
) -> int:
    """Run all interleavings, or `limit` of them chosen all over: how many were run. `check` looks at it after each write."""
    todo: list[tuple[list[int], Mapping[int, Op]]] = [([], {})]
    runs, choose = 0, random.Random(0)
    while todo and runs < limit:
        prefix, sleep = todo.pop(choose.randrange(len(todo)))
        runs += 1
        with pytest.MonkeyPatch.context() as patch:
            seeded(patch, 0)
            todo += _run(setup(), works, prefix, dict(sleep), check, finish)
    return runs


def _run(
    storage: Storage,
    works: list[Callable[[Storage], Any]],
    prefix: list[int],
    sleep: dict[int, Op],
    check: Check,
    finish: Callable[[Storage, list[Actor]], None],
) -> list[tuple[list[int], Mapping[int, Op]]]:
    """One interleaving that begins with `prefix`; the others that branch off after that."""
    actors = [Actor(work) for work in works]
    branches: list[tuple[list[int], Mapping[int, Op]]] = []
    path: list[int] = []
    try:
        for actor in actors:
            actor.start(storage)
        while True:
            enabled = {i: actor.waiting for i, actor in enumerate(actors) if actor.waiting is not None}
            if not enabled:
                break
            if len(path) < len(prefix):
                chosen = prefix[len(path)]
            else:
                awake = [i for i in enabled if i not in sleep]
                if not awake:
                    return branches  # the same as another one
                awake.sort(key=lambda i: not path or i != path[-1])
                chosen = awake[0]
                before = {**sleep, chosen: enabled[chosen]}
                for other in awake[1:]:
                    mine = enabled[other]
                    branches.append(([*path, other], {i: op for i, op in before.items() if independent(op, mine)}))
                    before[other] = mine
                sleep = {i: op for i, op in sleep.items() if independent(op, enabled[chosen])}
            op = enabled[chosen]  # the same as in the run that this one branched off from
            path.append(chosen)
            actors[chosen].grant()
            if op.verb in WRITES:
                check(storage)
        finish(storage, actors)
    finally:
        for actor in actors:
            actor.kill()
    return branches


def at_random(
    storage: Storage,
    works: list[Callable[[Storage], Any]],
    seed: int,
    check: Check,
    finish: Callable[[Storage, list[Actor]], None],
) -> None:
    """One interleaving that a seed chooses: some long runs of one actor, some quick changes, sometimes a death."""
    choose = random.Random(seed)
    actors = [Actor(work) for work in works]
    mortal = choose.random() < 0.5
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
