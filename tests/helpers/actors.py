"""Works as coroutines of one thread: each stops before every operation of its storage, and goes on with the answer to it."""

from __future__ import annotations

import itertools
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
from blake3 import blake3
from greenlet import getcurrent, greenlet

import modelstore.client  # noqa: F401  all that has threads
from modelstore.storage.base import Storage
from modelstore.testing.faults import Killed
from tests.helpers.stepping import NOW, Answer, Asking, Request

T = TypeVar("T")
Work = Callable[[Storage], Any]
HOURS = -72, 72, 0  # by how much the clocks of actors are ahead of the storage's


class Ended(NamedTuple):
    """What a work gave at last, or how it failed."""

    result: Any = None
    error: BaseException | None = None


class Entered(NamedTuple):
    """A work is within a call now of which only what it leaves behind matters once it is over."""

    call: str


class Returned(NamedTuple):
    """Such a call is over: the last one that was entered; a digest of what it left behind."""

    call: str
    left: bytes


Event = Request | Ended | Entered | Returned


class Actor:
    """A work that goes on only when it is told to.

    It has an address of its own, names that depend on nobody else, and a clock, which is another one on each machine.
    """

    _count = itertools.count()

    def __init__(self, work: Work, number: int, hours: float | None = None) -> None:
        """`hours`: so much is its clock ahead of the storage's; each actor's by another amount, unless said."""
        self.clock = NOW + 3600 * (HOURS[number % len(HOURS)] if hours is None else hours)
        self.url = f"memory://actor-{next(self._count)}"
        self.killed = False
        self._number = number
        self._work = work
        self._drawn = [0]  # names so far, in each call that it is in
        self._self = greenlet(self._run)
        self._self.actor = self  # type: ignore[attr-defined]

    def go(self, answer: Answer = None) -> Event:
        """Begin, or go on with an answer, up to the next event. After `Ended` there is none."""
        event: Event = self._self.switch(answer)
        return event

    def step(self, answer: Answer = None) -> Request | Ended:
        """The same up to the next request, or the end."""
        event = self.go(answer)
        while isinstance(event, Entered | Returned):
            event = self.go()
        return event

    def kill(self) -> Ended:
        """End it here, if it has not ended: whatever it asks for from now on, it is killed again."""
        self.killed = True
        ended: Ended = Ended() if self._self.dead else self._self.switch(None)
        return ended

    @contextmanager
    def within(self, call: str) -> Iterator[list[Any]]:
        """To be used by the actor itself: a call of which the digest that is put into the list is all that matters later."""
        self._tell(Entered(call))
        self._drawn.append(0)
        left: list[Any] = []
        try:
            yield left
        except Exception:
            self._leave(call, *left)
            raise
        self._leave(call, *left)

    def _leave(self, call: str, left: bytes) -> None:
        self._drawn.pop()
        self._drawn[-1] += 1
        self._tell(Returned(call, left + f"{self._drawn}".encode()))  # what is drawn next is left behind too

    def bits(self, count: int) -> int:
        """Random bits: others in each call, and after it, however many were drawn within."""
        drawn = blake3(f"{self._number} {self._drawn}".encode()).digest(count // 8)
        self._drawn[-1] += 1
        return int.from_bytes(drawn, "big")

    def _run(self, _: Answer) -> Ended:
        try:
            return Ended(self._work(Asking(self.url, self._tell)))
        except (Exception, Killed) as error:  # and not what ends the test
            return Ended(error=error)

    def _tell(self, event: Event) -> Answer:
        if self.killed:
            raise Killed("killed")
        answer = self._self.parent.switch(event)
        if self.killed:
            raise Killed("killed")
        return answer


def me() -> Actor | None:
    """The actor that this is called by."""
    return getattr(getcurrent(), "actor", None)


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


def inline(patch: pytest.MonkeyPatch) -> None:
    """Let works use no threads of their own."""
    for name, module in list(sys.modules.items()):
        for pool in ("Pool", "ThreadPoolExecutor"):
            if name.startswith("modelstore.") and hasattr(module, pool):
                patch.setattr(module, pool, Inline)


def seeded(patch: pytest.MonkeyPatch) -> None:
    """Let what is random be an actor's own, and the same each time that it runs; its clock stands still."""
    uuid4, token = uuid.uuid4, secrets.token_hex

    def named() -> uuid.UUID:
        actor = me()
        return uuid.UUID(int=actor.bits(128)) if actor else uuid4()

    def hexed(count: int = 16) -> str:
        actor = me()
        return f"{actor.bits(8 * count):0{2 * count}x}" if actor else token(count)

    patch.setattr(uuid, "uuid4", named)
    patch.setattr(secrets, "token_hex", hexed)
    patch.setattr(time, "time", lambda: actor.clock if (actor := me()) else NOW)
