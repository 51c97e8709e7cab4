"""Tensors of one chunk take a shorter way through both plans: the same reads and steps as the long one gives."""

from __future__ import annotations

import pytest

from modelstore.format import grid
from modelstore.format.objects.manifest import CodecSpec, Plane, Tensor
from modelstore.format.region import full
from modelstore.plan import read, write

SHAPES = [(), (1,), (7,), (5, 3), (2, 0, 4), (3, 1, 2)]


def tensor(shape: tuple[int, ...]) -> Tensor:
    return Tensor("w", "bfloat16", shape, tuple(max(1, n) for n in shape), 0, "0" * 64, (Plane("data", 4),))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_either_way(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    wants = [read.Want.of(tensor(shape), full(shape))]
    plan = write.plan_tensor("w", "bfloat16", shape, CodecSpec("raw"))
    short = list(read.chunk_reads(wants)), list(write.plan_steps([(0, plan)], 1 << 20))
    monkeypatch.setattr(grid, "is_one_chunk", lambda *_: False)
    assert short == (list(read.chunk_reads(wants)), list(write.plan_steps([(0, plan)], 1 << 20)))
    assert len(short[0]) == (0 not in shape)
