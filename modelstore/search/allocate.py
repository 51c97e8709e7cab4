"""The best mix of a given size: one option for each group, of the least cost in all, within so many bytes.

A multiple-choice knapsack, solved exactly. Groups are taken one after the other; of the choices made so far, those are kept
that are not worse than others in both bytes and cost, and that can still come to less than the best mix known. A price of a
byte bounds the best result of the rest: with the right price few choices are left, however many groups there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PRICES = 200  # halvings of the search for the price of a byte
_SLACK = 1e-12  # of what is added up: sums of floats in another order differ


@dataclass(frozen=True, slots=True)
class Option:
    """A group's size in one format, and its cost; costs add up."""

    bytes: int
    cost: float

    def __post_init__(self) -> None:
        if self.bytes < 0 or not 0 <= self.cost < float("inf"):
            raise ValueError(f"an option of {self.bytes} bytes and cost {self.cost} is none")


Groups = Sequence[Sequence[Option]]


def smallest(groups: Groups) -> int:
    """The bytes of the smallest mix."""
    return sum(min(option.bytes for option in group) for group in groups)


def allocate(groups: Groups, budget: int) -> list[int]:
    """The option of each group, by its number, with the least cost of all together in at most `budget` bytes.

    Among equal costs, the smaller mix. `ValueError` if not even the smallest is within the budget.
    """
    least = smallest(groups)
    if least > budget:
        raise ValueError(f"the smallest mix has {least} bytes, and {budget} are given")
    tables = [_table(group) for group in groups]
    price, known = _priced(tables, budget)
    # The least that the groups behind each need: in bytes, and in cost with bytes at the price.
    room = _behind([int(sizes.min()) for sizes, _, _ in tables])
    bound = _behind([float((costs + price * sizes).min()) for sizes, costs, _ in tables])
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for at, (sizes, costs, _) in enumerate(tables):
        every = (size[:, None] + sizes).reshape(-1)
        lost = (cost[:, None] + costs).reshape(-1)
        hope = lost + price * every + bound[at + 1] - price * budget
        kept = np.flatnonzero((every + room[at + 1] <= budget) & (hope <= known + _SLACK * (known + price * budget)))
        order = kept[np.lexsort((lost[kept], every[kept]))]
        order = order[_improves(lost[order])]
        steps.append((order // len(sizes), order % len(sizes)))
        size, cost = every[order], lost[order]
    return _followed(steps, [numbers for _, _, numbers in tables], int(np.argmin(cost)))


_Table = tuple[NDArray[np.int64], NDArray[np.float64], list[int]]


def _table(group: Sequence[Option]) -> _Table:
    """A group's options by size, without those that another is no worse than in both: bytes, costs, numbers."""
    order = sorted(range(len(group)), key=lambda at: (group[at].bytes, group[at].cost, at))
    kept: list[int] = []
    for at in order:
        if not kept or group[at].cost < group[kept[-1]].cost:
            kept.append(at)
    return np.array([group[at].bytes for at in kept], np.int64), np.array([group[at].cost for at in kept]), kept


def _priced(tables: Sequence[_Table], budget: int) -> tuple[float, float]:
    """A price of a byte at which the mix that is best with it is just within the budget; and that mix's cost.

    With a low price all groups take what costs least, with a high one what is smallest.
    """

    def best(price: float) -> tuple[int, float]:
        at = [int(np.argmin(costs + price * sizes)) for sizes, costs, _ in tables]  # of equal ones the smaller
        return (
            sum(int(sizes[one]) for (sizes, _, _), one in zip(tables, at, strict=True)),
            sum(float(costs[one]) for (_, costs, _), one in zip(tables, at, strict=True)),
        )

    size, cost = best(0.0)
    if size <= budget:
        return 0.0, cost
    high = 1.0 + max(float(costs.max()) for _, costs, _ in tables)  # a byte is worth more than any option
    low, cost = 0.0, best(high)[1]
    for _ in range(_PRICES):
        middle = (low * high) ** 0.5 if low else high / 1024
        if not low < middle < high:
            break
        size, found = best(middle)
        if size <= budget:
            high, cost = middle, min(cost, found)
        else:
            low = middle
    return high, cost


def _behind(values: Sequence[float]) -> list[float]:
    """For each place, the sum of the values from it on; 0 behind the last."""
    sums: list[float] = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _improves(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which costs are below all before them."""
    before = np.minimum.accumulate(costs)
    found = np.ones(len(costs), bool)
    found[1:] = costs[1:] < before[:-1]
    return found


def _followed(
    steps: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], numbers: Sequence[Sequence[int]], last: int
) -> list[int]:
    """The options on the way to a choice, by their numbers."""
    found = []
    for (before, option), known in zip(reversed(steps), reversed(numbers), strict=True):
        found.append(known[int(option[last])])
        last = int(before[last])
    return found[::-1]
