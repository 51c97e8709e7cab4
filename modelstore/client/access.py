"""State that a store's objects share: its storage, the limits of a call, models opened for reading, the way to the cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, UnsupportedError
from modelstore.execute.memory import budget
from modelstore.execute.read.fetcher import Fetcher, Fetching
from modelstore.execute.read.loading import Variant
from modelstore.format.locks import Lock
from modelstore.format.names import ORIGINAL, Reference
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.progress import Progress
from modelstore.format.structure import CHECKPOINT
from modelstore.plan.work import Limits, Work
from modelstore.storage.remote.options import without_secrets
from modelstore.store.damage import UNREADABLE
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session
    from modelstore.cluster.pieces import StoreAddress
    from modelstore.cluster.save.orders import Order
    from modelstore.compress.on_the_fly import Maker
    from modelstore.execute.write.save import Against
    from modelstore.format.answers.results import Exported, Saved

T = TypeVar("T")

log = logging.getLogger("modelstore")
_LOOKED_AT = 8  # one of so many newest versions of a model must be readable, so that its chunks are not stored again


def warn(damaged: Iterable[ModelStoreError]) -> None:
    """Say what cannot be read, where the work goes on without."""
    for error in damaged:
        log.warning("%s", error)


class Access:
    """An opened store: what `Store`, its models and its cluster share. May be used from many threads."""

    def __init__(
        self,
        repo: Repo,
        memory: int | str | None = None,
        threads: int | None = None,
        *,
        session: Session | None = None,
        source: StoreAddress | None = None,
        cluster: str | None = None,
    ) -> None:
        budget(memory)
        self.repo = repo
        self.source = source
        self.pending: dict[str, tuple[Order, Saved]] = {}  # saves that hosts took over, by id
        self._memory = memory
        self._threads = threads
        self._joined = session
        self._joining = Lock()
        self._process = os.getpid()
        self._cluster = cluster

    def __reduce__(self) -> tuple[Any, ...]:
        """An address and options: a pickle opens the store again, with the credentials of the process it comes to."""
        source = self.source
        if source is not None:
            source = type(source)(source.url, without_secrets(source.options)[0], source.engine)
        return _again, (self.repo.storage, self.repo.mirrors, self._memory, self._threads, source, self._cluster)

    # ------------------------------------------------------------------ the cluster

    @property
    def clustered(self) -> bool:
        """Whether the store was opened beside a cluster."""
        return self._cluster is not None or self._joined is not None

    @property
    def session(self) -> Session | None:
        """The connection to the cluster; a store of a pickle makes it when it is first used.

        `UnsupportedError` in a process that was forked off, where it cannot be used.
        """
        if not self.clustered:
            return None
        if self._process != os.getpid():
            raise UnsupportedError(
                f"{self.repo.storage.url} was opened with cluster= before this process was forked, and Ray does not live "
                "through that: start the workers with 'spawn', or open the store within them"
            )
        with self._joining:
            if self._joined is None:
                from modelstore.cluster.control.joining import join

                assert self._cluster is not None
                # A cluster of one process alone is, for its tasks and actors, the one they run in.
                self._joined = join("auto" if self._cluster == "local" else self._cluster)
            return self._joined

    @property
    def fetching(self) -> Fetching:
        """The source of chunks: the storage, or a cluster's hosts."""
        session = self.session
        if session is None or self.source is None:
            return Fetcher
        from modelstore.cluster.read.reader import ClusterFetching

        return ClusterFetching(session, self.source)

    def work(self, progress: Progress | None = None) -> Work:
        """The limits of a call that starts now, and the receiver of its progress."""
        return Work(self.limits(), progress=progress)

    # ------------------------------------------------------------------ reading

    def limits(self) -> Limits:
        """The limits of a call that starts now."""
        return Limits(budget(self._memory), self._threads)

    def manifest(self, ref: Reference) -> Manifest:
        """The manifest of a stored variant."""
        repo = self.repo
        return self.as_it_is(
            ref, lambda record: repo.manifests.entry(ref.name, repo.catalog.variant(record, ref.variant))
        )

    def stored(self, ref: Reference, record: VersionRecord | None = None) -> Variant:
        """A stored variant, opened for reading; `record`, where it was just read, is not read again."""
        return self.as_it_is(
            ref, lambda found: self.opened(ref.name, self.repo.catalog.variant(found, ref.variant)), record
        )

    def readable(self, ref: Reference, record: VersionRecord | None = None) -> Variant:
        """As `stored`; a variant that is not stored but has a preset's name is made while it is read, and said to be."""
        return self.as_it_is(ref, partial(self._stored_or_made, ref), record)

    def as_it_is(self, ref: Reference, opened: Callable[[VersionRecord], T], record: VersionRecord | None = None) -> T:
        """The result of `opened` for a version's record; again if a compaction has replaced its manifests meanwhile."""
        if record is None:
            self.repo.catalog.open()
            record = self.repo.catalog.resolve(ref)
        while True:
            try:
                return opened(record)
            except CorruptionError:
                self.repo.catalog.open(again=True)
                before, record = record, self.repo.catalog.resolve(ref)
                if record == before:
                    raise

    def opened(self, name: str, entry: VariantEntry) -> Variant:
        """The variant of a record's entry, opened for reading."""
        return Variant(self.repo, name, self.repo.manifests.entry(name, entry), fetching=self.fetching)

    def _stored_or_made(self, ref: Reference, record: VersionRecord) -> Variant:
        from modelstore.compress.presets import PRESETS

        if ref.variant in record.variants or ref.variant not in PRESETS:
            return self.opened(ref.name, self.repo.catalog.variant(record, ref.variant))
        from modelstore.compress.on_the_fly import unstored

        at = f"{ref.name}@{record.version}"
        original = record.variants[ORIGINAL]
        made = unstored(self.opened(ref.name, original), PRESETS[ref.variant], self._maker(ref, original))
        log.warning(
            "variant %r of %s is not stored and is made of the original while it is read: compress(%r, %r) stores it",
            ref.variant,
            at,
            at,
            ref.variant,
        )
        return made

    def _maker(self, ref: Reference, original: VariantEntry) -> Callable[[Manifest, Manifest], Maker] | None:
        """How a cluster's hosts make chunks of a variant that is not stored; None without a cluster."""
        session = self.session
        if session is None or self.source is None:
            return None
        from modelstore.cluster.read.making import HostMaker, variant_of
        from modelstore.compress.presets import PRESETS

        variant = variant_of(self.source, ref.name, original.manifest, PRESETS[ref.variant])
        return partial(HostMaker, makers=session, variant=variant)

    def tell_dense(self, ref: Reference, asked: str, done: Exported) -> None:
        """Say where a compressed variant takes as much outside the store as its original does; `asked` is what it is called."""
        if ref.variant == ORIGINAL:
            return
        original = self.repo.catalog.entry(replace(ref, variant=ORIGINAL))[1]
        if done.bytes >= original.nbytes:
            log.warning(
                "%s was written dense, as no engine has a layout for it: %s bytes, where its original has %s",
                asked,
                f"{done.bytes:,}",
                f"{original.nbytes:,}",
            )

    # ------------------------------------------------------------------ what a save is stored against

    def against(self, ref: Reference) -> Against:
        """A version to reuse chunks from."""

        from modelstore.execute.write.save import Against

        def opened(record: VersionRecord) -> Against:
            entry = self.repo.catalog.variant(record, ref.variant)
            model = self.opened(ref.name, entry)
            return Against(ref.name, entry.manifest, model.manifest, model.reader, model.chain)

        return self.as_it_is(ref, opened)

    def newest(self, name: str) -> Against | None:
        """The newest live version that can be read, whose chunks need not be stored again."""
        try:
            return self.against(Reference(name))
        except NotFoundError:
            return None
        except UNREADABLE as error:  # a record, or the manifest that it names
            warn([error])
        for record in islice(self.repo.catalog.readable(name), _LOOKED_AT):
            with suppress(NotFoundError, *UNREADABLE):
                return self.against(Reference(name, version=record.version))
        return None

    def previous(self, name: str) -> Against | None:
        """As `newest`, with what was beside its weights."""
        try:
            return self.against(Reference(name, variant=CHECKPOINT))
        except NotFoundError:
            return self.newest(name)


def _again(
    storage: Any,
    mirrors: Any,
    memory: int | str | None,
    threads: int | None,
    source: StoreAddress | None,
    cluster: str | None,
) -> Access:
    """The store that a pickle tells of.

    It joins the cluster when it is first used: Ray loads the function of a task, and all that it closes over, under a lock that
    joining needs, too.
    """
    return Access(Repo.on(storage, mirrors), memory, threads, source=source, cluster=cluster)
