"""Fetches without repetition: one thread fetches a piece, the others that need it wait for that one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError

from modelstore.format.buffers import Bytes

Flight = Future[Bytes | None]  # None: the thread that fetched it failed, so that another must try


class SingleFlight:
    """Pieces under way, by digest. Safe to use from many threads."""

    def __init__(self) -> None:
        self._open: dict[bytes, Flight] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def claim(self, digests: Iterable[bytes]) -> tuple[dict[bytes, Flight], dict[bytes, Flight]]:
        """Those that the caller is to fetch, each to be ended with `land`; and those that others fetch already."""
        mine: dict[bytes, Flight] = {}
        theirs: dict[bytes, Flight] = {}
        with self._lock:
            for digest in digests:
                flight = self._open.get(digest)
                if flight is not None:
                    theirs[digest] = flight
                else:
                    self._open[digest] = mine[digest] = Future()
        return mine, theirs

    def land(self, digest: bytes, flight: Flight, data: Bytes | None) -> None:
        """End a flight: all who wait for it get the bytes, or try themselves. Ended ones stay as they are."""
        self.abandon(digest, flight)
        with contextlib.suppress(InvalidStateError):
            flight.set_result(data)

    def abandon(self, digest: bytes, flight: Flight) -> None:
        """Wait for it no more: the next one who claims the piece fetches it itself."""
        with self._lock:
            if self._open.get(digest) is flight:
                del self._open[digest]
