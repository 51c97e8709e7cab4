"""Asking again, with patience that grows and ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from modelstore.errors import StorageError
from modelstore.format.buffers import Buffer
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.wrapping import Verb, WrappingStorage

T = TypeVar("T")


class RetryingStorage(WrappingStorage):
    """Repeats what failed for a passing reason (see `failures.transient`), with exponential backoff and full jitter.

    Gives up after `attempts`, or once `patience` seconds have gone by: a `StorageError` that names the object, the attempts and
    the last cause. A `create` whose answer was lost returns False when repeated: the caller recognises its own bytes.
    A `put` is repeated only if its pieces can be taken again, or none was taken; the parts of a large one are
    repeated by the backend, which alone still holds them.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        attempts: int = 6,
        base_delay: float = 0.1,
        cap: float = 10.0,
        patience: float = 180.0,
        seed: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        if attempts < 1:
            raise ValueError(f"Invalid attempts: {attempts!r}; at least 1.")
        self.attempts = attempts
        self.base_delay = base_delay
        self.cap = cap
        self.patience = patience
        self._random = random.Random(seed)
        self._sleep = sleep
        self._clock = clock

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        started, attempt = self._clock(), 0
        while True:
            attempt += 1
            try:
                return act()
            except TransientStorageError as error:
                self._wait(verb, key, attempt, started, error)

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        taken = False

        def watched() -> Iterator[Buffer]:
            nonlocal taken
            taken = True
            yield from pieces

        def act() -> None:
            try:
                self.inner.put(key, watched(), size)
            except TransientStorageError as error:
                if taken and iter(pieces) is pieces:
                    raise StorageError(f"{error} (its pieces cannot be taken again)", object=key) from error
                raise

        self.around("put", key, act)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        started, attempt, left = self._clock(), 0, limit
        while True:
            try:
                for item in self.inner.list(prefix, limit=left, after=after):
                    # A listing that broke off goes on after what was handed out, with new patience.
                    started, attempt, after = self._clock(), 0, item.key
                    left = None if left is None else left - 1
                    yield item
                return
            except TransientStorageError as error:
                attempt += 1
                self._wait("list", prefix, attempt, started, error)

    def _wait(self, verb: Verb, key: str, attempt: int, started: float, error: TransientStorageError) -> None:
        """Sleep before the next attempt, or raise for good."""
        delay = self._random.uniform(0, min(self.cap, self.base_delay * 2 ** min(attempt - 1, 30)))
        spent = self._clock() - started
        if attempt >= self.attempts or spent + delay > self.patience:
            raise StorageError(
                f"Gave up to {verb} {key!r} in {self.url} after {attempt} attempt{'s' * (attempt > 1)}"
                f" in {spent:.1f} s: {error}",
                object=key,
            ) from error
        self._sleep(delay)
