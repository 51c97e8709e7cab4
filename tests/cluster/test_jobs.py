"""How a compression is divided among workers: decided from the manifest and the view alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cluster.pieces import pieces
from modelstore.cluster.work import compression
from modelstore.compress.job import Portion
from modelstore.format.manifest import CodecSpec
from modelstore.plan.placement import Member, View

INT = CodecSpec("int", {"bits": 8, "granularity": "channel"})


def tensors(layers: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    return {name: (torch.randn(512, 512, generator=g) * 0.02).to(torch.bfloat16) for name in names}


def manifest_of(store: ms.Store, ref: str) -> Any:
    return store[ref].opened().manifest


@pytest.fixture
def url(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", tensors())
    return str(tmp_path / "store")


@pytest.mark.parametrize("size", [1, 512 * 512 * 2, 5 * 512 * 512, 1 << 40])
def test_portions_are_all_tensors_in_order(url: str, size: int) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    made = list(compression.portions(whole, manifest, size))
    assert [name for part in made for name in part.specs] == list(tensors())
    assert all(part.job == "j" and part.specs for part in made)
    limit = max(size, 512 * 512 * 2)
    assert all(sum(manifest.by_name[name].nbytes for name in part.specs) <= limit for part in made)


def test_portions_become_smaller_towards_the_end(url: str) -> None:
    """So that nobody begins a long one when the others have nothing left to do."""
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    counts = [len(part.specs) for part in compression.portions(whole, manifest, 4 * 512 * 512 * 2)]
    assert counts == [3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_worker_takes_a_part_of_a_gpu_where_that_gains_something() -> None:
    searched = CodecSpec("int", {"bits": 4, "granularity": "group", "method": "mse"})
    portion = Portion("j", ("int4",), {"a": INT, "b": searched})
    assert compression.gpu_share(portion, {"CPU": 2.0}) == 0
    assert compression.gpu_share(portion, {"CPU": 2.0, "GPU": 1.0}) == 0.1
    assert compression.gpu_share(portion, {"CPU": 2.0, "GPU": 0.05}) == 0, "none is free"
    assert compression.gpu_share(Portion("j", ("int8",), {"a": INT}), {"GPU": 1.0}) == 0
    ladder = Portion("j", ("original", "int8", "int4"), {"a": CodecSpec("ladder", {})})
    assert compression.gpu_share(ladder, {"GPU": 1.0}) == 0


def test_work_goes_where_most_of_its_chunks_are_at_home(url: str) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    assert compression.nearest(whole, manifest, View(1)) is None
    assert compression.nearest(whole, manifest, View(1, (Member("a", "n"),))) == "n"
    heavy = View(1, (Member("a", "n", weight=1e-9), Member("b", "o")))
    assert compression.nearest(whole, manifest, heavy) == "o"
    assert len(pieces(manifest, range(3))) == 3
