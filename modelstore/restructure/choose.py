"""How much of a model is kept, and which parts: pure decisions over numbers that were measured."""

from __future__ import annotations

from collections.abc import Sequence

from modelstore.format.given import told

Amount = float | int | Sequence[int]
"""A share to keep (0.75), how many to keep (24), or which ones, by their numbers from 0."""

_STEP = 32  # a share of neurons is rounded to a multiple of so many, which kernels run fastest


def named(amount: Amount | None) -> tuple[int, ...] | None:
    """The numbers that an amount names, None if it is a share or a count."""
    return None if amount is None or isinstance(amount, int | float) else tuple(amount)


def check_amount(what: str, amount: object, *, numbers: bool = False) -> None:
    """`ValueError` or `TypeError` if an amount cannot be meant; `numbers`: whether it may name what is kept."""
    if isinstance(amount, bool | str | bytes) or not isinstance(amount, int | float | Sequence):
        listed = ", or the numbers of those to keep" if numbers else ""
        raise TypeError(f"{what} must be a share such as 0.75, or a count{listed}, not {told(amount)}")
    if isinstance(amount, float):
        if not 0 < amount <= 1:
            raise ValueError(f"{what}={amount!r} is a share: give more than 0, and at most 1.0")
        return
    if isinstance(amount, int):
        if amount < 1:
            raise ValueError(f"{what}={amount!r} keeps nothing: give at least 1")
        return
    if not numbers:
        raise TypeError(f"{what} must be a share such as 0.75, or a count, not {told(amount)}")
    wrong = [one for one in amount if isinstance(one, bool) or not isinstance(one, int) or one < 0]
    if wrong or not amount or len(set(amount)) != len(amount):
        raise ValueError(f"{what}={told(list(amount))} must name each number once, from 0 on")


def count_of(what: str, amount: Amount, there: int, *, step: int = 1) -> int:
    """How many of `there` an amount keeps. A share is rounded to a multiple of `step` where `there` is one.

    `ValueError` if there are not so many.
    """
    if isinstance(amount, float):
        unit = step if there % step == 0 else 1
        return max(unit, round(there * amount / unit) * unit)
    if isinstance(amount, int):
        if amount > there:
            raise ValueError(f"{what}={amount} is more than the model's {there}")
        return amount
    if max(amount) >= there:
        raise ValueError(f"{what}={list(amount)} names {max(amount)}, and the model's are 0 to {there - 1}")
    return len(amount)


def neurons_of(amount: Amount, there: int) -> int:
    """How many neurons of a layer an amount keeps; a share gives a multiple of 32 where the layer has one."""
    return count_of("mlp", amount, there, step=_STEP)


def best(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """The numbers of the `count` most important parts, in ascending order. Among equal ones the first are kept."""
    order = sorted(range(len(importance)), key=lambda at: (-importance[at], at))
    return tuple(sorted(order[:count]))
