"""Values that a caller gave, checked before anything is done, and described in one sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from modelstore.text import shortened

_LINE = 60  # columns of a value that is told of


def told(value: Any) -> str:
    """A value in a few words: never its contents if these are long."""
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int | float):
        return f"the number {shortened(repr(value), _LINE)}"
    if isinstance(value, str):
        return f"the text {shortened(repr(value[: 4 * _LINE]), _LINE)}"
    if isinstance(value, bytes | list | tuple | set | frozenset | Mapping):
        return f"{article} {kind} of {len(value):,}"
    shape = getattr(value, "shape", None)
    return f"{article} {kind}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


def text(name: str, value: Any) -> str:
    """A text that is not empty; `TypeError` or `ValueError` if it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, not {told(value)}")
    if not value:
        raise ValueError(f"{name} is an empty text: say which one")
    return value


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number; `TypeError` or `ValueError` if it is none, or is less than `least`."""
    if isinstance(value, str):
        hint = f": write int({shortened(repr(value), _LINE)})" if value.strip().lstrip("-").isdecimal() else ""
        raise TypeError(f"{name} must be a whole number, not {told(value)}{hint}")
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number, not {told(value)}")
    try:
        number = operator.index(value)
    except TypeError:  # a tensor or array of several
        raise TypeError(f"{name} must be a whole number, not {told(value)}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={number} is too small: it must be at least {least}")
    return number


def amount(name: str, value: Any, least: float | None = None) -> float:
    """A number that is one; errors as for `whole`."""
    if isinstance(value, bool | str | bytes) or not hasattr(type(value), "__float__") or hasattr(value, "__len__"):
        raise TypeError(f"{name} must be a number, not {told(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large a number: leave it out, or give a smaller one") from None
    except (TypeError, ValueError, RuntimeError):  # a tensor of several, or one without values
        raise TypeError(f"{name} must be a number, not {told(value)}") from None
    if math.isnan(number) or (least is not None and number < least):
        raise ValueError(f"{name}={number} is not valid: it must be at least {least or 0:g}")
    return value if isinstance(value, int | float) else number


def flag(name: str, value: Any) -> bool:
    """True or False; a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {told(value)}")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts; one alone would be taken for its letters."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is a list of texts: write [{shortened(repr(value), _LINE)}]")
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} is a list of texts, not {told(value)}")
    found = tuple(value)
    for item in found:
        if not isinstance(item, str):
            raise TypeError(f"{name} is a list of texts, and one of it is {told(item)}")
    return found


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """One of several values."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} is one of {listed}, not {told(value)}")
    return value


def each(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """A check of one value, or of each value of a list."""

    def checked(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [check(f"one of {name}", one) for one in value]
        return check(name, value)

    return checked
