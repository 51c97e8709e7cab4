"""The storages that pieces come from at last: neighbours in one request, every piece checked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.errors import CorruptionError
from modelstore.format.buffers import Bytes, view
from modelstore.format.digest import matches
from modelstore.plan.read import GAP
from modelstore.storage.base import Storage

RUN = 32 << 20  # bytes that one request asks the storage for, at most, unless one piece is longer
_SHORT = 8 << 20  # bytes below which no run is cut so that more threads have work
_OPEN = 32  # storages that are kept open


def runs(parts: Sequence[Piece], threads: int) -> Iterator[list[Piece]]:
    """Pieces that are near each other in one pack, to be fetched together; so long that every thread has work. Pure."""
    longest = min(RUN, max(_SHORT, sum(part.length for part in parts) // max(1, threads)))
    run: list[Piece] = []
    stop = 0
    for part in sorted(parts, key=lambda p: (p.pack, p.offset)):
        near = run and part.pack == run[0].pack and part.offset - stop <= GAP
        if run and not (near and part.offset + part.length - run[0].offset <= longest):
            yield run
            run, stop = [], 0
        run.append(part)
        stop = max(stop, part.offset + part.length)
    if run:
        yield run


@dataclass
class Fetched:
    """The result of one request: right bytes by digest, and the pieces that are wrong in the storage."""

    nbytes: int
    found: dict[bytes, Bytes] = field(default_factory=dict)
    wrong: list[Piece] = field(default_factory=list)


class Origin:
    """Storages by source, opened once. Safe to use from many threads."""

    def __init__(self) -> None:
        self._storages: OrderedDict[bytes, Storage] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: StoreAddress, run: Sequence[Piece]) -> Fetched:
        """A run in one request; what came wrong is asked for once more. Errors are the storage's.

        `CorruptionError` if the object is shorter than the run.
        """
        storage, key = self._storage(source), run[0].key
        start, stop = run[0].offset, max(part.offset + part.length for part in run)
        if stop - start > RUN:  # the caller may be wrong: no such memory is taken before the object is known to have it
            info = storage.info(key)
            if info is not None and info.size < stop:
                raise CorruptionError(f"object {key!r} in {source.url} ends before byte {stop:,}", object=key)
        buffer = np.empty(stop - start, np.uint8)
        storage.read(key, start, view(buffer))
        fetched = Fetched(stop - start)
        for part in run:
            data = buffer[part.offset - start : part.offset - start + part.length]
            if not matches(data, part.digest):
                data = np.empty(part.length, np.uint8)  # the network's or the memory's fault, perhaps
                storage.read(key, part.offset, view(data))
                fetched.nbytes += part.length
                if not matches(data, part.digest):
                    fetched.wrong.append(part)
                    continue
            fetched.found[part.digest] = data
        return fetched

    def _storage(self, source: StoreAddress) -> Storage:
        key = msgspec.json.encode(source, enc_hook=repr, order="sorted")
        with self._lock:
            storage = self._storages.get(key)
            if storage is None:
                storage = self._storages[key] = source.open()
            self._storages.move_to_end(key)
            if len(self._storages) > _OPEN:
                self._storages.popitem(last=False)
            return storage
