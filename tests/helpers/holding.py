"""A digest of objects: all that can be reached from them, whatever it is. Equal digests are of things that act alike."""

from __future__ import annotations

import enum
import functools
import logging
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import torch
from blake3 import blake3

from tests.helpers.actors import Inline
from tests.helpers.stepping import Asking

_PLAIN = type(None), bool, int, float, complex, str, bytes, enum.Enum, np.generic
_NAMED = type, types.ModuleType, types.BuiltinFunctionType, np.dtype, torch.dtype
_EQUAL = type(threading.Lock()), type(threading.RLock()), threading.Condition, logging.Logger, Inline, Asking


def digest(*objects: Any, url: str = "") -> bytes:
    """What objects hold. `TypeError` for what cannot be looked into, such as a generator. `url` counts as no other text.

    Locks are taken to be free, and storages to hold nothing.
    """
    hasher = blake3()
    seen: dict[int, tuple[int, Any]] = {}  # each is kept, so that nothing else gets its identity

    def walk(one: Any) -> None:
        if isinstance(one, _PLAIN):
            hasher.update(f"{type(one).__qualname__} {one!r}\n".replace(url or "\0", "here").encode())
        elif id(one) in seen:
            hasher.update(f"again {seen[id(one)][0]}\n".encode())
        else:
            seen[id(one)] = len(seen), one
            hasher.update(f"{type(one).__qualname__}\n".encode())
            for part in _parts(one):
                walk(part)
            hasher.update(b".\n")

    walk(objects)
    return hasher.digest()


def _parts(one: Any) -> Iterator[Any]:
    """What an object consists of."""
    for kinds, parts in _KINDS:
        if isinstance(one, kinds):
            yield from parts(one)
            return
    fields = _fields(one)
    if fields is None:
        raise TypeError(f"a {type(one).__qualname__} cannot be looked into: say what of it matters")
    yield from fields.items()


def _of_function(one: Any) -> Iterator[Any]:
    yield one.__module__, one.__qualname__, one.__defaults__, one.__kwdefaults__
    for cell in one.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield "empty"


def _of_set(one: Any) -> Iterator[Any]:
    yield from sorted(digest(item).hex() for item in one)


def _fields(one: Any) -> Mapping[str, Any] | None:
    names = [name for kind in type(one).__mro__ for name in _slots(kind)]
    found = {name: getattr(one, name) for name in names if hasattr(one, name)} | getattr(one, "__dict__", {})
    return found if names or hasattr(one, "__dict__") else None


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


_KINDS: list[tuple[Any, Callable[[Any], Iterator[Any]]]] = [
    (_EQUAL, lambda _: iter(())),
    (_NAMED, lambda one: iter([getattr(one, "__qualname__", None) or str(one)])),
    ((bytearray, memoryview), lambda one: iter([bytes(one)])),
    ((tuple, list, deque), iter),
    ((set, frozenset), _of_set),
    (dict, lambda one: iter([*one.items()])),
    (np.ndarray, lambda one: iter([str(one.dtype), one.shape, one.tobytes()])),
    (
        torch.Tensor,
        lambda one: iter([str(one.dtype), tuple(one.shape), one.contiguous().view(torch.uint8).numpy().tobytes()]),
    ),
    (types.FunctionType, _of_function),
    (types.MethodType, lambda one: iter([one.__func__, one.__self__])),
    (functools.partial, lambda one: iter([one.func, one.args, one.keywords])),
    (msgspec.Struct, lambda one: iter([getattr(one, name) for name in one.__struct_fields__])),
    (BaseException, lambda one: iter([str(one), vars(one)])),
    (Future, lambda one: iter([one.exception() or one.result()] if one.done() else ["open"])),
]
