"""Models opened for reading through a cluster, by what names them exactly: the store, the model, the manifest's digest."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.read.reader import ClusterFetching, Holding
from modelstore.execute.read.fetcher import Fetcher
from modelstore.execute.read.loading import Variant
from modelstore.format.objects.decoding import prepared
from modelstore.store.repo import Repo


def opened(holding: Holding | None, source: StoreAddress, name: str, digest: str) -> Variant:
    """The model of a manifest, whose chunks come through `holding`, or from the storage itself without one.

    Storages and manifests are kept for the next time.
    """
    repo = repo_of(source)
    manifest = repo.manifests.read(name, digest)
    fetching = Fetcher if holding is None else ClusterFetching(holding, source)
    return Variant(repo, name, manifest, fetching=fetching)


def repo_of(source: StoreAddress) -> Repo:
    """A store, opened once in this process."""
    return _store(msgspec.json.encode(source))


@lru_cache(maxsize=16)
def _store(source: bytes) -> Repo:
    return Repo.on(msgspec.json.decode(source, type=prepared(StoreAddress)).open())
