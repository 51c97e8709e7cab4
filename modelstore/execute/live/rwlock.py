"""Many readers or one change: what is read stays as it is until the readers have left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Readers:
    """A lock that many threads hold to read, each as deep as it likes, and one alone to change; a change goes first."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._depths: dict[int, int] = {}  # of threads that read
        self._waiting = 0  # changes that wait or run

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it there is no change."""
        me = threading.get_ident()
        with self._free:
            if me not in self._depths:
                self._free.wait_for(lambda: not self._waiting)
            self._depths[me] = self._depths.get(me, 0) + 1
        try:
            yield
        finally:
            with self._free:
                self._depths[me] -= 1
                if not self._depths[me]:
                    del self._depths[me]
                self._free.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within it nobody reads; it starts when the readers have left."""
        with self._free:
            self._waiting += 1
            try:
                self._free.wait_for(lambda: not self._depths)
                yield
            finally:
                self._waiting -= 1
                self._free.notify_all()

    def check_outside(self) -> None:
        """`RuntimeError` if this thread reads: a change would wait for it forever."""
        if threading.get_ident() in self._depths:
            raise RuntimeError("a swap within reading() would wait for itself: leave the block first")
