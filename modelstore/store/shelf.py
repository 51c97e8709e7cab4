"""The content that is already in the store, and whether a save may rely on it: it is there, whole, and matches its name.

A pack is read and digested once in a process, before the first chunk in it is referred to; as long as the storage says that it
is the same object, that counts. All contents of a bad pack are stored again. A save of the same content makes the same pack
again, so that the bad one is replaced, for older versions and other models too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future

from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, StorageError
from modelstore.format.locks import Lock
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.objects.record import pack_key
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.pool import Pool
from modelstore.store.clock import REFRESH, now
from modelstore.store.mend.heal import checked_pieces
from modelstore.store.mend.remake import contents, remake
from modelstore.store.packs import Pack

log = logging.getLogger("modelstore")

_REMEMBERED = 100_000
_LOCAL_THREADS, _REMOTE_THREADS = 2, 4

_good: OrderedDict[tuple[str, str], ObjectInfo] = OrderedDict()  # (store, key) → the object that was found good
_lock = Lock()


class Shelf:
    """The content that one save may rely on. Safe to use from many threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._since: float | None = None
        self._threads = _LOCAL_THREADS if storage.local else _REMOTE_THREADS
        self._pool: Pool | None = None
        self._looks: dict[str, Future[bool]] = {}
        self._order: dict[str, int] = {}
        self._expected: list[str] = []
        self._stored: set[str] = set()
        self._lock = Lock()

    def young(self, modified: float) -> bool:
        """Whether what was written then (by the storage's clock, which is asked once) is younger than twelve hours.

        Garbage collection of the usual grace leaves it alone. That saves work and no more: what a save relies on is proved
        when it is published, whatever the clocks say.
        """
        if self._since is None:
            self._since = now(self._storage) - REFRESH
        return modified >= self._since

    def expect(self, packs: Iterable[str]) -> None:
        """In which order packs will be asked for: those to come are looked at ahead."""
        with self._lock:
            for pack in dict.fromkeys(packs):
                if pack not in self._order:
                    self._order[pack] = len(self._expected)
                    self._expected.append(pack)

    def good(self, pack: str) -> bool:
        """Whether a pack is there and its bytes are what its name says."""
        with self._lock:
            at = self._order.get(pack)
            ahead = [] if at is None else self._expected[at + 1 : at + 1 + self._threads]
            looks = [self._look(one) for one in (pack, *ahead)]
        try:
            return looks[0].result()
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Look at nothing more."""
        if self._pool is not None:
            self._pool.give_up()

    def require(self, model: str, packs: Iterable[str]) -> None:
        """`CorruptionError` unless packs are good whose content cannot be had from elsewhere."""
        self.expect(wanted := list(packs))
        for pack in wanted:
            if not self.good(pack):
                key = pack_key(pack)
                raise CorruptionError(
                    f"object {key}, which this is to share with what model {model!r} has stored, is missing or damaged: "
                    f"nothing was published; run 'modelstore repair {model}', or save the model again",
                    model=model,
                    object=key,
                )

    def put(self, pack: Pack) -> bool:
        """Store a pack unless a good one is there; whether there was none.

        One that is old is written again, so that garbage collection leaves it alone.
        """
        key = pack_key(pack.digest)
        there = self._storage.info(key)
        good = there is not None and there.size == pack.size and is_good(self._storage, pack.digest)
        if there is None or not good or not self.young(there.modified):
            self._storage.put(key, pack.pieces, pack.size)
            self._stored.add(pack.digest)
        return not good

    def heal(self, manifests: Sequence[Manifest], known: Mapping[bytes, Location]) -> None:
        """Make bad packs again, of chunks that are right: `known` has the places of those that were stored again.

        A pack that cannot be made again is left as it is; nothing new refers to it, so no save fails because of it.
        """
        bad = [
            pack
            for pack, look in self._looks.items()
            if pack not in self._stored and look.done() and not look.exception() and not look.result()
        ]
        if not bad:
            return
        inside = contents(bad, manifests)
        for pack, parts in inside.items():
            places = {part.digest: [known[part.digest]] for part in parts if part.digest in known}
            try:
                if remake(self._storage, pack, parts, places):
                    log.warning("object %s of %s was made again: it is whole", pack_key(pack), self._storage.url)
            except ModelStoreError as error:
                log.warning("object %s of %s could not be made again: %s", pack_key(pack), self._storage.url, error)
                if isinstance(error, StorageError):
                    return  # the next ones would fail of the same

    def _look(self, pack: str) -> Future[bool]:
        if pack not in self._looks:
            if self._pool is None:
                self._pool = Pool(self._threads, thread_name_prefix="modelstore-look")
            self._looks[pack] = self._pool.submit(is_good, self._storage, pack)
        return self._looks[pack]


def is_good(storage: Storage, digest: str) -> bool:
    """Whether a pack is there and its bytes are what its name says; read once while it is the same object."""
    key = pack_key(digest)
    info = storage.info(key)
    if info is None:
        log.warning("object %s of %s is missing: what it held is stored anew", key, storage.url)
        return False
    with _lock:
        if _good.get((storage.url, key)) == info:
            return True
    try:
        for _ in checked_pieces(storage, digest, info.size):
            pass
    except (NotFoundError, CorruptionError) as error:
        log.warning("object %s of %s is damaged (%s): what it held is stored anew", key, storage.url, error)
        return False
    with _lock:
        _good[storage.url, key] = info
        while len(_good) > _REMEMBERED:
            _good.popitem(last=False)
    return True
