"""A client's connection to a cluster: who is in it, how its hosts are asked, what they answered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray

from modelstore.cluster.control.protocol import Control
from modelstore.cluster.host.host import HostStats, local_path
from modelstore.cluster.host.protocol import Host
from modelstore.cluster.metrics import ReaderMetrics
from modelstore.cluster.network.calls import DIRECTORY, HostGoneError, actor, ask_directory, ask_directory_within
from modelstore.cluster.network.futures import answers
from modelstore.cluster.network.peers import ANSWER, LEFT, STATS, Peers
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.read.hedging import Hedged, ReadCounts
from modelstore.cluster.read.images import image_path
from modelstore.cluster.read.making import MadePlanes, Unstored
from modelstore.errors import NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest
from modelstore.format.region import Region
from modelstore.plan.placement import View

P = ParamSpec("P")
R = TypeVar("R")

_FRESH = 3.0  # seconds for which a view is used before it is asked for again
_REPLACED = 10.0  # seconds to wait for the host that takes the place of one that died
_NOTICED = 20.0  # seconds within which a dead node is noticed
_LOOK = 0.1  # seconds between two looks for it
_STEP = 0.5  # seconds between two looks at a host that drains


class Session:
    """Reads pieces through the hosts of the Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        self.settings = ask_directory(Control.settings)
        self.peers = Peers(ask_directory(Control.view), self.settings.secret)
        self._directory = actor(DIRECTORY)
        self._known_nodes: set[str] = set()  # that ever had a host
        self._asked = time.monotonic()
        self._coming: Future[View] | None = None
        self._node = ray.get_runtime_context().get_node_id()
        self._asker = Hedged(self._ask, lambda member: self.peers.ask(member, Host.ping))
        self._metrics = ReaderMetrics(self._node)
        for looked_up in self._meet():
            with contextlib.suppress(ValueError):
                looked_up.result()

    @property
    def node(self) -> str:
        """The node that this process runs on."""
        return str(self._node)

    @property
    def counts(self) -> ReadCounts:
        """The sources of answers so far: bytes by host, "node" for the node's own memory, "storage" for bytes that no host
        gave.
        """
        return self._asker.counts

    def view(self, *, fresh: bool = False) -> View:
        """The members, as known for a few seconds; the last known ones where the directory does not answer.

        Nobody who reads waits for the directory: it is asked, and its answer used when it is there. `fresh` waits for it.
        """
        with contextlib.suppress(ray.exceptions.RayError, StorageError):
            coming = self._coming
            if fresh:
                self.peers.see(ray.get(self._directory.view.remote(), timeout=ANSWER))
                self._coming, self._asked = None, time.monotonic()
                self._meet()
            elif coming is not None and coming.done():
                self._coming = None
                self.peers.see(coming.result())
                self._meet()
            elif time.monotonic() - self._asked > _FRESH:
                self._asked = time.monotonic()
                self._coming = self._directory.view.remote().future()
        return self.peers.view

    def without(self, lost: Collection[str]) -> View:
        """The members now; where some were found to be gone, once nobody counts them as members any more."""
        end = time.monotonic() + _REPLACED + _NOTICED
        while True:
            view = self.view(fresh=True)
            if not lost or time.monotonic() > end:
                return view
            if view.members and not any(member.id in lost for member in view.members):
                return view
            time.sleep(_LOOK)

    def read(self, source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """As `Holding.read`: from the node's own shared memory, else from holders."""
        view = self.view()
        folders = [self.settings.folder(member) for member in self.here()]
        found: dict[bytes, Bytes] = {}
        for part in parts:
            data = _from_node(folders, part)
            if data is not None:
                found[part.digest] = data
        self.counts.add("node", sum(len(data) for data in found.values()))
        rest = [part for part in parts if part.digest not in found]
        if rest:
            found |= self._asker.read(view, self.settings.replicas, source, rest)
            if len(found) < len(parts):  # who is there may have changed
                self._asked = 0.0
        self._metrics.show(self.counts)
        return found

    def wrong(self, part: Piece) -> None:
        """As `Holding.wrong`."""
        self.counts.wrong += 1
        self.peers.everyone(Host.drop, part.digest)

    def passed(self, nbytes: int) -> None:
        """As `Holding.passed`."""
        self.counts.add("storage", nbytes)

    def ask(
        self, member: str, method: Callable[Concatenate[Host, P], R], *arguments: P.args, **named: P.kwargs
    ) -> Future[R]:
        """As `Peers.ask`."""
        return self.peers.ask(member, method, *arguments, **named)

    def ask_to_make(self, member: str, variant: Unstored, tensor: str, region: Region) -> Future[MadePlanes]:
        """As `Makers.ask_to_make`."""
        return self.peers.ask(member, Host.make, variant, tensor, region)

    def made(self, member: str, nbytes: int) -> None:
        """As `Makers.made`."""
        self.counts.add(member, nbytes)

    def image(self, source: StoreAddress, name: str, digest: str, manifest: Manifest) -> Path:
        """The file on this node with a manifest's decoded tensors, made by the node's host where it is not there.

        `UnsupportedError` if this node does not have a host and will not get one, or its memory has no room; `HostGoneError`
        if the host that replaces a dead one is not there in time.
        """
        for member in self.here():
            path = image_path(self.settings.folder(member), manifest)
            if path.exists():
                return path
        end = time.monotonic() + _REPLACED
        while True:
            for member in self.here():
                with contextlib.suppress(HostGoneError):
                    return Path(self.peers.ask(member, Host.image, source, name, digest).result())
            if not self._is_home():
                raise UnsupportedError(
                    "this node has no store host, whose memory could be mapped: load it without mmap"
                )
            if time.monotonic() > end:
                raise HostGoneError("this node's store host is gone, and the one that takes its place is not there yet")
            time.sleep(_LOOK)
            self.view(fresh=True)

    def _is_home(self) -> bool:
        """Whether this node has a host, had one, or is to have one; True if nobody can say."""
        if self._node in self._known_nodes:
            return True
        try:
            return self._node in ask_directory_within(_REPLACED, Control.homes)
        except HostGoneError:
            return True

    def nodes(self) -> int:
        """As `acknowledge.Hosts.nodes`."""
        with contextlib.suppress(StorageError):
            return max(len(self._known_nodes), len(ask_directory_within(_REPLACED, Control.homes)))
        return len(self._known_nodes)

    def here(self) -> list[str]:
        """The members on this node."""
        return [member.id for member in self.view().members if member.node == self._node]

    def share(self, data: Bytes) -> Any:
        """As `acknowledge.Hosts.share`: in Ray's own memory, which a host of this node maps, and another one fetches."""
        return ray.put(data)

    def evict(self, digests: Sequence[bytes] | None, content: str | None = None) -> int:
        """Take pieces and the image of a content, or all, out of every host; bytes freed."""
        return sum(self._all(Host.evict, digests, content))

    def pin_image(self, content: str, pin: str) -> None:
        """Let every host keep the image of a content."""
        self._all(Host.pin_image, content, pin)

    def drain(self, node: str, *, draining: bool = True, seconds: float = 0.0) -> list[str]:
        """As `Supervisor.drain`; waits until what they hold is handed on. `NotFoundError` if there are none, `StorageError`
        where that takes longer than so many seconds: it goes on."""
        found = ask_directory(Control.drain, node, draining) if node else []
        if not found:
            raise NotFoundError(f"no host runs on a node {node!r}: list them with 'modelstore cluster status'")
        end = time.monotonic() + seconds
        while draining and seconds:
            there = {member.id for member in self.view(fresh=True).members}
            left = {member: count for member, count in self.left().items() if member in found}
            if not there.intersection(found) or (left and not any(count != 0 for count in left.values())):
                break
            if time.monotonic() > end:
                count = sum(filter(None, left.values()))
                raise StorageError(
                    f"hosts {', '.join(found)} have not handed on everything after {seconds:g} s ({count} bytes are left): "
                    f"they go on, and 'modelstore cluster status' shows it"
                )
            time.sleep(_STEP)
        self.view(fresh=True)
        return found

    def left(self) -> dict[str, int | None]:
        """For each member that drains, the bytes that it still has to hand on; None if it does not say."""
        draining = [member.id for member in self.view(fresh=True).members if member.draining]
        asked = {member: self.peers.ask(member, Host.left) for member in draining}
        return dict.fromkeys(draining) | answers(asked, LEFT)

    def unpin(self, pin: str) -> None:
        """Let every host evict what was held under this pin."""
        self._all(Host.unpin, pin)

    def stats(self) -> dict[str, HostStats | None]:
        """The content and counters of each member; None for one that does not answer."""
        members = [member.id for member in self.view(fresh=True).members]
        return dict.fromkeys(members) | answers(self.peers.everyone(Host.stats), STATS)

    def _meet(self) -> list[Future[Any]]:
        self._known_nodes |= {member.node for member in self.peers.view.members}
        return self.peers.meet()

    def _all(self, method: Callable[Concatenate[Host, P], R], *arguments: P.args, **named: P.kwargs) -> list[R]:
        """The answers of all hosts that answer."""
        self.view(fresh=True)
        found = []
        for future in self.peers.everyone(method, *arguments, **named).values():
            with contextlib.suppress(HostGoneError, TimeoutError):
                found.append(future.result(timeout=ANSWER))
        return found

    def _ask(
        self, member: str, source: StoreAddress, parts: Sequence[Piece], fetch: bool
    ) -> Future[Sequence[Bytes | None]]:
        return self.peers.pieces(member, source, parts, "fetched" if fetch else "held")


def _from_node(folders: Sequence[str], part: Piece) -> Bytes | None:
    """A piece's bytes from a host's files on this node; None if none has it."""
    for folder in folders:
        path: Path = local_path(folder, part.digest)
        try:
            data = np.fromfile(path, np.uint8)
        except OSError:
            continue
        if len(data) == part.length:
            return data
    return None
