"""A store in a process that was forked off, or to which it was pickled: it works there, or says at once that it cannot."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.client import Store
from modelstore.cluster.pieces import StoreAddress
from modelstore.errors import UnsupportedError
from modelstore.format.locks import Lock
from modelstore.storage.open import open_storage

WEIGHTS = {"w": torch.arange(4096.0).reshape(64, 64)}
LONGEST = 120  # seconds, after which a child counts as hung


def in_child(act: Callable[[], object]) -> object:
    """What `act` returns in a child that is forked now; the test fails where it hangs."""
    reading, writing = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            writing.send(("done", act()))
        except BaseException as error:
            writing.send(("failed", f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    try:
        assert reading.poll(LONGEST), "the child hangs"
        how, what = reading.recv()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert how == "done", what
    return what


def total(store: Store) -> float:
    return float(store.load("m")["w"].sum())


@pytest.mark.s3
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_a_forked_child_reads_and_writes(s3_url: str, engine: str) -> None:
    pytest.importorskip(engine)
    store = ms.open(s3_url, engine=engine)
    store.save("m", WEIGHTS)
    assert total(store) == in_child(lambda: total(store))
    in_child(lambda: store.save("m", {"w": WEIGHTS["w"] + 1}).version)
    assert [info.version for info in store.versions("m")] == [1, 2]


@pytest.mark.s3
def test_a_pickle_is_an_address_and_options_without_secrets(s3_url: str, caplog: pytest.LogCaptureFixture) -> None:
    given = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"] + "\n"}
    hidden = {**given, "secret": "very-hushed-secret", "client_kwargs": {"region_name": "us-east-1"}}
    data = pickle.dumps(ms.open(s3_url, storage_options=hidden))
    assert b"very-hushed-secret" not in data
    again = pickle.loads(data)
    assert again.url == s3_url
    assert "key, secret" in caplog.text
    again.save("m", WEIGHTS)  # with the environment's credentials
    assert total(pickle.loads(pickle.dumps(again))) == float(WEIGHTS["w"].sum())
    with_user = open_storage(s3_url.replace("s3://", "s3://AKIDX:hush%2Fed@"))
    assert b"hush" not in pickle.dumps(with_user)


def _spawned(data: bytes, out: Any) -> None:
    store = pickle.loads(data)
    out.send((store.url, total(store), float(store.tensor("m", "w")[1, 1])))


@pytest.mark.slow
def test_a_spawned_child_takes_a_store(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store", memory="64MiB", threads=2)
    store.save("m", WEIGHTS)
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=_spawned, args=(pickle.dumps(store), writing))
    child.start()
    assert reading.poll(LONGEST)
    assert reading.recv() == (store.url, float(WEIGHTS["w"].sum()), float(WEIGHTS["w"][1, 1]))
    child.join()


def test_what_is_opened_of_a_local_store_is_pickled_too(tmp_path: Path) -> None:
    ms.open(tmp_path / "mirror").save("m", WEIGHTS)
    store = ms.open(tmp_path / "store", mirrors=[str(tmp_path / "mirror")])
    store.save("m", WEIGHTS)
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, total(again)) == (store.url, total(store))
    lazy = pickle.loads(pickle.dumps(store.tensor("m", "w")))
    assert torch.equal(lazy[2:4], WEIGHTS["w"][2:4])
    read_only = pickle.loads(pickle.dumps(ms.open(tmp_path / "store", read_only=True)))
    with pytest.raises(UnsupportedError, match="reading only"):
        read_only.save("m", WEIGHTS)


class NoHosts:
    """A connection to a cluster whose hosts have nothing, and which cannot be pickled."""

    def __init__(self) -> None:
        self.asked = 0
        self.lock = threading.Lock()

    def read(self, *_: object) -> dict[bytes, Any]:
        self.asked += 1
        return {}

    def passed(self, nbytes: int) -> None: ...


def test_a_tensor_of_a_store_of_a_cluster_is_read_from_the_storage_elsewhere(tmp_path: Path) -> None:
    ms.open(tmp_path / "store").save("m", WEIGHTS)
    hosts: Any = NoHosts()
    url = str(tmp_path / "store")
    store = Store(open_storage(url), session=hosts, source=StoreAddress(url), cluster="auto")
    tensor = store.tensor("m", "w")
    assert torch.equal(tensor[2:4], WEIGHTS["w"][2:4])
    asked = hosts.asked
    assert asked
    assert torch.equal(pickle.loads(pickle.dumps(tensor))[2:4], WEIGHTS["w"][2:4])
    assert hosts.asked == asked


def test_memory_is_not_taken_along() -> None:
    store = ms.open("memory://kept-here")
    store.save("m", WEIGHTS)
    data = pickle.dumps(store)
    assert total(pickle.loads(data)) == total(store)

    def elsewhere() -> str:
        with pytest.raises(UnsupportedError, match="memory of another process"):
            pickle.loads(data)
        return "said"

    assert in_child(elsewhere) == "said"


def test_a_lock_that_a_thread_held_is_free_in_the_child(tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    store.save("m", WEIGHTS)
    total(store)
    held, release = threading.Event(), threading.Event()
    locks = [store.repo.manifests._lock, store.repo.storage._files._lock]  # type: ignore[attr-defined]
    assert all(isinstance(lock, Lock) for lock in locks)

    def hold() -> None:
        with locks[0], locks[1]:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(lambda: total(store)) == float(WEIGHTS["w"].sum())
    finally:
        release.set()
        thread.join()


def test_a_cluster_is_not_reached_from_a_forked_child() -> None:
    store = Store(open_storage("memory://of-a-cluster"), session=object(), cluster="auto")  # type: ignore[arg-type]

    def ask() -> str:
        with pytest.raises(UnsupportedError, match=r"before this process was forked.*'spawn'"):
            store.load("m")
        return "said"

    open_storage("memory://of-a-cluster")
    Store(open_storage("memory://of-a-cluster")).save("m", WEIGHTS)
    assert in_child(ask) == "said"
