"""Results whose `repr` fits a screen, however large the model is: long lists are counted, long texts shortened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec

from modelstore.text import shortened

_LINE = 72  # columns of a text or a list within a repr
_LISTED = 3  # items that are shown of a list


class Result(msgspec.Struct, frozen=True):
    """Base of what a store answers."""

    def __repr__(self) -> str:
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(f'{name}={brief(value)}' for name, value in fields)})"


class Timed(Result, frozen=True):
    """An answer with `seconds`: those of the whole call, from its start to its answer."""

    def after(self, seconds: float) -> Self:
        """The same answer, of a call that took so long."""
        return msgspec.structs.replace(self, seconds=seconds)


def brief(value: Any) -> str:
    """A value's `repr`, or what it is and how much of it there is, where that is long."""
    if isinstance(value, str):
        return shortened(repr(value), _LINE)
    if isinstance(value, float):
        return repr(round(value, 6))
    if isinstance(value, Mapping):
        return _listed([f"{brief(k)}: {brief(v)}" for k, v in value.items()] if len(value) < 9 else [], value, "{}")
    if isinstance(value, list | tuple):
        plain = all(isinstance(item, str | int | float) for item in value)
        return _listed([brief(item) for item in value[:_LISTED]] if plain else [], value, "()")
    if isinstance(value, Result) or not isinstance(value, msgspec.Struct):
        return repr(value)
    return shortened(repr(value), _LINE)


def _listed(items: list[str], whole: Any, brackets: str) -> str:
    """The items in brackets, with the number of those left out; where that is long, or there are none, the number alone."""
    if not whole:
        return brackets
    left = len(whole) - len(items)
    text = ", ".join([*items, *([f"… {left:,} more"] if left and items else [])])
    if not items or len(text) > _LINE:
        kind = type(next(iter(whole))).__name__ if brackets == "()" else ""
        noun = kind or ("entry" if len(whole) == 1 else "entries")
        text = f"{len(whole):,} × {noun}" if kind else f"{len(whole):,} {noun}"
    return brackets[0] + text + brackets[1]
