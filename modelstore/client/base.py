"""The base of every part of `Store`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelstore.client.access import Access
from modelstore.client.arguments import Checked
from modelstore.client.model import Model
from modelstore.storage.base import Storage
from modelstore.storage.open import open_storage
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session
    from modelstore.cluster.pieces import StoreAddress


class OpenedStore(Checked):
    """An opened store. Public methods of its heirs have arguments checked."""

    def __init__(
        self,
        storage: Storage,
        mirrors: tuple[Storage, ...] = (),
        *,
        memory: int | str | None = None,
        threads: int | None = None,
        session: Session | None = None,
        source: StoreAddress | None = None,
        cluster: str | None = None,
    ) -> None:
        repo = Repo.on(storage, mirrors)
        self._access = Access(repo, memory, threads, session=session, source=source, cluster=cluster)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._access)

    @property
    def repo(self) -> Repo:
        """The parts under the store: its storage, the catalog of its records, its manifests. For tools that look inside."""
        return self._access.repo

    @property
    def url(self) -> str:
        """The store's URL, without credentials."""
        return self.repo.storage.url

    def __repr__(self) -> str:
        return f"modelstore.open({self.url!r})"

    def _at(self, ref: str) -> Model:
        """The model that a reference names, which is looked up when it is first asked for something."""
        return Model(self._access, ref)


def copy_of(url: str, where: str | os.PathLike[str] | OpenedStore, options: Mapping[str, Any] | None = None) -> Storage:
    """The storage, for reading, of a copy of the store at `url`: of an open one its own, of a URL a new one.

    `ValueError` for the store itself.
    """
    storage = where.repo.storage if isinstance(where, OpenedStore) else open_storage(where, options, read_only=True)
    if storage.url == url:
        raise ValueError(f"{url} is this store itself, so what is damaged here is damaged there: give a copy of it")
    return storage


def _again(kind: type[OpenedStore], access: Access) -> OpenedStore:
    made = kind.__new__(kind)
    made._access = access
    return made
