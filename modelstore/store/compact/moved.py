"""Finds the new places of the chunks of a manifest after a compaction, for readers that still use the manifest."""

from __future__ import annotations

from collections.abc import Iterator

from modelstore.errors import CorruptionError, FormatError, NotFoundError
from modelstore.format.objects.manifest import Manifest
from modelstore.storage.base import Storage
from modelstore.store.lookup import Lookup
from modelstore.store.manifests import Manifests


def moved(storage: Storage, model: str, manifest: Manifest) -> Manifest | None:
    """The manifest that live records of the model name now, or its base, of the same chunks row for row in other packs.

    None if there is none: then what is missing was not moved.
    """
    manifests = Manifests(storage)
    for other in _named(manifests, storage, model):
        if other.chunks.digest == manifest.chunks.digest and other.packs != manifest.packs:
            return other
    return None


def _named(manifests: Manifests, storage: Storage, model: str) -> Iterator[Manifest]:
    seen: set[tuple[str, str]] = set()
    for record in Lookup(storage).readable(model):
        todo = [(model, entry.manifest) for entry in record.variants.values()]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            try:
                found = manifests.read(*name)
            except (NotFoundError, CorruptionError, FormatError):
                continue
            yield found
            if found.base is not None:
                todo.append((found.base.model, found.base.manifest))
