"""Reading the structure of a pickle without running anything in it.

Only names on a list given by the caller are accepted, and each stands for a harmless function of ours; any other is
refused by name. The reader is Python's own in Python (the one in C reserves memory for whatever index a pickle
names), less the operations that a checkpoint has no use for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from modelstore.errors import FormatError

Stand = Callable[..., Any]

_REFUSED = (
    pickle.BYTEARRAY8,  # reserves memory before there is data
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.INST,
    pickle.OBJ,
    pickle.EMPTY_SET,
    pickle.ADDITEMS,
    pickle.FROZENSET,
    pickle.PERSID,
    pickle.NEWOBJ_EX,
)
_KEYS = (str, int, bool, float, bytes, type(None))
_UNIT = 1 << 20


class Record:
    """Stands for an instance of a class: `kind` names it, `args` are what it was made with, `state` what was set."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """A field by name, where the state is a dict."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Class:
    """What `find_class` gives for a class on the list: calling it, or `cls.__new__(cls, …)`, makes a `Record`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *args: Any) -> Record:
        return Record(self.kind, args)


class _Dict(dict[Any, Any]):
    """Stands for an OrderedDict; what is set on it (`_metadata` of a state dict) is dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


def record(kind: str) -> Stand:
    """A stand-in for a class of that name."""
    return _Class(kind)


def ordered_dict(*args: Any) -> dict[Any, Any]:
    """A stand-in for `collections.OrderedDict`, which pickles fill after making it."""
    if args:
        raise FormatError("an OrderedDict in the pickle is made in an unusual way")
    return _Dict()


# Its tables are not typed.
_Base: Any = pickle._Unpickler


class _Reader(_Base):  # type: ignore[misc]
    dispatch = {code: f for code, f in _Base.dispatch.items() if code not in {op[0] for op in _REFUSED}}  # noqa: RUF012

    def __init__(self, data: bytes, allowed: Mapping[str, Stand], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._allowed = allowed
        self._persistent = persistent

    def find_class(self, module: Any, name: Any) -> Stand:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise FormatError(
                f"the pickle names {full[:200]!r}, which a checkpoint of tensors does not need: it was not run; "
                "save the tensors alone, as safetensors or a plain state dict"
            )
        return self._allowed[full]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise FormatError("the pickle refers to data outside itself")
        return self._persistent(pid)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        made = self.stack.pop()
        if not isinstance(made, _Class) or not isinstance(args, tuple):
            raise FormatError("the pickle makes an instance of something that is no class")
        self.append(made(*args))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_reduce(self) -> None:
        args = self.stack.pop()
        func = self.stack[-1]
        if not callable(func) or not isinstance(args, tuple):
            raise FormatError("the pickle calls something that is no function")
        self.stack[-1] = func(*args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, (Record, _Dict)):
            raise FormatError("the pickle sets the state of something that has none")
        made.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    dispatch[pickle.DICT[0]] = load_dict

    def _set(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise FormatError("the pickle puts items into something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys are hashed by walking them, however deep they are; records are told apart by identity.
            if not isinstance(key, (*_KEYS, Record)):
                raise FormatError(f"the pickle has a dict with a {type(key).__name__} as key")
            if key in table:
                raise FormatError(f"the pickle has the key {str(key)[:200]!r} twice")
            table[key] = value

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    dispatch[pickle.APPEND[0]] = load_append

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise FormatError("the pickle appends to something that is no list")
        return self.stack[-1]


def unpickle(
    data: bytes, allowed: Mapping[str, Stand], persistent: Callable[[Any], Any] | None = None, *, where: str
) -> Any:
    """The pickled object with stand-ins for everything on the list; `FormatError` naming `where` otherwise."""
    try:
        return _Reader(data, allowed, persistent).load()
    except FormatError as error:
        raise FormatError(f"{where}: {error}", object=where) from None
    except MemoryError:
        raise FormatError(f"{where}: the pickle asks for more memory than there is", object=where) from None
    except Exception as error:  # a reader of hostile bytes fails in any way: index, attribute, type, value, struct, …
        raise FormatError(f"{where}: not a valid pickle ({type(error).__name__}: {error})", object=where) from None
