"""Whether a codec's memory for a tensor is within the limits of an operation, checked before it starts."""

from __future__ import annotations

from collections.abc import Iterable

from modelstore.compress.plan import weight_codec
from modelstore.errors import UnsupportedError
from modelstore.format.objects.manifest import CodecSpec, Tensor

_WHILE = 8  # a share of the memory that codecs may hold which need none
SHARE = 4  # of the memory a quarter, at least, is for what is read, encoded and stored meanwhile


def check_memory(tensors: Iterable[tuple[Tensor, CodecSpec | None]], memory: int) -> int:
    """The bytes that codecs hold of one of the tensors, at most; `UnsupportedError` if too little is left beside them."""
    most, name, codec = 0, "", ""
    for tensor, spec in tensors:
        needed = weight_codec(spec).memory(tensor.shape, tensor.kind) if spec is not None else 0
        if spec is not None and needed > most:
            most, name, codec = needed, tensor.name, spec.name
    needed = most + most // (SHARE - 1)
    if needed > memory:
        raise UnsupportedError(
            f"tensor {name!r} needs {-(-needed >> 20)} MiB to be compressed by {codec}, and memory= is {memory >> 20} MiB: "
            f"give more, or compress that tensor by another codec",
            tensor=name,
        )
    return most


def look_memory(held: int, memory: int) -> int:
    """The bytes that a codec may hold of a tensor, of this memory: what was found to be needed, or else a small share."""
    return max(held, memory // _WHILE)
