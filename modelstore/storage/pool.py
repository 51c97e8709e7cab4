"""Threads of one piece of work, and pauses that end when the work does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar
from weakref import WeakSet

from modelstore.errors import CancelledError

T = TypeVar("T")
U = TypeVar("U")
REQUESTS = 16  # threads for small requests, which mostly wait
_AHEAD = 8  # items a thread that are under way or done and not yet taken


class _Work:
    """Whether a piece of work was given up, and the work that its threads started in turn."""

    def __init__(self) -> None:
        self.given_up = threading.Event()
        self.parts: WeakSet[_Work] = WeakSet()

    def give_up(self) -> None:
        self.given_up.set()
        for part in list(self.parts):
            part.give_up()


_mine = threading.local()  # .work: what the current thread works on, where it is a pool's


def pause(seconds: float) -> None:
    """Wait; `CancelledError` as soon as the work of this thread is given up, by an error or by Ctrl-C elsewhere."""
    work: _Work | None = getattr(_mine, "work", None)
    # An event, also where nobody sets it: Ctrl-C ends its wait in the main thread.
    if (work.given_up if work else threading.Event()).wait(seconds):
        raise CancelledError("the work was given up while it waited for the storage")


class Pool(ThreadPoolExecutor):
    """A thread pool whose threads stop waiting, and whose queue is dropped, when its block is left by an error."""

    def __init__(self, threads: int, thread_name_prefix: str = "modelstore") -> None:
        self._work = _Work()
        above: _Work | None = getattr(_mine, "work", None)
        if above is not None:
            above.parts.add(self._work)
        super().__init__(threads, thread_name_prefix, initializer=self._start)

    def give_up(self) -> None:
        """Let the threads finish the operation that they wait for, and start nothing more; does not wait for them."""
        self._work.give_up()
        self.shutdown(wait=False, cancel_futures=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.give_up()
        self.shutdown(wait=True)

    def _start(self) -> None:
        _mine.work = self._work


def ordered(
    act: Callable[[T], U],
    items: Iterable[T],
    threads: int,
    name: str = "modelstore",
    *,
    ahead: int | None = None,
    memory: int | None = None,
    cost: Callable[[T], int] = lambda item: 0,  # noqa: ARG005  items that cost nothing
) -> Generator[U, None, None]:
    """The result of `act` for each item, in the order of the items; `threads` threads of that name do it.

    At most `ahead` items (by default 8 a thread) are under way or wait to be taken, and what they cost is at most `memory`
    bytes, except that one above it is let through alone. Items are asked for in the caller's thread, as there is room for
    them. An error of `act` is raised in the place of its item. A consumer that stops taking, also by an error, starts nothing
    more, and continues when the threads have stopped.
    """
    limit = ahead or _AHEAD * threads
    pool = Pool(threads, thread_name_prefix=name)
    under_way: deque[tuple[Future[U], int]] = deque()
    held = 0
    try:
        for item in items:
            price = cost(item)
            while under_way and (len(under_way) >= limit or (memory is not None and held + price > memory)):
                held -= under_way[0][1]
                yield under_way.popleft()[0].result()  # held by no name here: what is taken is the caller's alone
            under_way.append((pool.submit(act, item), price))
            held += price
        while under_way:
            yield under_way.popleft()[0].result()
    finally:
        pool.give_up()
        pool.shutdown()
