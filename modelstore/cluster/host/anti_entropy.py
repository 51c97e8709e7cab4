"""Keeps copies right and complete: what is wrong is found and dropped, what other holders lack is sent to them. Knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from modelstore.cluster.host.host import ShardHost
from modelstore.cluster.host.replicas import others
from modelstore.cluster.pieces import Piece, StoreAddress, batches
from modelstore.plan.placement import View

log = logging.getLogger("modelstore")

PERIOD, SCRUB = 10.0, 64 << 20  # seconds between two looks, at so many bytes: under a hundredth of a core
BATCH = 32 << 20  # bytes of pieces that one request moves between hosts
LOOKED = 4096  # pieces that the other holders are asked for in one look

Lacks = Callable[[str, Sequence[Piece]], Sequence[bytes]]  # (member, pieces) → as `ShardHost.lacks` there
Fill = Callable[
    [str, StoreAddress, Sequence[Piece]], int
]  # (member, source, pieces) → bytes of them that it holds then


class AntiEntropy:
    """Keeps what a host holds right, also what nobody reads, and its copies complete.

    `held` says what is held and where it comes from; `view` who is there; `lacks` and `fill` ask another host, whatever they
    raise.
    """

    def __init__(
        self,
        me: str,
        host: ShardHost,
        held: Callable[[], Sequence[tuple[StoreAddress, list[Piece]]]],
        view: Callable[[], View],
        replicas: int,
        lacks: Lacks,
        fill: Fill,
    ) -> None:
        self._me = me
        self._host = host
        self._held = held
        self._view = view
        self._replicas = replicas
        self._lacks = lacks
        self._fill = fill
        self._at = 0  # where the next look starts

    def even(self) -> None:
        """Send the other holders of some of what is held what they lack, as far as they have room beside what they hold.

        Goes on where the last call ended. One that takes less than it was sent gets no more this time: its memory is full,
        whatever its bound says.
        """
        for source, parts in self._next():
            for member, theirs in self._theirs(parts):
                wanted = set(self._lacks(member, theirs))
                for batch in batches([part for part in theirs if part.digest in wanted], BATCH):
                    if self._fill(member, source, batch) < sum(part.length for part in batch):
                        break

    def left(self) -> int:
        """Bytes of what is held that other holders lack, as far as they have room: when it is none, this host may go."""
        count = 0
        for _, parts in self._held():
            for member, theirs in self._theirs(parts):
                wanted = set(self._lacks(member, theirs))
                count += sum(part.length for part in theirs if part.digest in wanted)
        return count

    def _theirs(self, parts: Sequence[Piece]) -> Iterable[tuple[str, list[Piece]]]:
        return others(self._me, self._view(), None, self._replicas, parts, least=1).items()

    def _drains(self) -> bool:
        return any(member.id == self._me and member.draining for member in self._view().members)

    def _next(self) -> Sequence[tuple[StoreAddress, list[Piece]]]:
        every = [(source, part) for source, parts in self._held() for part in parts]
        chosen = every[self._at : self._at + LOOKED]
        self._at = self._at + LOOKED if self._at + LOOKED < len(every) else 0
        found: dict[str, tuple[StoreAddress, list[Piece]]] = {}
        for source, part in chosen:
            found.setdefault(source.url, (source, []))[1].append(part)
        return list(found.values())

    def look(self) -> None:
        """Check some of what is held, then what others lack."""
        for digest in self._host.scrub(SCRUB):
            log.warning("a chunk that was held was wrong, and is dropped", extra={"chunk": digest.hex()})
        if self._replicas > 1 or self._drains():
            try:
                self.even()
            except Exception:  # a host that is gone or silent: the next view, or the next look, will do
                log.info("the other hosts' copies could not be looked after", exc_info=True)
