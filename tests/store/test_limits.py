"""What a store takes and what it refuses, at the borders: refused before anything is stored, never after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import save_file

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import FormatError, StorageError, UnsupportedError
from modelstore.storage.base import ObjectInfo
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.store import clock
from modelstore.testing.faults import FaultyStorage, Killed

T = TypeVar("T")


@pytest.mark.parametrize("shape", [(1,) * 63, (0, 1 << 40), (2,) * 10, (0,), ()], ids=str)
def test_any_shape_that_torch_has_comes_back(shape: tuple[int, ...]) -> None:
    store = Store(MemoryStorage(f"limits-{shape}"), memory="64MiB")
    tensor = torch.rand(shape)
    store.save("m", {"t": tensor})
    store.save("m", {"t": tensor})  # the first one must not stand in the way
    loaded = store.load("m")["t"]
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


def test_more_dimensions_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'t' has 64 dimensions"):
        Store(MemoryStorage("limits-dimensions")).save("m", {"t": torch.zeros((1,) * 64)})


def test_a_tensor_name_that_no_pack_can_hold_is_refused_at_once() -> None:
    storage = MemoryStorage("limits-names")
    with pytest.raises(FormatError, match="__metadata__"):
        Store(storage).save("m", {"__metadata__": torch.zeros(3)}, codec="raw", grid="whole")
    assert not list(storage.list("packs/"))


def test_no_tag_is_called_latest() -> None:
    store = Store(MemoryStorage("limits-tags"))
    store.save("m", {"t": torch.zeros(3)})
    with pytest.raises(ValueError, match="newest"):
        store.tag("m", "latest")


class Plain(WrappingStorage):
    """Passes everything on."""

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        return act()


class Older(Plain):
    """A storage of which everything was written long ago."""

    def info(self, key: str) -> ObjectInfo | None:
        info = super().info(key)
        return info and info._replace(modified=time.time() - 2 * clock.REFRESH)


def test_what_an_old_journal_names_is_stored_again(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.randn(300_000) for i in range(20)}, tmp_path / "m.safetensors")
    inner = MemoryStorage("limits-journal")
    with pytest.raises(Killed):
        Store(FaultyStorage(inner, kill_at=6), memory="64MiB").save("m", tmp_path / "m.safetensors")
    packs = {info.key: info.modified for info in inner.list("packs/")}
    assert packs  # it was killed in the middle
    Store(Older(inner), memory="64MiB").save("m", tmp_path / "m.safetensors")
    now = {info.key: info.modified for info in inner.list("packs/")}
    assert all(
        now[key] > written for key, written in packs.items()
    )  # so their age protects them until they are published


class Unreachable(Plain):
    """Packs cannot be read; everything else can."""

    def read(self, key: str, start: int, out: memoryview) -> None:
        del start, out
        raise TransientStorageError(f"{key}: no answer", object=key)


def test_a_mirror_stands_in_for_a_storage_that_does_not_answer(tmp_path: Path) -> None:
    storage = MemoryStorage("limits-mirror")
    tensors = {"t": torch.randn(1000, 100)}
    Store(storage).save("m", tensors)
    with pytest.raises(StorageError):
        Store(Unreachable(storage)).load("m")
    loaded = Store(Unreachable(storage), (storage,)).load("m")
    assert torch.equal(loaded["t"], tensors["t"])


def test_working_memory_has_a_floor() -> None:
    with pytest.raises(ValueError, match="64 MiB"):
        ms.open("memory://limits-memory", memory="1MiB")
