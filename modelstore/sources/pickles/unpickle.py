"""Reading the structure of a pickle without running anything in it.

Names on a list given by the caller stand for harmless functions of ours. Any other is refused by name, or, where the caller
says so, stands for an inert `Record` of what the pickle would have made. The reader is Python's own in Python (the one in C
reserves memory for any index that a pickle names), less the operations that a checkpoint does not need. Work and memory follow
the pickle's length: no operation repeats what an earlier one made.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import struct
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, BinaryIO

from modelstore.errors import FormatError

Stand = Callable[..., Any]

_REFUSED = (
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.INST,
    pickle.OBJ,
    pickle.PERSID,
)
_KEYS = (str, float, bytes, type(None))  # hashed by a secret, or at most some hundred of them alike
_DISTINCT = 1 << 60  # whole numbers below this have hashes of their own
MAX_ARGUMENTS = 64
_OWN_NAMES = 3  # the first protocol that names what Python 3 has as it is there
_MAX_MEMO = 1 << 32


class Record:
    """Stands for an instance of a class: `kind` names it, `args` are what it was made with, `state` what was set.

    `items` and `elements` are what was put into it, where it is a kind of dict, of list or of set.
    """

    __slots__ = ("args", "elements", "items", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None
        self.items: list[tuple[Any, Any]] = []
        self.elements: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """A field by name, where the state is a dict."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class Key:
    """A dict's key whose hash an author can choose, or that is hashed by walking it: told apart by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class ClassStub:
    """The result of `find_class` for a class: calling it, or `cls.__new__(cls, …)`, makes a `Record`."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *args: Any) -> Record:
        return Record(self.kind, args)


class Known(ClassStub):
    """A name on the list: calling it makes what it stands for; where it is only named it is what the pickle says."""

    __slots__ = ("_make",)

    def __init__(self, kind: str, make: Stand) -> None:
        super().__init__(kind)
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


class Ordered(dict[Any, Any]):
    """Stands for an OrderedDict; `state` is what was set on it (`_metadata` of a state dict)."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def record(kind: str) -> Stand:
    """A stand-in for a class of that name."""
    return ClassStub(kind)


def ordered_dict(*args: Any) -> dict[Any, Any]:
    """A stand-in for `collections.OrderedDict`, which pickles fill after making it."""
    if args:
        raise FormatError("an OrderedDict in the pickle is made in an unusual way")
    return Ordered()


def reconstructed(cls: Any, *_: Any) -> Record:
    """A stand-in for `copyreg._reconstructor`, by which old pickles make an instance."""
    if not isinstance(cls, ClassStub):
        raise FormatError("the pickle makes an instance of something that is not a class")
    return Record(cls.kind)


# Its tables are not typed.
_Base: Any = pickle._Unpickler


class _Reader(_Base):  # type: ignore[misc]
    dispatch = {code: f for code, f in _Base.dispatch.items() if code not in {op[0] for op in _REFUSED}}  # noqa: RUF012

    def __init__(
        self,
        file: BinaryIO,
        allowed: Mapping[str, Stand],
        persistent: Callable[[Any], Any] | None,
        inert: bool,
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._allowed = allowed
        self._persistent = persistent
        self._inert = inert

    def find_class(self, module: Any, name: Any) -> Stand:
        if not module or not name:
            raise pickle.UnpicklingError("a name is empty, or cut short")
        if self.proto < _OWN_NAMES:
            module, name = _todays(module, name)
        full = f"{module}.{name}"
        if full in self._allowed:
            stand = self._allowed[full]
            return Known(full, stand) if isinstance(stand, FunctionType) else stand
        if self._inert and full.strip("."):
            return ClassStub(full)
        raise FormatError(
            f"the pickle names {full[:200]!r}, which a checkpoint of tensors does not need: it was not run; "
            "save the tensors alone, as safetensors or a plain state dict"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise FormatError("the pickle refers to data outside itself")
        return self._persistent(pid)

    def load_put(self) -> None:
        index = int(self.readline()[:-1])
        if not 0 <= index < _MAX_MEMO:
            raise FormatError("the pickle numbers what it remembers beyond 2**32")
        self.memo[index] = self.stack[-1]

    dispatch[pickle.PUT[0]] = load_put

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        data = self.read(min(length, 1 << 62))
        if len(data) != length:
            raise FormatError("the pickle is cut short")
        self.append(data)

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_newobj(self) -> None:
        args = self.stack.pop()
        made = self.stack.pop()
        if not isinstance(made, ClassStub) or not isinstance(args, tuple):
            raise FormatError("the pickle makes an instance of something that is not a class")
        self.append(made(*_few(args)))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self.load_newobj()
        self.stack[-1].state = keywords

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_reduce(self) -> None:
        args = self.stack.pop()
        func = self.stack[-1]
        if not isinstance(args, tuple) or not (callable(func) or isinstance(func, Record)):
            raise FormatError("the pickle calls something that is not a function")
        # A record stands for what a call gave, and what calling that gives is one more.
        self.stack[-1] = Record(func.kind, (args,)) if isinstance(func, Record) else func(*_few(args))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, (Record, Ordered)):
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
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(table, Record):
            table.items.extend(pairs)
            return
        if not isinstance(table, dict):
            raise FormatError("the pickle puts items into something that is not a dict")
        for key, value in pairs:
            plain = isinstance(key, _KEYS) or (isinstance(key, int) and abs(key) < _DISTINCT)
            told = key if plain or isinstance(key, Record) else Key(key)
            if told in table:
                raise FormatError(f"the pickle has the key {str(key)[:200]!r} twice")
            table[told] = value

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    dispatch[pickle.APPEND[0]] = load_append

    def _list(self) -> list[Any]:
        made = self.stack[-1]
        if isinstance(made, Record):
            return made.elements
        if not isinstance(made, list):
            raise FormatError("the pickle appends to something that is not a list")
        return made

    # Sets are records too: nothing in them is hashed.
    def load_empty_set(self) -> None:
        self.append(Record("builtins.set"))

    dispatch[pickle.EMPTY_SET[0]] = load_empty_set

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], Record):
            raise FormatError("the pickle adds to something that is not a set")
        self.stack[-1].elements.extend(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        self.append(Record("builtins.frozenset", (self.pop_mark(),)))

    dispatch[pickle.FROZENSET[0]] = load_frozenset


def _todays(module: str, name: str) -> tuple[str, str]:
    """A name of Python 2, as old protocols write it, as it is today."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def _few(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments, which are copied at each call: a long tuple that is remembered could be given again and again."""
    if len(args) > MAX_ARGUMENTS:
        raise FormatError(f"the pickle calls a function with {len(args)} arguments, where {MAX_ARGUMENTS} is the limit")
    return args


def unpickle(
    data: bytes | BinaryIO,
    allowed: Mapping[str, Stand],
    persistent: Callable[[Any], Any] | None = None,
    *,
    inert: bool = False,
    where: str,
) -> Any:
    """The pickled object with stand-ins for everything on the list; `FormatError` naming `where` otherwise.

    `inert`: names that are not on the list become `Record`s, of which nothing is run. A file is read up to the pickle's end.
    """
    file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _Reader(file, allowed, persistent, inert).load()
    except FormatError as error:
        raise FormatError(f"{where}: {error}", object=where) from None
    except MemoryError:
        raise FormatError(f"{where}: the pickle asks for more memory than there is", object=where) from None
    except EOFError:
        raise FormatError(
            f"{where}: the pickle ends too early: it was cut short, so copy or save it again", object=where
        ) from None
    except Exception as error:  # a reader of hostile bytes fails in any way: index, attribute, type, value, struct, …
        raise FormatError(
            f"{where}: not a valid pickle ({type(error).__name__}): it is damaged, or a file of another kind",
            object=where,
        ) from None
