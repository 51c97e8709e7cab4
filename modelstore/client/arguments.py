"""The arguments of every public method, checked by one table before any work, and refused in one sentence.

A parameter is checked by its annotation, so that a new method is checked as it is written; a name with a meaning (a reference,
a tag, a device) is checked by that name.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from time import monotonic
from types import FunctionType
from typing import Any, Literal, TypeVar, get_args

from modelstore.codecs.kernels.jit import telling
from modelstore.format import given
from modelstore.format.answers.brief import Timed
from modelstore.format.given import told
from modelstore.format.names import check_model, check_word, parse_reference
from modelstore.format.units import parse_duration, parse_size
from modelstore.plan.layout_share import as_layout
from modelstore.restructure.choose import check_amount

F = TypeVar("F", bound=Callable[..., Any])
Check = Callable[[str, Any], Any]

LEAST = {  # the least that a number may be
    **dict.fromkeys(("since", "gpus", "seed", "rate", "ce"), 0),
    **dict.fromkeys(("threads", "replicas", "stride", "batch", "steps", "checkpoint"), 1),
    **dict.fromkeys(("context", "limit", "tokens", "length"), 2),
}


def checked(function: F) -> F:
    """The function, with its arguments checked first, and its answer with the time it took.

    Its `progress` hears, too, when it waits for kernels to be compiled.
    """

    @functools.cache
    def table() -> tuple[inspect.Signature, dict[str, Check]]:  # made at the first call: most methods are never called
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        return signature, {p.name: check for p in parameters if (check := check_of(p, signature)) is not None}

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        signature, checks = table()
        try:
            bound = signature.bind(*args, **named)
        except TypeError:
            return function(*args, **named)  # says what is missing, or too much
        for name, check in checks.items():
            if name not in bound.arguments:
                continue
            try:
                bound.arguments[name] = check(name, bound.arguments[name])
            except TypeError:
                _refuse_swapped(function.__name__, name, bound.arguments, checks, signature)
                raise
        started = monotonic()
        with telling(bound.arguments.get("progress")):
            answer = function(*bound.args, **bound.kwargs)
        return answer.after(monotonic() - started) if isinstance(answer, Timed) else answer

    return call  # type: ignore[return-value]


class Checked:
    """Public methods of its heirs have their arguments checked."""

    def __init_subclass__(cls) -> None:
        for name, value in list(vars(cls).items()):
            if isinstance(value, FunctionType) and not name.startswith("_"):
                setattr(cls, name, checked(value))


def _refuse_swapped(
    function: str, name: str, arguments: Mapping[str, Any], checks: Mapping[str, Check], signature: inspect.Signature
) -> None:
    """`TypeError` if an argument that does not fit would fit in another's place, and that one in its own."""
    for other, value in arguments.items():
        if other == name or other not in checks or signature.parameters[other].kind is inspect.Parameter.KEYWORD_ONLY:
            continue
        try:
            checks[name](name, value)
            checks[other](other, arguments[name])
        except (TypeError, ValueError):
            continue
        order = ", ".join(n for n, p in signature.parameters.items() if p.default is p.empty and n != "self")
        raise TypeError(
            f"{name} and {other} are swapped: write {function}({order}), here {name} is {told(arguments[name])} and {other} is "
            f"{told(value)}"
        ) from None


def check_of(parameter: inspect.Parameter, signature: inspect.Signature) -> Check | None:
    """How a parameter's argument is checked; None if nothing here knows its annotation."""
    annotation = str(parameter.annotation).removesuffix(" | None")
    optional = annotation != str(parameter.annotation)
    check = _of_annotation(annotation, parameter.name)
    meaning = MEANINGS.get(parameter.name)
    if parameter.name == "name" and ("ref" in signature.parameters or "LazyTensor" in str(signature.return_annotation)):
        meaning = None  # a tensor's
    if parameter.name == "device" and "workers" in signature.parameters:
        meaning = None  # one of the workers' nodes, which need not be one of this machine
    if check is None:
        return None

    def full(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        value = check(name, value)
        return value if meaning is None or not isinstance(value, str) else meaning(name, value)

    return full


def _of_annotation(annotation: str, name: str) -> Check | None:
    if annotation.startswith("Literal["):
        choices = get_args(eval(annotation, {"Literal": Literal}))
        return lambda n, value: given.one_of(n, value, choices)
    least = LEAST.get(name)
    if annotation == "int":
        return lambda n, value: given.whole(n, value, least)
    if annotation == "float":
        return lambda n, value: given.amount(n, value, least)
    return ANNOTATIONS.get(annotation)


# ---------------------------------------------------------------------- by annotation


def _path(name: str, value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path or a URL, not {told(value)}")
    if not str(value):
        raise ValueError(f"{name} is an empty text: say where")
    return _no_nul(name, value)


def _no_nul(name: str, value: Any) -> Any:
    if isinstance(value, str | os.PathLike) and "\0" in os.fsdecode(value):
        raise ValueError(f"{name} has a character with the number 0, as no path has: {told(os.fsdecode(value))}")
    return value


def _is_store(value: Any) -> bool:
    return isinstance(getattr(value, "url", None), str) and hasattr(value, "repo")


def _stores(name: str, value: Any) -> Any:
    if isinstance(value, str | bytes | os.PathLike) or _is_store(value):
        shown = repr(value) if isinstance(value, str) else "…"
        raise TypeError(f"{name} is a list of stores: write [{shown}]")
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is a list of stores' paths or URLs, or of opened stores, not {told(value)}")
    return tuple(_store(f"one of {name}", one) for one in value)


def _store(name: str, value: Any) -> Any:
    if _is_store(value):
        return value
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a store's path or URL, or an opened store, not {told(value)}")
    return _path(name, value)


def _some(name: str, value: Any) -> Any:
    """All or none, or these by name."""
    return value if isinstance(value, bool) else given.texts(name, value)


def _share(name: str, value: Any) -> Any:
    """Yes, no, or a share from 0 to 1."""
    if isinstance(value, bool):
        return value
    share = given.amount(name, value, 0)
    if share > 1:
        raise ValueError(f"{name}={value!r} is not a share of a pack: give a number from 0 to 1, or True")
    return share


def _source(name: str, value: Any) -> Any:
    """Refuse values that nothing can be saved from; `open_source` looks at all others."""
    if value is None or isinstance(value, bool | int | float | bytes):
        raise TypeError(f"{name} is {told(value)}: give a path, a mapping from names to tensors, or a module")
    if _is_store(value) or type(value).__module__ == "modelstore.client.model":
        raise TypeError(f"{name} is {told(value)}: copy(ref, destination) brings a model of a store to another one")
    return _no_nul(name, value)


def _amount(name: str, value: Any) -> Any:
    check_amount(name, value)
    return value


def _amount_or_numbers(name: str, value: Any) -> Any:
    check_amount(name, value, numbers=True)
    return value


def _module(name: str, value: Any) -> Any:
    import torch

    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, not {told(value)}: load(ref) gives tensors by name")
    return value


def _shard(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping) and not (hasattr(value, "shares") and not isinstance(value, type)):
        raise TypeError(
            f"{name} must be a layout such as TensorParallel(rank, size), or a mapping from names to regions, not {told(value)}"
        )
    return as_layout(value)


def _shards(name: str, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is a list with a layout for each worker, not {told(value)}")
    return [None if one is None else _shard(name, one) for one in value]


def _workers(name: str, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is a list of Ray actors, not {told(value)}")
    if not value:
        raise ValueError(f"there are no workers: give {name} the handles of Ray actors")
    return value


def _files(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} maps the paths of files to local paths or bytes, and is {told(value)}")
    for path in value:
        if not isinstance(path, str):
            raise TypeError(f"{name} maps texts to local paths or bytes, and has {told(path)}")
    return value


def _options(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a mapping, not {told(value)}")
    return value


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be a function of bytes done, bytes in all and what is done, not {told(value)}")
    return value


def _memory(name: str, value: Any) -> Any:
    from modelstore.execute.memory import budget

    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} is a number of bytes or a text such as '1GiB', not {told(value)}")
    budget(value)
    return value


def _size(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} is a number of bytes or a text such as '1GiB', not {told(value)}")
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _duration(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return given.amount(name, value, 0)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _recipe(name: str, value: Any) -> Any:
    from modelstore.format.recipe import Recipe

    if not isinstance(value, str | Recipe | Mapping):
        raise TypeError(f"{name} is a preset's name, a Recipe, or one as plain data, not {told(value)}")
    return value


def _calibration(name: str, value: Any) -> Any:
    from modelstore.calibrate.text import Calibration

    if not isinstance(value, str | os.PathLike | Calibration):
        raise TypeError(f"{name} is a text, the path of one, or a Calibration, not {told(value)}")
    return value


def _refs(name: str, value: Any) -> Any:
    for one in (value,) if isinstance(value, str) else given.texts(name, value):
        parse_reference(one)
    return value if isinstance(value, str) else list(value)


def _device(name: str, value: Any) -> Any:
    """A device on which memory can be had now."""
    if value == "cpu":
        return value
    import torch

    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} is a text such as 'cpu' or 'cuda:0', or a torch.device, not {told(value)}")
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ValueError(f"{name} is {told(value)}, which PyTorch does not know: write 'cpu' or 'cuda:0'") from None
    if device.type == "meta":
        raise ValueError(f"{name}='meta' holds no values: describe(ref) tells shapes and dtypes")
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "is_available"):
        count = backend.device_count() if backend.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"{name}={str(device)!r} is not there: PyTorch {torch.__version__} finds {count} devices of that kind, "
                f"write device='cpu' or look at the driver"
            )
    return value


ANNOTATIONS: dict[str, Check] = {
    "str": given.text,
    "bool": given.flag,
    "bool | float": _share,
    "int | str": _memory,
    "Size": _size,
    "Duration": _duration,
    **dict.fromkeys(("str | os.PathLike[str]", "str | PathLike[str]"), _path),
    "Text | list[Text] | tuple[Text, ...]": given.each(_path),
    "str | Path": _path,
    "float | int": _amount,
    "float | int | Sequence[int]": _amount_or_numbers,
    "Path": _path,
    "str | os.PathLike[str] | OpenedStore": _store,
    "Sequence[str | os.PathLike[str] | OpenedStore]": _stores,
    "bool | Iterable[str]": _some,
    "Iterable[str]": given.texts,
    "Sequence[str]": given.texts,
    "list[str]": given.texts,
    "Openable": _source,
    "torch.nn.Module": _module,
    "Shard": _shard,
    "Sequence[Shard | None]": _shards,
    "Sequence[Any]": _workers,
    "str | torch.device": _device,
    "Progress": _callable,
    "Mapping[str, str | Path | bytes]": _files,
    "Mapping[str, Any]": _options,
    "Mapping[str, str]": _options,
    "Mapping[str, str | int | float | bool]": _options,
    "str | Recipe | Mapping[str, Any]": _recipe,
    "str | os.PathLike[str] | Calibration": _calibration,
    "str | list[str] | tuple[str, ...]": _refs,
    "DTypeName": lambda name, value: given.one_of(name, value, ("float32", "bfloat16", "float16")),
}


# ---------------------------------------------------------------------- by name


def _reference(_: str, value: str) -> str:
    parse_reference(value)
    return value


def _session(name: str, value: str) -> str:
    if len(value) > 1024:
        raise ValueError(f"{name} is {told(value)}, {len(value):,} long: give at most 1024 characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {told(value)}, which is not valid Unicode: give another") from None
    return value


def _url(name: str, value: str) -> str:
    if value != value.strip():
        raise ValueError(f"{name} is {told(value)}: take away the space around it")
    return value


MEANINGS: dict[str, Check] = {
    **dict.fromkeys(("ref", "a", "b", "parent", "teacher"), _reference),
    **dict.fromkeys(("name", "old", "new", "to"), lambda _, value: check_model(value)),
    "tag": lambda _, value: check_word(value, "tag"),
    "variant": lambda _, value: check_word(value, "variant"),
    "device": _device,
    "session": _session,
    "url": _url,
}
