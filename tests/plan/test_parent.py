"""Distances between sketches, and sketches whose bytes are not those of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.sketch import Sketch, decode, encode, places, sketch
from modelstore.plan.parent import Candidate, nearest

SHAPES = {f"layers.{n}": (64, 96 + n % 2) for n in range(32)}


def made(seed: int, *, moved: int = 0, prefix: str = "", names: range = range(32)) -> tuple[Sketch, list[int]]:
    random = np.random.default_rng(seed)
    words = {f"layers.{n}": random.integers(0, 1 << 16, 64, np.uint16) + np.uint16(moved) for n in names}
    at = places((name, DTYPES["bfloat16"], SHAPES[name]) for name in words)
    own = [(place._replace(name=prefix + place.name), words[place.name]) for place in at]
    return sketch(own), [place.nbytes for place in at]


def distance(own: Sketch, weights: list[int], other: Sketch) -> float:
    return nearest(own, weights, [Candidate("m", 1, 0.0, other)])[0].distance


def test_the_same_is_at_0_and_a_stranger_at_1() -> None:
    own, weights = made(1)
    assert distance(own, weights, own) == 0
    assert distance(own, weights, made(2)[0]) > 0.9


def test_a_small_difference_is_a_small_distance_whatever_tensors_are_called() -> None:
    own, weights = made(1)
    near, nearer = made(1, moved=9, prefix="h.")[0], made(1, moved=2)[0]
    assert 0 < distance(own, weights, nearer) < distance(own, weights, near) < 0.5


def test_tensors_that_are_not_there_have_nothing_in_common() -> None:
    own, weights = made(1)
    assert distance(own, weights, made(1, names=range(16))[0]) == pytest.approx(0.5, abs=0.05)


def test_many_strangers_tensors_are_not_taken_for_renamed_ones() -> None:
    own, weights = made(1)
    assert distance(own, weights, made(2, prefix="h.")[0]) == 1


def test_values_that_are_all_one_are_near_to_nothing() -> None:
    (place,) = places([("w", DTYPES["bfloat16"], (64, 96))])
    ones = sketch([(place, np.full(64, 16256, np.uint16))])
    assert nearest(ones, [1], [Candidate("m", 1, 0.0, ones)]) == []


def test_of_equally_near_ones_the_oldest_comes_first() -> None:
    own, weights = made(1)
    other = made(1, moved=2)[0]
    found = nearest(
        own, weights, [Candidate("b", 1, 5.0, other), Candidate("a", 1, 3.0, other), Candidate("c", 1, 1.0, own)]
    )
    assert [one.candidate.model for one in found] == ["c", "a", "b"]


@given(st.binary(max_size=200) | st.builds(lambda cut: encode(made(1)[0])[:cut], st.integers(0, 500)))
def test_bytes_of_no_sketch_are_none(data: bytes) -> None:
    found = decode(data)
    assert found is None or distance(*made(1), found) >= 0


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_breaks_nothing(at: int, value: int) -> None:
    data = bytearray(encode(made(1)[0]))
    data[at] = value
    found = decode(bytes(data))
    assert found is None or distance(*made(1), found) >= 0
