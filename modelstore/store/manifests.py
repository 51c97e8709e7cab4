"""Manifests in a store: written with a copy among the packs, read through a small cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from modelstore.errors import CorruptionError, FormatError, NotFoundError
from modelstore.format.locks import Lock
from modelstore.format.objects import manifest as man
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VariantEntry, manifest_key
from modelstore.storage.base import Storage

if TYPE_CHECKING:
    from modelstore.store.shelf import Shelf

_CACHED_BYTES = 256 << 20


class Manifests:
    """Manifests of one store. Safe to use from many threads."""

    def __init__(self, storage: Storage, mirrors: tuple[Storage, ...] = ()) -> None:
        self._storages = (storage, *mirrors)
        self._cache: OrderedDict[str, tuple[Manifest, int]] = OrderedDict()
        self._lock = Lock()
        self._here = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifests, (self._storages[0], self._storages[1:])  # what is cached is read again

    @property
    def bytes_read(self) -> int:
        """Bytes of manifests that this thread has read so far, from wherever; of those in the cache there are none."""
        found: int = getattr(self._here, "bytes", 0)
        return found

    def write(self, model: str, manifest: Manifest, shelf: Shelf) -> tuple[str, str]:
        """Store a manifest, and a copy of it as a pack, from which a lost one is rebuilt: both digests."""

        from modelstore.store import packs

        digest, data = man.encode(manifest)
        copy = packs.copy_pack(model, digest, data)
        shelf.put(copy)
        self._storages[0].put(manifest_key(model, digest), [data], len(data))
        return digest, copy.digest

    def read(self, model: str, digest: str) -> Manifest:
        """A manifest by its digest, from the store or a mirror of it; each is checked before it is believed."""
        with self._lock:
            if digest in self._cache:
                self._cache.move_to_end(digest)
                return self._cache[digest][0]
        key = manifest_key(model, digest)
        problem: Exception | None = None
        for storage in self._storages:
            try:
                data = storage.get(key)
                self._here.bytes = self.bytes_read + len(data)
                manifest = man.decode(data, digest, key)
            except (NotFoundError, CorruptionError, FormatError) as error:
                problem = problem or error
                continue
            self._remember(digest, manifest, len(data))
            return manifest
        raise CorruptionError(
            f"the manifest {digest[:12]}… of model {model!r} is lost or damaged ({problem}): "
            f"run 'modelstore repair {model}' to rebuild it from its copy",
            model=model,
            object=key,
        ) from problem

    def entry(self, model: str, entry: VariantEntry) -> Manifest:
        """The manifest of a variant's entry."""
        return self.read(model, entry.manifest)

    def _remember(self, digest: str, manifest: Manifest, size: int) -> None:
        with self._lock:
            self._cache[digest] = manifest, 4 * size
            while len(self._cache) > 1 and sum(n for _, n in self._cache.values()) > _CACHED_BYTES:
                self._cache.popitem(last=False)
