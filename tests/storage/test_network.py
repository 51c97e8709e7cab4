"""Connections that stall, drop or break off: every request ends, and is repeated where that can help."""

from __future__ import annotations

import pytest

from modelstore.errors import StorageError
from modelstore.storage.base import Storage
from modelstore.storage.open import open_storage
from modelstore.storage.retry import RetryingStorage
from tests.storage.proxy import Proxy

pytestmark = pytest.mark.s3
STALL = 0.5
ENGINES = ["obstore", "s3fs"]


def behind(proxy: Proxy, url: str, engine: str) -> Storage:
    pytest.importorskip(engine)
    options = {"endpoint_url": proxy.endpoint, "config_kwargs": {"connect_timeout": 1, "read_timeout": STALL}}
    storage = open_storage(url, options, engine)
    assert isinstance(storage, RetryingStorage)
    storage.base_delay = 0.001
    return storage


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["drop", "stall", "cut"])
def test_one_fault_is_mended(proxy: Proxy, s3_url: str, engine: str, fault: str) -> None:
    storage = behind(proxy, s3_url, engine)
    storage.put("a", [b"0123456789" * 1000], 10_000)
    faults = iter([fault])
    proxy.rule = lambda _, request: next(faults, "pass") if request.startswith(b"GET ") else "pass"
    out = bytearray(5000)
    storage.read("a", 0, memoryview(out))
    assert out == b"0123456789" * 500
    assert next(faults, None) is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["drop", "stall"])
def test_a_fault_that_stays_ends_in_an_error(proxy: Proxy, s3_url: str, engine: str, fault: str) -> None:
    storage = behind(proxy, s3_url, engine)
    assert isinstance(storage, RetryingStorage)
    storage.patience = 2 * STALL
    proxy.rule = lambda *_: fault
    with pytest.raises(
        StorageError, match=r"cannot read 'some/key' in s3://.*gave up to get it after \d+ s and \d+ attempts"
    ) as caught:
        storage.get("some/key")
    assert caught.value.object == "some/key"
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("fault", ["drop", "stall"])
def test_a_part_of_a_put_is_repeated(proxy: Proxy, s3_url: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelstore.storage.remote import objects

    monkeypatch.setattr(objects, "SLOWEST", 64 << 20)
    storage = behind(proxy, s3_url, "obstore")
    faults = iter([fault, fault])
    proxy.rule = lambda _, request: next(faults, "pass") if b"partNumber" in request[:300] else "pass"
    piece = b"x" * (5 << 20)
    storage.put("big", iter([piece] * 4), 20 << 20)
    assert next(faults, None) is None
    assert storage.get("big") == piece * 4


def test_a_lost_answer_to_a_create_is_false_not_an_error(proxy: Proxy, s3_url: str) -> None:
    storage = behind(proxy, s3_url, "obstore")
    storage.create("before", b"")  # by which it was proved that objects are created exclusively
    faults = iter(["cut"])  # the server has written when its answer is cut
    proxy.rule = lambda _, request: next(faults, "pass") if request.startswith(b"PUT ") else "pass"
    assert storage.create("a", b"mine") is False
    assert storage.get("a") == b"mine"


def test_a_little_of_a_listing_is_one_request(proxy: Proxy, s3_url: str) -> None:
    storage = behind(proxy, s3_url, "obstore")
    for number in range(30):
        storage.create(f"{number:02}", b"x")
    proxy.requests.clear()
    assert [item.key for item in storage.list("", limit=10)] == [f"{number:02}" for number in range(10)]
    assert len(proxy.requests) == 1


def test_what_is_forbidden_is_not_repeated(proxy: Proxy, s3_url: str, s3_is_real: bool) -> None:
    if not s3_is_real:
        pytest.skip("this server takes any key")
    storage = open_storage(s3_url, {"endpoint_url": proxy.endpoint, "key": "testkey", "secret": "wrong"})
    with pytest.raises(StorageError) as caught:
        storage.get("a")
    assert "wrong" not in str(caught.value)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_no_bucket_is_said(proxy: Proxy, s3_url: str, engine: str) -> None:
    storage = behind(proxy, "s3://no-such-bucket-here/x", engine)
    with pytest.raises(StorageError, match="bucket or container does not exist"):
        storage.create("a", b"x")
    with pytest.raises(StorageError, match="bucket or container does not exist"):
        storage.get("a")
    assert len(proxy.requests) == len(set(proxy.requests))  # none is repeated
