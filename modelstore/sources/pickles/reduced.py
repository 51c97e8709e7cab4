"""Objects in memory of other classes than plain data, as the records that a pickle of them would be."""

from __future__ import annotations

import copyreg
import types
from typing import Any

from modelstore.sources.pickles.unpickle import ClassStub, Record

_PROTOCOL = 2  # as torch.save writes
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)
_MADE = ("copyreg.__newobj__", "copyreg.__newobj_ex__")


def as_record(value: Any) -> ClassStub | Record | None:
    """An object as a pickle would describe it: its class's name, and its parts. None if it does not have such a form.

    The object's own `__reduce_ex__` is asked, as by `torch.save`; nothing that it names is called.
    """
    if isinstance(value, _FUNCTIONS):
        return _named(value)
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced: Any = reduce(value) if reduce else value.__reduce_ex__(_PROTOCOL)
    except (
        Exception
    ):  # of any class whatever: a lock, a generator, a module say in their own way that they have no pickle
        return None
    if isinstance(reduced, str):
        return ClassStub(f"{getattr(value, '__module__', None) or type(value).__module__}.{reduced}")
    function, args, *rest = reduced
    named = _named(function)
    if named is None:
        return None
    made = Record(named.kind, tuple(args))
    if named.kind in _MADE and args:
        of = _named(args[0])
        if of is None:
            return None
        given = args[1:] if named.kind == _MADE[0] else args[1]
        made = Record(of.kind, tuple(given))
    state, elements, items = [*rest, None, None, None][:3]
    made.state, made.elements, made.items = state, list(elements or ()), list(items or ())
    return made


def _named(what: Any) -> ClassStub | None:
    """The name by which a pickle finds a class or function; None for what is made within a function, such as a lambda."""
    name = getattr(what, "__qualname__", None) or getattr(what, "__name__", None)
    module = getattr(what, "__module__", None) or "builtins"
    return ClassStub(f"{module}.{name}") if isinstance(name, str) and "<" not in name else None
