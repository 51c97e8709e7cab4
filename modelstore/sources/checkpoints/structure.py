"""A training checkpoint's structure as JSON, and its tensors by name: out of a pickle's stand-ins, or of objects in memory."""

from __future__ import annotations

import argparse
import base64
import collections
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PureWindowsPath
from typing import Any, Protocol

import numpy as np

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.names import check_tensor
from modelstore.format.structure import EXACT, FACTORIES, MAX_BYTES, MAX_DEPTH, VERSION, check
from modelstore.format.views import SharedView, placed
from modelstore.sources.arrays import is_tensor_dtype
from modelstore.sources.checkpoints.checkpoint import Chosen, shown
from modelstore.sources.pickles.reduced import as_record
from modelstore.sources.pickles.tensors import PickledSize, StorageRef
from modelstore.sources.pickles.unpickle import ClassStub, Key, Ordered, Record

MAX_NODES = 2_000_000
_PATHS = re.compile(r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path")
_NUMBERS = re.compile(r"[<>=|]?[biufc]\d{1,2}")
_BYTES = "_codecs.encode"


@dataclass(frozen=True)
class TensorView:
    """A tensor's place in memory: an identity of the view, the memory, and the place in it in elements."""

    identity: str
    memory: str
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


class Leaves(Protocol):
    """Decides which values of a structure are tensors."""

    def view(self, value: Any, path: str) -> TensorView | None:
        """The view of a tensor; None for what is none. `UnsupportedError` for a tensor that does not have dense values."""


class Outline:
    """Collects the tensors of a structure under names that are theirs, and writes down the rest.

    `names`: tensors that have one already, by path. `UnsupportedError` if a value cannot be kept, `FormatError` if
    it could not be given back, or the structure is larger than `nodes` values, 64 MiB of JSON, or 100 levels.
    """

    def __init__(self, leaves: Leaves, names: Mapping[tuple[str, ...], str], nodes: int = MAX_NODES) -> None:
        self.tensors: dict[str, Any] = {}
        self.apart: list[str] = []  # views of one memory that will share nothing
        self._leaves = leaves
        self._given = names
        self._taken = set(names.values())
        self._known: dict[str, str] = {}  # identity → name
        self._views: dict[str, list[tuple[str, TensorView]]] = {}  # memory → distinct views
        self._alive: list[Any] = []
        self._nodes = nodes
        self._bytes = 0

    def write(self, root: Any) -> bytes:
        """The structure as the bytes of a file; its tensors are in `tensors` then."""
        node = self._node(root, (), 0)
        views, self.apart = placed(
            [SharedView(name, view.itemsize, view.shape, view.offset, view.strides) for name, view in shared]
            for shared in self._views.values()
            if len(shared) > 1
        )
        data = json.dumps({"format": VERSION, "views": views, "root": node}, separators=(",", ":")).encode()
        if len(data) > MAX_BYTES:
            raise FormatError(f"what lies beside the tensors takes {len(data)} bytes, where {MAX_BYTES} is the limit")
        check(data, self._taken)
        return data

    def give(self, tensor: Any, name: str, path: str) -> None:
        """Take a tensor under a name before all others."""
        view = self._leaves.view(tensor, path)
        assert view is not None
        self._known[view.identity] = name
        if view.elements:
            self._views.setdefault(view.memory, []).append((name, view))

    # ------------------------------------------------------------------ nodes

    def _node(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        self._nodes -= 1
        where = ".".join(path) or "the object"
        if depth > MAX_DEPTH or self._nodes < 0 or self._bytes > MAX_BYTES:
            raise FormatError(
                f"{where[:200]}: the structure beside the weights is too deep or too large to be kept, or repeats itself: "
                'leave it out, or save without include="all"'
            )
        if value is None or isinstance(value, bool):
            return value
        if type(value) is str:
            return self._text(value)
        if type(value) is int:
            if abs(value) < EXACT:
                return value
            return ["int", self._text(hex(value))]
        if type(value) is float:
            return value if math.isfinite(value) else ["float", struct.pack(">d", value).hex()]
        view = self._leaves.view(value, where)
        if view is not None:
            return ["array" if isinstance(value, np.ndarray) else "tensor", self._name(value, view, path)]
        if isinstance(value, Record):
            return self._record(value, path, depth + 1)
        return self._plain(value, path, depth + 1)

    def _plain(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        kind = type(value)
        if kind in (bytes, bytearray):
            return [kind.__name__, self._text(base64.b64encode(value).decode())]
        if kind is complex:
            return ["complex", self._node(value.real, path, depth), self._node(value.imag, path, depth)]
        if kind in (list, tuple):
            return [kind.__name__, *self._many(value, path, depth)]
        if kind in (set, frozenset):
            return [kind.__name__, *self._many(list(value), path, depth)]
        if kind in (Ordered, collections.OrderedDict):
            state = (
                value.state if kind is Ordered else {k: v for k, v in vars(value).items() if k == "_metadata"} or None
            )
            kept = state if isinstance(state, dict) and set(state) <= {"_metadata"} else None
            return ["ordered", self._node(kept, (*path, "_metadata"), depth), *self._pairs(value.items(), path, depth)]
        if kind is dict:
            return ["dict", *self._pairs(value.items(), path, depth)]
        if kind is collections.Counter:
            return ["counter", *self._pairs(value.items(), path, depth)]
        if kind is collections.defaultdict:
            factory = next((name for name, made in FACTORIES.items() if made is value.default_factory), None)
            return ["defaultdict", factory, *self._pairs(value.items(), path, depth)]
        if kind is collections.deque:
            return ["deque", value.maxlen, *self._many(list(value), path, depth)]
        if kind is argparse.Namespace:
            return ["namespace", *self._pairs(vars(value).items(), path, depth)]
        if isinstance(value, PurePath):
            return ["winpath" if isinstance(value, PureWindowsPath) else "path", self._text(str(value))]
        if kind in (slice, range):
            return [kind.__name__, *(self._node(n, path, depth) for n in (value.start, value.stop, value.step))]
        if isinstance(value, np.generic) and _NUMBERS.fullmatch(value.dtype.str):
            return ["scalar", value.dtype.str, self._text(base64.b64encode(value.tobytes()).decode())]
        if (word := _word(value)) is not None:
            return word
        if isinstance(value, ClassStub):
            return ["object", self._text(f"class {value.kind}"), [], None, [], []]
        storage = isinstance(value, StorageRef) or (kind.__module__ == "torch.storage" and not isinstance(value, type))
        reduced = None if storage else as_record(value)
        if reduced is not None:
            self._alive.append(reduced)  # what is told apart by where it lies must stay there
            return self._node(reduced, path, depth)
        what = "a storage without a tensor" if storage else f"a {kind.__module__}.{kind.__qualname__}"
        raise UnsupportedError(
            f"{'.'.join(path)[:200] or 'the object'} is {what}, which is not a plain value: leave it out, or make it a dict"
        )

    def _record(self, value: Record, path: tuple[str, ...], depth: int) -> Any:
        kind, args, first = value.kind, value.args, value.args[0] if value.args else None
        if kind in ("builtins.set", "builtins.frozenset"):
            given = first if isinstance(first, (list, tuple)) else ()
            return [kind.removeprefix("builtins."), *self._many([*given, *value.elements], path, depth)]
        if kind == "collections.Counter":
            pairs = [*(first.items() if isinstance(first, dict) else ()), *value.items]
            return ["counter", *self._pairs(pairs, path, depth)]
        if kind == "collections.defaultdict":
            factory = _factory(first.kind) if isinstance(first, ClassStub) else None
            return ["defaultdict", factory, *self._pairs(value.items, path, depth)]
        if kind == "collections.deque":
            longest = args[1] if len(args) > 1 and type(args[1]) is int and args[1] >= 0 else None
            given = first if isinstance(first, (list, tuple)) else ()
            return ["deque", longest, *self._many([*given, *value.elements], path, depth)]
        if kind == "argparse.Namespace" and isinstance(value.state, dict):
            return ["namespace", *self._pairs(value.state.items(), path, depth)]
        if _PATHS.fullmatch(kind) and all(isinstance(part, str) for part in args):
            windows = "Windows" in kind
            return [
                "winpath" if windows else "path",
                self._text(str(PurePath(*args)) if not windows else "\\".join(args)),
            ]
        if kind == "torch.device" and args:
            return ["device", self._text(":".join(str(part)[:40] for part in args[:2]))]
        if kind in ("builtins.slice", "builtins.range", "builtins.complex") and 1 < len(args) <= 3:
            return [kind.removeprefix("builtins."), *(self._node(arg, path, depth) for arg in args)]
        made = as_bytes(value)
        if made is not None:
            return self._plain(bytearray(made) if kind == "builtins.bytearray" else made, path, depth)
        number = as_array(value)
        if isinstance(number, np.generic):
            return self._plain(number, path, depth)
        if number is not None and is_tensor_dtype(number.dtype):
            view = TensorView(f"array {id(value)}", f"array {id(value)}", 0, (), number.shape, number.itemsize)
            return ["array", self._name(number, view, path)]
        return [
            "object",
            self._text(value.kind),
            self._many(list(args), path, depth),
            self._node(value.state, path, depth),
            self._pairs(value.items, path, depth),
            self._many(value.elements, path, depth),
        ]

    def _many(self, values: Any, path: tuple[str, ...], depth: int) -> list[Any]:
        return [self._node(value, (*path, str(i)), depth) for i, value in enumerate(values)]

    def _pairs(self, pairs: Any, path: tuple[str, ...], depth: int) -> list[Any]:
        made = []
        for key, value in pairs:
            plain = key.value if isinstance(key, Key) else key
            made.append([self._node(plain, path, depth), self._node(value, (*path, shown(key)), depth)])
        return made

    def _text(self, text: str) -> str:
        self._bytes += len(text)
        return text

    # ------------------------------------------------------------------ tensors

    def _name(self, value: Any, view: TensorView, path: tuple[str, ...]) -> str:
        given = self._given.get(path)
        known = given or (self._known.get(view.identity) if view.elements else None)
        if known is not None:
            return self._text(known)
        name = _valid(".".join(path) or "tensor")
        number = 1
        base = name
        while name in self._taken:
            number += 1
            name = f"{base}~{number}"
        self._taken.add(name)
        self.tensors[name] = value
        if view.elements:
            self._known[view.identity] = name
            self._views.setdefault(view.memory, []).append((name, view))
        return self._text(name)


def _factory(kind: str) -> str | None:
    """The name of a `defaultdict`'s factory, from a class's in a pickle; None for one that is not known."""
    module, _, name = kind.rpartition(".")
    return name if name in FACTORIES and FACTORIES[name].__module__ == module else None


def _word(value: Any) -> list[Any] | None:
    """A dtype, device or size as it is written; None for what is none of these."""
    kind = type(value)
    torchs = kind.__name__ if kind.__module__ == "torch" else ""
    if isinstance(value, DType):
        return ["dtype", value.name]
    if torchs == "dtype" and str(value).removeprefix("torch.") in DTYPES:
        return ["dtype", str(value).removeprefix("torch.")]
    if torchs == "device":
        return ["device", str(value)]
    return ["size", *value] if kind is PickledSize or torchs == "Size" else None


@dataclass(frozen=True)
class Beside:
    """The content beside a model's state dict: the file of the structure, further tensors by name, and remarks on them."""

    file: bytes
    tensors: Mapping[str, Any]
    remarks: tuple[str, ...]


def beside_state(saved: Any, chosen: Chosen, leaves: Leaves, aliases: Mapping[str, str], size: int | None) -> Beside:
    """All of a checkpoint that is not in the model's state dict.

    The model's own tensors keep their names. `size`: the bytes of the file it came from, to which its values are in proportion.
    """
    names = {(*chosen.path, shown(name)): aliases.get(name, name) for name in chosen.state}
    nodes = MAX_NODES if size is None else min(MAX_NODES, 100_000 + size)
    outline = Outline(leaves, names, nodes)
    for name, tensor in chosen.state.items():
        if name not in aliases:
            outline.give(tensor, name, name)
    data = outline.write(saved)
    return Beside(data, outline.tensors, _of_apart(outline.apart))


def _of_apart(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    some = ", ".join(repr(name[:80]) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"tensors {some} overlap in a memory that is far larger than they are: each is kept exactly, but they share "
        "nothing when they come back",
    )


def _valid(name: str) -> str:
    try:
        return check_tensor(name[:500]) if not name.startswith("file:") else f"_{name[:500]}"
    except ModelStoreError:
        return "tensor"


def as_bytes(value: Record) -> bytes | None:
    """The bytes that a pickle of an old protocol makes of a text, or a bytearray's."""
    first = value.args[0] if value.args else None
    if (
        value.kind == _BYTES
        and len(value.args) == 2
        and isinstance(first, str)
        and value.args[1] in ("latin1", "latin-1")
    ):
        try:
            return first.encode("latin1")
        except UnicodeEncodeError:
            return None
    if value.kind in ("builtins.bytearray", "builtins.bytes"):
        if first is None:
            return b""
        if isinstance(first, Record) and first.kind == _BYTES:
            return as_bytes(first)
        if isinstance(first, bytes):
            return first
        return first.encode("latin1", "replace") if isinstance(first, str) and len(value.args) == 2 else None
    return None


def as_array(value: Record) -> Any:
    """The NumPy array or number that a record stands for; None if it is none of plain numbers."""
    module, _, name = value.kind.rpartition(".")
    if module.endswith("core.multiarray") and name == "scalar" and len(value.args) == 2:
        dtype, data = _dtype(value.args[0]), _data(value.args[1])
        return None if dtype is None or data is None or len(data) != dtype.itemsize else np.frombuffer(data, dtype)[0]
    if module.endswith("core.numeric") and name == "_frombuffer" and len(value.args) == 4:
        data, dtype, shape, order = _data(value.args[0]), _dtype(value.args[1]), value.args[2], value.args[3]
        return _shaped(data, dtype, shape, order == "F")
    if module.endswith("core.multiarray") and name == "_reconstruct" and isinstance(value.state, tuple):
        if len(value.state) != 5:
            return None
        _, shape, dtype, fortran, data = value.state
        return _shaped(_data(data), _dtype(dtype), shape, fortran is True)
    return None


def _shaped(data: bytes | None, dtype: np.dtype[Any] | None, shape: Any, fortran: bool) -> Any:
    if data is None or dtype is None or not isinstance(shape, tuple) or len(shape) > 32:
        return None
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
        return None
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _data(value: Any) -> bytes | None:
    if isinstance(value, str):  # of Python 2
        return value.encode("utf-8", "surrogateescape")
    return as_bytes(value) if isinstance(value, Record) else value if isinstance(value, bytes) else None


def _dtype(value: Any) -> np.dtype[Any] | None:
    """A dtype of numbers, from the record of one."""
    if not isinstance(value, Record) or not value.kind.endswith("numpy.dtype") or not value.args:
        return None
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "<"
    text = f"{order if order in ('<', '>', '|', '=') else '<'}{value.args[0]}"
    try:
        return np.dtype(text) if _NUMBERS.fullmatch(text) else None
    except TypeError:
        return None
