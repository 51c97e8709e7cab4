"""A node's host: pieces in tiers, nearest first; what none has comes from other hosts, at last from the storage. Knows no Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError as FuturesCancelledError
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from modelstore.cluster.host.device_tier import DeviceTier
from modelstore.cluster.host.file_tier import FileTier, TierStats, local_path
from modelstore.cluster.host.origin import Origin, runs
from modelstore.cluster.host.singleflight import Flight, SingleFlight
from modelstore.cluster.node.folders import claim, sweep
from modelstore.cluster.pieces import Piece, StoreAddress, batches
from modelstore.cluster.save.orders import PendingStats
from modelstore.errors import ConflictError, CorruptionError, StorageError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.digest import matches

__all__ = ["FromPeers", "HostSettings", "HostStats", "ShardHost", "TierStats", "local_path", "sweep"]

log = logging.getLogger("modelstore")

FromPeers = Callable[[StoreAddress, Sequence[Piece]], Mapping[bytes, Bytes]]  # what other holders have of these
Tier = str  # "memory", "disk" or "gpu"

_BATCH = 64 << 20  # bytes that `hold` asks peers for at once
_WAIT = 60.0  # seconds that a thread waits for others that fetch the same pieces, before it fetches them itself


class HostSettings(msgspec.Struct, frozen=True):
    """The places of a host's content. Sizes are bytes at most; `folder` is in shared memory and is this host's own."""

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
    """A host's content, by tier, and its counters: bytes fetched from the storage and from peers, wrong copies, pieces under
    way.

    Among the pieces that readers `asked` for, `hits` were held. `repaired`: bytes taken in as copies that others lacked;
    `queued`: batches of copies to be sent to others. `pending`: saves that are not in the storage yet.
    """

    tiers: dict[str, TierStats]
    from_storage: int = 0
    from_peers: int = 0
    requests: int = 0
    wrong: int = 0
    in_flight: int = 0
    asked: int = 0
    hits: int = 0
    repaired: int = 0
    queued: int = 0
    pending: PendingStats | None = None


class ShardHost:
    """Holds pieces and hands them out, checked when they came in. Safe to use from many threads.

    Working memory is bounded by the settings' threads, each with one request of `origin.RUN` bytes, beside what is handed out.
    """

    def __init__(self, settings: HostSettings, peers: FromPeers | None = None) -> None:
        """`ConflictError` if another process has the folder, `StorageError` if one cannot be used.

        A folder on disk that another host uses is left to it: this one then keeps nothing on disk.
        """
        self._settings = settings
        self._peers = peers
        sweep(str(Path(settings.folder).parent.parent))
        self._claims = [claim(settings.folder)]
        self._memory = FileTier(settings.folder, settings.memory, trusted=True)
        self._disk = self._open_disk(settings)
        self._device = DeviceTier(settings.device, settings.device_bytes) if settings.device else None
        self._flights = SingleFlight()
        self._origin = Origin()
        self._lock = threading.Lock()
        self._stats = HostStats({})
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="modelstore-host")

    # ------------------------------------------------------------------ reading

    def read(self, source: StoreAddress, parts: Sequence[Piece], *, fetch: bool = True) -> list[Bytes | None]:
        """The pieces' bytes, in order: maps of those in memory. None if a piece is not held and `fetch` is off; else it is
        fetched, and held from then on where there is room. Readers check bytes from memory, and call `drop`.

        `StorageError`, `NotFoundError` or `CorruptionError` if the storage cannot give one. Pieces that together are
        longer than the memory tier pass through without being held there.
        """
        found = [self._held(part) for part in parts]
        missing = [part for part, data in zip(parts, found, strict=True) if data is None]
        if fetch:  # a caller that only looks asks for nothing
            with self._lock:
                self._stats.asked += len(parts)
                self._stats.hits += len(parts) - len(missing)
        if not missing or not fetch:
            return found
        fits = sum(self._memory.cost(part.length) for part in missing) <= self._settings.memory
        fetched = self._fetch(source, missing, "memory" if fits else None)
        return [fetched[part.digest] if data is None else data for part, data in zip(parts, found, strict=True)]

    def hold(
        self, source: StoreAddress, parts: Sequence[Piece], *, tier: Tier = "memory", pin: str | None = None
    ) -> int:
        """Get pieces into a tier; bytes of them that it holds then. The pieces that exceed the tier, from the front, are not
        fetched.

        Errors as for `read`; `ValueError` if the host does not have such a tier. With `pin` they stay until `unpin`.
        """
        target = self._tier(tier)
        wanted = list({part.digest: part for part in parts}.values())
        if pin is not None:
            for each in self._tiers().values():  # the copies in other tiers, too
                each.pin([part.digest for part in wanted], pin)
        for batch in batches(_first(wanted, target), _BATCH):
            missing = [part for part in batch if not target.has(part.digest)]
            if missing:
                self._fetch(source, missing, tier)
        return sum(part.length for part in wanted if target.has(part.digest))

    def has(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each piece is held in any tier."""
        return [any(tier.has(digest) for tier in self._tiers().values()) for digest in digests]

    def lacks(self, parts: Sequence[Piece]) -> list[bytes]:
        """Which of these neither the device nor the tier that keeps things longest holds: as many as the latter has room for
        beside what it holds."""
        tier = self._disk or self._memory
        now = tier.stats()
        room, found = now.limit - now.bytes, []
        for part in parts:
            if tier.has(part.digest) or (self._device is not None and self._device.has(part.digest)):
                continue
            room -= tier.cost(part.length)
            if room < 0:
                break
            found.append(part.digest)
        return found

    def fill(self, source: StoreAddress, parts: Sequence[Piece]) -> int:
        """Get pieces into the tier that keeps things longest; bytes of them that are held then."""
        return self.hold(source, parts, tier="memory" if self._disk is None else "disk")

    # ------------------------------------------------------------------ keeping

    def unpin(self, pin: str) -> None:
        """Let what only this pin keeps be evicted."""
        for tier in self._tiers().values():
            tier.unpin(pin)

    def evict(self, digests: Collection[bytes] | None = None) -> int:
        """Let pieces go, or everything, except what is pinned; bytes freed."""
        return sum(tier.evict(digests) for tier in self._tiers().values())

    def drop(self, digest: bytes) -> None:
        """Check a piece that a reader found wrong, in every tier; what is wrong is removed."""
        for tier in self._tiers().values():
            tier.check(digest)

    def scrub(self, limit_bytes: int) -> list[bytes]:
        """Check some of what is held in memory and on disk, going on where the last call ended; wrong pieces are removed, and
        returned. Counts as no use of them."""
        share = limit_bytes // 2 if self._disk is not None else limit_bytes
        wrong, checked = self._memory.scrub(share)
        if self._disk is not None:
            wrong += self._disk.scrub(max(share, limit_bytes - checked))[0]
        return list(dict.fromkeys(wrong))

    def stats(self) -> HostStats:
        """The current content, and the counters."""
        tiers = {name: tier.stats() for name, tier in self._tiers().items()}
        with self._lock:
            wrong = self._stats.wrong + sum(tier.wrong for tier in tiers.values())
            return msgspec.structs.replace(self._stats, tiers=tiers, wrong=wrong, in_flight=len(self._flights))

    def close(self, *, keep_disk: bool = True) -> None:
        """Stop, and remove the files in shared memory; the disk keeps its own, unless asked otherwise."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._memory.close(keep=False)
        if self._disk is not None:
            self._disk.close(keep=keep_disk)
        while self._claims:
            os.close(self._claims.pop())

    # ------------------------------------------------------------------ within

    def _open_disk(self, settings: HostSettings) -> FileTier | None:
        if not settings.disk:
            return None
        try:
            self._claims.append(claim(settings.disk))
        except ConflictError as error:
            log.warning("host %s keeps nothing on disk: %s", settings.id, error)
            return None
        return FileTier(settings.disk, settings.disk_bytes, trusted=False)

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
            raise ValueError(
                f"host {self._settings.id} has no tier {name!r}, only {', '.join(tiers)}: start the cluster with room for it"
            )
        return tiers[name]

    def _held(self, part: Piece) -> Bytes | None:
        """A piece from the nearest tier; one found on disk moves up into memory."""
        for tier in (self._memory, self._device, self._disk):
            data = tier.get(part.digest) if tier is not None else None
            if data is None or tier is None:
                continue
            if len(data) != part.length:  # cut short behind our back, or the caller is wrong
                tier.check(part.digest)
                continue
            if tier is self._disk:
                self._memory.put(part.digest, data)
            return data
        return None

    def _fetch(self, source: StoreAddress, parts: Sequence[Piece], tier: Tier | None) -> dict[bytes, Bytes]:
        """Bytes of pieces, checked; each is fetched once, however many threads ask for it now, and held in the tier."""
        found: dict[bytes, Bytes] = {}
        left = {part.digest: part for part in parts}
        while left:
            mine, theirs = self._flights.claim(left)
            if mine:
                found.update(self._lead(source, [left[digest] for digest in mine], mine, tier))
            end = time.monotonic() + _WAIT
            for digest, flight in theirs.items():
                data = None
                with contextlib.suppress(TimeoutError):
                    data = flight.result(timeout=max(0.0, end - time.monotonic()))
                if data is None:  # it failed, or took too long: this thread tries itself
                    self._flights.abandon(digest, flight)
                elif len(data) == left[digest].length:
                    found[digest] = data
                    self._keep(digest, data, tier)
            left = {digest: part for digest, part in left.items() if digest not in found}
        return found

    def _lead(
        self, source: StoreAddress, parts: Sequence[Piece], mine: Mapping[bytes, Flight], tier: Tier | None
    ) -> dict[bytes, Bytes]:
        """Fetch for this thread and for those that wait for it. The pieces that could be fetched are held, even if the rest
        fails.
        """
        found: dict[bytes, Bytes] = {}
        try:
            found |= self._from_tiers(parts, tier)
            found |= self._from_peers(source, [part for part in parts if part.digest not in found], tier)
            for digest, data in found.items():
                self._flights.land(digest, mine[digest], data)
            rest = [part for part in parts if part.digest not in found]
            work = [self._begin(source, run, mine, tier) for run in runs(rest, self._settings.threads)]
            # Pieces that one of them brings are held, even if another fails. (`wait` would not see those that `close` cancels.)
            problems = [error for error in (_problem(future) for future in work) if error is not None]
            if problems:
                raise self._is_closed() if isinstance(problems[0], FuturesCancelledError) else problems[0]
            for future in work:
                found |= future.result()
        finally:
            for digest, flight in mine.items():
                self._flights.land(digest, flight, None)
        return found

    def _begin(
        self, source: StoreAddress, run: Sequence[Piece], mine: Mapping[bytes, Flight], tier: Tier | None
    ) -> Future[dict[bytes, Bytes]]:
        try:
            return self._pool.submit(self._from_storage, source, run, mine, tier)
        except RuntimeError:
            raise self._is_closed() from None

    def _is_closed(self) -> StorageError:
        return StorageError(f"host {self._settings.id} is closed: ask another one")

    def _keep(self, digest: bytes, data: Bytes, tier: Tier | None) -> Bytes:
        """Hold checked bytes in the tier that was asked for, and on disk; a map of them where there is one."""
        if tier is not None:
            self._tier(tier).put(digest, data)
        if tier != "disk" and self._disk is not None:
            self._disk.put(digest, data)
        kept = self._memory.kept(digest)
        return data if kept is None else kept

    def _from_tiers(self, parts: Sequence[Piece], tier: Tier | None) -> dict[bytes, Bytes]:
        """The pieces that came in since they were looked for, or are held in another tier than their target."""
        found = {}
        for part in parts:
            data = self._held(part)
            if data is None:
                continue
            if tier not in (None, "memory") and not self._tier(str(tier)).has(part.digest):
                if not matches(data, part.digest):  # nothing wrong enters another tier
                    self.drop(part.digest)
                    continue
                self._tier(str(tier)).put(part.digest, data)
            found[part.digest] = data
        return found

    def _from_peers(self, source: StoreAddress, parts: Sequence[Piece], tier: Tier | None) -> dict[bytes, Bytes]:
        """The pieces of other holders; a peer that fails, or sends something wrong, counts as one that has nothing."""
        if self._peers is None or not parts:
            return {}
        try:
            given = self._peers(source, parts)
        except Exception:  # whatever the shell's transport raises: the storage has everything
            log.warning("host %s could not ask its peers; it reads the storage", self._settings.id, exc_info=True)
            return {}
        wanted = {part.digest: part.length for part in parts}
        good = {}
        for digest, sent in given.items():
            data = as_bytes(sent)
            right = len(data) == wanted.get(digest) and matches(data, digest)
            with self._lock:
                self._stats.from_peers += len(data) if right else 0
                self._stats.wrong += not right
            if right:
                good[digest] = self._keep(digest, data, tier)
            else:
                log.warning("a peer sent a chunk with other bytes; it is not used", extra={"chunk": digest.hex()})
        return good

    def _from_storage(
        self, source: StoreAddress, run: Sequence[Piece], mine: Mapping[bytes, Flight], tier: Tier | None
    ) -> dict[bytes, Bytes]:
        """One request, in a thread of the pool: its right pieces are held and handed on, then a wrong one is an error."""
        fetched = self._origin.read(source, run)
        with self._lock:
            self._stats.from_storage += fetched.nbytes
            self._stats.requests += 1
            self._stats.wrong += len(fetched.wrong)
        found = {}
        for digest, data in fetched.found.items():
            found[digest] = self._keep(digest, data, tier)
            self._flights.land(digest, mine[digest], found[digest])
        for part in fetched.wrong:
            raise CorruptionError(
                f"bytes {part.offset} to {part.offset + part.length} of {part.key} in {source.url} do not match their "
                f"digest: run 'modelstore verify', and 'repair' with another copy of the store",
                object=part.key,
            )
        return found


def _problem(future: Future[dict[bytes, Bytes]]) -> BaseException | None:
    """How a future failed, once it has ended."""
    try:
        return future.exception()
    except FuturesCancelledError as error:
        return error


def _first(parts: Sequence[Piece], tier: FileTier | DeviceTier) -> list[Piece]:
    """As many of the pieces, from the front, as the tier can hold together. Pure."""
    chosen, room = [], tier.stats().limit
    for part in parts:
        room -= tier.cost(part.length)
        if room < 0:
            break
        chosen.append(part)
    return chosen
