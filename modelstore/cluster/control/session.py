"""A client's connection to a cluster: who is in it, how its hosts are asked, what they answered."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import ray

from modelstore.cluster.calls import (
    ANSWER,
    DIRECTORY,
    GoneError,
    actor,
    answered,
    ask_directory,
    failed,
    host_name,
)
from modelstore.cluster.channel import TLS
from modelstore.cluster.host.host import HostStats, local_path
from modelstore.cluster.metrics import ReaderMetrics
from modelstore.cluster.pieces import Piece, Source
from modelstore.cluster.read.hedging import Counts, Hedged
from modelstore.cluster.read.images import image_path
from modelstore.cluster.read.making import Made, Unstored
from modelstore.cluster.wire import PieceClients, in_thread
from modelstore.errors import NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.manifest import Manifest
from modelstore.format.region import Region
from modelstore.plan.placement import View, addresses

_FRESH = 3.0  # seconds for which a view is used before it is asked for again
_REPLACED = 10.0  # seconds to wait for the host that takes the place of one that died
_NOTICED = 20.0  # seconds within which a dead node is noticed
_LOOK = 0.1  # seconds between two looks for it
_STEP = 0.5  # seconds between two looks at a host that drains
_LEFT = 20.0  # seconds that hosts which drain have to say what they have still to hand on
_STATS = 2.0  # seconds that all hosts together have to say what they hold


class Session:
    """Reads pieces through the hosts of the Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        self.settings = ask_directory("settings")
        self._view: View = ask_directory("view")
        self._directory = actor(DIRECTORY)
        self._known_nodes = {member.node for member in self._view.members}  # that ever had a host
        self._asked = time.monotonic()
        self._coming: Future[View] | None = None
        self._node = ray.get_runtime_context().get_node_id()
        self._handles: dict[str, Any] = {}
        self._asker = Hedged(self._ask, self._alive)
        self._clients = PieceClients(self.settings.secret, TLS.from_environment())
        self._metrics = ReaderMetrics(self._node)
        for looked_up in self._meet():
            with contextlib.suppress(ValueError):
                looked_up.result()

    @property
    def node(self) -> str:
        """The node that this process runs on."""
        return str(self._node)

    @property
    def counts(self) -> Counts:
        """What answered so far: bytes by host, "node" for the node's own memory, "storage" for what no host gave."""
        return self._asker.counts

    def view(self, *, fresh: bool = False) -> View:
        """The members, as known for a few seconds; the last known ones where the directory does not answer.

        Nobody who reads waits for the directory: it is asked, and its answer used when it is there. `fresh` waits for it.
        """
        with contextlib.suppress(ray.exceptions.RayError, StorageError):
            coming = self._coming
            if fresh:
                self._view, self._coming = ray.get(self._directory.view.remote(), timeout=ANSWER), None
                self._asked = time.monotonic()
                self._meet()
            elif coming is not None and coming.done():
                self._coming = None
                self._view = coming.result()
                self._meet()
            elif time.monotonic() - self._asked > _FRESH:
                self._asked = time.monotonic()
                self._coming = self._directory.view.remote().future()
        return self._view

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

    def read(self, source: Source, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
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
        for member in self._view.members:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                self.handle(member.id).drop.remote(part.digest)

    def passed(self, nbytes: int) -> None:
        """As `Holding.passed`."""
        self.counts.add("storage", nbytes)

    def handle(self, member: str) -> Any:
        """A member's actor. `ValueError` where there is none any more."""
        found = self._handles.get(member)
        if found is None:  # no lock: where the control plane stops, this stops, and nobody else is to wait for it
            found = self._handles[member] = actor(host_name(member))
        return found

    def ask_to_hold(
        self, member: str, source: Source, parts: Sequence[Piece], tier: str, pin: str | None
    ) -> Future[int]:
        """Have a member get pieces into a tier; bytes that it then holds."""
        return self._future(member, "hold", source, list(parts), tier, pin)

    def ask_to_make(self, member: str, variant: Unstored, tensor: str, region: Region) -> Future[Made]:
        """As `Makers.ask_to_make`."""
        return self._future(member, "make", variant, tensor, region)

    def made(self, member: str, nbytes: int) -> None:
        """As `Makers.made`."""
        self.counts.add(member, nbytes)

    def image(self, source: Source, name: str, digest: str, manifest: Manifest) -> Path:
        """The file on this node with a manifest's decoded tensors, made by the node's host where it is not there.

        `UnsupportedError` where this node has no host and is to have none, or its memory no room; `GoneError` where the host
        that takes the place of one that died is not there in time.
        """
        for member in self.here():
            path = image_path(self.settings.folder(member), manifest)
            if path.exists():
                return path
        end = time.monotonic() + _REPLACED
        while True:
            for member in self.here():
                with contextlib.suppress(GoneError):
                    made = self._future(member, "image", source, name, digest)
                    return Path(made.result())
            if not self._is_home():
                raise UnsupportedError(
                    "this node has no store host, whose memory could be mapped: load it without mmap"
                )
            if time.monotonic() > end:
                raise GoneError("this node's store host is gone, and the one that takes its place is not there yet")
            time.sleep(_LOOK)
            self.view(fresh=True)

    def _is_home(self) -> bool:
        """Whether this node has a host, had one, or is to have one; True where nobody can say."""
        if self._node in self._known_nodes:
            return True
        try:
            return self._node in ask_directory("homes", seconds=_REPLACED)
        except GoneError:
            return True

    def nodes(self) -> int:
        """As `acknowledge.Hosts.nodes`."""
        with contextlib.suppress(StorageError):
            return max(len(self._known_nodes), len(ask_directory("homes", seconds=_REPLACED)))
        return len(self._known_nodes)

    def here(self) -> list[str]:
        """The members on this node."""
        return [member.id for member in self.view().members if member.node == self._node]

    def share(self, data: Bytes) -> Any:
        """As `acknowledge.Hosts.share`: in Ray's own memory, which a host of this node maps, and another one fetches."""
        return ray.put(data)

    def keep(self, member: str, method: str, *arguments: Any) -> Future[Any]:
        """As `acknowledge.Hosts.keep`."""
        return self._future(member, "keep", method, *arguments)

    def evict(self, digests: Sequence[bytes] | None, content: str | None = None) -> int:
        """Take pieces and the image of a content, or all, out of every host; bytes freed."""
        return sum(self._all("evict", digests, content))

    def pin_image(self, content: str, pin: str) -> None:
        """Let every host keep the image of a content."""
        self._all("pin_image", content, pin)

    def drain(self, node: str, *, draining: bool = True, seconds: float = 0.0) -> list[str]:
        """As `Supervisor.drain`; waits until what they hold is handed on. `NotFoundError` where there are none, `StorageError`
        where that takes longer than so many seconds: it goes on."""
        found: list[str] = ask_directory("drain", node, draining) if node else []
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
        """Of each member that drains, the bytes that it has still to hand on; None where it does not say."""
        asked = {m.id: self._future(m.id, "left") for m in self.view(fresh=True).members if m.draining}
        wait(asked.values(), timeout=_LEFT)
        return {
            member: future.result() if future.done() and not future.exception() else None
            for member, future in asked.items()
        }

    def unpin(self, pin: str) -> None:
        """Let every host evict what was held under this pin."""
        self._all("unpin", pin)

    def _meet(self) -> list[Future[Any]]:
        """Look up members that are new, each in a thread: where the control plane stops later, nobody can be any more."""
        self._known_nodes |= {member.node for member in self._view.members}
        new = [member.id for member in self._view.members if member.id not in self._handles]
        return [in_thread(functools.partial(self.handle, member)) for member in new]

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What every host that answers says."""
        asked = [self._future(member.id, method, *arguments) for member in self.view(fresh=True).members]
        found = []
        for future in asked:
            with contextlib.suppress(GoneError, TimeoutError):
                found.append(future.result(timeout=ANSWER))
        return found

    def stats(self) -> dict[str, HostStats | None]:
        """Of each member what it holds and did; None for one that does not answer."""
        members = [member.id for member in self.view(fresh=True).members]
        asked = {member: ref for member in members if (ref := self._stats_of(member)) is not None}
        refs = list(asked.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_STATS) if refs else ([], [])
        found: dict[str, HostStats | None] = dict.fromkeys(members)
        for member, ref in asked.items():
            if ref in ready:
                with contextlib.suppress(ray.exceptions.RayError):
                    found[member] = ray.get(ref)
        return found

    def _stats_of(self, member: str) -> Any:
        with contextlib.suppress(ValueError):
            return self.handle(member).stats.remote()
        return None

    def _ask(self, member: str, source: Source, parts: Sequence[Piece], fetch: bool) -> Future[Sequence[Bytes | None]]:
        address = addresses(self._view).get(member, "")
        through_ray = lambda: self._future(member, "read", source, list(parts), fetch)  # noqa: E731
        return self._clients.ask(address, source, parts, fetch, through_ray)

    def _alive(self, member: str) -> Future[bool]:
        return self._future(member, "ping")

    def _future(self, member: str, method: str, *arguments: Any) -> Future[Any]:
        """A call to a member, which may be gone by then: `GoneError`. What it raises itself is raised as it is."""
        whom = f"host {member}"
        try:
            return answered(getattr(self.handle(member), method).remote(*arguments), whom)
        except (ValueError, ray.exceptions.RayError) as error:
            self._handles.pop(member, None)
            return failed(error, whom)


def _from_node(folders: Sequence[str], part: Piece) -> Bytes | None:
    """A piece's bytes from a host's files on this node; None where none has it."""
    for folder in folders:
        path: Path = local_path(folder, part.digest)
        try:
            data = np.fromfile(path, np.uint8)
        except OSError:
            continue
        if len(data) == part.length:
            return data
    return None
