"""Tensors that are views of one memory: which of them are put into one memory again, and their places in it.

One rule serves both sides, so that nothing is saved that cannot be given back: views are joined where their memory takes at
most 16 times their own bytes, or is small. Others stay tensors of their own, exact, which share nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

_SMALL = 64 << 20  # bytes of memories, all together, that may be larger than 16 times their views
_TIMES = 16
_ALIGNED = 16  # bytes: the largest element


class SharedView(NamedTuple):
    """A tensor in a memory: offset and strides in elements, `first` and `end` in bytes."""

    name: str
    itemsize: int
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def first(self) -> int:
        """The place of its first element."""
        return self.offset * self.itemsize

    @property
    def end(self) -> int:
        """The end of its last element."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.itemsize


class _Allowance:
    """The bytes that memories may still take beyond what is in proportion to their views."""

    def __init__(self) -> None:
        self.left = _SMALL

    def admits(self, views: Sequence[SharedView]) -> bool:
        """Whether these are joined."""
        span = max(view.end for view in views)
        if span <= _TIMES * sum(view.nbytes for view in views):
            return True
        if span > self.left:
            return False
        self.left -= span
        return True


def placed(groups: Iterable[Sequence[SharedView]]) -> tuple[dict[str, list[Any]], list[str]]:
    """Name → `[memory, offset, strides]` of the views that are joined, and the names of those that will share nothing.

    Each group is of one memory. Views of a wide memory that do not overlap get memories of their own.
    """
    allowance, table, apart, number = _Allowance(), {}, [], itertools.count()
    for group in groups:
        moved = _moved(group)
        whole = allowance.admits(moved)
        for views in [moved] if whole else [_moved(part) for part in _overlapping(group) if len(part) > 1]:
            if whole or allowance.admits(views):
                memory = next(number)
                table.update({view.name: [memory, view.offset, list(view.strides)] for view in views})
            else:
                apart += [view.name for view in views]
    return table, apart


def _moved(views: Sequence[SharedView]) -> list[SharedView]:
    """The same views in a memory that starts at the first of them."""
    start = min(view.first for view in views) // _ALIGNED * _ALIGNED
    return [view._replace(offset=view.offset - start // view.itemsize) for view in views]


def _overlapping(views: Sequence[SharedView]) -> list[list[SharedView]]:
    """The views in groups, of which none reaches into another."""
    found: list[list[SharedView]] = []
    end = -1
    for view in sorted(views, key=lambda view: view.first):
        if view.first >= end:
            found.append([])
        found[-1].append(view)
        end = max(end, view.end)
    return found


def joined(tensors: Mapping[str, torch.Tensor], table: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that were views of one memory as views of one again, those that are joined.

    `table`: name → `[memory, offset, strides]`. `ValueError` if a place in it is not valid.
    """
    together: dict[int, list[SharedView]] = {}
    for name, (memory, offset, strides) in table.items():
        tensor = tensors[name]
        numbers = (memory, offset, *strides)
        if len(strides) != tensor.dim() or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"the place of tensor {name[:80]!r} is not valid")
        if tensor.numel():
            view = SharedView(name, tensor.element_size(), tuple(tensor.shape), offset, tuple(strides))
            together.setdefault(memory, []).append(view)
    allowance = _Allowance()
    made: dict[str, torch.Tensor] = {}
    for views in together.values():
        if allowance.admits(views):
            made.update(_memory(tensors, views))
    return made


def _memory(tensors: Mapping[str, torch.Tensor], views: Sequence[SharedView]) -> dict[str, torch.Tensor]:
    import torch

    span = math.ceil(max(view.end for view in views) / _ALIGNED) * _ALIGNED
    memory = torch.zeros(span, dtype=torch.uint8, device=tensors[views[0].name].device)
    made = {}
    for view in views:
        tensor = tensors[view.name]
        made[view.name] = memory.view(tensor.dtype).as_strided(view.shape, view.strides, view.offset)
        # An element that is repeated along an axis is there once.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in view.strides)
        _fill(made[view.name][once], tensor[once])
    return made


def _fill(view: torch.Tensor, tensor: torch.Tensor) -> None:
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(view.element_size())
    if whole is None:  # complex128, of two lanes
        torch.view_as_real(view).view(torch.int64).copy_(torch.view_as_real(tensor).view(torch.int64))
    else:  # as integers, so that no NaN changes
        view.view(whole).copy_(tensor.view(whole))
