"""Storage that fails, loses answers, is slow or stalls: work ends right, or with one error that says what failed."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelstore as ms
from modelstore.cli.main import app
from modelstore.client import Store
from modelstore.errors import NotFoundError, StorageError
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.open import open_storage
from modelstore.storage.retry import RetryingStorage
from modelstore.testing.faults import CountingStorage, FaultyStorage
from tests.helpers.stores import (
    all_bits,
    bits,
    contents,
    copy_all,
    journal,
    open_on,
    overwrite,
    pack_sizes,
    shrink,
    weights,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks and packs, so that there are many requests to fail."""
    shrink(monkeypatch)


def cycle(store: Store, files: Path) -> None:
    """A store's life: saves of each kind, reads of each kind, deletion and collection."""
    one, two = all_bits(weights(1)), all_bits(weights(2))
    assert store.save("acme/m", files, tag="prod").version == 1
    assert store.save("acme/m", weights(2), codec="delta", parent="acme/m@1").version == 2
    assert store.save("acme/m", weights(2), codec="raw", grid="whole").version == 3
    assert all_bits(store.load("acme/m@prod")) == one
    assert all_bits(dict(store.stream("acme/m@2"))) == two
    assert all_bits(store.load("acme/m")) == two
    part = store.load("acme/m@1", shard={"large": ((32, 64), (100, 300))})
    assert all_bits(part) == {"large": bits(weights(1)["large"][32:64, 100:300])}
    assert torch.equal(store.tensor("acme/m@1", "head")[7, 50:], weights(1)["head"][7, 50:])
    assert store.diff("acme/m@2", "acme/m@3").changed == ()
    assert store.verify(deep=True).ok
    store.delete("acme/m@3")
    store.untag("acme/m", "prod")
    store.gc(dry_run=False, grace=0)
    assert contents(store) == {"acme/m": ({1: {"original": one}, 2: {"original": two}}, {})}
    assert store.verify(deep=True).ok
    store.delete("acme/m", all=True)
    store.gc(dry_run=False, grace=0)
    assert contents(store) == {}
    assert not pack_sizes(store.repo.storage)
    assert not journal(store.repo.storage)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The first weights, as a checkpoint."""
    save_file(weights(1), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def patient(storage: FaultyStorage) -> RetryingStorage:
    """As every remote storage is wrapped; no time is spent between attempts."""
    return RetryingStorage(storage, sleep=lambda _: None)


@pytest.mark.parametrize("seed", range(4))
def test_one_request_in_five_fails(seed: int, files: Path) -> None:
    faulty = FaultyStorage(MemoryStorage(uuid.uuid4().hex), seed=seed, failing=0.2, losing=0.1)
    cycle(open_on(patient(faulty)), files)


def test_slow(files: Path) -> None:
    cycle(open_on(FaultyStorage(MemoryStorage(uuid.uuid4().hex), delay=0.0005)), files)


class StallsOnce(FaultyStorage):
    """Stalls at its `at`-th operation, for one attempt: what waits then times out, and goes on when it is asked again."""

    def __init__(self, inner: MemoryStorage, at: int) -> None:
        super().__init__(inner, stall_timeout=0.01)
        self.at = at
        self.operations = 0
        self.timed_out = 0
        self._count = threading.Lock()

    def around(self, verb: Any, key: str, act: Callable[[], Any]) -> Any:
        with self._count:
            self.operations += 1
            if self.operations == self.at:
                self.stall()
        try:
            return super().around(verb, key, act)
        except StorageError:
            self.timed_out += 1
            self.release()
            raise


@pytest.mark.parametrize("at", [1, 10, 40, 90])
def test_stalls(at: int, files: Path) -> None:
    stalling = StallsOnce(MemoryStorage(uuid.uuid4().hex), at)
    cycle(open_on(patient(stalling)), files)
    assert stalling.timed_out >= 1


def test_a_storage_that_never_answers_again(files: Path) -> None:
    inner = MemoryStorage(uuid.uuid4().hex)
    open_on(inner).save("acme/m", files)
    before = contents(open_on(inner))
    dead = FaultyStorage(inner, failing=1.0)
    store = open_on(RetryingStorage(dead, patience=0))
    works: list[Callable[[], object]] = [
        lambda: store.save("acme/m", weights(2)),
        lambda: store.load("acme/m"),
        lambda: list(store.stream("acme/m")),
        lambda: store.models(),
        lambda: store.delete("acme/m@1"),
        lambda: store.gc(dry_run=False, grace=0),
    ]
    for work in works:
        with pytest.raises(StorageError, match=r"Injected.*gave up to .* after 0 s and 1 attempt"):
            work()
    assert contents(open_on(inner)) == before


def test_reads_that_fail_while_a_model_is_loaded(files: Path) -> None:
    inner = MemoryStorage(uuid.uuid4().hex)
    faulty = FaultyStorage(inner)
    store = open_on(faulty)
    store.save("acme/m", files)
    stream = store.stream("acme/m")
    name, first = next(stream)
    assert bits(first) == bits(weights(1)[name])
    faulty.failing = 1.0
    with pytest.raises(StorageError):
        store.load("acme/m")
    faulty.failing = 0.0
    assert all_bits(store.load("acme/m")) == all_bits(weights(1))  # nothing bad was kept


@pytest.mark.parametrize("deep", [False, True])
def test_verify_of_a_storage_that_fails_says_so_once(
    files: Path, deep: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = MemoryStorage(uuid.uuid4().hex)
    open_on(inner).save("acme/m", files)

    class NoPacks(FaultyStorage):
        def around(self, verb: Any, key: str, act: Callable[[], Any]) -> Any:
            if key.startswith("packs/") and verb == "read":
                raise StorageError(f"{key} is behind a wall", object=key)
            return act()

    store = open_on(NoPacks(inner))
    report = store.verify(deep=deep)
    (problem,) = report.problems
    assert problem.kind == "unreadable"
    assert f"{len(pack_sizes(inner))} objects cannot be read now" in problem.message
    assert "behind a wall" in problem.message
    assert not report.damaged
    assert not report.ok
    (unmended,) = [p for p in store.repair().problems if p.kind == "unreadable"]
    assert "behind a wall" in unmended.message
    monkeypatch.setattr(ms, "open", lambda *_, **__: store)
    assert app(["verify", "--store", "x", *(["--deep"] if deep else [])], standalone_mode=False) == 3
    told = capsys.readouterr()
    assert told.out.count("unreadable") == 1
    assert "damaged:" not in told.out
    assert "mends" not in told.err


def test_damage_beside_what_cannot_be_read_is_damage(files: Path) -> None:
    inner = MemoryStorage(uuid.uuid4().hex)
    store = open_on(inner)
    store.save("acme/m", files)
    first, second, *_ = sorted(pack_sizes(inner), key=lambda key: -pack_sizes(inner)[key])
    overwrite(inner, first, lambda data: data.__setitem__(len(data) // 2, data[len(data) // 2] ^ 1))

    class NoPack(FaultyStorage):
        def around(self, verb: Any, key: str, act: Callable[[], Any]) -> Any:
            if key == second:
                raise StorageError(f"{key} is behind a wall", object=key)
            return act()

    report = open_on(NoPack(inner)).verify()
    assert report.damaged
    assert sorted(p.kind for p in report.problems) == ["corruption", "unreadable"]


def test_unchanged_chunks_are_not_sent_again(files: Path) -> None:
    counting = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counting)
    first = store.save("acme/m", files)
    counting.reset()
    again = store.save("acme/m", files)
    assert again.stored == 0
    assert again.reused >= first.stored - 4096 * len(weights())
    assert again.digest == first.digest
    changed = weights(1)
    changed["large"][5, 7] += 1
    counting.reset()
    third = store.save("acme/m", changed)
    assert third.stored < first.stored / 4  # one chunk of many, and headers
    assert all_bits(store.load("acme/m")) == all_bits(changed)


def test_a_copy_of_a_store_is_a_store(files: Path, tmp_path: Path) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    open_on(storage).save("acme/m", files, tag="prod")
    local = open_storage(tmp_path / "copy")
    copy_all(storage, local)
    moved = ms.open(tmp_path / "copy")
    assert contents(moved) == contents(open_on(storage))
    assert moved.verify(deep=True).ok


@pytest.mark.s3
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_a_life_on_s3(engine: str, s3_url: str, files: Path) -> None:
    cycle(ms.open(s3_url, engine=engine, memory="64MiB"), files)


@pytest.mark.s3
def test_a_mirror_on_s3_heals_a_local_store(s3_url: str, files: Path, tmp_path: Path) -> None:
    ms.open(s3_url).save("acme/m", files)
    local = tmp_path / "store"
    copy_all(open_storage(s3_url), open_storage(local))
    for pack in local.rglob("packs/**/*.safetensors"):
        pack.write_bytes(bytes(pack.stat().st_size))
    store = ms.open(local, mirrors=[s3_url])
    assert all_bits(store.load("acme/m")) == all_bits(weights(1))
    assert all_bits(ms.open(local).load("acme/m")) == all_bits(weights(1))


@pytest.mark.s3
def test_nothing_at_s3(s3_url: str) -> None:
    with pytest.raises(NotFoundError, match="there is no store"):
        ms.open(s3_url).load("acme/m")
