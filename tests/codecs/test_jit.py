"""Who waits for kernels to be compiled is told so, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from modelstore.client.arguments import Checked
from modelstore.codecs.kernels.jit import COMPILING, compiled, telling
from modelstore.format.progress import Progress, meter


def fresh(number: int) -> Callable[[int], int]:
    """A function that no cache has the code of: it is in no file."""
    made: dict[str, Any] = {}
    exec(f"def kernel(x):\n    return x + {number}\n", made)
    function: Callable[[int], int] = made["kernel"]
    return function


class Works(Checked):
    """As a store has methods."""

    def work(self, *, progress: Progress | None = None) -> int:
        """Compile two kernels."""
        return sum(int(compiled(fresh(n), "int64(int64)")(0)) for n in (1, 2))


@pytest.mark.parametrize("heard", [True, False])
def test_the_first_kernel_that_is_compiled_is_told_of(heard: bool) -> None:
    said: list[tuple[int, int, str]] = []
    assert Works().work(progress=(lambda *what: said.append(what)) if heard else None) == 3
    assert said == [(0, 1, COMPILING)] * heard
    compiled(fresh(3), "int64(int64)")  # nobody waits for it
    assert len(said) == heard


def test_every_work_that_goes_on_is_told() -> None:
    said: list[str] = []
    with telling(lambda *_: said.append("a")), telling(lambda *_: said.append("b")), telling(None):
        compiled(fresh(4), "int64(int64)")
    assert sorted(said) == ["a", "b"]


def test_what_a_user_compiles_is_not_told_of() -> None:
    import numba

    said: list[str] = []
    compiled(fresh(5), "int64(int64)")  # from here on it is listened
    with telling(lambda *_: said.append("a")):
        numba.njit("int64(int64)")(fresh(6))
    assert not said


@pytest.mark.parametrize("total", [0, 3])
def test_a_share_of_the_total_can_be_computed(total: int) -> None:
    shares: list[float] = []
    count = meter(lambda done, total, _: shares.append(done / total), total, "verifying")
    assert count is not None
    for nbytes in (0, 3):
        count(nbytes)
    assert shares == [0, 0, 1]
