"""Pruning over a whole model: the smallest weights of all tensors together, whichever tensor they lie in."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import open_on


def weights() -> dict[str, torch.Tensor]:
    """Linear layers of very different scales and shapes, of three dtypes; a norm that is left alone."""
    g = torch.Generator().manual_seed(1)
    shapes = {"q_proj": (96, 64), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (64, 128)}
    made = {
        f"model.layers.0.self_attn.{name}.weight": (torch.randn(shape, generator=g) * 0.02 * 4**i).to(torch.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    made["model.layers.0.mlp.up_proj.weight"] = torch.randn(200, 33, generator=g) * 0.1
    made["model.layers.0.mlp.down_proj.weight"] = (torch.randn(64, 200, generator=g) * 0.3).to(torch.float16)
    made["model.norm.weight"] = torch.full((64,), 1e-6)
    return made


def numbers(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([t.float().numpy().reshape(-1) for n, t in tensors.items() if "norm" not in n])


@pytest.mark.parametrize("share", [0.5, 0.13, 0.9])
def test_the_smallest_of_all_weights_go(share: float) -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    tensors = weights()
    store.save("m", tensors)
    recipe = ms.Recipe("pruned", ms.presets()["sparse50-global"].rules, prune=share)
    plan = store.plan_compression("m", recipe)
    done = store.compress("m", recipe)
    assert done.compressed == len(tensors) - 1
    found = store.load("m:pruned")
    before, after = numbers(tensors), numbers(found)
    gone = after == 0
    assert abs(gone.mean() - share) < 2e-3, "the share is met over all tensors together"
    assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min(), "and none that goes is larger than one that stays"
    assert (before[~gone] == after[~gone]).all()
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])
    by_tensor = [float((found[n] == 0).float().mean()) for n in tensors if "norm" not in n]
    assert max(by_tensor) - min(by_tensor) > 0.1, "tensors of small weights lose more of them"
    thresholds = {t.params["threshold"] for t in _codecs(store, "m:pruned") if t.name == "sparse"}
    assert len(thresholds) == 1
    assert plan.needs_threshold
    assert plan.expected < plan.stored if share > 0.3 else plan.expected > 0


def _codecs(store: ms.Store, ref: str) -> tuple[ms.CodecSpec, ...]:

    return store[ref].opened().manifest.codecs


def test_made_again_it_is_recognised() -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", weights())
    first = store.compress("m", "sparse50-global")
    again = store.compress("m", "sparse50-global")
    assert first.stored > 0
    assert again.stored == 0
    assert store.verify("m:sparse50-global", deep=True).ok
    assert [v.variant for v in store.variants("m")] == ["original", "sparse50-global"]


def test_only_sparse_rules_can_be_pruned_so() -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", weights())
    rules = [{"targets": ["linear"], "codec": {"name": "int"}}]
    with pytest.raises(ValueError, match="prune= is for rules whose codec is sparse"):
        store.compress("m", {"name": "x", "rules": rules, "prune": 0.5})
