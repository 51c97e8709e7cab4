"""The store as a user sees it: names, saving, keeping; and the way to its models and its cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.client.arguments import checked
from modelstore.client.base import OpenedStore, copy_of
from modelstore.client.checkpoints import Checkpoints
from modelstore.client.copying import Copying
from modelstore.client.following import Following
from modelstore.client.forwards import OfModels
from modelstore.client.forwards_imatrix import OfImportance
from modelstore.client.forwards_restructuring import OfSmallerModels
from modelstore.client.joined import OfCluster
from modelstore.client.keeping import Keeping
from modelstore.client.looking import Looking
from modelstore.client.model import Model
from modelstore.client.saving import Saving
from modelstore.storage.open import open_storage
from modelstore.store.place import check_mirror


@checked
def open(
    url: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    mirrors: Sequence[str | os.PathLike[str] | OpenedStore] = (),
    storage_options: Mapping[str, Any] | None = None,
    engine: str | None = None,
    read_only: bool = False,
    cluster: str | None = None,
) -> Store:
    """Open the store at a URL or in a folder. The first save makes it.

    Args:
        url: A folder, `file://`, `s3://bucket/prefix`, `gs://`, `az://`, `memory://name`, or another of fsspec's.
        memory: The working memory of each call, in bytes or as a text like "1GiB" (default: a quarter of what is free, at
            most 4 GiB; at least 64 MiB). The results of a call come on top.
        threads: Threads of each call (default: the cores; more if requests wait for a network).
        mirrors: Copies of the store, as URLs or opened stores, read if this store's bytes are wrong or gone, which they then
            replace.
        storage_options: fsspec's for the protocol.
        engine: The S3 client, "obstore" or "s3fs".
        read_only: Write nothing. Protocols that cannot hold a store safely, such as http, can be read so.
        cluster: Read through the hosts of a Ray cluster: "auto" (the one that this machine belongs to), HOST:PORT, or
            "local" (one of this process's own, which ends with it).

    Returns:
        The store. Nothing is asked of the network yet, but of each mirror whether it is a store, once; one that does not
        answer is asked again when it is needed.

    Raises:
        ValueError: The URL or an option is not valid.
        UnsupportedError: The protocol cannot hold a store, or needs a package that is not installed.
        NotFoundError: A mirror answers, but is not a store.
        StorageError: A client that connects immediately cannot.

    Example:
        >>> store = ms.open("s3://bucket/models", memory="1GiB")
    """
    storage = open_storage(url, storage_options, engine, read_only=read_only)
    copies = tuple(copy_of(storage.url, mirror, storage_options) for mirror in mirrors)
    for copy in copies:
        check_mirror(copy)
    session = source = None
    if cluster is not None:
        from modelstore.cluster.control.joining import join, source_of

        source = source_of(url, storage_options, engine)
        session = join(cluster)
    return Store(storage, copies, memory=memory, threads=threads, session=session, source=source, cluster=cluster)


class Store(
    Saving, Looking, Keeping, Copying, Checkpoints, Following, OfModels, OfSmallerModels, OfImportance, OfCluster
):
    """A store of models over a storage. Made by `modelstore.open`; may be used from many threads, and be pickled.

    `store[ref]` is one variant of one version, and `store.cluster` the cluster that the store was opened with.
    """

    def __getitem__(self, ref: str) -> Model:
        """One variant of one version of a model; it stays at that version.

        Args:
            ref: `name[@version-or-tag][:variant]`; by default the original of the newest version.

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
