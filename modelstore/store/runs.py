"""Groups neighbouring bytes of packs into one read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from modelstore.format.buffers import Bytes, view
from modelstore.format.objects.record import pack_key
from modelstore.storage.base import Storage

PIECE = 8 << 20  # bytes that are read at once, but for one span that is longer
_GAP = 32 << 10  # bytes between what is wanted that are read rather than asked around

T = TypeVar("T")


class Span(NamedTuple):
    """Bytes of a pack, from `start` to before `stop`."""

    pack: str
    start: int
    stop: int


def runs(items: Iterable[T], span: Callable[[T], Span]) -> Iterator[list[T]]:
    """Items, in their order, grouped by read: each follows the one before in the same pack, with little between them."""
    run: list[T] = []
    first = last = Span("", 0, 0)
    for item in items:
        here = span(item)
        near = here.pack == last.pack and 0 <= here.start - last.stop <= _GAP and here.stop - first.start <= PIECE
        if run and not near:
            yield run
            run = []
        if not run:
            first = here
        run.append(item)
        last = here
    if run:
        yield run


def read(storage: Storage, run: Sequence[Span]) -> list[Bytes]:
    """The bytes of a run's spans, unchecked, in one request; `NotFoundError` or `CorruptionError` if not all are there."""
    pack, start, _ = run[0]
    data = np.empty(run[-1].stop - start, np.uint8)
    storage.read(pack_key(pack), start, view(data))
    return [data[one.start - start : one.stop - start] for one in run]
