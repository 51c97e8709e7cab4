"""A bound on what is measured: the smallest mix that holds it, in at most four trials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.search.bound import TRIALS, bisect

EXPECTED = [0.5 * 0.87**at for at in range(40)] + [0.0]


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("limit", [0.3, 0.05, 0.004])
def test_it_comes_close_where_what_is_expected_is_wrong_by_a_factor(factor: float, limit: float) -> None:
    at, trials = bisect(EXPECTED, limit, lambda at: factor * EXPECTED[at])
    assert at is not None
    assert factor * EXPECTED[at] <= limit
    assert at == 0 or limit < factor * EXPECTED[at - 1]
    assert len(trials) <= TRIALS


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.floats(0, 1),
    st.lists(st.floats(0, 2), min_size=30, max_size=30),
)
def test_what_it_gives_was_found_to_hold(expected: list[float], limit: float, found: list[float]) -> None:
    expected = sorted(expected, reverse=True)
    at, trials = bisect(expected, limit, lambda at: found[at])
    assert len(trials) <= TRIALS
    assert len({one.at for one in trials}) == len(trials)
    held = [one.at for one in trials if one.found <= limit]
    assert at == min(held, default=None)


def test_where_none_holds_that_is_said() -> None:
    assert bisect(EXPECTED[:-1], 0.001, lambda at: 1.0 + at)[0] is None
