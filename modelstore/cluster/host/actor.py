"""The Ray actor of a host: a thin shell over `ShardHost` and `WriteBehind`, which do the work and are tested without Ray."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import ray

from modelstore.cluster.calls import actor, host_name
from modelstore.cluster.channel import TLS
from modelstore.cluster.control.directory import ClusterSettings
from modelstore.cluster.folders import own_folder
from modelstore.cluster.host.anti_entropy import BATCH, PERIOD, AntiEntropy
from modelstore.cluster.host.capacity import check
from modelstore.cluster.host.host import HostSettings, HostStats, ShardHost, sweep
from modelstore.cluster.host.replicas import copies_to_send, others
from modelstore.cluster.logs import log_as_json
from modelstore.cluster.metrics import HostMetrics
from modelstore.cluster.pieces import Piece, Source, batches
from modelstore.cluster.private import private_folder
from modelstore.cluster.read.images import Images
from modelstore.cluster.read.making import Made, Making, Unstored
from modelstore.cluster.save.write_behind import WriteBehind
from modelstore.cluster.wire import PieceClients, PieceServer
from modelstore.errors import ModelStoreError
from modelstore.format.buffers import Bytes
from modelstore.format.region import Region
from modelstore.plan.placement import Member, View, addresses, holders
from modelstore.plan.work import Limits

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session

log = logging.getLogger("modelstore")

# In one pool, hosts that ask each other would block.
GROUPS = {"read": 8, "write": 4, "keep": 16, "make": 4, "repair": 4, "control": 4}
_PEER_SECONDS = 2.0
_KEEP_SECONDS = 30.0
_SHOWN = 2.0  # seconds between two givings out of metrics
_DECODING = 1 << 30  # bytes of working memory for an image


class StorageActor:
    """A node's host in a process of its own."""

    def __init__(self, member: Member, settings: ClusterSettings, view: View, device: str | None = None) -> None:
        log_as_json(host=member.id, node=member.node)
        self._problem: Exception | None = None
        try:
            check(settings)
            self._begin(member, settings, view, device)
        except (ModelStoreError, ValueError, OSError) as error:
            self._problem = error  # said by `member`: Ray would say only that the actor died

    def _begin(self, member: Member, settings: ClusterSettings, view: View, device: str | None) -> None:
        private_folder(Path(settings.root), "remove it")
        self._member = member
        self._settings = settings
        self._view: View = view
        self._before: View | None = None
        self._known: dict[bytes, tuple[Source, Piece]] = {}
        self._repaired = 0
        self._handles: dict[str, Any] = {}
        self._images = Images(settings.folder(member.id), settings.images)
        self._session: Session | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._making = Making(self._reading)
        self._copies: queue.Queue[tuple[str, Source, list[Piece]]] = queue.Queue()
        self._host = ShardHost(
            HostSettings(
                id=member.id,
                node=member.node,
                folder=settings.folder(member.id),
                memory=settings.memory,
                disk=own_folder(settings.disk) if settings.disk else None,
                disk_bytes=settings.disk_bytes,
                device=device,
                device_bytes=settings.device_bytes,
            ),
            self._peers,
        )
        lacks, fill = (functools.partial(self._call, method) for method in ("lacks", "fill"))
        self._mending = AntiEntropy(
            member.id, self._host, self._held, lambda: self._view, settings.replicas, lacks, fill
        )
        self._behind = WriteBehind(member.id, settings.folder(member.id), settings.pending, self._tell)
        self._clients = PieceClients(settings.secret, TLS.from_environment())
        self._server = self._serve()
        # Loads the compiled kernel now: the first reader would otherwise wait for it, and take this host for dead.
        holders(View(0, (member,)), np.zeros(1, np.uint64), 1)
        self._metrics = HostMetrics(member.id, member.node)
        for work in (self._send_copies, self._show, self._look, self._reading):
            threading.Thread(target=work, daemon=True, name=f"modelstore{work.__name__}").start()

    # ------------------------------------------------------------------ reading

    @ray.method(concurrency_group="read")
    def read(self, source: Source, parts: Sequence[Piece], fetch: bool = True) -> list[Bytes | None]:
        """The pieces' bytes, fetched where they are not held (with `fetch`); None for what is not there."""
        return self._read(source, parts, fetch)

    @ray.method(concurrency_group="read")
    def hold(self, source: Source, parts: Sequence[Piece], tier: str = "memory", pin: str | None = None) -> int:
        """Get the pieces into a tier; bytes of them that are held now."""
        new = self._unheld(parts)
        held = self._host.hold(source, parts, tier=tier, pin=pin)
        self._note(source, new)
        return held

    @ray.method(concurrency_group="repair")
    def take(self, source: Source, parts: Sequence[Piece]) -> list[Bytes | None]:
        """What is held of these, for another host."""
        return self._host.read(source, parts, fetch=False)

    @ray.method(concurrency_group="repair")
    def copy(self, source: Source, parts: Sequence[Piece]) -> int:
        """Hold a copy of these, which others have."""
        held = self._host.hold(source, self._unheld(parts))
        self._known.update((part.digest, (source, part)) for part in parts)
        self._repaired += held
        return held

    @ray.method(concurrency_group="repair")
    def lacks(self, parts: Sequence[Piece]) -> list[bytes]:
        """Which of these are not held here, as far as there is room for them."""
        return self._host.lacks(parts)

    @ray.method(concurrency_group="repair")
    def fill(self, source: Source, parts: Sequence[Piece]) -> int:
        """Hold copies of these, which another host found to be missing here."""
        self._known.update((part.digest, (source, part)) for part in parts)
        held = self._host.fill(source, parts)
        self._repaired += held
        return held

    @ray.method(concurrency_group="write")
    def image(self, source: Source, name: str, digest: str) -> str:
        """The file with the decoded tensors of a model's manifest, made where it is not there. Its path on this node."""
        from modelstore.cluster.read.models import opened

        model = opened(self._reading(), source, name, digest)
        return str(self._images.make(model, Limits(_DECODING)))

    @ray.method(concurrency_group="make")
    def make(self, variant: Unstored, tensor: str, region: Region) -> Made:
        """The planes, with their digests, of a chunk of a variant that is not stored."""
        return self._making.make(variant, tensor, region)

    @ray.method(concurrency_group="write")
    def put(self, data: Mapping[bytes, Bytes], pin: str | None = None) -> None:
        """Hold new pieces, whose bytes come with the call."""
        self._host.put(data, pin=pin)

    @ray.method(concurrency_group="keep")
    def keep(self, method: str, *arguments: Any) -> Any:
        """A method of this host's `WriteBehind`: saves that were acknowledged, or are about to be."""
        return getattr(self._behind, method)(*arguments)

    # ------------------------------------------------------------------ control

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def member(self) -> Member:
        """Who this host is. `ValueError` or `StorageError` where its settings are not for this node."""
        if self._problem is not None:
            raise self._problem
        mine = next((member for member in self._view.members if member.id == self._member.id), self._member)
        return msgspec.structs.replace(self._member, draining=mine.draining)

    @ray.method(concurrency_group="keep")
    def left(self) -> int:
        """Bytes that are still to be handed on before this host may go: copies, and saves that are not stored."""
        pending = self._behind.stats()
        return self._mending.left() + (pending.bytes if pending.saves else 0)

    @ray.method(concurrency_group="control")
    def ping(self) -> bool:
        """True, as long as this process answers."""
        return True

    @ray.method(concurrency_group="control")
    def see(self, view: View) -> None:
        """Take a newer view of the cluster; copies that it makes missing elsewhere are sent."""
        if view.epoch <= self._view.epoch:
            return
        before, self._view = self._view, view
        self._before = before
        self._behind.see(view)
        for source, parts in self._held():
            sent = copies_to_send(self._member.id, before, view, self._settings.replicas, parts)
            for member, wanted in sent.items():
                self._copies.put((member, source, wanted))

    @ray.method(concurrency_group="control")
    def drop(self, digest: bytes) -> None:
        """A reader found these bytes wrong."""
        self._host.drop(digest)

    @ray.method(concurrency_group="control")
    def evict(self, digests: Sequence[bytes] | None = None, content: str | None = None) -> int:
        """Let pieces and the image of a content go (all, where none are named), except what is pinned; bytes freed."""
        return self._host.evict(digests) + self._images.evict([content] if content else None)

    @ray.method(concurrency_group="control")
    def pin_image(self, content: str, pin: str) -> None:
        """Keep the image of a content, made now or later."""
        self._images.pin(content, pin)

    @ray.method(concurrency_group="control")
    def unpin(self, pin: str) -> None:
        """Let what was held under this pin be evicted."""
        self._host.unpin(pin)
        self._images.unpin(pin)

    @ray.method(concurrency_group="control")
    def stats(self) -> HostStats:
        """What is held, and what was done."""
        return self._stats()

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Remove what lies in shared memory; the disk keeps its own."""
        self._closed.set()
        if self._server is not None:
            self._server.close()
        self._behind.close()
        self._host.close()
        sweep(str(Path(self._settings.root).parent))

    # ------------------------------------------------------------------ other hosts

    def _serve(self) -> PieceServer | None:
        """Give out pieces over TCP, at the address by which Ray knows this node."""
        if not self._settings.secret:
            return None
        try:
            here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            server = PieceServer(here, self._settings.secret.encode(), self._read, TLS.from_environment())
        except OSError:
            log.warning("no address of this node can be listened at: its pieces go through Ray", exc_info=True)
            return None
        self._member = msgspec.structs.replace(self._member, address=server.address)
        return server

    def _reading(self) -> Session:
        """How this host reads what others are home to."""
        from modelstore.cluster.control.session import Session

        with self._lock:
            if self._session is None:
                self._session = Session()
            return self._session

    def _read(self, source: Source, parts: Sequence[Piece], fetch: bool) -> list[Bytes | None]:
        new = self._unheld(parts) if fetch else []
        found = self._host.read(source, parts, fetch=fetch)
        self._note(source, new)
        return found

    def _peers(self, source: Source, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """What other holders have of these, asked all at once."""
        asked = []
        where = addresses(self._view)
        for member, wanted in others(self._member.id, self._view, self._before, self._settings.replicas, parts).items():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                through_ray = functools.partial(self._take, member, source, wanted)
                asked.append((self._clients.ask(where.get(member, ""), source, wanted, False, through_ray), wanted))
        found: dict[bytes, Bytes] = {}
        for answer, wanted in asked:
            with contextlib.suppress(ray.exceptions.RayError, ModelStoreError, OSError, EOFError, TimeoutError):
                for part, data in zip(wanted, answer.result(timeout=_PEER_SECONDS), strict=False):
                    if data is not None:
                        found.setdefault(part.digest, np.asarray(data))
        return found

    def _take(self, member: str, source: Source, parts: Sequence[Piece]) -> Future[Any]:
        taken: Future[Any] = self._handle(member).take.remote(source, parts).future()
        return taken

    def _tell(self, member: str, method: str, *arguments: Any) -> Any:
        """What another host's `WriteBehind` answers."""
        return ray.get(self._handle(member).keep.remote(method, *arguments), timeout=_KEEP_SECONDS)

    def _handle(self, member: str) -> Any:
        if member not in self._handles:
            self._handles[member] = actor(host_name(member))
        return self._handles[member]

    def _unheld(self, parts: Sequence[Piece]) -> list[Piece]:
        held = self._host.has([part.digest for part in parts])
        return [part for part, there in zip(parts, held, strict=True) if not there]

    def _note(self, source: Source, new: Sequence[Piece]) -> None:
        """Remember where pieces come from, and let their other holders have copies."""
        if not new:
            return
        self._known.update((part.digest, (source, part)) for part in new)
        if self._settings.replicas > 1:
            sent = copies_to_send(self._member.id, View(0, ()), self._view, self._settings.replicas, new)
            for member, wanted in sent.items():
                self._copies.put((member, source, wanted))

    def _stats(self) -> HostStats:
        pending, queued = self._behind.stats(), self._copies.qsize()
        return msgspec.structs.replace(self._host.stats(), pending=pending, repaired=self._repaired, queued=queued)

    def _held(self) -> list[tuple[Source, list[Piece]]]:
        """What is held and known to come from a store, by store."""
        known = dict(self._known)
        found: dict[str, tuple[Source, list[Piece]]] = {}
        for (digest, (source, part)), there in zip(known.items(), self._host.has(list(known)), strict=True):
            if there:
                found.setdefault(source.url, (source, []))[1].append(part)
            else:
                self._known.pop(digest, None)
        return list(found.values())

    def _show(self) -> None:
        """Give out metrics, again and again."""
        while not self._closed.wait(_SHOWN):
            self._metrics.show(self._stats())

    def _look(self) -> None:
        """Look after copies, here and elsewhere, again and again."""
        while not self._closed.wait(PERIOD):
            self._mending.look()

    def _send_copies(self) -> None:
        """Have others pull what they are to hold, in batches, one after another."""
        while True:
            member, source, parts = self._copies.get()
            for batch in batches(parts, BATCH):
                with contextlib.suppress(ValueError, ray.exceptions.RayError, ModelStoreError):
                    self._call("copy", member, source, batch)

    def _call(self, method: str, member: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._handle(member), method).remote(*arguments), timeout=60)
