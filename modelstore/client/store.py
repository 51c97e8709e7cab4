"""The store as a user sees it: names, saving, keeping; and the way to its models and its cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.client.arguments import checked
from modelstore.client.checkpoints import Checkpoints
from modelstore.client.copying import Copying
from modelstore.client.following import Following
from modelstore.client.forwards import OfModels
from modelstore.client.joined import OfCluster
from modelstore.client.keeping import Keeping
from modelstore.client.looking import Looking
from modelstore.client.model import Model
from modelstore.client.saving import Saving
from modelstore.storage.open import open_storage


@checked
def open(
    url: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    mirrors: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    engine: str | None = None,
    read_only: bool = False,
    cluster: str | None = None,
) -> Store:
    """The store at `url`: a folder, `file://`, `s3://bucket/prefix`, `gs://`, `az://`, `memory://name`, or another of fsspec's.

    `memory` is the working memory of each call, as bytes or a text like "1GiB" (default: a quarter of what is free, at
    most 4 GiB); what a call returns comes on top. `threads` (default: the cores; more where requests wait for a network).
    `mirrors` are copies of the store, read where this one's bytes are wrong or gone, which they then replace.
    `storage_options` are fsspec's for the protocol; `engine` is the S3 client, "obstore" or "s3fs". The first save makes it.
    With `read_only` nothing can be written, and protocols that cannot hold a store safely, such as http, are read.
    `cluster`: read through the hosts of a Ray cluster: "auto" (the one that this machine belongs to), HOST:PORT, or "local"
    (one of this process's own, which ends with it).
    """
    copies = tuple(open_storage(mirror, storage_options, read_only=True) for mirror in mirrors)
    storage = open_storage(url, storage_options, engine, read_only=read_only)
    session = source = None
    if cluster is not None:
        from modelstore.cluster.joining import join, source_of

        source = source_of(url, storage_options, engine)
        session = join(cluster)
    return Store(storage, copies, memory=memory, threads=threads, session=session, source=source, cluster=cluster)


class Store(Saving, Looking, Keeping, Copying, Checkpoints, Following, OfModels, OfCluster):
    """A store of models over a storage. Made by `modelstore.open`; may be used from many threads, and be pickled.

    `store[ref]` is one variant of one version, and `store.cluster` the cluster that the store was opened with.
    """

    def __getitem__(self, ref: str) -> Model:
        """One variant of one version of a model; it stays at that version.

        Args:
            ref: `name[@version-or-tag][:variant]`; the newest version's original where nothing else is said.

        Returns:
            The model, which can be loaded, streamed, exported, compressed, …

        Raises:
            NotFoundError: There is no such model, version, tag or variant.

        Example:
            >>> model = store["acme/llama@prod:int4"]
            >>> model.version
            3
        """
        return Model.there(self._access, ref)
