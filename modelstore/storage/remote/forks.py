"""Storages whose clients do not live through a fork: the child opens its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from modelstore.storage.base import Storage
from modelstore.storage.wrapping import Verb, WrappingStorage

T = TypeVar("T")


class OpenedAnew(WrappingStorage):
    """A storage over the network. In a process that was forked off, its threads and connections are gone: `again` opens it there.

    A pickle of it is what `reopen` is called with, again: an address and options, without secrets.

    A `DataLoader` forks its workers, and a client that is used in one waits for ever for threads that only the parent has.
    """

    def __init__(self, opened: Storage, anew: Callable[[], Storage], reopen: tuple[Any, ...]) -> None:
        super().__init__(opened)
        self._anew = anew
        self._process = os.getpid()
        self._reopen = reopen

    def __reduce__(self) -> tuple[Any, ...]:
        function, *arguments = self._reopen
        return function, tuple(arguments)

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:  # noqa: ARG002
        return act()

    @property
    def inner(self) -> Storage:
        """The storage of this process."""
        if self._process != os.getpid():
            self._inner, self._process = self._anew(), os.getpid()
        return self._inner

    @inner.setter
    def inner(self, opened: Storage) -> None:
        self._inner = opened
