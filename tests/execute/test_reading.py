"""What a read fetches: the chunks that it touches, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelstore.client import Store
from modelstore.storage.faults import CountingStorage
from modelstore.storage.local import LocalStorage


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
