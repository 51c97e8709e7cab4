"""A lock that is free in a forked child, and does not stop what has it from being pickled."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet


class Lock:
    """A mutex for `with`. If a thread of the parent held it at a fork, nobody in the child could ever release it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


_all: WeakSet[Lock] = WeakSet()


def _free_all() -> None:
    for lock in list(_all):
        lock._lock = threading.Lock()


os.register_at_fork(after_in_child=_free_all)
