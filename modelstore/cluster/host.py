"""A node's host: pieces in tiers, nearest first; what none has comes from other hosts, at last from the storage. Knows no Ray."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from modelstore.cluster.device_tier import DeviceTier
from modelstore.cluster.file_tier import FileTier, TierStats, claim, local_path, sweep
from modelstore.cluster.pieces import Piece, Source
from modelstore.errors import CorruptionError
from modelstore.format.buffers import Bytes, view
from modelstore.plan.read import GAP
from modelstore.storage.base import Storage

__all__ = ["HostSettings", "HostStats", "Peers", "ShardHost", "TierStats", "local_path", "sweep"]

Peers = Callable[[Source, Sequence[Piece]], Mapping[bytes, Bytes]]  # what other holders have of these
Tier = str  # "memory", "disk" or "gpu"

_RUN = 32 << 20  # bytes that one request asks the storage for, at most
_BATCH = 64 << 20  # bytes that `hold` has in heap at once
_WAIT = 60.0  # seconds that a thread waits for another that fetches the same piece, before it fetches it itself


class HostSettings(msgspec.Struct, frozen=True):
    """Where a host keeps what. Sizes are bytes at most; `folder` lies in shared memory and is this host's own."""

    id: str
    node: str
    folder: str
    memory: int
    disk: str | None = None
    disk_bytes: int = 0
    device: str | None = None
    device_bytes: int = 0
    threads: int = 8


class HostStats(msgspec.Struct):
    """What a host holds, by tier, and did: bytes fetched from the storage and from peers, wrong pieces, work in flight."""

    tiers: dict[str, TierStats]
    from_storage: int = 0
    from_peers: int = 0
    requests: int = 0
    wrong: int = 0
    in_flight: int = 0


class ShardHost:
    """Holds pieces and hands them out, checked when they came in. Safe to use from many threads."""

    def __init__(self, settings: HostSettings, peers: Peers | None = None) -> None:
        self._settings = settings
        self._peers = peers
        sweep(str(Path(settings.folder).parent.parent))
        self._claim_fd = claim(settings.folder)
        self._memory = FileTier(settings.folder, settings.memory, trusted=True)
        self._disk = FileTier(settings.disk, settings.disk_bytes, trusted=False) if settings.disk else None
        self._device = DeviceTier(settings.device, settings.device_bytes) if settings.device else None
        self._fetching: dict[bytes, Future[Bytes]] = {}
        self._storages: dict[bytes, Storage] = {}
        self._lock = threading.Lock()
        self._stats = HostStats({})
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="modelstore-host")
        self._scrubbed = 0

    # ------------------------------------------------------------------ reading

    def read(self, source: Source, parts: Sequence[Piece], *, fetch: bool = True) -> list[Bytes | None]:
        """The pieces' bytes, in order: maps of what lies in memory or on disk. None where a piece is not held and `fetch`
        is off; else it is fetched, and held from then on where there is room.

        `StorageError`, `NotFoundError` or `CorruptionError` where the storage cannot give one.
        """
        found = [self._held(part) for part in parts]
        missing = [part for part, data in zip(parts, found, strict=True) if data is None]
        if not missing or not fetch:
            return found
        fetched = self._fetch(source, missing, "memory")
        return [fetched[part.digest] if data is None else data for part, data in zip(parts, found, strict=True)]

    def hold(self, source: Source, parts: Sequence[Piece], *, tier: Tier = "memory", pin: str | None = None) -> int:
        """Get pieces into a tier; bytes of them that it holds then. Errors as for `read`.

        `ValueError` where the host has no such tier. With `pin` they stay until `unpin`.
        """
        target = self._tier(tier)
        if pin is not None:
            for each in self._tiers().values():  # the copies in other tiers, too
                each.pin([part.digest for part in parts], pin)
        for batch in _batches(parts, _BATCH):
            missing = [part for part in batch if not target.has(part.digest)]
            for part in missing if tier != "memory" else ():
                data = self._held(part)
                if data is not None:
                    target.put(part.digest, data)
            missing = [part for part in missing if not target.has(part.digest)]
            if missing:
                self._fetch(source, missing, tier)
        return sum(part.length for part in parts if target.has(part.digest))

    def put(self, data: Mapping[bytes, Bytes], *, pin: str | None = None) -> None:
        """Hold pieces that are given. `CorruptionError` where bytes are not what their digest says: none of them is held."""
        for digest, content in data.items():
            if blake3(view(content)).digest() != digest:
                raise CorruptionError(f"piece {digest.hex()} was sent with other bytes: send it again")
        if pin is not None:
            self._memory.pin(data, pin)
        for digest, content in data.items():
            if not self._memory.put(digest, content) and self._disk is not None:
                self._disk.put(digest, content)

    def has(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each piece is held in any tier."""
        return [any(tier.has(digest) for tier in self._tiers().values()) for digest in digests]

    # ------------------------------------------------------------------ keeping

    def unpin(self, pin: str) -> None:
        """Let what only this pin keeps be evicted."""
        for tier in self._tiers().values():
            tier.unpin(pin)

    def evict(self, digests: Sequence[bytes] | None = None) -> int:
        """Let pieces go, or everything, except what is pinned; bytes freed."""
        freed = 0
        for tier in self._tiers().values():
            free = tier.unpinned()
            freed += tier.remove(free if digests is None else set(free).intersection(digests))
        return freed

    def drop(self, digest: bytes) -> None:
        """Check a piece that a reader found wrong, in every tier that checks can reach; what is wrong is removed."""
        tiers = [tier for tier in (self._memory, self._disk) if tier is not None]
        good = [tier.check(digest) for tier in tiers]  # every tier, whatever the first one has
        if not all(good):
            self._stats.wrong += 1
        if self._device is not None:
            self._device.remove([digest])

    def scrub(self, limit_bytes: int) -> list[bytes]:
        """Check some of what is held, going on where the last call ended; wrong pieces are removed, and returned."""
        wrong, checked = [], 0
        for tier in (self._memory, self._disk):
            digests = tier.digests() if tier is not None else []
            for at in range(len(digests)):
                if checked >= limit_bytes or tier is None:
                    break
                digest = digests[(self._scrubbed + at) % len(digests)]
                data = tier.get(digest)
                checked += 0 if data is None else len(data)
                if not tier.check(digest):
                    wrong.append(digest)
        self._scrubbed += 1 + checked // (4 << 20)
        self._stats.wrong += len(wrong)
        return wrong

    def stats(self) -> HostStats:
        """What is held now, and what was done so far."""
        tiers = {name: tier.stats() for name, tier in self._tiers().items()}
        return msgspec.structs.replace(self._stats, tiers=tiers, in_flight=len(self._fetching))

    def close(self, *, keep_disk: bool = True) -> None:
        """Stop, and remove what lies in shared memory; the disk keeps its own, unless told otherwise."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._memory.close(keep=False)
        os.close(self._claim_fd)
        if self._disk is not None:
            self._disk.close(keep=keep_disk)

    # ------------------------------------------------------------------ within

    def _tiers(self) -> dict[Tier, FileTier | DeviceTier]:
        found: dict[Tier, FileTier | DeviceTier | None] = {
            "memory": self._memory,
            "disk": self._disk,
            "gpu": self._device,
        }
        return {name: tier for name, tier in found.items() if tier is not None}

    def _tier(self, name: Tier) -> FileTier | DeviceTier:
        tiers = self._tiers()
        if name not in tiers:
            raise ValueError(f"host {self._settings.id} has no tier {name!r}: it has {', '.join(tiers)}")
        return tiers[name]

    def _held(self, part: Piece) -> Bytes | None:
        """A piece from the nearest tier; one found on disk moves up into memory."""
        data = self._memory.get(part.digest)
        if data is None and self._device is not None:
            data = self._device.get(part.digest)
        if data is None and self._disk is not None:
            data = self._disk.get(part.digest)
            if data is not None:
                self._memory.put(part.digest, data)
        return data if data is not None and len(data) == part.length else None

    def _fetch(self, source: Source, parts: Sequence[Piece], tier: Tier) -> dict[bytes, Bytes]:
        """Bytes of pieces that are not held, checked; each is fetched once, however many threads ask for it now."""
        found: dict[bytes, Bytes] = {}
        left = {part.digest: part for part in parts}
        while left:
            mine, waiting = self._claim(left.values())
            if mine:
                found.update(self._lead(source, mine, tier))
            for part, future in waiting:
                with contextlib.suppress(Exception):  # the other failed, or took too long: this thread tries itself
                    found[part.digest] = future.result(timeout=_WAIT)
                if part.digest not in found:
                    with self._lock:
                        if self._fetching.get(part.digest) is future:
                            del self._fetching[part.digest]
            left = {digest: part for digest, part in left.items() if digest not in found}
        return found

    def _claim(self, parts: Iterable[Piece]) -> tuple[list[Piece], list[tuple[Piece, Future[Bytes]]]]:
        """Those that this thread is to fetch, and those that others fetch already."""
        mine, waiting = [], []
        with self._lock:
            for part in parts:
                future = self._fetching.get(part.digest)
                if future is None:
                    self._fetching[part.digest] = Future()
                    mine.append(part)
                else:
                    waiting.append((part, future))
        return mine, waiting

    def _lead(self, source: Source, parts: Sequence[Piece], tier: Tier) -> dict[bytes, Bytes]:
        """Fetch for this thread and for those that wait for it."""
        found: dict[bytes, Bytes] = {}
        problem: BaseException | None = None
        try:
            given = self._from_peers(source, parts)
            runs = list(_runs([part for part in parts if part.digest not in given]))
            read = self._pool.map(lambda run: self._from_storage(source, run), runs)
            for digest, data in (*given.items(), *(pair for pairs in read for pair in pairs.items())):
                found[digest] = data
                self._keep(digest, data, tier)
        except BaseException as error:
            problem = error
            raise
        finally:
            with self._lock:
                futures = {part.digest: self._fetching.pop(part.digest, None) for part in parts}
            for digest, future in futures.items():
                if future is None or future.done():
                    continue
                if digest in found:
                    future.set_result(found[digest])
                else:
                    future.set_exception(problem or RuntimeError("not fetched"))
        return found

    def _keep(self, digest: bytes, data: Bytes, tier: Tier) -> None:
        """Hold a piece in the tier that was asked for; what is fetched for memory goes to disk, too."""
        self._tier(tier).put(digest, data)
        if tier != "disk" and self._disk is not None:
            self._disk.put(digest, data)

    def _from_peers(self, source: Source, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        if self._peers is None:
            return {}
        wanted = {part.digest: part.length for part in parts}
        good = {}
        for digest, data in self._peers(source, parts).items():
            if len(data) == wanted.get(digest) and blake3(view(data)).digest() == digest:
                good[digest] = data
                self._stats.from_peers += len(data)
            else:
                self._stats.wrong += 1
        return good

    def _from_storage(self, source: Source, run: Sequence[Piece]) -> dict[bytes, Bytes]:
        """Neighbouring pieces of one pack in one request, checked."""
        start, stop = run[0].offset, max(part.offset + part.length for part in run)
        buffer = np.empty(stop - start, np.uint8)
        self._storage(source).read(run[0].key, start, view(buffer))
        self._stats.from_storage += stop - start
        self._stats.requests += 1
        found = {}
        for part in run:
            data = buffer[part.offset - start : part.offset - start + part.length]
            if blake3(view(data)).digest() != part.digest:
                self._stats.wrong += 1
                raise CorruptionError(
                    f"bytes {part.offset} to {part.offset + part.length} of {part.key} in {source.url} do not match their "
                    f"digest: run 'modelstore verify', and 'repair' with another copy of the store",
                    object=part.key,
                )
            found[part.digest] = data
        return found

    def _storage(self, source: Source) -> Storage:
        key = msgspec.json.encode(source)
        with self._lock:
            if key not in self._storages:
                self._storages[key] = source.open()
            return self._storages[key]


def _runs(parts: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that lie near each other in one pack, to be fetched together."""
    run: list[Piece] = []
    for part in sorted(parts, key=lambda p: (p.pack, p.offset)):
        near = run and part.pack == run[0].pack and part.offset - (run[-1].offset + run[-1].length) <= GAP
        if run and not (near and part.offset + part.length - run[0].offset <= _RUN):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _batches(parts: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in batches of about `size` bytes."""
    batch: list[Piece] = []
    nbytes = 0
    for part in parts:
        batch.append(part)
        nbytes += part.length
        if nbytes >= size:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
