"""Work in a pool: in order, bounded, and over when its taker is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from modelstore.storage.pool import ordered, pause


def test_results_come_in_the_order_of_their_items() -> None:
    second = threading.Event()

    def act(number: int) -> int:
        if number == 0:
            assert second.wait(10)  # the first item is done after the second
        if number == 1:
            second.set()
        return number * number

    assert list(ordered(act, range(100), 4)) == [n * n for n in range(100)]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_asked_for_than_may_be_under_way(threads: int) -> None:
    asked = []

    def items() -> Iterator[int]:
        for number in range(20):
            asked.append(number)
            yield number

    for taken, _ in enumerate(ordered(lambda n: n, items(), threads, ahead=5)):
        assert len(asked) <= taken + 6  # one is asked for before there is room for it
    assert len(asked) == 20


def test_what_is_held_costs_no_more_than_the_memory_but_for_one_alone() -> None:
    costs = [3, 4, 5, 90, 1, 1, 9, 9, 2]
    lock, held = threading.Lock(), []

    def act(cost: int) -> int:
        with lock:
            held.append(cost)
            assert sum(held) <= 10 or len(held) == 1
        return cost

    got = []
    for cost in ordered(act, costs, 4, memory=10, cost=lambda cost: cost):
        with lock:
            held.remove(cost)
        got.append(cost)
    assert got == costs


def test_an_error_comes_in_the_place_of_its_item_and_ends_the_others() -> None:
    begun = []

    def act(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        if number > 3:
            pause(60)  # ends when the work is given up
        return number

    results = ordered(act, range(1000), 2, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert max(begun) < 20


def test_who_stops_taking_leaves_no_thread_behind() -> None:
    running = set(threading.enumerate())
    for number in ordered(lambda n: n, range(1000), 4, "modelstore-left"):
        if number == 5:
            break
    assert set(threading.enumerate()) <= running


def test_nothing_is_begun_before_it_is_asked_for() -> None:
    begun: list[int] = []
    results = ordered(begun.append, range(10), 2)
    assert not begun
    assert list(results) == [None] * 10


def test_what_was_taken_is_held_by_nobody_else() -> None:
    results = ordered(lambda number: np.full(10, number), range(20), 2, ahead=3)
    for number in range(20):
        taken = weakref.ref(next(results))
        assert taken() is None, number
