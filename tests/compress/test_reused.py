"""A variant of a next version is made of what changed: the rest is the variant's of the version before, unread."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping

import pytest
import torch

import modelstore as ms
from modelstore.format.buffers import Buffer
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import all_bits, open_on

CHANGED = "model.layers.2.mlp.up_proj.weight"
RECIPES = ("int8", "int4", "fp8", "nf4")


class CountedStorage(MemoryStorage):
    """Counts the bytes of ranges that are read, which chunks are, by their object."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts: Counter[str] = Counter()

    def read(self, key: str, start: int, out: Buffer) -> None:
        self.counts[key] += memoryview(out).nbytes
        super().read(key, start, out)


def model() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    made = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(256, 256, generator=random) for n in range(6)}
    return {name: t.bfloat16() for name, t in made.items()}


def versions(storage: MemoryStorage) -> tuple[ms.Store, dict[str, torch.Tensor]]:
    """Two versions, one tensor of which differs."""
    store, values = open_on(storage), model()
    store.save("m", values)
    second = values | {CHANGED: values[CHANGED] * 2}
    store.save("m", second)
    return store, second


def alone(values: dict[str, torch.Tensor], recipe: str) -> tuple[Mapping[str, object], Mapping[str, torch.Tensor]]:
    """Metrics and values of the same variant, where there is nothing to reuse."""
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", values)
    store.compress("m", recipe)
    return store.describe(f"m:{recipe}").metrics, store.load(f"m:{recipe}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_changed_is_read_and_all_is_as_if_made_alone(recipe: str) -> None:
    storage = CountedStorage(uuid.uuid4().hex)
    store, second = versions(storage)
    originals = {info.key for info in storage.list("packs/")}
    store.compress("m@1", recipe)
    storage.counts.clear()
    store.compress("m@2", recipe)
    # The chunks of one tensor of six, and the pack that they are in, which is digested once in a process.
    assert sum(n for key, n in storage.counts.items() if key in originals) < 1.5 * second[CHANGED].nbytes
    metrics, values = alone(second, recipe)
    assert store.describe(f"m@2:{recipe}").metrics == metrics
    assert all_bits(dict(store.load(f"m@2:{recipe}"))) == all_bits(dict(values))
    live = store.follow(f"m@1:{recipe}")
    assert live.swap_to(2).bytes < second[CHANGED].nbytes
    assert store.verify(deep=True).ok


def test_another_recipe_reuses_nothing() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store, second = versions(storage)
    store.compress("m@1", "int8", variant="mine")
    store.compress("m@2", "int4", variant="mine")
    assert all_bits(store.load("m@2:mine")) == all_bits(dict(alone(second, "int4")[1]))


def test_a_variant_without_its_losses_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier releases made them."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store, second = versions(storage)
    with monkeypatch.context() as patched:
        patched.setattr("modelstore.compress.kept.LOSSES", "other")
        store.compress("m@1", "int8")
    store.compress("m@2", "int8")
    assert store.describe("m@2:int8").metrics == alone(second, "int8")[0]


def test_a_pack_that_is_gone_is_not_relied_on() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    store, second = versions(storage)
    before = {info.key for info in storage.list("packs/")}
    store.compress("m@1", "int8")
    lost = max((i for i in storage.list("packs/") if i.key not in before), key=lambda info: info.size)
    storage.delete(lost.key)
    store.compress("m@2", "int8")
    assert all_bits(store.load("m@2:int8")) == all_bits(dict(alone(second, "int8")[1]))
