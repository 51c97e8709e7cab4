"""What every part of the client stands on: the storage, its catalog, and models opened for reading."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

from modelstore.client.arguments import checked
from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, UnsupportedError
from modelstore.execute.fetch import Fetcher, Fetching
from modelstore.execute.loading import Model
from modelstore.execute.memory import budget
from modelstore.execute.reading import Limits, Reader
from modelstore.execute.saving import Against
from modelstore.format.locks import Lock
from modelstore.format.manifest import Manifest
from modelstore.format.names import ORIGINAL, Reference
from modelstore.format.record import VariantEntry, VersionRecord
from modelstore.format.results import Exported, Saved
from modelstore.plan.layout import Share
from modelstore.storage.base import Storage
from modelstore.storage.options import without_secrets
from modelstore.store.damage import UNREADABLE
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    from modelstore.cluster.orders import Order
    from modelstore.cluster.pieces import Source
    from modelstore.cluster.session import Session
    from modelstore.compress.fly import FlyReader

T = TypeVar("T")

log = logging.getLogger("modelstore")
_LOOKED_AT = 8  # newest versions of a model of which one is to be readable, so that its chunks are not stored again


def warn(damaged: Iterable[ModelStoreError]) -> None:
    """Say what cannot be read, where the work goes on without."""
    for error in damaged:
        log.warning("%s", error)


def check_part(model: Model, shares: Mapping[str, Share]) -> None:
    """`ValueError` where a part that is to be written holds nothing of a model; a warning names the tensors of which it does."""
    held = [name for name, share in shares.items() if 0 not in share.shape]
    empty = [name for name, share in shares.items() if 0 in share.shape and model.tensor(name).nbytes]
    if not held and (empty or not shares):
        raise ValueError(f"this part holds nothing of model {model.name!r}, so nothing is written: give another part")
    if empty:
        named = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        log.warning("this part holds no element of %d tensors, which are written empty: %s", len(empty), named)


class Base:
    """A store's storage and records, and the limits of each call. Public methods of its heirs have arguments checked."""

    def __init_subclass__(cls) -> None:
        for name, value in list(vars(cls).items()):
            if isinstance(value, FunctionType) and not name.startswith("_"):
                setattr(cls, name, checked(value))

    def __init__(
        self,
        storage: Storage,
        mirrors: tuple[Storage, ...] = (),
        *,
        memory: int | str | None = None,
        threads: int | None = None,
        session: Session | None = None,
        source: Source | None = None,
        cluster: str | None = None,
    ) -> None:
        budget(memory)
        self.repo = Repo.on(storage, mirrors)
        self._memory = memory
        self._threads = threads
        self._joined = session
        self._joining = Lock()
        self._process = os.getpid()
        self._cluster = cluster
        self._source = source
        self._pending: dict[str, tuple[Order, Saved]] = {}  # saves that hosts took over, by id

    def __reduce__(self) -> tuple[Any, ...]:
        """An address and options: a pickle opens the store anew, with the credentials of the process it comes to."""
        source = self._source
        if source is not None:
            source = type(source)(source.url, without_secrets(source.options)[0], source.engine)
        return _again, (
            type(self),
            self.repo.storage,
            self.repo.mirrors,
            self._memory,
            self._threads,
            source,
            self._cluster,
        )

    @property
    def _session(self) -> Session | None:
        """The connection to the cluster; a store of a pickle makes it when it is first used.

        `UnsupportedError` in a process that was forked off, where it cannot be used.
        """
        if self._cluster is None and self._joined is None:
            return None
        if self._process != os.getpid():
            raise UnsupportedError(
                f"{self.url} was opened with cluster= before this process was forked, and Ray does not live through that: "
                "start the workers with 'spawn', or open the store within them"
            )
        with self._joining:
            if self._joined is None:
                from modelstore.cluster.joining import join

                assert self._cluster is not None
                # A cluster of one process alone is, for its tasks and actors, the one they run in.
                self._joined = join("auto" if self._cluster == "local" else self._cluster)
            return self._joined

    @property
    def _fetching(self) -> Fetching:
        return _fetching(self._session, self._source)

    @property
    def url(self) -> str:
        """Where the store lies, without credentials."""
        return self.repo.storage.url

    def __repr__(self) -> str:
        return f"modelstore.open({self.url!r})"

    def _limits(self) -> Limits:
        return Limits(budget(self._memory), self._threads)

    def _manifest(self, ref: Reference) -> Manifest:
        return self._as_it_is(
            ref, lambda record: self.repo.manifests.entry(ref.name, self.repo.catalog.variant(record, ref.variant))
        )

    def _model(self, ref: Reference) -> Model:
        return self._as_it_is(
            ref, lambda record: self._opened(ref.name, self.repo.catalog.variant(record, ref.variant))
        )

    def _as_it_is(self, ref: Reference, opened: Callable[[VersionRecord], T]) -> T:
        """What `opened` makes of a version's record; again where a compaction has replaced its manifests meanwhile."""
        self.repo.catalog.open()
        record = self.repo.catalog.resolve(ref)
        while True:
            try:
                return opened(record)
            except CorruptionError:
                before, record = record, self.repo.catalog.resolve(ref)
                if record == before:
                    raise

    def _readable(self, ref: Reference) -> Model:
        """As `_model`; a variant that is not stored but has a preset's name is made while it is read, and said to be."""
        return self._as_it_is(ref, partial(self._stored_or_made, ref))

    def _stored_or_made(self, ref: Reference, record: VersionRecord) -> Model:
        from modelstore.compress.presets import PRESETS

        if ref.variant in record.variants or ref.variant not in PRESETS:
            return self._opened(ref.name, self.repo.catalog.variant(record, ref.variant))
        from modelstore.compress.fly import unstored

        at = f"{ref.name}@{record.version}"
        original = record.variants[ORIGINAL]
        made = unstored(self._opened(ref.name, original), PRESETS[ref.variant], self._maker(ref, original))
        log.warning(
            "variant %r of %s is not stored and is made of the original while it is read: compress(%r, %r) stores it",
            ref.variant,
            at,
            at,
            ref.variant,
        )
        return made

    def _tell_dense(self, ref: Reference, done: Exported) -> None:
        """Say where a compressed variant takes as much outside the store as its original does."""
        if ref.variant == ORIGINAL:
            return
        original = self.repo.catalog.entry(replace(ref, variant=ORIGINAL))[1]
        if done.bytes >= original.nbytes:
            log.warning(
                "%s was written dense, as no engine has a layout for it: %s bytes, where its original has %s",
                ref,
                f"{done.bytes:,}",
                f"{original.nbytes:,}",
            )

    def _maker(self, ref: Reference, original: VariantEntry) -> Callable[[Manifest, Reader], FlyReader] | None:
        """How a cluster's hosts make chunks of a variant that is not stored; None without a cluster."""
        if self._session is None or self._source is None:
            return None
        from modelstore.cluster.making import MakingReader, variant_of
        from modelstore.compress.presets import PRESETS

        variant = variant_of(self._source, ref.name, original.manifest, PRESETS[ref.variant])
        return partial(MakingReader, makers=self._session, variant=variant)

    def _opened(self, name: str, entry: VariantEntry) -> Model:
        manifest = self.repo.manifests.entry(name, entry)
        return Model(self.repo, name, manifest, fetching=self._fetching)

    def _against(self, ref: Reference) -> Against:
        self.repo.catalog.open()
        entry = self.repo.catalog.entry(ref)[1]
        model = self._opened(ref.name, entry)
        return Against(ref.name, entry.manifest, model.manifest, model.reader, model.chain)

    def _newest(self, name: str) -> Against | None:
        """The newest live version that can be read, whose chunks need not be stored again."""
        try:
            return self._against(Reference(name))
        except NotFoundError:
            return None
        except UNREADABLE as error:  # a record, or the manifest that it names
            warn([error])
        for record in islice(self.repo.catalog.readable(name), _LOOKED_AT):
            with suppress(NotFoundError, *UNREADABLE):
                return self._against(Reference(name, version=record.version))
        return None


def _fetching(session: Session | None, source: Source | None) -> Fetching:
    """Where chunks come from: the storage, or a cluster's hosts."""
    if session is None or source is None:
        return Fetcher
    from modelstore.cluster.reading import ClusterFetching

    return ClusterFetching(session, source)


def _again(
    kind: type[Base],
    storage: Storage,
    mirrors: tuple[Storage, ...],
    memory: int | str | None,
    threads: int | None,
    source: Source | None,
    cluster: str | None,
) -> Base:
    """The store that a pickle tells of.

    It joins the cluster when it is first used: Ray loads the function of a task, and all that it closes over, under a lock that
    joining needs, too.
    """
    return kind(storage, mirrors, memory=memory, threads=threads, source=source, cluster=cluster)
