"""The sources of the pieces that a host holds, and the copies of them that other holders must get."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from modelstore.cluster.host.host import ShardHost
from modelstore.cluster.host.replicas import copies_to_send
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.plan.placement import View

Send = Callable[[str, StoreAddress, list[Piece]], None]  # has a member get copies, as far as it is there


class Copies:
    """A host's knowledge of its pieces' stores, and a queue of copies to be sent. Safe to use from many threads."""

    def __init__(self, me: str, host: ShardHost, replicas: int) -> None:
        self._me = me
        self._host = host
        self._replicas = replicas
        self._known: dict[bytes, tuple[StoreAddress, Piece]] = {}
        self._queue: queue.Queue[tuple[str, StoreAddress, list[Piece]]] = queue.Queue()

    @property
    def queued(self) -> int:
        """Batches that wait to be sent."""
        return self._queue.qsize()

    def unheld(self, parts: Sequence[Piece]) -> list[Piece]:
        """Those of the pieces that the host does not hold."""
        held = self._host.has([part.digest for part in parts])
        return [part for part, there in zip(parts, held, strict=True) if not there]

    def know(self, source: StoreAddress, parts: Sequence[Piece]) -> None:
        """Remember where pieces come from."""
        self._known.update((part.digest, (source, part)) for part in parts)

    def fetched(self, source: StoreAddress, new: Sequence[Piece], view: View) -> None:
        """Remember where new pieces come from, and let their other holders have copies."""
        if not new:
            return
        self.know(source, new)
        if self._replicas > 1:
            self._let_have(source, new, View(0, ()), view)

    def moved(self, before: View, after: View) -> None:
        """Let others have copies of what they hold in `after` and did not in `before`."""
        for source, parts in self.held():
            self._let_have(source, parts, before, after)

    def held(self) -> list[tuple[StoreAddress, list[Piece]]]:
        """The pieces that are held and known to come from a store, by store."""
        known = dict(self._known)
        found: dict[str, tuple[StoreAddress, list[Piece]]] = {}
        for (digest, (source, part)), there in zip(known.items(), self._host.has(list(known)), strict=True):
            if there:
                found.setdefault(source.url, (source, []))[1].append(part)
            else:
                self._known.pop(digest, None)
        return list(found.values())

    def send(self, send: Send) -> None:
        """Have others get what they are to hold, one after another; does not return."""
        while True:
            send(*self._queue.get())

    def _let_have(self, source: StoreAddress, parts: Sequence[Piece], before: View, after: View) -> None:
        sent = copies_to_send(self._me, before, after, self._replicas, parts)
        for member, wanted in sent.items():
            self._queue.put((member, source, wanted))
