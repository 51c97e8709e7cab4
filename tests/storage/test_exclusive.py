"""A store that is reached through something that ignores `If-None-Match`: nothing is written, by whatever path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import modelstore
from modelstore.client import Store
from modelstore.errors import UnsupportedError
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.open import open_storage
from modelstore.storage.remote.exclusive import ProvedStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import keys
from tests.storage.proxy import Proxy

pytestmark = pytest.mark.s3
WEIGHTS = {"w": torch.arange(64.0).reshape(8, 8)}


@pytest.fixture
def proxy(proxy: Proxy) -> Proxy:
    """One that takes the condition out of every request."""
    proxy.strip = b"if-none-match"
    return proxy


PATHS: dict[str, Callable[[Store], object]] = {
    "save": lambda s: s.save("m", {"w": WEIGHTS["w"] + 1}),
    "save of another model": lambda s: s.save("n", WEIGHTS),
    "tag": lambda s: s.tag("m@1", "x"),
    "untag": lambda s: s.untag("m", "prod"),
    "delete": lambda s: s.delete("m@2"),
    "compress": lambda s: s.compress("m@1", "int8", include=["*"]),
    "gc": lambda s: s.gc(dry_run=False, grace=0),
    "save_part": lambda s: s.save_part("m", WEIGHTS, session="s", rank=0, ranks=1),
    "together": lambda s: s.together("s", rank=0, ranks=1)(True),
}


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_no_path_writes_through_it(proxy: Proxy, s3_url: str, engine: str) -> None:
    pytest.importorskip(engine)
    sound = modelstore.open(s3_url, engine=engine)
    sound.save("m", WEIGHTS, tag="prod")
    sound.save("m", {"w": WEIGHTS["w"] * 2})
    before = keys(open_storage(s3_url))
    options: dict[str, Any] = {"endpoint_url": proxy.endpoint}
    store = modelstore.open(s3_url, storage_options=options, engine=engine)
    for name, act in PATHS.items():
        with pytest.raises(UnsupportedError, match="ignores 'If-None-Match"):
            act(store)
        assert keys(open_storage(s3_url)) == before, name
    assert torch.equal(store.load("m@prod")["w"], WEIGHTS["w"])  # reading goes on
    assert store.gc(dry_run=True, grace=0).bytes == 0
    proxy.strip = None  # mended: the same store is proved then, and written to
    store.tag("m@1", "next")
    assert sound.load("m@next").keys() == {"w"}


def test_it_is_proved_once_a_process_and_way_with_three_requests() -> None:
    inner = CountingStorage(MemoryStorage("proved"))
    first = ProvedStorage(inner, "a way of this test")
    assert inner.requests == {}
    first.create("a", b"")
    assert inner.requests == {"create": 3, "delete": 1}
    first.create("b", b"")
    ProvedStorage(inner, "a way of this test").put("c", [b""], 0)
    assert inner.requests == {"create": 4, "delete": 1, "put": 1}
    ProvedStorage(inner, "another way").create("d", b"")
    assert inner.requests == {"create": 7, "delete": 2, "put": 1}


def test_it_is_proved_again_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("modelstore.storage.remote.exclusive.time.monotonic", lambda: now[0])
    inner = CountingStorage(MemoryStorage("again"))
    storage = ProvedStorage(inner, "a way that grows old")
    for seconds, proofs in ((0, 1), (3599, 1), (2, 2)):
        now[0] += seconds
        storage.create(str(now[0]), b"")
        assert inner.requests["delete"] == proofs


def test_reading_proves_nothing() -> None:
    inner = CountingStorage(MemoryStorage("reads"))
    storage = ProvedStorage(inner, "a way that is only read")
    assert storage.info("a") is None
    assert not list(storage.list(""))
    assert inner.requests == {"info": 1, "list": 1}
