"""How slices of tensors that several processes store become one tensor each: a cut that they share, and what may be wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.format import grid
from modelstore.format.region import Region, Shape, extent, full, intersect, size

_FACTORS = (2, 3, 5, 7)  # a cell is cut by these before it is cut into what may be very small


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One rank's stored part of a tensor: its dtype, the whole tensor's shape, the region, the cut that it kept to.

    `chunk` is the shape of a chunk of the whole tensor; None if the region's borders fit no cut, and it was cut by itself.
    """

    rank: int
    dtype: str
    shape: Shape
    region: Region
    chunk: Shape | None


def shared_chunk(shape: Shape, region: Region, itemsize: int, ranks: int, like: Shape | None) -> Shape | None:
    """The shape of chunks that a slice and the others of its tensor keep to, without having heard of each other.

    A slice's place tells the cell that an even split into at most `ranks` would have, as torch makes it: all but the last
    equally long. All ranks find the same cell, and so the same cut: `like` (an earlier version's), else the one that a
    tensor saved whole would have, where the cell's borders are multiples of it; else the cell cut evenly. None if the
    slice is of no even split.
    """
    cells = [_cell(n, a, b, ranks) for n, (a, b) in zip(shape, region, strict=True)]
    cell = tuple(c for c in cells if c is not None)
    if len(cell) < len(cells):
        return None
    split = [axis for axis, n in enumerate(shape) if cell[axis] < n]
    candidates = [like, grid.chunk_shape(shape, itemsize)]
    candidates += [grid.chunk_shape(shape, itemsize, axis=axis) for axis in split]
    for chunk in candidates:
        if chunk is not None and all(cell[axis] % chunk[axis] == 0 for axis in split):
            return chunk
    return _cut(cell, split, itemsize)


def _cell(n: int, start: int, stop: int, ranks: int) -> int | None:
    """The length of the parts that a dimension was split into, of which (start, stop) is one."""
    if (start, stop) == (0, n):
        return n
    ways = (
        ranks,
        *range(2, ranks),
    )  # first into as many parts as there are ranks: else the last part may fit two splits
    parts = [part for part in (-(-n // w) for w in ways) if start % part == 0 and stop == min(n, start + part)]
    return parts[0] if parts else None


def _cut(cell: Shape, split: Sequence[int], itemsize: int) -> Shape:
    """A cell in equal parts of at most the target's bytes; along dimensions that are not split the last may be smaller."""
    chunk = list(cell)
    while math.prod(chunk) * itemsize > grid.TARGET:
        ways = {axis: _ways(n) if axis in split else 2 for axis, n in enumerate(chunk) if n > 1}
        if not ways:
            break
        # The longest dimension, but rather another than one that could only be cut into very many.
        axis = min(ways, key=lambda a: (ways[a] > _FACTORS[-1], -chunk[a], a))
        chunk[axis] = -(-chunk[axis] // ways[axis])
    return tuple(chunk)


def _ways(n: int) -> int:
    """The smallest number from 2 on that divides n."""
    return next((ways for ways in range(2, math.isqrt(n) + 1) if n % ways == 0), n)


def common_chunk(pieces: Sequence[RankSlice]) -> Shape | None:
    """The cut that all pieces of a tensor kept to and whose cells they are made of; None if there is none."""
    chunk = pieces[0].chunk
    if chunk is None or any(piece.chunk != chunk for piece in pieces):
        return None
    for piece in pieces:
        for (a, b), n, c in zip(piece.region, piece.shape, chunk, strict=True):
            if a % c or (b % c and b != n):
                return None
    return chunk


def cells(piece: RankSlice, chunk: Shape) -> NDArray[np.int64]:
    """The indices of a piece's own chunks, in the order of its grid, in the whole tensor's grid."""
    return grid.touching(piece.shape, chunk, piece.region)


def piece_problem(pieces: Sequence[RankSlice]) -> str | None:
    """Why the pieces are not one tensor, naming their ranks; None if they are, each element given once."""
    first = pieces[0]
    for piece in pieces[1:]:
        if (piece.dtype, piece.shape) != (first.dtype, first.shape):
            return (
                f"rank {first.rank} has {first.dtype} of shape {first.shape}, "
                f"rank {piece.rank} {piece.dtype} of shape {piece.shape}"
            )
    if 0 in first.shape:
        return None
    overlap = _overlap(pieces)
    if overlap is not None:
        one, other, both = overlap
        return f"ranks {one.rank} and {other.rank} both have {_text(both)}"
    total = sum(size(piece.region) for piece in pieces)
    if total < size(full(first.shape)):
        held = "; ".join(f"rank {p.rank} has {_text(p.region)}" for p in pieces[:8])
        more = f"; and {len(pieces) - 8} more" if len(pieces) > 8 else ""
        return f"of its {size(full(first.shape))} elements {total} are there: {held}{more}"
    return None


def _overlap(pieces: Sequence[RankSlice]) -> tuple[RankSlice, RankSlice, Region] | None:
    regions = np.array([piece.region for piece in pieces], np.int64).reshape(len(pieces), -1, 2)
    for i, piece in enumerate(pieces):
        others = regions[i + 1 :]
        shared = np.maximum(others[:, :, 0], regions[i, :, 0]) < np.minimum(others[:, :, 1], regions[i, :, 1])
        hits = np.flatnonzero(shared.all(axis=1))  # a 0-d tensor has no dimension in which two could be apart
        if len(hits):
            other = pieces[i + 1 + int(hits[0])]
            both = intersect(piece.region, other.region)
            assert both is not None, "two regions that overlap in every dimension share elements"
            return piece, other, both
    return None


def _text(region: Region) -> str:
    return f"[{', '.join(f'{a}:{b}' for a, b in region)}]" if extent(region) else "all of it"
