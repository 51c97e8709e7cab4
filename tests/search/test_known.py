"""What was measured of a model is found again: of the same data, formats and tensors, whatever else was measured since."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import ConflictError
from modelstore.format.objects.manifest import CodecSpec
from modelstore.format.objects.sensitivity import Sensitivity
from modelstore.search.known import keep, known, measured
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import open_on

TWO, FOUR, EIGHT = (CodecSpec("int", {"bits": bits}) for bits in (2, 4, 8))
DATA = {"digest": "a" * 64, "samples": 4, "length": 32, "seed": 0, "torch": "2.13.0", "transformers": "5.24.0"}


@pytest.fixture
def store() -> ms.Store:
    opened = open_on(MemoryStorage(uuid.uuid4().hex))
    opened.save("m", {"a.weight": torch.zeros(4, 32), "b.weight": torch.zeros(4, 32)})
    return opened


def made(**data: Any) -> Sensitivity:
    return Sensitivity({**DATA, **data}, (TWO, FOUR), {"a.weight": (0.5, 0.25), "b.weight": (None, 1.0)})


def metrics(store: ms.Store) -> dict[str, Any]:
    return store.describe("m").metrics


def test_it_is_found_again_by_data_formats_and_tensors(store: ms.Store) -> None:
    content = store["m"].opened().manifest.content
    before = store.describe("m")
    keep(store.repo, "m", 1, content, made())
    keep(store.repo, "m", 1, content, made(seed=1))
    found = known(metrics(store), [FOUR], ["b.weight"], DATA | {"torch": "2.14.0"})
    assert found == Sensitivity(DATA, (FOUR,), {"b.weight": (1.0,)})
    newest = known(metrics(store), [TWO], ["a.weight"], None)
    assert newest is not None
    assert newest.data["seed"] == 1
    assert known(metrics(store), [EIGHT], ["a.weight"], DATA) is None
    assert known(metrics(store), [TWO], ["c.weight"], DATA) is None
    assert known(metrics(store), [TWO], ["a.weight"], DATA | {"digest": "b" * 64}) is None
    assert store.describe("m").created == before.created
    assert store.verify("m").ok


def test_the_same_again_replaces_it_and_few_are_kept(store: ms.Store) -> None:
    content = store["m"].opened().manifest.content
    for seed in (0, 1, 2, 3, 4, 4):
        keep(store.repo, "m", 1, content, made(seed=seed))
    assert [one.data["seed"] for one in measured(metrics(store))] == [4, 3, 2, 1]


def test_of_other_values_nothing_is_kept(store: ms.Store) -> None:
    with pytest.raises(ConflictError, match="made again"):
        keep(store.repo, "m", 1, "other", made())


@pytest.mark.parametrize("strange", [None, 7, ["x"], [{"data": {}, "formats": [], "costs": {"a": [1.0]}}]])
def test_what_is_none_of_ours_is_passed_over(strange: Any) -> None:
    assert measured({"sensitivity": strange}) == []
