"""The chunk grid: it covers each tensor exactly, in chunks of the right size, where ranks will cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.format import grid
from modelstore.format.region import Region, Shape, extent, full, is_contiguous, offset, size, slices
from modelstore.plan.write import FILE_CODEC, STEP, plan_steps, plan_tensor

ITEMSIZES = st.sampled_from([1, 2, 4, 8, 16])
LENGTHS = st.integers(0, 9) | st.sampled_from([64, 100, 1000, 4096, 5120, 14336, 128_256, 2**21, 10**7])
SHAPES = st.lists(LENGTHS, max_size=5).map(tuple).filter(lambda s: math.prod(s) < 2**36)
SMALL = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def small_grids(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """A small tensor and any chunk shape for it."""
    shape = draw(SMALL)
    return shape, tuple(draw(st.integers(1, max(1, n))) for n in shape)


def regions_of(shape: Shape, chunk: Shape) -> list[Region]:
    return [grid.chunk_region(shape, chunk, i) for i in range(grid.count(shape, chunk))]


@given(cut=small_grids())
def test_chunks_cover_a_tensor_once(cut: tuple[Shape, Shape]) -> None:
    shape, chunk = cut
    seen = np.zeros(shape, int)
    for region in regions_of(shape, chunk):
        assert size(region) > 0
        seen[slices(region)] += 1
    assert (seen == 1).all()
    assert grid.count(shape, chunk) == math.prod(grid.counts(shape, chunk))


@given(cut=small_grids(), data=st.data())
def test_touching(cut: tuple[Shape, Shape], data: st.DataObject) -> None:
    shape, chunk = cut
    pairs = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    wanted = np.zeros(shape, bool)
    wanted[tuple(slice(a, b) for a, b in pairs)] = True
    expected = [i for i, region in enumerate(regions_of(shape, chunk)) if wanted[slices(region)].any()]
    assert grid.touching(shape, chunk, tuple((a, b) for a, b in pairs)).tolist() == expected


@given(cut=small_grids())
def test_slabs_are_the_bytes_in_order_in_whole_chunks(cut: tuple[Shape, Shape]) -> None:
    shape, chunk = cut
    at, chunks = 0, []
    for slab in grid.slabs(shape, chunk):
        assert is_contiguous(slab, shape)
        assert offset(slab, shape) == at
        at += size(slab)
        within = grid.touching(shape, chunk, slab).tolist()
        assert sum(size(grid.chunk_region(shape, chunk, i)) for i in within) == size(slab)
        chunks += within
    assert at == math.prod(shape)
    assert chunks == list(range(grid.count(shape, chunk)))


@given(cut=small_grids())
def test_all_chunks_at_once_are_those_one_by_one(cut: tuple[Shape, Shape]) -> None:
    found = list(grid.regions(*cut))
    assert [region for region, _ in found] == regions_of(*cut)
    assert all(own == full(extent(region)) for region, own in found)


@given(shape=SMALL, itemsize=ITEMSIZES, limit=st.integers(1, 300))
def test_bands_are_the_bytes_in_order_and_within_the_limit(shape: Shape, itemsize: int, limit: int) -> None:
    if 0 in shape:
        return
    at = 0
    for band in grid.bands(full(shape), itemsize, limit):
        assert is_contiguous(band, shape)
        assert offset(band, shape) == at
        assert size(band) * itemsize <= max(limit, itemsize)
        at += size(band)
    assert at == math.prod(shape)


@settings(max_examples=300)
@given(shape=SHAPES, itemsize=ITEMSIZES, data=st.data())
def test_chunks_are_of_the_right_size(shape: Shape, itemsize: int, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    chunk = grid.chunk_shape(shape, itemsize, axis=axis)
    nbytes, whole = math.prod(chunk) * itemsize, math.prod(shape) * itemsize
    assert len(chunk) == len(shape)
    assert all(1 <= c <= max(1, n) for c, n in zip(chunk, shape, strict=True))
    if whole < grid.SMALL:
        assert chunk == tuple(max(1, n) for n in shape)
        return
    assert nbytes <= grid.TARGET or all(c < 4 for c in chunk)  # a length of 3 is cut in two at most
    assert nbytes >= grid.FINEST
    if axis is None and whole > grid.TARGET:
        assert 2 * nbytes >= grid.TARGET
    for n, c in zip(shape, chunk, strict=True):  # even cuts, into a power of two of parts
        assert any(c == -(-n // 2**k) for k in range(40))


@given(shape=SHAPES, itemsize=ITEMSIZES)
def test_chunks_of_rows_are_runs_of_bytes(shape: Shape, itemsize: int) -> None:
    chunk = grid.chunk_shape(shape, itemsize, rows_only=True)
    assert math.prod(chunk) * itemsize <= grid.TARGET or math.prod(shape) * itemsize < grid.SMALL
    if 0 in shape:
        return
    at = 0
    for index in range(min(grid.count(shape, chunk), 50)):
        region = grid.chunk_region(shape, chunk, index)
        assert is_contiguous(region, shape)
        assert offset(region, shape) == at
        at += size(region)


@given(shape=SHAPES.filter(bool), group=st.sampled_from([1, 16, 32, 128]), data=st.data())
def test_cuts_respect_the_group(shape: Shape, group: int, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    chunk = grid.chunk_shape(shape, 2, axis=axis, units=(*[1] * (len(shape) - 1), group))
    assert chunk[-1] % group == 0 or chunk[-1] == max(1, shape[-1])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "shape",
    [
        (4096, 4096),
        (1024, 4096),
        (14336, 4096),
        (4096, 14336),
        (128_256, 4096),
        (32_000, 2048),
        (896, 4864),
        (3072, 768),
    ],
)
def test_ranks_read_whole_chunks(shape: Shape, axis: int, ranks: int) -> None:
    chunk = grid.chunk_shape(shape, 2, axis=axis)
    part = shape[axis] // ranks
    for rank in range(ranks):
        region = tuple((rank * part, (rank + 1) * part) if i == axis else (0, n) for i, n in enumerate(shape))
        touched = grid.touching(shape, chunk, region)
        assert sum(size(grid.chunk_region(shape, chunk, int(i))) for i in touched) == size(region)


@pytest.mark.parametrize(("shape", "axis"), [((4096, 4096), 0), ((8192, 8192), 1), ((16_384, 16_384), None)])
def test_both_dimensions_of_a_large_matrix_are_cut(shape: Shape, axis: int | None) -> None:
    chunk = grid.chunk_shape(shape, 2, axis=axis)
    cuts = grid.counts(shape, chunk)
    if axis is not None:
        assert cuts[axis] >= grid.WAYS
    else:
        assert all(n >= grid.WAYS for n in cuts)


@settings(deadline=None)
@given(shape=SHAPES.filter(lambda s: math.prod(s) < 2**31), limit=st.sampled_from([STEP, 2 * STEP, 64 << 20]))
def test_steps_read_everything_once_in_order(shape: Shape, limit: int) -> None:
    plan = plan_tensor("t", "float32", shape, FILE_CODEC)
    steps = list(plan_steps([(0, plan)], limit))
    parts = list(itertools.chain.from_iterable(step.parts for step in steps))
    at = 0
    for part in parts:
        assert part.nbytes == size(part.region) * 4
        if part.hashed:
            assert offset(part.region, shape) == at
            at += size(part.region)
    assert at == math.prod(shape)
    chunks = [chunk for part in parts for chunk in part.chunks]
    assert chunks == list(range(grid.count(shape, plan.chunk)))
    for part in parts:
        held = sum(size(grid.chunk_region(shape, plan.chunk, c)) for c in part.chunks)
        assert held == (size(part.region) if part.chunks else 0)
    assert all(step.nbytes == sum(part.nbytes for part in step.parts) for step in steps)
    assert all(step.nbytes <= max(limit, STEP) for step in steps)
    assert extent(full(shape)) == shape
