"""A mirror that answers is a store when it is opened; one that does not is asked again when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import modelstore as ms
from modelstore.errors import NotFoundError
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.retry import RetryingStorage
from modelstore.storage.wrapping import ReadOnlyStorage, Verb, WrappingStorage
from modelstore.store.place import check_mirror
from modelstore.testing.faults import CountingStorage

T = TypeVar("T")
WEIGHTS = {"w": torch.arange(4.0)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    ms.open(tmp_path / "store").save("m", WEIGHTS)
    return tmp_path / "store"


def test_what_is_no_store_is_no_mirror(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "photos.zip").touch()
    (tmp_path / "file").touch()
    for name, why in [
        ("empty", "no store at"),
        ("others", "photos.zip"),
        ("file", "is a file"),
        ("away", "no store at"),
    ]:
        with pytest.raises(NotFoundError, match=why) as caught:
            ms.open(store, mirrors=[tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)
        assert "so it is not a mirror: give the address of a copy of the store" in str(caught.value)
    with pytest.raises(NotFoundError, match="not a mirror"):
        ms.open(store, mirrors=[ms.open(tmp_path / "empty")])
    assert not (tmp_path / "away").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_store_is_no_copy_of_itself(store: Path) -> None:
    opened = ms.open(store)
    for act in (lambda: ms.open(store, mirrors=[store]), lambda: opened.repair(source=opened)):
        with pytest.raises(ValueError, match="this store itself"):
            act()


def test_a_copy_that_lost_its_record_can_still_mend(store: Path, tmp_path: Path) -> None:
    ms.open(store).copy("m", tmp_path / "copy")
    (tmp_path / "copy" / "modelstore.json").unlink()
    for pack in store.glob("packs/*/*.safetensors"):
        pack.unlink()
    assert torch.equal(ms.open(store, mirrors=[tmp_path / "copy"]).load("m")["w"], WEIGHTS["w"])


def test_a_mirror_that_does_not_answer_is_told_when_it_is_needed(store: Path) -> None:
    nobody = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9", "client_kwargs": {"region_name": "x"}}
    away = ms.open("s3://bucket/copy", storage_options=nobody)
    opened = ms.open(store, mirrors=[away])  # the request is made once, and not with patience
    assert torch.equal(opened.load("m")["w"], WEIGHTS["w"])


def test_a_mirror_is_asked_once(tmp_path: Path) -> None:
    storage = MemoryStorage(f"copy-{tmp_path.name}")
    counting = CountingStorage(storage)
    with pytest.raises(NotFoundError):
        check_mirror(counting)
    ms.open(f"memory://copy-{tmp_path.name}").save("m", WEIGHTS)
    counting = CountingStorage(storage)
    check_mirror(counting)
    assert counting.requests == {"get": 1}


class Silent(WrappingStorage):
    """A server that does not answer."""

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        raise TransientStorageError("no answer", object=key)


def test_no_time_is_spent_on_a_mirror_that_does_not_answer() -> None:
    slept: list[float] = []
    check_mirror(ReadOnlyStorage(RetryingStorage(Silent(MemoryStorage("silent")), sleep=slept.append)))
    assert not slept
