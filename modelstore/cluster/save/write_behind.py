"""Saves that were acknowledged from memory: kept on two nodes until the storage has them. Knows no Ray.

Objects named by their content may be in the storage before anything refers to them, so each is stored as soon as it is whole;
the record, which alone makes the version visible, comes last. The first keeper stores; the second one does when it is gone.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec

import msgspec

from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.save.keeper import Keeper, Tell
from modelstore.cluster.save.orders import Order, PendingStats, keepers
from modelstore.cluster.save.pending import Kept, Parts, digest_of_kept, write_part
from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError
from modelstore.format.buffers import Buffer
from modelstore.plan.placement import View
from modelstore.storage.base import Storage
from modelstore.store.catalog import Catalog
from modelstore.store.damage import DAMAGED
from modelstore.store.relying import GoneError, release

log = logging.getLogger("modelstore")

P = ParamSpec("P")

_STORING = 4  # objects on their way to the storage at once
_AGAIN = 0.2, 5.0  # seconds until a failed write is tried again: at first, at most
_MENDABLE = (GoneError, *DAMAGED)  # the obstacle that keeps a save from being published until it is removed
_REMEMBERED = 1000  # saves whose version is still known after they are durable
_FORGOTTEN = 600.0  # seconds without a word after which a save that was not committed is dropped


@dataclass(slots=True)
class _Save:
    source: StoreAddress
    leads: bool
    other: str
    objects: dict[str, Kept] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    order: Order | None = None
    publishing: bool = False
    stuck: bool = False  # what it relies on is gone: later saves do not wait for it
    heard: float = field(default_factory=time.monotonic)


class WriteBehind:
    """One host's share of the saves that are under way. Safe to use from many threads."""

    def __init__(self, member: str, folder: str, limit: int, tell: Tell) -> None:
        self._member = member
        self._folder = Path(folder) / "pending"
        self._tell = tell
        self._saves: dict[str, _Save] = {}
        self._done: dict[str, int] = {}
        self._stats = PendingStats(limit=limit)
        self._count = 0
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(_STORING, thread_name_prefix="modelstore-behind")

    # ------------------------------------------------------------------ what a save asks

    def reserve(
        self, save: str, source: StoreAddress, keepers: Sequence[str], key: str, size: int, seconds: float
    ) -> bool:
        """Make room for an object; False if there is none within so many seconds: the storage takes less than comes in."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._stats.bytes + size <= self._stats.limit, timeout=seconds):
                return False
            found = self._saves.get(save)
            if found is None:
                other = next(keeper for keeper in keepers if keeper != self._member)
                found = self._saves[save] = _Save(source, keepers[0] == self._member, other)
            found.heard = time.monotonic()
            if key in found.objects:
                return True
            self._count += 1
            found.objects[key] = Kept(self._folder / f"{self._count}", size)
            self._stats.bytes += size
        return True

    def write(self, save: str, key: str, start: int, data: Buffer, digest: bytes | None = None) -> None:
        """Keep a part of an object; with its last one comes the digest of the whole. `CorruptionError` if it is another,
        `NotFoundError` for an object that no room was made for."""
        with self._changed:
            found = self._saves.get(save)
            there = found.objects.get(key) if found is not None else None
            if found is not None and key in found.stored:
                return  # the other keeper, which had it first, has stored it meanwhile
        if found is None or there is None:
            raise NotFoundError(
                f"host {self._member} knows nothing of object {key} of save {save}: save again", object=key
            )
        found.heard = time.monotonic()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        right = True
        with contextlib.suppress(FileNotFoundError):  # dropped between two steps
            write_part(there, start, data)
            right = digest is None or digest_of_kept(there) == digest
        with self._changed:
            if found.objects.get(key) is not there:
                there.path.unlink(missing_ok=True)
                return
            there.whole = digest is not None and right
        if not right:
            self.discard(save, key, stored=False)
            raise CorruptionError(f"object {key} came to host {self._member} with other bytes: save again", object=key)
        self._store_some(save)

    def commit(self, order: Order) -> None:
        """Take over a save whose objects are all kept: it will be published. `NotFoundError` if one is missing."""
        with self._changed:
            if order.save in self._done:
                return
            found = self._saves.get(order.save)
            if found is None:
                found = self._saves[order.save] = _Save(
                    order.source,
                    order.keepers[0] == self._member,
                    next(keeper for keeper in order.keepers if keeper != self._member),
                )
            if found.leads:
                missing = [key for key in order.keys if key not in found.stored and not _is_whole(found, key)]
                if missing:
                    raise NotFoundError(
                        f"host {self._member} does not have all of save {order.save} of model {order.model!r}: save again",
                        object=missing[0],
                    )
            found.order = order
        self._store_some(order.save)

    def abandon(self, save: str) -> None:
        """Forget a save that will not be committed; one that was, stays."""
        with self._changed:
            found = self._saves.get(save)
            if found is not None and found.order is None:
                self._remove(save)

    def stored(self, save: str) -> set[str]:
        """The objects of a save that its keepers have stored already, and keep no longer."""
        with self._changed:
            found = self._saves.get(save)
            return set(found.stored) if found is not None else set()

    def versions(self, saves: Sequence[str]) -> dict[str, int]:
        """The saves among these that were taken over here: the version that each became, 0 while it is not durable."""
        with self._changed:
            known = {save: 0 for save in saves if save in self._saves and self._saves[save].order is not None}
            return known | {save: self._done[save] for save in saves if save in self._done}

    # ------------------------------------------------------------------ what keepers tell each other

    def discard(self, save: str, key: str, stored: bool = True) -> None:
        """Let go of an object: the storage has it, or (not `stored`) it will not be kept."""
        with self._changed:
            found = self._saves.get(save)
            there = found.objects.pop(key, None) if found is not None else None
            if found is not None and there is not None:
                self._free(there)
                if stored:
                    found.stored.add(key)

    def finish(self, save: str, version: int) -> None:
        """A save is durable, as this version."""
        with self._changed:
            self._done[save] = version
            while len(self._done) > _REMEMBERED:
                self._done.pop(next(iter(self._done)))
            self._remove(save)
            waiting = [other for other, found in self._saves.items() if found.order is not None]
        for other in waiting:
            self._store_some(other)

    # ------------------------------------------------------------------ keeping on

    def see(self, now: View) -> None:
        """Take the place of a first keeper that is gone, and find another second one."""
        members = {member.id for member in now.members}
        with self._changed:
            for save, found in list(self._saves.items()):
                if found.order is None and time.monotonic() - found.heard > _FORGOTTEN:
                    self._remove(save)
            alone = [
                (save, found, found.order)
                for save, found in self._saves.items()
                if found.order is not None and found.other not in members
            ]
        for save, found, order in alone:
            found.leads = True
            self._store_some(save)
            names = [name for name in keepers(now, order.model, self._member) if name != self._member]
            if names:
                threading.Thread(target=self._copy, args=(save, order, names[0]), daemon=True).start()

    def flush(self, seconds: float) -> bool:
        """Wait until every acknowledged save that this host leads is durable; whether it is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(found.order and found.leads for found in self._saves.values()), timeout=seconds
            )

    def stats(self) -> PendingStats:
        """The content that is not in the storage yet. Saves are counted by the host that stores them."""
        with self._changed:
            saves = sum(1 for found in self._saves.values() if found.order and found.leads)
            return msgspec.structs.replace(self._stats, saves=saves, problem=self._stats.problem if saves else None)

    def close(self) -> None:
        """Stop, and remove what is kept here."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------ within

    def _store_some(self, save: str) -> None:
        """Begin to store what is whole, or publish where all of it is stored."""
        with self._changed:
            found = self._saves.get(save)
            if found is None or not found.leads:
                return
            ready = [(key, there) for key, there in found.objects.items() if there.whole and not there.storing]
            for _, there in ready:
                there.storing = True
            publish = (
                found.order is not None and not found.objects and not found.publishing and self._is_next(found.order)
            )
            found.publishing = found.publishing or publish
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            for key, there in ready:
                self._pool.submit(self._store, save, found, key, there)
            if publish and found.order is not None:
                self._pool.submit(self._publish, save, found, found.order)

    def _is_next(self, order: Order) -> bool:
        """Whether no earlier save of the same model waits here: versions come in the order in which saves were acknowledged."""
        mine = (order.source.url, order.model)
        waiting = (
            found.order for found in self._saves.values() if found.leads and found.order is not None and not found.stuck
        )
        return all(
            (other.began, other.save) >= (order.began, order.save)
            for other in waiting
            if (other.source.url, other.model) == mine
        )

    def _store(self, save: str, found: _Save, key: str, there: Kept) -> None:
        def put(storage: Storage) -> None:
            storage.put(key, Parts(there), there.size)

        if self._try(found.source, put, key):
            self.discard(save, key)
            self._say(found.other, Keeper.discard, save, key)
            self._store_some(save)

    def _publish(self, save: str, found: _Save, order: Order) -> None:
        def publish(storage: Storage) -> None:
            catalog = Catalog(storage)
            record = catalog.publish_version(order.model, order.save, order.entry, after=order.after, note=order.note)
            if order.tag is not None and catalog.tags(order.model, []).get(order.tag) != record.version:
                with contextlib.suppress(NotFoundError):  # the version was deleted since
                    catalog.set_tag(order.model, order.tag, record.version, order.save)
            versions.append(record.version)
            release(storage, order.save)

        versions: list[int] = []
        try:
            done = self._try(found.source, publish, "the record of a new version", order.model, _MENDABLE)
        except _MENDABLE as error:  # `repair` may put it right: it is tried again, and holds up nobody meanwhile
            self._set_aside(save, found, str(error))
            return
        if done:
            self.finish(save, versions[0])
            self._say(found.other, Keeper.finish, save, versions[0])

    def _try(
        self,
        source: StoreAddress,
        act: Callable[[Storage], None],
        what: str,
        model: str | None = None,
        raised: tuple[type[ModelStoreError], ...] = (),
    ) -> bool:
        """Do it until it is done, or this host is closed: whether it was done. A storage that fails is only late.

        Errors of the kinds `raised` are not tried again.
        """
        pause, longest = _AGAIN
        while not self._closed.is_set():
            try:
                act(_storage(source))
            except raised:
                raise
            except (ModelStoreError, OSError) as error:
                log.warning(
                    "could not store %s yet, and try again: %s", what, error, extra={"object": what, "model": model}
                )
                with self._changed:
                    self._stats.problem = str(error)
            else:
                with self._changed:
                    self._stats.problem = None
                return True
            self._closed.wait(pause)
            pause = min(2 * pause, longest)
        return False

    def _set_aside(self, save: str, found: _Save, problem: str) -> None:
        """Let later saves of the model pass one that cannot be published now, and try it again in a while."""
        log.warning("could not publish a save yet, and try again: %s", problem, extra={"save": save})
        with self._changed:
            self._stats.problem = problem
            found.stuck, found.publishing = True, False
            others = [other for other, one in self._saves.items() if one.order is not None and other != save]
        for other in others:
            self._store_some(other)
        again = threading.Timer(_AGAIN[1], self._store_some, [save])
        again.daemon = True
        if not self._closed.is_set():
            again.start()

    def _copy(self, save: str, order: Order, member: str) -> None:
        """Let another host keep what is not stored yet, too, in the place of one that is gone."""
        with self._changed:
            found = self._saves.get(save)
            if found is None:
                return
            found.other = member
            objects = dict(found.objects)
        pair = (self._member, member)
        try:
            for key, there in objects.items():
                if self._tell(member, Keeper.reserve, save, found.source, pair, key, there.size, 1.0):
                    with contextlib.suppress(FileNotFoundError):  # stored meanwhile
                        digest = digest_of_kept(there)
                        at = 0
                        for part in Parts(there):
                            last = at + len(part) == there.size
                            self._tell(member, Keeper.write, save, key, at, part, digest if last else None)
                            at += len(part)
                with self._changed:
                    gone = key not in found.objects
                if gone:
                    self._tell(member, Keeper.discard, save, key)
            self._tell(member, Keeper.commit, msgspec.structs.replace(order, keepers=pair))
        except Exception:  # the host that was asked is gone, too: the next view says so
            log.warning(
                "could not copy a save to another host", exc_info=True, extra={"model": order.model, "peer": member}
            )
        with self._changed:
            version = self._done.get(save)
        if version is not None:
            self._say(member, Keeper.finish, save, version)

    def _say(
        self, member: str, method: Callable[Concatenate[Keeper, P], None], *arguments: P.args, **named: P.kwargs
    ) -> None:
        """Tell the other keeper, who may be gone."""
        with contextlib.suppress(Exception):
            self._tell(member, method, *arguments, **named)

    def _remove(self, save: str) -> None:
        found = self._saves.pop(save, None)
        for there in found.objects.values() if found is not None else ():
            self._free(there)
        self._changed.notify_all()

    def _free(self, there: Kept) -> None:
        there.path.unlink(missing_ok=True)
        self._stats.bytes -= there.size
        self._changed.notify_all()


def _is_whole(found: _Save, key: str) -> bool:
    there = found.objects.get(key)
    return there is not None and there.whole


def _storage(source: StoreAddress) -> Storage:
    from modelstore.cluster.read.models import repo_of

    return repo_of(source).storage
