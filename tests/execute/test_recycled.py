"""Memory that is used again: only when nobody holds it, in whatever way."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from modelstore.execute.memory import Arena
from modelstore.execute.recycled import Recycled
from modelstore.format.buffers import Bytes

SIZE = 3 << 20


HOLD: dict[str, Callable[[Bytes, torch.Tensor], object]] = {
    "slice": lambda buffer, _: buffer[5:9],
    "tensor": lambda _, tensor: tensor,
    "view of a tensor": lambda _, tensor: tensor.view(torch.bfloat16)[4:8].reshape(2, 2),
    "dlpack": lambda _, tensor: np.from_dlpack(tensor[:100]),
    "parameter": lambda _, tensor: torch.nn.Parameter(tensor[:8], requires_grad=False),
}


@pytest.mark.parametrize("hold", HOLD)
def test_what_somebody_holds_is_not_used_again(hold: str) -> None:
    memory = Recycled()
    buffer = memory.take(SIZE)
    address, buffer[:] = buffer.ctypes.data, 7
    held = HOLD[hold](buffer, torch.from_numpy(buffer))
    del buffer
    gc.collect()
    other = memory.take(SIZE)
    assert other.ctypes.data != address
    other[:] = 1
    del held
    gc.collect()
    assert memory.take(SIZE).ctypes.data == address


def test_other_sizes_and_its_end() -> None:
    memory = Recycled()
    buffer = memory.take(SIZE)
    address = buffer.ctypes.data
    del buffer
    assert memory.take(SIZE + 1).size == SIZE + 1
    last = memory.take(SIZE)
    assert last.ctypes.data == address
    del memory
    last[:] = 3  # who holds it may go on
    assert (last == 3).all()


def test_an_arena_of_it_gives_all_back() -> None:
    memory = Recycled()
    for _ in range(2):
        arena = Arena(memory.take)
        buffers = [arena.allocate(n) for n in (9 << 20, 1_500_000, 1_500_000, 1000, 0)]
        found = sorted(b.ctypes.data for b in buffers if b.size > 2000)
        assert len({*found}) == 3
        del arena, buffers
    assert sum(map(len, memory._spare.values())) == 2
