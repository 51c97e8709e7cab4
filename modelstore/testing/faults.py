"""Storages for tests and measurements: one that counts, and one that fails on demand."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

from modelstore.format.buffers import Buffer, as_bytes
from modelstore.storage.base import LARGEST, ObjectInfo, Storage
from modelstore.storage.failures import TransientStorageError, ends_before
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage

T = TypeVar("T")


class CountingStorage(WrappingStorage):
    """Counts operations, and the bytes they carried, by verb; an operation that failed counts too."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.requests: Counter[Verb] = Counter()
        self.bytes: Counter[Verb] = Counter()
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self.requests.clear()
            self.bytes.clear()

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:  # noqa: ARG002
        with self._lock:
            self.requests[verb] += 1
        return act()

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        data = super().get(key, limit)
        self._carried("get", len(data))
        return data

    def read(self, key: str, start: int, out: memoryview) -> None:
        super().read(key, start, out)
        self._carried("read", out.nbytes)

    def create(self, key: str, data: Buffer) -> bool:
        self._carried("create", as_bytes(data).nbytes)
        return super().create(key, data)

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        super().put(key, pieces, size)
        self._carried("put", size)

    def _carried(self, verb: Verb, size: int) -> None:
        with self._lock:
            self.bytes[verb] += size


class Killed(BaseException):
    """The process counts as dead: nothing catches this on its way out, and no later operation works."""


class FaultyStorage(WrappingStorage):
    """Fails on demand; every choice follows from `seed` and the order of the operations.

    `failing` is the fraction of operations that fail with a passing error before they do anything, `losing` the
    fraction of writes that take effect and then fail (a lost answer). `delay` seconds pass before each operation.
    The `kill_at`-th write (counted from 1) raises `Killed`, before it takes effect or, with `kill_after`, after; so
    does everything later. Reads of `flipped` keys hand out one wrong bit, reads of `truncated` keys find the object
    cut in half. Operations wait while it is stalled (`stall`, `release`), and fail as a time-out after
    `stall_timeout` seconds.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        seed: int = 0,
        failing: float = 0.0,
        losing: float = 0.0,
        delay: float = 0.0,
        kill_at: int | None = None,
        kill_after: bool = False,
        flipped: Collection[str] = (),
        truncated: Collection[str] = (),
        stall_timeout: float = 30.0,
    ) -> None:
        super().__init__(inner)
        self.failing = failing
        self.losing = losing
        self.delay = delay
        self.kill_at = kill_at
        self.kill_after = kill_after
        self.flipped = set(flipped)
        self.truncated = set(truncated)
        self.stall_timeout = stall_timeout
        self.writes = 0
        self.dead = False
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()

    def stall(self) -> None:
        """Let every operation wait from now on."""
        self._flowing.clear()

    def release(self) -> None:
        """Let the waiting operations go on."""
        self._flowing.set()

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        if not self._flowing.wait(self.stall_timeout):
            raise TransientStorageError(f"Injected: {verb} {key!r} timed out", object=key)
        if self.delay:
            time.sleep(self.delay)
        with self._lock:
            if self.dead:
                raise Killed(f"{verb} {key!r} after the end")
            self.writes += verb in WRITES
            fatal = verb in WRITES and self.writes == self.kill_at
            fails = self._random.random() < self.failing
            loses = verb in WRITES and self._random.random() < self.losing
            self.dead = fatal and not self.kill_after
        if self.dead:
            raise Killed(f"before {verb} {key!r}")
        if fails and not fatal:
            raise TransientStorageError(f"Injected: {verb} {key!r} failed", object=key)
        result = act()
        if fatal:
            self.dead = True
            raise Killed(f"after {verb} {key!r}")
        if loses:
            raise TransientStorageError(f"Injected: the answer to {verb} {key!r} was lost", object=key)
        return result

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        data = super().get(key, limit)
        if key in self.truncated:
            data = data[: len(data) // 2]
        if key in self.flipped and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        return data

    def read(self, key: str, start: int, out: memoryview) -> None:
        if key in self.truncated:
            info = self.inner.info(key)
            if info is not None and start + out.nbytes > info.size // 2:
                raise ends_before(self.url, key, start + out.nbytes)
        super().read(key, start, out)
        if key in self.flipped and out.nbytes:
            out[0] ^= 1

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        # A listing can break half-way, too: every object is an occasion to fail.
        for item in super().list(prefix, limit=limit, after=after):
            yield item
            with self._lock:
                fails = self._random.random() < self.failing / 10
            if fails:
                raise TransientStorageError(f"Injected: the listing of {prefix!r} broke off", object=prefix)
