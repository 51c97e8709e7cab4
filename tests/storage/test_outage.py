"""A storage that is out of reach for a minute in the middle of a save: the save waits, goes on, and publishes once."""

from __future__ import annotations

import threading

import pytest

import modelstore
from modelstore.client import Store
from modelstore.storage.retry import RetryingStorage
from tests.helpers.stores import all_bits, contents, journal, open_on, shrink, weights
from tests.storage.proxy import Proxy

pytestmark = pytest.mark.s3
OUTAGE = 60.0  # seconds of waiting


class Clock:
    """The time of the storage's retries, which goes on only when they wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


def behind(proxy: Proxy, url: str, clock: Clock) -> Store:
    store = modelstore.open(url, storage_options={"endpoint_url": proxy.endpoint}, memory="64MiB", threads=2)
    storage = store.repo.storage
    assert isinstance(storage, RetryingStorage)
    storage._sleep, storage._clock = clock.sleep, lambda: clock.now
    return store


# drop: nothing arrives. cut: all arrives, and no answer comes back.
@pytest.mark.parametrize(
    ("begins", "fault"),
    [("number 8", "drop"), ("packs/", "cut"), ("/manifests/", "drop"), ("/versions/", "drop"), ("/versions/", "cut")],
)
def test_a_save_outlasts_an_outage(
    proxy: Proxy, s3_url: str, begins: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    clock = Clock()
    store = behind(proxy, s3_url, clock)
    store.save("m", weights(1))
    proxy.requests.clear()
    refused: list[int] = []

    def rule(number: int, request: bytes) -> str:
        line = request.split(b"\r\n", 1)[0].decode()
        starts = number >= 8 if begins == "number 8" else line.startswith("PUT ") and begins in line
        if (refused or starts) and clock.now < OUTAGE:
            refused.append(number)
            return fault
        return "pass"

    proxy.rule = rule
    saved = store.save("m", weights(2), tag="best")
    assert clock.now >= OUTAGE
    assert len(refused) > 3
    assert (saved.durable, saved.version) == (True, 2)
    direct = modelstore.open(s3_url)
    assert contents(direct)["m"] == (
        {1: {"original": all_bits(weights(1))}, 2: {"original": all_bits(weights(2))}},
        {"best": 2},
    )
    assert direct.verify(deep=True).ok
    assert not journal(direct.repo.storage)
    assert contents(open_on(direct.repo.storage)) == contents(store)
