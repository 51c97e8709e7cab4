"""The plain values of a training checkpoint as a JSON file, typed and exact, and the structure made of it again.

Null, booleans, texts, numbers that are finite (whole ones below 2**53) are JSON's own. All else is a list whose first item
says what it is: `["tuple", …]`, `["dict", [key, value], …]`, `["tensor", name]`. See `docs/format.md`.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from modelstore.format.hashed import check_hashes
from modelstore.format.views import joined

if TYPE_CHECKING:
    import torch

CHECKPOINT = "checkpoint"  # the variant that has all that was beside the weights
FILE = "modelstore_checkpoint.json"
VERSION = 1
MAX_BYTES = 64 << 20
MAX_DEPTH = 100
EXACT = 1 << 53  # whole numbers below it are the same in every JSON reader
FACTORIES: Mapping[str, Callable[[], Any]] = {
    "list": list, "dict": dict, "int": int, "float": float, "set": set, "str": str, "tuple": tuple, "bool": bool,
    "bytes": bytes, "complex": complex, "frozenset": frozenset, "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict, "deque": collections.deque,
}  # fmt: skip


class Inert:
    """Stands for an object of a class that is not plain data: its class's name, what it was made of; nothing is run.

    `args` are what it was made with, `state` what was set on it, `items` and `elements` what was put into it.
    """

    __slots__ = ("args", "elements", "items", "kind", "state")

    def __init__(
        self, kind: str, args: tuple[Any, ...], state: Any, items: list[tuple[Any, Any]], elements: list[Any]
    ) -> None:
        self.kind, self.args, self.state, self.items, self.elements = kind, args, state, items, elements

    def __repr__(self) -> str:
        return f"<inert {self.kind[:200]}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    __hash__ = object.__hash__


def structure(data: bytes, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The structure that a file says, with these tensors in it; views of one memory share one again (`views` says which).

    `FormatError` if the file is not valid, or names a tensor that is not given.
    """
    try:
        table = _table(data)
        return _made(table, {**tensors, **joined(tensors, table.get("views") or {})})
    except _WRONG as error:
        raise FormatError(
            f"{FILE} is not a valid structure of a checkpoint ({_told(error)}): restore it", object=FILE
        ) from None


def check(data: bytes, names: Iterable[str]) -> None:
    """`FormatError` if `structure` would not take a file with tensors of these names: asked before it is stored."""
    try:
        _made(_table(data), {name: _Absent() for name in names})
    except _WRONG as error:
        raise FormatError(
            f"what lies beside the weights could not be given back ({_told(error)}): leave out what is named, or save "
            'without include="all"'
        ) from None


class _Absent:
    """Stands for a tensor, or the array that it is made into, whose values do not matter."""

    def numpy(self) -> _Absent:
        return self

    copy = numpy


_WRONG = (
    RecursionError, KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, struct.error,
)  # fmt: skip


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)[:200] if type(error) is ValueError else f"{type(error).__name__}: {str(error)[:200]}"


def _table(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, where {MAX_BYTES} is the limit")
    table = json.loads(data)
    if not isinstance(table, dict) or table.get("format") != VERSION:
        raise ValueError(f"its format is not {VERSION}")
    return table


def _made(table: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    return _Maker(tensors).make(table["root"])


class _Maker:
    """Makes values of their nodes."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def make(self, node: Any) -> Any:
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise ValueError("a value is a JSON object")
            return node
        kind, *rest = node
        make = getattr(self, f"_{kind}", None) if isinstance(kind, str) and kind in _KINDS else None
        if make is None:
            raise ValueError(f"{str(kind)[:40]!r} is not a kind of value")
        return make(*rest)

    def _many(self, nodes: tuple[Any, ...]) -> list[Any]:
        return [self.make(node) for node in nodes]

    def _pairs(self, pairs: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        made = [(self.make(key), self.make(value)) for key, value in pairs]
        check_hashes([key for key, _ in made])
        return made

    def _int(self, text: str) -> int:
        return int(text, 16)

    def _float(self, text: str) -> float:
        return float(struct.unpack(">d", bytes.fromhex(text))[0])

    def _complex(self, real: Any, imaginary: Any) -> complex:
        return complex(self.make(real), self.make(imaginary))

    def _bytes(self, text: str) -> bytes:
        return base64.b64decode(text, validate=True)

    def _bytearray(self, text: str) -> bytearray:
        return bytearray(self._bytes(text))

    def _list(self, *nodes: Any) -> list[Any]:
        return self._many(nodes)

    def _tuple(self, *nodes: Any) -> tuple[Any, ...]:
        return tuple(self._many(nodes))

    def _set(self, *nodes: Any) -> set[Any]:
        return {key for key, _ in self._pairs(tuple((node, None) for node in nodes))}

    def _frozenset(self, *nodes: Any) -> frozenset[Any]:
        return frozenset(self._set(*nodes))

    def _deque(self, longest: int | None, *nodes: Any) -> collections.deque[Any]:
        return collections.deque(self._many(nodes), longest)

    def _size(self, *numbers: int) -> Any:
        import torch

        return torch.Size(numbers)

    def _dict(self, *pairs: Any) -> dict[Any, Any]:
        return dict(self._pairs(pairs))

    def _ordered(self, state: Any, *pairs: Any) -> collections.OrderedDict[Any, Any]:
        made = collections.OrderedDict(self._pairs(pairs))
        attributes = self.make(state)
        if isinstance(attributes, dict) and "_metadata" in attributes:  # what torch keeps on a state dict
            made._metadata = attributes["_metadata"]  # type: ignore[attr-defined]
        return made

    def _counter(self, *pairs: Any) -> collections.Counter[Any]:
        made: collections.Counter[Any] = collections.Counter()
        dict.update(made, self._pairs(pairs))
        return made

    def _defaultdict(self, factory: str | None, *pairs: Any) -> collections.defaultdict[Any, Any]:
        return collections.defaultdict(FACTORIES.get(factory or ""), self._pairs(pairs))

    def _namespace(self, *pairs: Any) -> argparse.Namespace:
        made = argparse.Namespace()
        made.__dict__.update({str(key): value for key, value in self._pairs(pairs)})
        return made

    def _path(self, text: str) -> PurePosixPath:
        return PurePosixPath(text)

    def _winpath(self, text: str) -> PureWindowsPath:
        return PureWindowsPath(text)

    def _slice(self, *parts: Any) -> slice:
        return slice(*self._many(parts))

    def _range(self, start: int, stop: int, step: int) -> range:
        return range(self.make(start), self.make(stop), self.make(step))

    def _dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, DTYPES[name].name)

    def _device(self, text: str) -> Any:
        import torch

        try:
            return torch.device(text)
        except RuntimeError as error:
            raise ValueError(str(error)[:100]) from None

    def _scalar(self, kind: str, text: str) -> Any:
        dtype = np.dtype(kind)
        if dtype.kind not in "biufc":
            raise ValueError(f"a number of dtype {kind[:40]!r}")
        return np.frombuffer(self._bytes(text), dtype, 1)[0]

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ValueError(f"it names a tensor {name[:80]!r} that is not there")
        return self._tensors[name]

    def _array(self, name: str) -> Any:
        return self._tensor(name).numpy().copy()

    def _object(self, kind: str, args: list[Any], state: Any, items: list[Any], elements: list[Any]) -> Inert:
        made = [(self.make(key), self.make(value)) for key, value in items]
        return Inert(str(kind), tuple(self._many(tuple(args))), self.make(state), made, self._many(tuple(elements)))


_KINDS = frozenset(
    (
        *("int", "float", "complex", "bytes", "bytearray", "list", "tuple", "set", "frozenset", "deque", "size"),
        *("dict", "ordered", "counter", "defaultdict", "namespace", "path", "winpath", "slice", "range"),
        *("dtype", "device", "scalar", "tensor", "array", "object"),
    )
)
