"""A store as its parts pass it along: its storage, and the readers of its records and manifests."""

from __future__ import annotations

from dataclasses import dataclass

from modelstore.storage.base import Storage
from modelstore.store.catalog import Catalog
from modelstore.store.manifests import Manifests


@dataclass(frozen=True)
class Repo:
    """A store on a storage; `mirrors` are copies of it, read where the bytes of the first are wrong or gone."""

    storage: Storage
    mirrors: tuple[Storage, ...]
    catalog: Catalog
    manifests: Manifests

    @classmethod
    def on(cls, storage: Storage, mirrors: tuple[Storage, ...] = ()) -> Repo:
        """The store on a storage and its mirrors."""
        return cls(storage, mirrors, Catalog(storage), Manifests(storage, mirrors))
