"""All that a node's host does: its pieces, images and saves, for readers and for the other hosts. Runs in any process: other
hosts are reached by `Peers`."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
import numpy as np

from modelstore.cluster.control.directory import ClusterSettings
from modelstore.cluster.host.anti_entropy import BATCH, PERIOD, AntiEntropy
from modelstore.cluster.host.copies import Copies
from modelstore.cluster.host.host import HostSettings, HostStats, ShardHost, sweep
from modelstore.cluster.host.protocol import Host
from modelstore.cluster.host.replicas import others
from modelstore.cluster.network.channel import TLS
from modelstore.cluster.network.futures import answers
from modelstore.cluster.network.peers import COPIES, KEEP, PIECES, Peers
from modelstore.cluster.network.wire import PieceServer
from modelstore.cluster.node.folders import own_folder
from modelstore.cluster.node.private import private_folder
from modelstore.cluster.pieces import Piece, StoreAddress, batches
from modelstore.cluster.read.images import Images
from modelstore.cluster.read.making import Making
from modelstore.cluster.read.models import opened
from modelstore.cluster.read.reader import Holding
from modelstore.cluster.save.keeper import Keeper
from modelstore.cluster.save.write_behind import WriteBehind
from modelstore.errors import ModelStoreError
from modelstore.format.buffers import Bytes
from modelstore.plan.placement import Member, View, holders
from modelstore.plan.work import Limits

log = logging.getLogger("modelstore")

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = 2.0  # seconds between two givings out of metrics
_DECODING = 1 << 30  # bytes of working memory for an image


class NodeHost:
    """A member's parts together. The methods of `host.protocol.Host`; those of `pieces`, `saves` and `making` do the work."""

    def __init__(
        self,
        member: Member,
        settings: ClusterSettings,
        peers: Peers,
        device: str | None = None,
        *,
        address: Callable[[], str],
        join: Callable[[], Holding],
        show: Callable[[HostStats], None],
    ) -> None:
        """`address` of this node; `join` makes a reader of the cluster; `show` is given the newest figures again and again."""
        private_folder(Path(settings.root), "remove it")
        folder = settings.folder(member.id)
        self._member = member
        self._settings = settings
        self._peers = peers
        self._before: View | None = None
        self._repaired = 0
        self._join = join
        self._holding: Holding | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._images = Images(folder, settings.images)
        self.making = Making(self._reading)
        self.pieces = ShardHost(_settings_of(member, settings, device), self._from_peers)
        self._copies = Copies(member.id, self.pieces, settings.replicas)
        self._mending = AntiEntropy(
            member.id,
            self.pieces,
            self._copies.held,
            lambda: self._peers.view,
            settings.replicas,
            lambda other, parts: self._peers.ask(other, Host.lacks, parts).result(COPIES),
            lambda other, source, parts: self._peers.ask(other, Host.fill, source, parts).result(COPIES),
        )
        self.saves = WriteBehind(member.id, folder, settings.pending, self._tell)
        self._server = self._serve(address)
        # Loads the compiled kernel now: the first reader would otherwise wait for it, and take this host for dead.
        holders(View(0, (member,)), np.zeros(1, np.uint64), 1)
        for name, work in {
            "copies": lambda: self._copies.send(self._send),
            "show": lambda: self._again(_SHOWN, lambda: show(self.stats())),
            "look": lambda: self._again(PERIOD, self._mending.look),
            "reading": self._reading,
        }.items():
            threading.Thread(target=work, daemon=True, name=f"modelstore-{name}").start()

    # ------------------------------------------------------------------ for readers

    def read(self, source: StoreAddress, parts: Sequence[Piece], fetch: bool = True) -> list[Bytes | None]:
        """As `Host.read`."""
        new = self._copies.unheld(parts) if fetch else []
        found = self.pieces.read(source, parts, fetch=fetch)
        self._copies.fetched(source, new, self._peers.view)
        return found

    def hold(self, source: StoreAddress, parts: Sequence[Piece], tier: str, pin: str | None) -> int:
        """As `Host.hold`."""
        new = self._copies.unheld(parts)
        held = self.pieces.hold(source, parts, tier=tier, pin=pin)
        self._copies.fetched(source, new, self._peers.view)
        return held

    def image(self, source: StoreAddress, name: str, digest: str) -> str:
        """As `Host.image`."""
        return str(self._images.make(opened(self._reading(), source, name, digest), Limits(_DECODING)))

    def evict(self, digests: Sequence[bytes] | None, content: str | None) -> int:
        """As `Host.evict`."""
        return self.pieces.evict(digests) + self._images.evict([content] if content else None)

    def pin_image(self, content: str, pin: str) -> None:
        """As `Host.pin_image`."""
        self._images.pin(content, pin)

    def unpin(self, pin: str) -> None:
        """As `Host.unpin`."""
        self.pieces.unpin(pin)
        self._images.unpin(pin)

    # ------------------------------------------------------------------ for other hosts

    def copy(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        """As `Host.copy`."""
        held = self.pieces.hold(source, self._copies.unheld(parts))
        self._copies.know(source, parts)
        self._repaired += held
        return held

    def fill(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        """As `Host.fill`."""
        self._copies.know(source, parts)
        held = self.pieces.fill(source, parts)
        self._repaired += held
        return held

    # ------------------------------------------------------------------ for those who look after it

    def member(self) -> Member:
        """As `Host.member`."""
        mine = next((member for member in self._peers.view.members if member.id == self._member.id), self._member)
        return msgspec.structs.replace(self._member, draining=mine.draining)

    def see(self, view: View) -> None:
        """As `Host.see`."""
        before = self._peers.view
        if view.epoch <= before.epoch:
            return
        self._peers.see(view)
        self._before = before
        self.saves.see(view)
        self._copies.moved(before, view)

    def left(self) -> int:
        """As `Host.left`."""
        pending = self.saves.stats()
        return self._mending.left() + (pending.bytes if pending.saves else 0)

    def stats(self) -> HostStats:
        """As `Host.stats`."""
        pending, queued = self.saves.stats(), self._copies.queued
        return msgspec.structs.replace(self.pieces.stats(), pending=pending, repaired=self._repaired, queued=queued)

    def close(self) -> None:
        """As `Host.close`."""
        self._closed.set()
        if self._server is not None:
            self._server.close()
        self.saves.close()
        self.pieces.close()
        sweep(str(Path(self._settings.root).parent))

    # ------------------------------------------------------------------ within

    def _serve(self, address: Callable[[], str]) -> PieceServer | None:
        """Give out pieces over TCP, at the address by which Ray knows this node."""
        secret = self._settings.secret
        if not secret:
            return None
        try:
            server = PieceServer(address(), secret.encode(), self.read, TLS.from_environment())
        except OSError:
            log.warning("no address of this node can be listened at: its pieces go through Ray", exc_info=True)
            return None
        self._member = msgspec.structs.replace(self._member, address=server.address)
        return server

    def _reading(self) -> Holding:
        """How this host reads what others are home to."""
        with self._lock:
            if self._holding is None:
                self._holding = self._join()
            return self._holding

    def _from_peers(self, source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """The pieces of other holders, all asked in parallel."""
        wanted = others(self._member.id, self._peers.view, self._before, self._settings.replicas, parts)
        asked = {member: self._peers.pieces(member, source, its, "handed on") for member, its in wanted.items()}
        found: dict[bytes, Bytes] = {}
        for member, given in answers(asked, PIECES).items():
            for part, data in zip(wanted[member], given, strict=False):
                if data is not None:
                    found.setdefault(part.digest, np.asarray(data))
        return found

    def _tell(
        self, member: str, method: Callable[Concatenate[Keeper, P], R], /, *arguments: P.args, **named: P.kwargs
    ) -> R:
        """The answer of another keeper."""
        return self._peers.ask(member, method, *arguments, **named).result(KEEP)

    def _send(self, member: str, source: StoreAddress, parts: list[Piece]) -> None:
        """Have another host pull what it is to hold, in batches, one after another."""
        for batch in batches(parts, BATCH):
            with contextlib.suppress(ValueError, TypeError, OSError, TimeoutError, ModelStoreError):
                self._peers.ask(member, Host.copy, source, batch).result(COPIES)

    def _again(self, seconds: float, work: Callable[[], None]) -> None:
        """Do it again and again, until this host is closed."""
        while not self._closed.wait(seconds):
            work()


def _settings_of(member: Member, settings: ClusterSettings, device: str | None) -> HostSettings:
    return HostSettings(
        id=member.id,
        node=member.node,
        folder=settings.folder(member.id),
        memory=settings.memory,
        disk=own_folder(settings.disk) if settings.disk else None,
        disk_bytes=settings.disk_bytes,
        device=device,
        device_bytes=settings.device_bytes,
    )
