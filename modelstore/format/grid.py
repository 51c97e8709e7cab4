"""The chunk grid: how a tensor is cut into chunks, on a regular grid, and which chunks a region touches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, product

import numpy as np
from numpy.typing import NDArray

from modelstore.format.region import Region, Shape

TARGET = 4 << 20  # bytes of a raw chunk that cutting aims to stay at or below, and above half of
SMALL = 1 << 20  # a tensor below this is one chunk
FINEST = 128 << 10  # a cut for tensor parallelism never makes chunks below this
WAYS = 8  # ranks that each should find whole chunks


def chunk_shape(
    shape: Sequence[int],
    itemsize: int,
    *,
    axis: int | None = None,
    units: Sequence[int] | None = None,
    rows_only: bool = False,
) -> Shape:
    """The shape of a tensor's chunks.

    Every dimension is cut evenly into a power of two of parts, the leading ones first and each 8 ways before any is cut
    finer, until a chunk has at most `TARGET` bytes. `axis`, along which ranks will slice the tensor, is cut 8 ways before
    all others and down to chunks of `FINEST` bytes. Cuts along each dimension are at multiples of `units`, the group of
    a codec, which for that may pass the target. `rows_only` cuts so that every chunk is one run of the tensor's bytes.
    """
    shape = tuple(shape)
    if not shape or math.prod(shape) * itemsize < SMALL:
        return tuple(max(1, n) for n in shape)
    units = tuple(units) if units is not None else (1,) * len(shape)
    parts = [1] * len(shape)

    def chunk() -> Shape:
        return tuple(map(_part, shape, parts, units))

    def nbytes() -> int:
        return math.prod(chunk()) * itemsize

    def can_cut(i: int) -> bool:
        return 2 * parts[i] <= shape[i] // units[i]

    def cut(i: int, ways: int, smallest: int) -> None:
        while parts[i] < ways and can_cut(i) and nbytes() >= smallest:
            parts[i] *= 2

    if rows_only:
        for i, n in enumerate(shape):
            cut(i, n, TARGET + 1)
            parts[i] = n if nbytes() > TARGET else parts[i]
        return chunk()
    if axis is not None:
        cut(axis, WAYS, 2 * FINEST)
    for i in cycle(range(len(shape))):
        if nbytes() <= TARGET or not any(map(can_cut, range(len(shape)))):
            return chunk()
        cut(i, parts[i] * WAYS, TARGET + 1)
    raise AssertionError("unreachable: cycle() does not end")


def _part(length: int, parts: int, unit: int) -> int:
    part = -(-length // parts)
    return min(length, -(-part // unit) * unit) or 1


def counts(shape: Sequence[int], chunk: Sequence[int]) -> Shape:
    """How many chunks there are along each dimension; an empty tensor has none."""
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def count(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """How many chunks a tensor has (1 for a 0-d one, 0 for an empty one)."""
    return math.prod(counts(shape, chunk))


def is_one_chunk(shape: Shape, chunk: Shape) -> bool:
    """Whether a tensor is one chunk, and not empty."""
    return shape == chunk and 0 not in shape


def chunk_region(shape: Sequence[int], chunk: Sequence[int], index: int) -> Region:
    """The region of the chunk at a row-major index of the grid."""
    region = []
    for n, c in zip(reversed(tuple(shape)), reversed(tuple(chunk)), strict=True):
        index, at = divmod(index, -(-n // c))
        region.append((at * c, min(n, at * c + c)))
    return tuple(reversed(region))


def regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[Region, Region]]:
    """Each chunk's region, in row-major order, and the same counted from the chunk's own corner."""
    cuts = [[(a, min(n, a + c)) for a in range(0, n, c)] for n, c in zip(shape, chunk, strict=True)]
    return zip(product(*cuts), product(*([(0, b - a) for a, b in along] for along in cuts)), strict=True)


def touching(shape: Sequence[int], chunk: Sequence[int], region: Region) -> NDArray[np.int64]:
    """Row-major indices, ascending, of the chunks that a region touches."""
    indices = np.zeros(1, np.int64)
    for (a, b), n, c in zip(region, shape, chunk, strict=True):
        along = np.arange(a // c, -(-b // c) if b > a else a // c, dtype=np.int64)
        indices = (indices[:, None] * -(-n // c) + along).reshape(-1)
    return indices


def slabs(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Region]:
    """The tensor as consecutive runs of its bytes, each made of whole chunks: the smallest such runs, in order.

    One slab's memory is what it takes to walk a tensor in the order of its bytes, chunk by chunk.
    """
    shape, chunk = tuple(shape), tuple(chunk)
    # Leading dimensions that are cut into single steps go step by step; the next one chunk by chunk; the rest is whole.
    lead = _lead(chunk) + 1
    for index in range(count(shape[:lead], chunk[:lead]) if 0 not in shape else 0):
        yield chunk_region(shape[:lead], chunk[:lead], index) + tuple((0, n) for n in shape[lead:])


def _lead(chunk: Sequence[int]) -> int:
    """The dimension along which slabs follow each other."""
    return next((i for i, c in enumerate(chunk) if c != 1), max(0, len(chunk) - 1))


def slab_sizes(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, int]:
    """(period, slab): the elements of a slab of `slabs`, and after how many of them slabs start again, the last cut short."""
    lead = _lead(chunk)
    inner = math.prod(shape[lead + 1 :])
    return math.prod(shape[lead:]), math.prod(chunk[lead : lead + 1]) * inner


def bands(region: Region, itemsize: int, limit: int) -> Iterator[Region]:
    """A region in consecutive parts of at most `limit` bytes each (or of one element), in row-major order."""
    rows = next((i for i, (a, b) in enumerate(region) if b - a > 1), None)
    nbytes = math.prod(b - a for a, b in region) * itemsize
    if nbytes <= limit or rows is None:
        yield region
        return
    a, b = region[rows]
    step = max(1, limit // (nbytes // (b - a)))
    for start in range(a, b, step):
        part = (*region[:rows], (start, min(b, start + step)), *region[rows + 1 :])
        yield from bands(part, itemsize, limit) if step == 1 else (part,)


def runs(shape: Sequence[int], chunk: Sequence[int], itemsize: int, limit: int) -> Iterator[Region]:
    """A tensor in the order of its bytes, in parts of at most `limit` bytes (or of one element), of whole chunks if they can."""
    for slab in slabs(shape, chunk):
        if math.prod(b - a for a, b in slab) * itemsize <= limit:
            yield slab
        else:
            yield from bands(slab, itemsize, limit)
