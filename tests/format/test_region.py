"""Regions, against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.format import region as reg
from modelstore.format.region import Region, Shape

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: Shape) -> Region:
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in pairs)


def numbers(shape: Shape) -> Any:
    """An array in which every element is its own row-major index."""
    return np.arange(math.prod(shape)).reshape(shape)


@given(data=st.data(), shape=SHAPES)
def test_a_region_is_a_box(data: st.DataObject, shape: Shape) -> None:
    one = data.draw(regions(shape))
    part = numbers(shape)[reg.slices(one)]
    assert reg.extent(one) == part.shape
    assert reg.size(one) == part.size
    reg.check(one, shape)
    if part.size:
        assert reg.offset(one, shape) == part.reshape(-1)[0]


@given(data=st.data(), shape=SHAPES)
def test_intersect_and_shift(data: st.DataObject, shape: Shape) -> None:
    one, other = data.draw(regions(shape)), data.draw(regions(shape))
    array = numbers(shape)
    expected = np.intersect1d(array[reg.slices(one)], array[reg.slices(other)])
    both = reg.intersect(one, other)
    assert both == reg.intersect(other, one)
    if both is None:
        assert not expected.size
    else:
        assert np.array_equal(np.sort(array[reg.slices(both)].reshape(-1)), expected)
        # In coordinates of `one`, it is the same elements.
        assert np.array_equal(array[reg.slices(one)][reg.slices(reg.shift(both, one))], array[reg.slices(both)])


@given(data=st.data(), shape=SHAPES)
def test_one_run_of_bytes(data: st.DataObject, shape: Shape) -> None:
    one = data.draw(regions(shape))
    flat = numbers(shape)[reg.slices(one)].reshape(-1)
    if flat.size:
        assert reg.is_contiguous(one, shape) == bool((np.diff(flat) == 1).all())


@given(data=st.data(), shape=SHAPES)
def test_an_index_is_what_numpy_has(data: st.DataObject, shape: Shape) -> None:
    index: list[Any] = []
    for n in shape:
        bound = st.none() | st.integers(-n - 2, n + 2)
        kinds = [st.builds(slice, bound, bound), st.integers(-n, n - 1) if n else st.just(slice(None))]
        index.append(data.draw(st.one_of(kinds)))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(index)))
        index[at : data.draw(st.integers(at, len(index)))] = [...]
    region, dropped = reg.from_index(tuple(index), shape)
    reg.check(region, shape)
    expected = numbers(shape)[(*index,)]
    found = numbers(shape)[reg.slices(region)].squeeze(dropped)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 0, 0), IndexError),
        ((..., ...), IndexError),
        (slice(None, None, 2), TypeError),
        (slice(None, None, -1), TypeError),
        ([0, 1], TypeError),
        (True, TypeError),
        (None, TypeError),
        ("x", TypeError),
        (1.5, TypeError),
        (np.array([True, False, True]), TypeError),
    ],
)
def test_an_index_that_is_not_read(index: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        reg.from_index(index, (3, 4))


@pytest.mark.parametrize(
    "region", [((0, 4), (0, 4)), ((-1, 2), (0, 4)), ((2, 1), (0, 4)), ((0, 3),), ((0, 3), (0, 5)), ()]
)
def test_a_region_outside(region: Region) -> None:
    with pytest.raises(ValueError, match="region"):
        reg.check(region, (3, 4))


def test_numbers_beyond_64_bits() -> None:
    huge = (2**40, 2**40)
    assert reg.size(reg.full(huge)) == 2**80
    assert reg.nbytes(huge, 8) == 2**83
    assert reg.offset(((2**39, 2**39 + 1), (5, 6)), huge) == 2**79 + 5
