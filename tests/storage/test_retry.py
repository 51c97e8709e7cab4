"""Retries, and which failures deserve them."""

from __future__ import annotations

import errno
import uuid
from collections import Counter

import pytest

from modelstore.errors import ConflictError, CorruptionError, NotFoundError, StorageError, UnsupportedError
from modelstore.storage.base import Storage
from modelstore.storage.exclusive import prove_exclusive_create
from modelstore.storage.failures import TransientStorageError, failure, transient
from modelstore.storage.faults import CountingStorage, FaultyStorage, Killed
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.retry import RetryingStorage
from modelstore.storage.wrapping import ReadOnlyStorage


@pytest.fixture
def memory() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


def retrying(inner: Storage, sleeps: list[float] | None = None, **options: float) -> RetryingStorage:
    return RetryingStorage(inner, seed=1, sleep=(sleeps if sleeps is not None else []).append, **options)  # type: ignore[arg-type]


class Status(Exception):  # noqa: N818
    def __init__(self, status: int) -> None:
        super().__init__("no")
        self.status = status


PASSING = [
    TimeoutError(),
    ConnectionResetError(),
    BrokenPipeError(),
    EOFError(),
    OSError(errno.ETIMEDOUT, "timed out"),
    Status(429),
    Status(500),
    Status(503),
    TransientStorageError("x"),
    RuntimeError("<Code>SlowDown</Code>"),
]
STAYING = [
    ValueError("x"),
    KeyError("x"),
    FileNotFoundError(),
    PermissionError(),
    OSError(errno.ENOSPC, "full"),
    Status(400),
    Status(403),
    Status(404),
    NotFoundError("x"),
    CorruptionError("x"),
    ConflictError("x"),
    StorageError("x"),
    UnsupportedError("x"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_passing_failures(error: Exception) -> None:
    assert transient(error)
    assert isinstance(failure(error, "k", "read"), TransientStorageError)


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_staying_failures(error: Exception) -> None:
    assert not transient(error)
    assert not isinstance(failure(error, "k", "read"), TransientStorageError)


def test_the_cause_counts() -> None:
    outer = OSError(errno.EIO, "translated")
    outer.__cause__ = Status(503)
    assert transient(outer)
    outer.__cause__ = Status(403)
    assert not transient(outer)


def test_backoff_grows_and_is_capped(memory: Storage) -> None:
    sleeps: list[float] = []
    storage = retrying(FaultyStorage(memory, failing=1.0), sleeps, attempts=12, base_delay=1.0, cap=8.0, patience=1e9)
    with pytest.raises(
        StorageError, match=r"Gave up to get 'a/b' in memory://\w+ after 12 attempts .*: Injected"
    ) as caught:
        storage.get("a/b")
    assert not isinstance(caught.value, TransientStorageError)
    assert caught.value.object == "a/b"
    assert len(sleeps) == 11
    assert all(0 <= slept <= min(8.0, 2.0**number) for number, slept in enumerate(sleeps))
    assert max(sleeps) > 4


def test_patience_ends(memory: Storage) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    storage = RetryingStorage(
        FaultyStorage(memory, failing=1.0), attempts=10**6, patience=60, seed=2, sleep=sleep, clock=lambda: now
    )
    with pytest.raises(StorageError, match="Gave up"):
        storage.get("a")
    assert now <= 60


def test_what_stays_is_asked_once(memory: Storage) -> None:
    counting = CountingStorage(memory)
    with pytest.raises(NotFoundError):
        retrying(counting).get("a")
    assert counting.requests == Counter(get=1)


def test_lost_answers(memory: Storage) -> None:
    storage = retrying(FaultyStorage(memory, losing=0.5, seed=4), attempts=50)
    made = [storage.create(f"k{number}", b"x") for number in range(50)]
    assert True in made
    assert False in made  # written by the attempt whose answer was lost
    assert len(list(memory.list(""))) == 50


def test_put_is_repeated_only_with_its_pieces(memory: Storage) -> None:
    storage = retrying(FaultyStorage(memory, losing=1.0), attempts=3)
    with pytest.raises(StorageError, match="cannot be taken again"):
        storage.put("a", iter([b"x"]), 1)
    with pytest.raises(StorageError, match="after 3 attempts"):
        storage.put("a", [b"x"], 1)
    before = retrying(FaultyStorage(memory, failing=0.9, seed=5), attempts=1000, patience=1e9)
    before.put("b", iter([b"x"]), 1)  # nothing was taken when it failed
    assert memory.get("b") == b"x"


def test_a_broken_listing_goes_on_where_it_was(memory: Storage) -> None:
    for number in range(200):
        memory.create(f"{number:03}", b"")
    storage = retrying(FaultyStorage(memory, failing=0.4, seed=6), attempts=50)
    assert [item.key for item in storage.list("")] == [f"{number:03}" for number in range(200)]
    assert [item.key for item in storage.list("", limit=150)] == [f"{number:03}" for number in range(150)]


def test_counting(memory: Storage) -> None:
    storage = CountingStorage(memory)
    storage.put("a", [b"123", b"45"], 5)
    storage.create("b", b"12")
    storage.read("a", 1, memoryview(bytearray(3)))
    storage.get("a")
    list(storage.list(""))
    assert storage.requests == Counter(put=1, create=1, read=1, get=1, list=1)
    assert storage.bytes == Counter(put=5, create=2, read=3, get=5)
    storage.reset()
    assert not storage.requests


@pytest.mark.parametrize(("after", "there"), [(False, False), (True, True)])
def test_kill(memory: Storage, after: bool, there: bool) -> None:
    storage = FaultyStorage(memory, kill_at=2, kill_after=after)
    storage.create("a", b"x")
    with pytest.raises(Killed):
        storage.put("b", [b"x"], 1)
    with pytest.raises(Killed):
        storage.get("a")
    assert (memory.info("b") is not None) is there


def test_damage(memory: Storage) -> None:
    memory.create("a", b"1234")
    memory.create("b", b"1234")
    storage, out = FaultyStorage(memory, flipped={"a"}, truncated={"b"}), bytearray(4)
    storage.read("a", 0, memoryview(out))
    assert out == b"0234"
    assert storage.get("a") == b"0234"
    assert storage.get("b") == b"12"
    with pytest.raises(CorruptionError):
        storage.read("b", 0, memoryview(out))


def test_stall(memory: Storage) -> None:
    memory.create("a", b"x")
    storage = FaultyStorage(memory, stall_timeout=0.01)
    storage.stall()
    with pytest.raises(TransientStorageError, match="timed out"):
        storage.get("a")
    storage.release()
    assert storage.get("a") == b"x"


def test_a_server_that_ignores_the_condition_is_found_out(memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "create", lambda key, data: memory.put(key, [data], len(data)) is None)
    with pytest.raises(UnsupportedError, match="ignores 'If-None-Match"):
        prove_exclusive_create(memory)
    assert list(memory.list("")) == []


def test_read_only(memory: Storage) -> None:
    memory.create("a", b"x")
    storage = ReadOnlyStorage(memory)
    assert storage.get("a") == b"x"
    for act in (lambda: storage.create("b", b""), lambda: storage.put("b", [], 0), lambda: storage.delete("a")):
        with pytest.raises(UnsupportedError, match="reading only"):
            act()
