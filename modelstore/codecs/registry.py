"""Codecs by name, as manifests and recipes speak of them. A new codec is one row here.

A row names a class as "module:Class", loaded when it is first asked for. The class is a frozen dataclass whose fields are the
codec's parameters, and which refuses wrong values in `__post_init__` with `ValueError`. Other packages add codecs by entry points
of the group `modelstore.codecs`, of the same form; `modelstore.testing` has the tests that each codec must pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import cast

from modelstore.codecs.base import Codec
from modelstore.errors import UnsupportedError
from modelstore.format.given import told
from modelstore.format.suggest import suggestion

_ROWS = MappingProxyType(
    {
        "raw": "modelstore.codecs.exact.raw:Raw",
        "lossless": "modelstore.codecs.exact.lossless:Lossless",
        "packed": "modelstore.codecs.exact.packed:FixedRate",
        "delta": "modelstore.codecs.exact.delta:Delta",
        "ladder": "modelstore.codecs.ladder.codec:Ladder",
        "binary": "modelstore.codecs.signs.codec:Binary",
        "ternary": "modelstore.codecs.signs.codec:Ternary",
        "kmeans": "modelstore.codecs.shared.kmeans:KMeans",
        "sparse": "modelstore.codecs.sparse.codec:Sparse",
        "deep": "modelstore.codecs.shared.deep:Deep",
        "lowrank": "modelstore.codecs.lowrank.codec:LowRank",
        "int": "modelstore.codecs.integer.codec:Int",
        "round": "modelstore.codecs.floating.rounded:Round",
        "half": "modelstore.codecs.floating.half:Half",
        "fp8": "modelstore.codecs.floating.fp8:Fp8",
        "nf4": "modelstore.codecs.floating.nf4:Nf4",
        "mxfp4": "modelstore.codecs.floating.fp4:Mxfp4",
        "nvfp4": "modelstore.codecs.floating.fp4:Nvfp4",
    }
)


_GROUP = "modelstore.codecs"
_LARGEST = 1 << 62


@cache
def added() -> Mapping[str, str]:
    """Codecs of other packages that are installed here, each with its place; the names above are taken."""
    return {point.name: point.value for point in entry_points(group=_GROUP) if point.name not in _ROWS}


def names() -> tuple[str, ...]:
    """The names of all codecs."""
    return (*_ROWS, *sorted(added()))


def codec(name: str, params: Mapping[str, object] | None = None) -> Codec:
    """The codec of that name with these parameters, each having a default.

    `UnsupportedError` if no codec has that name, `ValueError` if it does not have such a parameter or refuses its value.
    """
    if not isinstance(name, str):
        raise ValueError(f"a codec is named by a text such as 'int', not by {told(name)}")
    place = _ROWS.get(name) or added().get(name)
    if place is None:
        raise UnsupportedError(
            f"codec {name!r} is not known{suggestion(name, names())}; known are {', '.join(names())}"
        )
    module, attribute = place.split(":")
    made = getattr(import_module(module), attribute)
    params = {} if params is None else params
    if not isinstance(params, Mapping):
        raise ValueError(
            f"codec {name!r}: its parameters are a mapping by name, such as {{'bits': 4}}, not {told(params)}"
        )
    known = [field.name for field in dataclasses.fields(made)]
    unknown = sorted(str(one) for one in params if one not in known)
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"codec {name!r} has no parameter {', '.join(map(repr, unknown))}; {takes}")
    try:
        for field in dataclasses.fields(made):
            if field.name in params:
                _check_kind(field.name, params[field.name], field.default)
        return cast(Codec, made(**params))
    except (TypeError, ValueError) as error:
        raise ValueError(f"codec {name!r}: {error}") from None


def _check_kind(name: str, value: object, default: object) -> None:
    """A parameter is of the kind that its default is of, as a manifest holds it: a whole number does for a share, too."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    kind = type(default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind in kinds and not fits:
        raise ValueError(f"{name} must be {kinds[kind]}, not {told(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {told(value)}, which is not a finite number")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} is {told(value)}, beyond all bounds of a whole number")
