"""Facts about a model's tensors from its own class, as a manifest keeps them: plain data, so that readers do not need the
class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, TypeVar

import msgspec

T = TypeVar("T")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_Axis = Annotated[int, msgspec.Meta(ge=0, lt=64)]
_Units = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class Sliced(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How ranks slice a tensor: along which axis, and the parts along it, each as (what it is, how many units).

    Without parts: all ranks hold the whole of it, though the weight beside it is sliced.
    """

    axis: _Axis
    parts: tuple[tuple[str, _Units], ...]


class Architecture(msgspec.Struct, frozen=True, omit_defaults=True):
    """Facts about a model, by whom (`by`, such as "transformers 5.24.0"), of which class.

    Tensors are named as in the manifest, with `*` for parts of a name that are numbers; a whole name counts before one with
    `*`. `kinds`: what tensors are for. `ties`: name → the name of the tensor that it is. `blocks`: the names before the
    numbers of repeated layers. `slices`: how tensor-parallel ranks slice tensors, which hold the whole of others; None if it
    is not known.
    """

    by: str
    model_class: str
    kinds: dict[str, str] = {}
    ties: dict[str, str] = {}
    blocks: Annotated[tuple[str, ...], msgspec.Meta(max_length=256)] = ()
    slices: dict[str, Sliced] | None = None


def general(name: str) -> str:
    """A tensor's name with `*` for each part of it that is a number."""
    return _NUMBER.sub("*", name)


def find(entries: Mapping[str, T], name: str) -> T | None:
    """The entry of a tensor: that of its name, or of its name with `*` for numbers."""
    return entries[name] if name in entries else entries.get(general(name))


def folded(entries: Mapping[str, T | None]) -> dict[str, T]:
    """Entries by names with `*`, where all tensors that fit have the same; others by their names. None stands for no entry."""
    groups: dict[str, dict[str, T | None]] = {}
    for name, entry in entries.items():
        groups.setdefault(general(name), {})[name] = entry
    return dict(pair for key, group in groups.items() for pair in _folded(key, group))


def _folded(key: str, group: Mapping[str, T | None]) -> Iterator[tuple[str, T]]:
    entries = list(group.values())
    same = all(entry == entries[0] for entry in entries)
    named = {key: entries[0]} if same else group
    return ((name, entry) for name, entry in named.items() if entry is not None)
