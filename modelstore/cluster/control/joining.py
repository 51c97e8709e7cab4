"""From a user's `cluster=` to a session. Says what is missing where Ray is not installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelstore.cluster.pieces import StoreAddress
from modelstore.errors import UnsupportedError
from modelstore.paths import from_home
from modelstore.storage.address import normal

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session


def join(cluster: str) -> Session:
    """A session of the cluster "auto", "local" or HOST:PORT. `StorageError` if it does not answer or has no hosts."""
    if importlib.util.find_spec("ray") is None:
        raise UnsupportedError("cluster= needs Ray: pip install 'modelstore[cluster]'")
    from modelstore.cluster.control import runtime

    if cluster == "local":
        runtime.start_local(runtime.default_settings())
    else:
        runtime.connect(cluster)
    from modelstore.cluster.control.session import Session  # imports Ray, whose settings must be made before

    return Session()


def source_of(url: str | os.PathLike[str], options: Mapping[str, Any] | None, engine: str | None) -> StoreAddress:
    """A store's address as hosts can use it; `ValueError` for one that only this process sees."""
    text = normal(url)
    scheme, separator, _ = text.partition("://")
    if separator and scheme == "memory":
        raise ValueError(
            f"{text} lies in this process's memory, where a cluster cannot read it: use a folder or a bucket"
        )
    return StoreAddress(text if separator else str(from_home(text).resolve()), dict(options or {}), engine)
