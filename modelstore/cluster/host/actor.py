"""The Ray actor of a host: a thin shell over `NodeHost`, which does the work."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray

from modelstore.cluster.control.directory import ClusterSettings
from modelstore.cluster.control.session import Session
from modelstore.cluster.host.capacity import check
from modelstore.cluster.host.host import HostStats
from modelstore.cluster.host.node import NodeHost
from modelstore.cluster.logs import log_as_json
from modelstore.cluster.metrics import HostMetrics
from modelstore.cluster.network.peers import Peers
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.read.making import MadePlanes, Unstored
from modelstore.cluster.save.orders import Order
from modelstore.errors import ModelStoreError
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.region import Region
from modelstore.plan.placement import Member, View

# In one pool, hosts that ask each other would block.
GROUPS = {"read": 8, "write": 4, "keep": 16, "make": 4, "repair": 4, "control": 4}


class StorageActor:
    """A node's host in a process of its own. `host.protocol.Host` says what its methods do."""

    def __init__(self, member: Member, settings: ClusterSettings, view: View, device: str | None = None) -> None:
        log_as_json(host=member.id, node=member.node)
        self._problem: Exception | None = None
        try:
            check(settings)
            peers = Peers(view, settings.secret)
            show = HostMetrics(member.id, member.node).show
            here = ray.util.get_node_ip_address
            self._host = NodeHost(member, settings, peers, device, address=here, join=Session, show=show)
        except (ModelStoreError, ValueError, OSError) as error:
            self._problem = error  # said by `member`: Ray would say only that the actor died

    # ------------------------------------------------------------------ by readers

    @ray.method(concurrency_group="read")
    def read(self, source: StoreAddress, parts: Sequence[Piece], fetch: bool = True) -> list[Bytes | None]:
        return self._host.read(source, parts, fetch)

    @ray.method(concurrency_group="read")
    def hold(self, source: StoreAddress, parts: Sequence[Piece], tier: str = "memory", pin: str | None = None) -> int:
        return self._host.hold(source, parts, tier, pin)

    @ray.method(concurrency_group="write")
    def image(self, source: StoreAddress, name: str, digest: str) -> str:
        return self._host.image(source, name, digest)

    @ray.method(concurrency_group="make")
    def make(self, variant: Unstored, tensor: str, region: Region) -> MadePlanes:
        return self._host.making.make(variant, tensor, region)

    @ray.method(concurrency_group="control")
    def drop(self, digest: bytes) -> None:
        self._host.pieces.drop(digest)

    @ray.method(concurrency_group="control")
    def evict(self, digests: Sequence[bytes] | None = None, content: str | None = None) -> int:
        return self._host.evict(digests, content)

    @ray.method(concurrency_group="control")
    def pin_image(self, content: str, pin: str) -> None:
        self._host.pin_image(content, pin)

    @ray.method(concurrency_group="control")
    def unpin(self, pin: str) -> None:
        self._host.unpin(pin)

    # ------------------------------------------------------------------ by other hosts

    @ray.method(concurrency_group="repair")
    def take(self, source: StoreAddress, parts: Sequence[Piece]) -> list[Bytes | None]:
        return self._host.pieces.read(source, parts, fetch=False)

    @ray.method(concurrency_group="repair")
    def copy(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        return self._host.copy(source, parts)

    @ray.method(concurrency_group="repair")
    def lacks(self, parts: Sequence[Piece]) -> list[bytes]:
        return self._host.pieces.lacks(parts)

    @ray.method(concurrency_group="repair")
    def fill(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        return self._host.fill(source, parts)

    # ------------------------------------------------------------------ by saves

    @ray.method(concurrency_group="keep")
    def reserve(
        self, save: str, source: StoreAddress, keepers: Sequence[str], key: str, size: int, seconds: float
    ) -> bool:
        return self._host.saves.reserve(save, source, keepers, key, size, seconds)

    @ray.method(concurrency_group="keep")
    def write(self, save: str, key: str, start: int, data: Buffer, digest: bytes | None = None) -> None:
        self._host.saves.write(save, key, start, data, digest)

    @ray.method(concurrency_group="keep")
    def commit(self, order: Order) -> None:
        self._host.saves.commit(order)

    @ray.method(concurrency_group="keep")
    def abandon(self, save: str) -> None:
        self._host.saves.abandon(save)

    @ray.method(concurrency_group="keep")
    def stored(self, save: str) -> set[str]:
        return self._host.saves.stored(save)

    @ray.method(concurrency_group="keep")
    def versions(self, saves: Sequence[str]) -> dict[str, int]:
        return self._host.saves.versions(saves)

    @ray.method(concurrency_group="keep")
    def discard(self, save: str, key: str, stored: bool = True) -> None:
        self._host.saves.discard(save, key, stored)

    @ray.method(concurrency_group="keep")
    def finish(self, save: str, version: int) -> None:
        self._host.saves.finish(save, version)

    @ray.method(concurrency_group="keep")
    def flush(self, seconds: float) -> bool:
        return self._host.saves.flush(seconds)

    # ------------------------------------------------------------------ by those who look after it

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="control")
    def member(self) -> Member:
        if self._problem is not None:
            raise self._problem
        return self._host.member()

    @ray.method(concurrency_group="control")
    def ping(self) -> bool:
        return True

    @ray.method(concurrency_group="control")
    def see(self, view: View) -> None:
        self._host.see(view)

    @ray.method(concurrency_group="keep")
    def left(self) -> int:
        return self._host.left()

    @ray.method(concurrency_group="control")
    def stats(self) -> HostStats:
        return self._host.stats()

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        self._host.close()
