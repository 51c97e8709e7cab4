"""Asking again, with patience that grows and ends."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from modelstore.errors import ModelStoreError, StorageError
from modelstore.format.buffers import Buffer
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.failures import TransientStorageError, UnknownHostError
from modelstore.storage.pool import pause
from modelstore.storage.wrapping import Verb, WrappingStorage

T = TypeVar("T")
PATIENCE = 180.0
FIRST_PATIENCE = 30.0  # with a server that has never answered: more likely the endpoint is wrong
QUIET = 5.0  # seconds that something is tried before a warning says so

log = logging.getLogger("modelstore")


class RetryingStorage(WrappingStorage):
    """Repeats what failed for a passing reason (see `causes`) for `patience` seconds, however often that is.

    The time starts with the first failure, so that a long upload has it too. Pauses grow exponentially to `cap` seconds, with
    full jitter; they end immediately when the work is given up (see `pool`). The `StorageError` that remains names the object,
    the time, the attempts and the last cause. A `create` whose answer was lost returns False when repeated: the caller
    recognises its own bytes. A `put` is repeated if its pieces can be taken again, or none was taken.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        base_delay: float = 0.1,
        cap: float = 10.0,
        patience: float = PATIENCE,
        seed: int | None = None,
        sleep: Callable[[float], None] = pause,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        if patience < 0:
            raise ValueError(f"patience={patience!r} is negative")
        self.base_delay = base_delay
        self.cap = cap
        self.patience = patience
        self.answered = False  # whether the server was ever heard of
        self._random = random.Random(seed)
        self._sleep = sleep
        self._clock = clock

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        trying = _Trying(self, verb, key)
        while True:
            try:
                result = act()
            except ModelStoreError as error:
                trying.wait(error)
            else:
                self.answered = True
                return result

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

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:
        return self.around("sweep", "", lambda: self.inner.sweep(before, dry_run=dry_run))

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        trying, left = _Trying(self, "list", prefix), limit
        while True:
            try:
                for item in self.inner.list(prefix, limit=left, after=after):
                    # A listing that broke off goes on after what was handed out, with new patience.
                    trying, after = _Trying(self, "list", prefix), item.key
                    self.answered = True
                    left = None if left is None else left - 1
                    yield item
            except ModelStoreError as error:
                trying.wait(error)
            else:
                self.answered = True
                return


class _Trying:
    """One operation that is tried until it succeeds or patience ends."""

    def __init__(self, storage: RetryingStorage, verb: Verb, key: str) -> None:
        self._storage = storage
        self._verb = verb
        self._key = key
        self._attempts = 0
        self._since = 0.0
        self._warned = False

    def wait(self, error: ModelStoreError) -> None:
        """Sleep before the next attempt, or raise for good."""
        storage = self._storage
        unreachable = isinstance(error, UnknownHostError) or getattr(error, "unreachable", False)
        storage.answered |= not unreachable
        # A host that answered before has a name: then the network is down, and the endpoint not wrong.
        passes = isinstance(error, TransientStorageError)
        if not passes and not (isinstance(error, UnknownHostError) and storage.answered):
            raise error
        self._attempts += 1
        now = storage._clock()
        if self._attempts == 1:
            self._since = now
        spent = now - self._since
        patience = storage.patience if storage.answered else min(storage.patience, FIRST_PATIENCE)
        if spent >= patience:
            raise StorageError(
                f"{error} (gave up to {self._verb} it after {spent:.0f} s and {self._attempts}"
                f" attempt{'s' * (self._attempts > 1)})",
                object=self._key,
            ) from error
        longest = min(storage.cap, storage.base_delay * 2 ** min(self._attempts - 1, 30))
        if spent > QUIET and not self._warned:
            self._warned = True
            log.warning("%s; trying again for %.0f s", error, patience - spent)
        storage._sleep(min(storage._random.uniform(0, longest), patience - spent))
