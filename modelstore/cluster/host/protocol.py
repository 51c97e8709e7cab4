"""The calls to a host from another process: each with its types, as `Peers.ask` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from modelstore.cluster.host.host import HostStats
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.read.making import MadePlanes, Unstored
from modelstore.cluster.save.keeper import Keeper
from modelstore.format.buffers import Bytes
from modelstore.format.region import Region
from modelstore.plan.placement import Member, View


class Host(Keeper, Protocol):
    """A node's host. Errors are its own; of one that is gone, `HostGoneError`."""

    # ------------------------------------------------------------------ by readers

    def read(self, source: StoreAddress, parts: Sequence[Piece], fetch: bool = True) -> list[Bytes | None]:
        """The pieces' bytes, fetched where they are not held (with `fetch`); None for what is not there."""

    def hold(self, source: StoreAddress, parts: Sequence[Piece], tier: str = "memory", pin: str | None = None) -> int:
        """Get the pieces into a tier; bytes of them that are held now."""

    def image(self, source: StoreAddress, name: str, digest: str) -> str:
        """The file with the decoded tensors of a model's manifest, made where it is not there. Its path on the host's node."""

    def make(self, variant: Unstored, tensor: str, region: Region) -> MadePlanes:
        """The planes, with their digests, of a chunk of a variant that is not stored."""

    def drop(self, digest: bytes) -> None:
        """A reader found these bytes wrong."""

    def evict(self, digests: Sequence[bytes] | None = None, content: str | None = None) -> int:
        """Let pieces and the image of a content go (all, where none are named), except what is pinned; bytes freed."""

    def pin_image(self, content: str, pin: str) -> None:
        """Keep the image of a content, made now or later."""

    def unpin(self, pin: str) -> None:
        """Let what was held under this pin be evicted."""

    # ------------------------------------------------------------------ by other hosts

    def take(self, source: StoreAddress, parts: Sequence[Piece]) -> list[Bytes | None]:
        """The held ones of these."""

    def copy(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        """Hold a copy of these, which others have; bytes of them that are held now."""

    def lacks(self, parts: Sequence[Piece]) -> list[bytes]:
        """Which of these are not held, as far as there is room for them."""

    def fill(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        """Hold copies of these, which another host found to be missing; bytes of them that are held now."""

    # ------------------------------------------------------------------ by those who look after it

    def pid(self) -> int:
        """The process."""

    def member(self) -> Member:
        """This host as a member. `ValueError` or `StorageError` if its settings are not for this node."""

    def ping(self) -> bool:
        """True, as long as the process answers."""

    def see(self, view: View) -> None:
        """Take a newer view of the cluster; copies that it makes missing elsewhere are sent."""

    def left(self) -> int:
        """Bytes that are still to be handed on before this host may go: copies, and saves that are not stored."""

    def stats(self) -> HostStats:
        """The current content, and the counters."""

    def close(self) -> None:
        """Remove the files in shared memory; the disk keeps its own."""
