"""Codecs by name, as manifests and recipes speak of them. A new codec is one row here.

A row names a class as "module:Class", loaded when it is first asked for. The class is a frozen dataclass whose fields are the
codec's parameters, and which refuses wrong values in `__post_init__` with `ValueError`. Other packages add codecs by entry points
of the group `modelstore.codecs`, of the same form; `modelstore.testing` has the tests that each codec must pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import cast

from modelstore.codecs.base import Codec
from modelstore.errors import UnsupportedError

_ROWS = MappingProxyType(
    {
        "raw": "modelstore.codecs.exact.raw:Raw",
        "lossless": "modelstore.codecs.exact.lossless:Lossless",
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


@cache
def added() -> Mapping[str, str]:
    """Codecs of other packages that are installed here, each with its place; the names above are taken."""
    return {point.name: point.value for point in entry_points(group=_GROUP) if point.name not in _ROWS}


def names() -> tuple[str, ...]:
    """The names of all codecs."""
    return (*_ROWS, *sorted(added()))


def codec(name: str, params: Mapping[str, object] | None = None) -> Codec:
    """The codec of that name with these parameters, each having a default.

    `UnsupportedError` where no codec has that name, `ValueError` where it has no such parameter or refuses its value.
    """
    place = _ROWS.get(name) or added().get(name)
    if place is None:
        raise UnsupportedError(f"codec {name!r} is not known; known are {', '.join(names())}")
    module, attribute = place.split(":")
    made = getattr(import_module(module), attribute)
    params = params or {}
    known = [field.name for field in dataclasses.fields(made)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"codec {name!r} has no parameter {', '.join(map(repr, unknown))}; {takes}")
    return cast(Codec, made(**params))
