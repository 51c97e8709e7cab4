"""Retries, and which failures deserve them."""

from __future__ import annotations

import errno
import threading
import uuid
from collections import Counter
from collections.abc import Callable

import pytest

from modelstore.errors import (
    CancelledError,
    ConflictError,
    CorruptionError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from modelstore.storage.base import Storage
from modelstore.storage.failures import TransientStorageError, UnknownHostError, failure, transient
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.pool import Pool, pause
from modelstore.storage.remote.exclusive import prove_exclusive_create
from modelstore.storage.retry import RetryingStorage
from modelstore.storage.wrapping import ReadOnlyStorage
from modelstore.testing.faults import CountingStorage, FaultyStorage, Killed


@pytest.fixture
def memory() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def retrying(inner: Storage, clock: Clock | None = None, **options: float) -> RetryingStorage:
    clock = clock or Clock()
    return RetryingStorage(inner, seed=1, sleep=clock.sleep, clock=lambda: clock.now, **options)  # type: ignore[arg-type]


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
    assert isinstance(failure(error, "k", "read", "s3://b"), TransientStorageError)


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_staying_failures(error: Exception) -> None:
    assert not transient(error)
    assert not isinstance(failure(error, "k", "read", "s3://b"), TransientStorageError)


def test_the_cause_counts() -> None:
    outer = OSError(errno.EIO, "translated")
    outer.__cause__ = Status(503)
    assert transient(outer)
    outer.__cause__ = Status(403)
    assert not transient(outer)


def test_backoff_grows_and_is_capped(memory: Storage) -> None:
    clock = Clock()
    storage = retrying(FaultyStorage(memory, failing=1.0), clock, base_delay=1.0, cap=8.0, patience=100)
    with pytest.raises(
        StorageError, match=r"Injected: get 'a/b' failed \(gave up to get it after 100 s and \d\d attempts\)"
    ) as caught:
        storage.get("a/b")
    assert not isinstance(caught.value, TransientStorageError)
    assert caught.value.object == "a/b"
    assert all(0 <= slept <= min(8.0, 2.0**number) for number, slept in enumerate(clock.sleeps))
    assert max(clock.sleeps) > 4
    assert len(set(clock.sleeps)) == len(clock.sleeps)  # no two clients come back together
    assert clock.now == pytest.approx(100)


def test_three_minutes_are_tried_however_often(memory: Storage) -> None:
    clock = Clock()
    with pytest.raises(StorageError, match="after 180 s"):
        retrying(FaultyStorage(memory, failing=1.0), clock).get("a")
    assert clock.now == pytest.approx(180)


def test_the_time_begins_with_the_first_failure(memory: Storage) -> None:
    clock = Clock()

    def slowly() -> bool:
        clock.now += 1000  # an upload that takes long, and fails at its end
        if clock.now < 1500:
            raise TransientStorageError("it broke off")
        return True

    assert retrying(memory, clock).around("put", "a", slowly)


def test_a_server_that_never_answered_is_tried_for_less(memory: Storage) -> None:
    clock = Clock()

    def refused() -> None:
        error = TransientStorageError("refused")
        error.unreachable = True
        raise error

    storage = retrying(memory, clock)
    with pytest.raises(StorageError, match="after 30 s"):
        storage.around("get", "a", refused)
    memory.create("a", b"x")
    storage.get("a")
    with pytest.raises(StorageError, match="after 180 s"):
        storage.around("get", "a", refused)


def test_a_name_that_is_not_found_is_no_outage_unless_it_was_found_before(memory: Storage) -> None:
    clock, names = Clock(), iter([UnknownHostError("no host"), UnknownHostError("no host"), None])

    def looked_up() -> None:
        if error := next(names):
            raise error

    storage = retrying(memory, clock)
    with pytest.raises(UnknownHostError):
        storage.around("get", "a", looked_up)
    assert not clock.sleeps
    storage.answered = True
    storage.around("get", "a", looked_up)


def test_pauses_end_when_the_work_is_given_up(memory: Storage) -> None:
    """However long a pause would be: the block is left at once, and the thread is told."""
    waiting, ended = threading.Event(), []

    def wait() -> None:
        try:
            waiting.set()
            pause(3600)
        except CancelledError as error:
            ended.append(error)

    def nested() -> None:
        with Pool(1, "inner") as inner:
            inner.submit(wait).result()

    def broken_by(error: BaseException, act: Callable[[], None]) -> None:
        waiting.clear()
        with pytest.raises(type(error)), Pool(2, "outer") as pool:  # noqa: PT012
            pool.submit(act)
            assert waiting.wait(60)
            raise error

    broken_by(KeyboardInterrupt(), wait)
    broken_by(CancelledError("stop"), nested)
    assert len(ended) == 2


def test_what_stays_is_asked_once(memory: Storage) -> None:
    counting = CountingStorage(memory)
    with pytest.raises(NotFoundError):
        retrying(counting).get("a")
    assert counting.requests == Counter(get=1)


def test_lost_answers(memory: Storage) -> None:
    storage = retrying(FaultyStorage(memory, losing=0.5, seed=4), patience=1e9)
    made = [storage.create(f"k{number}", b"x") for number in range(50)]
    assert True in made
    assert False in made  # written by the attempt whose answer was lost
    assert len(list(memory.list(""))) == 50


def test_put_is_repeated_only_with_its_pieces(memory: Storage) -> None:
    storage = retrying(FaultyStorage(memory, losing=1.0))
    with pytest.raises(StorageError, match="cannot be taken again"):
        storage.put("a", iter([b"x"]), 1)
    with pytest.raises(StorageError, match="gave up to put it after 180 s"):
        storage.put("a", [b"x"], 1)
    before = retrying(FaultyStorage(memory, failing=0.9, seed=5), patience=1e9)
    before.put("b", iter([b"x"]), 1)  # nothing was taken when it failed
    assert memory.get("b") == b"x"


def test_a_broken_listing_goes_on_where_it_was(memory: Storage) -> None:
    for number in range(200):
        memory.create(f"{number:03}", b"")
    storage = retrying(FaultyStorage(memory, failing=0.4, seed=6), patience=1e9)
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
