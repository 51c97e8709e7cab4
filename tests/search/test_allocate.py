"""The best mix of a size: what trying all of them gives, within the budget, and never worse with more."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.search.allocate import Option, allocate, smallest

COSTS = st.integers(0, 40).map(lambda n: n / 8) | st.floats(0, 1e6) | st.floats(1e-12, 1e-6)
GROUPS = st.lists(st.lists(st.builds(Option, st.integers(0, 60), COSTS), min_size=1, max_size=3), max_size=6)


def total(groups: list[list[Option]], mix: list[int]) -> tuple[int, float]:
    chosen = [group[at] for group, at in zip(groups, mix, strict=True)]
    return sum(option.bytes for option in chosen), sum(option.cost for option in chosen)


def brute(groups: list[list[Option]], budget: int) -> tuple[float, int]:
    """Cost and bytes of the best mix, of all there are."""
    mixes = itertools.product(*(range(len(group)) for group in groups))
    return min((cost, size) for size, cost in (total(groups, list(mix)) for mix in mixes) if size <= budget)


@given(GROUPS, st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_it_is_what_trying_all_mixes_finds(groups: list[list[Option]], more: int) -> None:
    budget = smallest(groups) + more
    size, cost = total(groups, allocate(groups, budget))
    assert size <= budget
    best, least = brute(groups, budget)
    assert cost == pytest.approx(best, rel=1e-9, abs=1e-18)
    assert size == least or cost != best


@given(GROUPS, st.integers(0, 100), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_more_room_is_never_worse(groups: list[list[Option]], one: int, other: int) -> None:
    budget = smallest(groups) + one
    before, after = (total(groups, allocate(groups, bytes))[1] for bytes in (budget, budget + other))
    assert after <= before * (1 + 1e-9)


@given(GROUPS.filter(smallest), st.integers(1, 10))
@settings(max_examples=50, deadline=None)
def test_what_does_not_fit_is_refused_with_the_smallest_size(groups: list[list[Option]], less: int) -> None:
    least = smallest(groups)
    with pytest.raises(ValueError, match=f"the smallest mix has {least} bytes"):
        allocate(groups, max(0, least - less))


def test_thousands_of_groups_with_costs_of_any_size_are_no_matter() -> None:
    """As many experts as a large mixture has; the price of a byte leaves few mixes to look at."""
    draw = random.Random(0)
    groups = []
    for _ in range(3000):
        columns, scale = draw.choice([768, 2048]) * 2048, 10 ** draw.uniform(-9, -2)
        groups.append(
            [
                Option(columns * bits // 8 + columns // 64, scale * 4.0**-bits * draw.uniform(0.9, 1.1))
                for bits in (2, 3, 4, 8)
            ]
        )
    budget = 3 * smallest(groups) // 2
    size, cost = total(groups, allocate(groups, budget))
    assert size <= budget
    uniform = max(bits for bits in range(4) if total(groups, [bits] * len(groups))[0] <= budget)
    assert cost < 0.9 * total(groups, [uniform] * len(groups))[1]


@pytest.mark.parametrize(("bytes", "cost"), [(-1, 0.0), (1, -0.5), (1, float("nan")), (1, float("inf"))])
def test_an_option_that_is_none_is_refused(bytes: int, cost: float) -> None:
    with pytest.raises(ValueError, match="is none"):
        Option(bytes, cost)
