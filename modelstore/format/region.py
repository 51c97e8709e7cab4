"""Regions: n-d boxes within a tensor, as ((start, stop), …), one pair per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from modelstore.format.buffers import Bytes

Region = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


def full(shape: Sequence[int]) -> Region:
    """The region that is the whole tensor."""
    return tuple((0, n) for n in shape)


def extent(region: Region) -> Shape:
    """The shape of a region."""
    return tuple([b - a for a, b in region])


def size(region: Region) -> int:
    """How many elements a region has (1 for a 0-d tensor)."""
    return math.prod(extent(region))


def nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a tensor of that shape."""
    return math.prod(shape) * itemsize


def intersect(one: Region, other: Region) -> Region | None:
    """The overlap of two regions of the same tensor, None if they share no element."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(a < b for a, b in both) else None


def shift(region: Region, origin: Region) -> Region:
    """`region` in coordinates that start at the corner of `origin`."""
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(region, origin, strict=True))


def placed(region: Region, origin: Region) -> Region:
    """The reverse of `shift`: a region in coordinates relative to the corner of `origin`, in those of the whole."""
    return tuple((a + c, b + c) for (a, b), (c, _) in zip(region, origin, strict=True))


def slices(region: Region) -> tuple[slice, ...]:
    """The region as an index for an array."""
    return tuple(slice(a, b) for a, b in region)


def rows(buffer: Bytes, shape: Sequence[int], itemsize: int, place: Region) -> Bytes | None:
    """A region's bytes as a 2-d view of a tensor's buffer, rows contiguous; None if its rows are not evenly apart."""
    if not place:
        return buffer.reshape(1, -1)
    *lead, last = shape
    inner = slice(place[-1][0] * itemsize, place[-1][1] * itemsize)
    view = buffer.reshape(*lead, last * itemsize)[(*slices(place[:-1]), inner)]
    if view.flags.c_contiguous:
        return view.reshape(1, -1)
    try:
        return view.reshape(-1, view.shape[-1], copy=False)
    except ValueError:
        return None


def is_contiguous(region: Region, shape: Sequence[int]) -> bool:
    """Whether the region is one run of elements in the row-major order of a tensor of that shape."""
    partial = False  # a dimension further in was cut: all dimensions before it must have length 1
    for (a, b), n in zip(reversed(region), reversed(tuple(shape)), strict=True):
        if partial and b - a != 1:
            return False
        partial = partial or (a, b) != (0, n)
    return True


def offset(region: Region, shape: Sequence[int]) -> int:
    """Index, in row-major order, of the region's first element in a tensor of that shape."""
    at = 0
    for (a, _), n in zip(region, shape, strict=True):
        at = at * n + a
    return at


def check(region: Region, shape: Sequence[int]) -> None:
    """`ValueError` unless the region is within a tensor of that shape."""
    if len(region) != len(shape):
        raise ValueError(
            f"region {region} has {len(region)} dimensions, the tensor {len(shape)}: give one pair a dimension"
        )
    for (a, b), n in zip(region, shape, strict=True):
        if not 0 <= a <= b <= n:
            raise ValueError(f"region {region} does not lie within shape {tuple(shape)}")


def from_index(index: Any, shape: Sequence[int], *, exact: bool = False) -> tuple[Region, tuple[int, ...]]:
    """A NumPy-like index (ints, slices of step 1, `...`) as a region, and the dimensions that ints drop.

    `IndexError` if an int is outside, and with `exact` also if a slice reaches beyond the dimension, which otherwise ends with
    it; `TypeError` for steps, arrays and other kinds of index.
    """
    items = index if isinstance(index, tuple) else (index,)
    if sum(item is Ellipsis for item in items) > 1:
        raise IndexError("an index can have one '...' only")
    if Ellipsis not in [item if item is Ellipsis else None for item in items]:
        items = (*items, Ellipsis)
    at = next(i for i, item in enumerate(items) if item is Ellipsis)
    fill = len(shape) - (len(items) - 1)
    if fill < 0:
        raise IndexError(f"an index of {len(items) - 1} dimensions is too many for shape {tuple(shape)}")
    items = (*items[:at], *[slice(None)] * fill, *items[at + 1 :])
    region, dropped = [], []
    for axis, (item, n) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            a, b, step = item.indices(n)
            if step != 1:
                raise TypeError(f"index {index!r} has step {step}: only steps of 1 are read; slice the result instead")
            ends = [end for end in (item.start, item.stop) if end is not None]
            if exact and (a > b or not all(-n <= end <= n for end in ends)):
                written = ":".join("" if end is None else str(end) for end in (item.start, item.stop))
                raise IndexError(f"{written} does not lie within dimension {axis}, which is {n} long: give 0 to {n}")
            region.append((a, max(a, b)))
        elif hasattr(item, "__index__") and not isinstance(item, bool):
            i = item.__index__()
            if not -n <= i < n:
                raise IndexError(f"index {i} is out of range for dimension {axis} of length {n}")
            region.append((i % n, i % n + 1))
            dropped.append(axis)
        else:
            raise TypeError(f"index {item!r} is not an int, a slice or '...'")
    return tuple(region), tuple(dropped)
