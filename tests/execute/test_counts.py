"""What a save says that it wrote, and found: each byte once, and only what was there before it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.client import Store

WAYS: list[dict[str, Any]] = [{}, {"codec": "raw"}, {"codec": "raw", "grid": "whole"}]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return ms.open(tmp_path / "store")


def noise(seed: int) -> torch.Tensor:
    """A tensor of 400 KB that nothing compresses."""
    return torch.randn(100_000, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ways", WAYS, ids=repr)
def test_nothing_was_there_before_the_first_save(store: Store, ways: dict[str, Any]) -> None:
    one = noise(0)
    saved = store.save("m", {"a": one, "b": one.clone(), "c": noise(1), "d": one.clone()}, **ways)
    assert saved.reused == 0
    assert saved.stored > 0


@pytest.mark.parametrize("ways", WAYS, ids=repr)
def test_what_was_there_is_counted_once(store: Store, ways: dict[str, Any]) -> None:
    one = noise(0)
    first = store.save("m", {"a": one}, **ways)
    second = store.save("m", {"a": one, "b": one.clone(), "c": one.clone()}, **ways)
    assert second.stored == 0
    assert 0 < second.reused <= first.stored
    third = store.save("m", {"a": one, "c": noise(1)}, **ways)
    assert third.reused == second.reused
    assert 0 < third.stored <= 500_000


@pytest.mark.parametrize("ways", WAYS, ids=repr)
def test_packs_of_a_save_that_published_nothing_were_there(store: Store, ways: dict[str, Any]) -> None:
    weights = {"a": noise(0), "b": noise(1)}
    first = store.save("one", weights, **ways)
    other = store.save("two", weights, **ways)
    assert other.stored == 0
    assert 0 < other.reused <= first.stored
