"""Which part of a trainer's file is the model, and what is beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelstore.errors import FormatError
from modelstore.sources.pickles.unpickle import Key, Ordered, Record

# Trainers' names of the model's own state dict.
USUAL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
# Entries that hold tensors and are not a model.
_OTHER = re.compile(r"optim|sched|scaler|rng|random|\bamp\b|sampler|loss|criterion|metric|callback|hyper|loops", re.I)
BESIDE = "it is beside the state dict"
_DEEPEST = 4
TOP = "."
_MOST = 5_000_000  # values that are looked at


@dataclass(frozen=True, slots=True)
class Left:
    """Something that is not part of the model: the bytes of its tensors, and how many these are."""

    bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The model's state dict, the keys that lead to it, and the entries beside and in it that are not weights of it."""

    path: tuple[str, ...]
    state: dict[str, Any]
    left: dict[str, Left] = field(default_factory=dict)


class TensorTest:
    """Decides which values of a saved structure are tensors, and how many bytes each has."""

    def __init__(self, kinds: tuple[type, ...], size: Callable[[Any], int]) -> None:
        self.kinds = kinds
        self.size = size


class _Looking:
    """Findings about the dicts of one structure: an object that many refer to is looked at only once."""

    def __init__(self, tensors: TensorTest) -> None:
        self.tensors = tensors
        self._own: dict[int, bool] = {}
        self._below: dict[tuple[int, int], bool] = {}
        self._seen: set[int] = set()

    def in_(self, value: Any) -> bool:
        """Whether it is a dict that holds tensors itself."""
        if not isinstance(value, dict):
            return False
        if id(value) not in self._own:
            self._own[id(value)] = any(isinstance(item, self.tensors.kinds) for item in value.values())
        return self._own[id(value)]

    def holds(self, value: Any, depth: int = _DEEPEST) -> bool:
        """Whether a dict is a state dict, or has one below a usual name."""
        if not isinstance(value, dict):
            return False
        known = self._below.get((id(value), depth))
        if known is None:
            known = self.in_(value) or (
                depth > 0
                and (
                    any(self.holds(value.get(key), depth - 1) for key in USUAL)
                    or any(self.in_(v) for key, v in value.items() if isinstance(key, str) and not _OTHER.search(key))
                )
            )
            self._below[id(value), depth] = known
        return known

    def weigh(self, value: Any) -> Left:
        """The tensors anywhere in a value that were not counted before: their bytes, and how many."""
        size = count = 0
        for item in _everything(value, self._seen):
            if isinstance(item, self.tensors.kinds):
                size += self.tensors.size(item)
                count += 1
        return Left(size, count)


def choose(saved: Any, tensors: TensorTest, where: str, key: str | None = None) -> Chosen:
    """The model's state dict in a saved object.

    `key` names it, as keys joined by dots ("." is the object itself). Else it is the one entry of a usual name (`USUAL`)
    that maps names to tensors, or has such an entry in turn; else the object itself, if it maps names to tensors and no
    entry of it does; else its one entry that does, and is not an optimizer's or the like. `FormatError` if there are
    several, or none; it names them.
    """
    looking = _Looking(tensors)
    path = _named(saved, key, where) if key is not None else _found(saved, looking, where, ())
    left: dict[str, Left] = {}
    state = saved
    for i, step in enumerate(path):
        for other in state:
            if other != step:
                left[".".join([*path[:i], shown(other)])] = looking.weigh(state[other])
        state = state[step]
    if not isinstance(state, dict) or (state and not looking.in_(state)):
        raise FormatError(
            f"{_at(where, path)} holds {_what(state)}, not a state dict: {_advice(saved, looking)}", object=where
        )
    weights: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            kind = type(name.value if isinstance(name, Key) else name).__name__
            raise FormatError(f"{_at(where, path)}: the state dict has a name of type {kind}", object=where)
        if isinstance(value, tensors.kinds):
            weights[name] = value
        elif isinstance(value, Record) and not name.endswith("_extra_state"):
            raise FormatError(
                f"{where}: {name!r} in the state dict is a {value.kind[:200]}, which is not a tensor and was not run: convert "
                "it to a plain tensor, or leave it out",
                object=where,
            )
        else:
            left[".".join([*path, shown(name)])] = looking.weigh(value)
    return Chosen(path, weights, left)


def _named(saved: Any, key: str, where: str) -> tuple[str, ...]:
    path: tuple[str, ...] = ()
    rest = "" if key == TOP else key
    value = saved
    while rest:
        names = [k for k in value if isinstance(k, str)] if isinstance(value, dict) else []
        # A key may have dots in it: the longest that fits is meant.
        step = max((k for k in names if rest == k or rest.startswith(f"{k}.")), key=len, default=None)
        if step is None:
            known = ", ".join(repr(shown(k)) for k in names[:8]) or "nothing"
            raise FormatError(
                f"{_at(where, path)} has no entry {rest[:80]!r} (key={key[:80]!r}): it has {known}", object=where
            )
        path, value, rest = (*path, step), value[step], rest[len(step) + 1 :]
    return path


def _found(saved: Any, looking: _Looking, where: str, path: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(saved, dict):
        raise FormatError(
            f"{_at(where, path)} holds {_what(saved)}, not a state dict: save a dict from names to tensors",
            object=where,
        )
    usual = [key for key in USUAL if looking.holds(saved.get(key))]
    usual = usual or [key for key in USUAL if saved.get(key) == {}]
    others = [
        key
        for key, value in saved.items()
        if isinstance(key, str) and key not in usual and not _OTHER.search(key) and looking.in_(value)
    ]
    if len(usual) > 1:
        raise _several(where, path, usual, others)
    if usual:
        return _found(saved[usual[0]], looking, where, (*path, usual[0]))
    if looking.in_(saved) or (path and not saved):
        if others:
            raise _several(where, path, [TOP], others)
        return path
    if len(others) == 1:
        return (*path, others[0])
    if others:
        raise _several(where, path, others, [])
    names = ", ".join(repr(shown(key)) for key in list(saved)[:8])
    raise FormatError(
        f"{_at(where, path)} holds no state dict among {names or 'nothing'}: name it by key=", object=where
    )


def _several(where: str, path: tuple[str, ...], first: list[str], others: list[str]) -> FormatError:
    full = [".".join([*path, key]) if key != TOP else ".".join(path) or TOP for key in [*first, *others]]
    return FormatError(
        f"{_at(where, path)} holds several state dicts ({', '.join(full[:8])}): say which is the model, such as "
        f"key={full[0]!r}",
        object=where,
    )


def _advice(saved: Any, looking: _Looking) -> str:
    """The entries that can be named, if the one that was named is not a state dict."""
    entries = saved.items() if isinstance(saved, dict) else ()
    fit = [key for key, value in entries if isinstance(key, str) and looking.holds(value)]
    if fit:
        return f"name by key= one of {', '.join(repr(shown(key)) for key in fit[:8])}"
    names = ", ".join(repr(shown(key)) for key, _ in [*entries][:8])
    return f"none of its entries ({names or 'nothing'}) is one: save a dict from names to tensors"


def _everything(value: Any, seen: set[int]) -> Iterator[Any]:
    """Every value in a structure that was not seen before; not more than 5 million in all."""
    waiting = [value]
    while waiting and len(seen) < _MOST:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        waiting += _inside(item)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.values(), *([value.state] if isinstance(value, Ordered) else [])]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Record):
        return [*value.args, value.state, *(pair[1] for pair in value.items), *value.elements]
    return []


def shown(key: Any) -> str:
    """A key as it is spoken of."""
    key = key.value if isinstance(key, Key) else key
    if isinstance(key, int) and abs(key) >= 1 << 64:
        return "a large number"
    text = (
        key.kind if isinstance(key, Record) else str(key) if isinstance(key, (str, int, float)) else type(key).__name__
    )
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def _what(value: Any) -> str:
    if isinstance(value, Record):
        return f"a whole pickled {value.kind[:200]}, of which nothing was run (load it and save its state_dict())"
    return (
        "a tensor" if hasattr(value, "dtype") and hasattr(value, "shape") else f"a value of type {type(value).__name__}"
    )


def _at(where: str, path: tuple[str, ...]) -> str:
    return f"{where}{''.join(f'[{shown(key)!r}]' for key in path)}"
