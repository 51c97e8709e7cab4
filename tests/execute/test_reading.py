"""What a read fetches: the chunks that it touches, once."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from modelstore.client import Store
from modelstore.cluster.read.delivery import batches, read_batch, tensors_of
from modelstore.plan.layout import ExpertParallel, Layers, Layout, PipelineStage
from modelstore.storage.local import LocalStorage
from modelstore.testing.faults import CountingStorage


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_job_of_runs_and_columns_fetches_each_chunk_once(tmp_path: Path, codec: str) -> None:
    # Columns of one tensor go to strided places, rows of the next to one run: both lie in one job.
    tensors = {name: torch.randn(512, 1024) for name in ("a", "b", "c", "d")}
    Store(LocalStorage(tmp_path)).save("m", tensors, codec=codec)
    counting = CountingStorage(LocalStorage(tmp_path))
    store = Store(counting)
    half = ((0, 512), (0, 512))
    loaded = store.load("m", shard={"a": half, "b": ((0, 512), (0, 1024)), "c": half, "d": ((0, 256), (0, 1024))})
    assert torch.equal(loaded["a"], tensors["a"][:, :512])
    assert torch.equal(loaded["b"], tensors["b"])
    assert torch.equal(loaded["d"], tensors["d"][:256])
    stored = sum(tensor.stored for tensor in store.describe("m").tensors)
    assert counting.bytes["read"] <= stored


EXPERTS = {f"model.layers.{i}.mlp.experts.{n}.up_proj.weight": torch.randn(4, 4) for i in range(2) for n in range(4)}


@pytest.mark.parametrize("shard", [PipelineStage(1, 2), ExpertParallel(1, 2), Layers(1, 2)])
def test_a_part_of_some_tensors_is_what_the_part_of_the_model_holds_of_them(tmp_path: Path, shard: Layout) -> None:
    store = Store(LocalStorage(tmp_path))
    store.save("m", EXPERTS)
    held = store.load("m", shard=shard)
    for names in (["*.layers.0.*"], ["*.layers.1.*"], ["*.experts.2.*"], ["*.experts.0.*", "*.experts.1.*"]):
        wanted = {name for name in held if any(fnmatchcase(name, pattern) for pattern in names)}
        assert store.load("m", shard=shard, names=names).keys() == wanted


def test_regions_of_several_tensors_are_read_of_one(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path))
    store.save("m", {"a": torch.arange(4.0), "b": torch.arange(4.0)})
    assert store.load("m", shard={"a": ((0, 2),), "b": None}, names=["a"])["a"].tolist() == [0, 1]


@pytest.mark.parametrize("layout", [PipelineStage(1, 2), ExpertParallel(1, 2)])
def test_a_part_comes_in_batches_of_the_model_s_part(tmp_path: Path, layout: Layout) -> None:
    store = Store(LocalStorage(tmp_path))
    store.save("m", EXPERTS)
    model = store["m"].opened()
    found: dict[str, torch.Tensor] = {}
    for entries in batches(model, model.shares(layout, None), size=64):
        assert len(entries) == 1
        found.update(tensors_of(read_batch(model, layout, entries, None)))
    wanted = store.load("m", shard=layout)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
