"""Threads of one piece of work, and pauses that end when the work does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from weakref import WeakSet

from modelstore.errors import CancelledError


class _Work:
    """Whether a piece of work was given up, and the work that its threads began in turn."""

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
        """Let the threads end what they wait for, and begin nothing more; does not wait for them."""
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
