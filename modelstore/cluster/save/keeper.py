"""The calls to a host that keeps saves, from savers and from the other keepers, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.save.orders import Order
from modelstore.format.buffers import Buffer

P = ParamSpec("P")
R = TypeVar("R")


class Keeper(Protocol):
    """A host's share of the saves that are under way; `WriteBehind` says what each call does, and raises."""

    def reserve(
        self, save: str, source: StoreAddress, keepers: Sequence[str], key: str, size: int, seconds: float
    ) -> bool:
        """Make room for an object; whether there is."""

    def write(self, save: str, key: str, start: int, data: Buffer, digest: bytes | None = None) -> None:
        """Keep a part of an object; with its last one comes the digest of the whole."""

    def commit(self, order: Order) -> None:
        """Take over a save whose objects are all kept."""

    def abandon(self, save: str) -> None:
        """Forget a save that will not be committed."""

    def stored(self, save: str) -> set[str]:
        """The objects of a save that are in the storage already."""

    def versions(self, saves: Sequence[str]) -> dict[str, int]:
        """The version that each of these saves became, 0 while it is not durable; those that were taken over here."""

    def discard(self, save: str, key: str, stored: bool = True) -> None:
        """Let go of an object."""

    def finish(self, save: str, version: int) -> None:
        """A save is durable."""

    def flush(self, seconds: float) -> bool:
        """Wait until all that was acknowledged is durable; whether it is."""


class Tell(Protocol):
    """Has another host do something, and waits for its answer: `tell(member, Keeper.commit, order)`."""

    def __call__(
        self, member: str, method: Callable[Concatenate[Keeper, P], R], /, *arguments: P.args, **named: P.kwargs
    ) -> R: ...
