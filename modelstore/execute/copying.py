"""Copies versions from store to store: packs as they are, then manifests, then the record that makes a version visible.

A pack is streamed, and its digest checked on the way; what the other store has is not sent. Killed at any point, a copy that
is started again goes on: nothing that was sent is sent again, and no version is made twice.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from modelstore.errors import ConflictError, CorruptionError, FormatError, NotFoundError, StorageError
from modelstore.execute.reading import Limits
from modelstore.execute.saving import REFRESH
from modelstore.format import manifest as man
from modelstore.format.buffers import Pieces
from modelstore.format.inventory import Copied, CopiedVersion
from modelstore.format.manifest import Manifest
from modelstore.format.names import ORIGINAL
from modelstore.format.record import PACKS, VariantEntry, VersionRecord, manifest_key, pack_key
from modelstore.storage.base import Storage
from modelstore.store import packs
from modelstore.store.catalog import Catalog
from modelstore.store.heal import checked_pieces
from modelstore.store.manifests import Manifests
from modelstore.store.repair import copy_pack

_LOST = (NotFoundError, CorruptionError, FormatError, StorageError)
_PER_PACK = 96 << 20  # working memory of a pack on its way: parts of an upload under way, and a piece
_AT_ONCE = 8
_ONE_LISTING = 256  # packs from which one listing is quicker than a look at each
_RACES = 1000

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Place:
    """A store that is copied from or to; `mirrors` are read where the bytes of the first are wrong or gone."""

    storage: Storage
    catalog: Catalog
    manifests: Manifests
    mirrors: tuple[Storage, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A version to be copied: which of its variants, and tags, and the name that it gets."""

    record: VersionRecord
    variants: tuple[str, ...]
    name: str
    tags: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """What it is called in the store that it comes from."""
        return f"{self.record.model}@{self.record.version}"


@dataclass(frozen=True)
class _Plan:
    """What is to be done for a version: where it is there already, which entries it still lacks, and their manifests."""

    wanted: Wanted
    there: VersionRecord | None
    entries: tuple[str, ...] = ()
    needs: tuple[
        tuple[str, str, str], ...
    ] = ()  # (model there, model here, manifest), what deltas are stored against first
    left_out: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether the version is left out, as it was deleted there."""
        return self.there is not None and self.there.deleted


def copy(
    source: Place,
    target: Place,
    wanted: Sequence[Wanted],
    *,
    everything: bool,
    limits: Limits,
    meter: Callable[[int], Progress | None],
) -> Copied:
    """Copy versions, in this order. `everything`: as one of many, so that what was deleted there stays so, and what does not
    fit is left out and said; else it is copied anew, or an error.

    `meter`, given the bytes that will be sent, gives what hears of them.
    """
    started = time.monotonic()
    work = _Copying(source, target, everything)
    plans = [work.plan(one) for one in wanted]
    missing, there = work.missing({pack for plan in plans for pack in work.packs_of(plan)})
    report = meter(sum(missing.values()))
    made, tags = [], []
    for plan in plans:
        if plan.nothing:
            continue
        fresh = {pack: missing[pack] for pack in work.packs_of(plan) if pack in missing}
        work.send(fresh, limits, report)
        for pack in fresh:
            del missing[pack]
        version = work.publish(plan)
        made.append(version)
        tags += work.tag(plan, version.version)
    left_out = tuple(said for plan in plans for said in plan.left_out)
    return Copied(
        target.storage.url,
        tuple(made),
        tuple(tags),
        work.sent_packs,
        work.sent,
        sum(there.values()),
        left_out,
        time.monotonic() - started,
    )


def form(manifest: Manifest) -> str:
    """Equal for manifests of the same values, stored as the same chunks, wherever these lie."""
    table = msgspec.structs.replace(manifest.chunks, pack=b"", offset=b"")
    return man.encode(msgspec.structs.replace(manifest, packs=(), chunks=table, base=None))[0]


class _Copying:
    """One copy, and what it did so far."""

    def __init__(self, source: Place, target: Place, everything: bool) -> None:
        self._source = source
        self._target = target
        self._everything = everything
        self._source_id = source.catalog.open().id
        self._refresh_before = time.time() - REFRESH
        self._lock = threading.Lock()
        self.sent = 0
        self.sent_packs = 0

    # ------------------------------------------------------------------ deciding

    def plan(self, wanted: Wanted) -> _Plan:
        """What is to be done for a version."""
        there = self._there(wanted)
        if there is not None and there.deleted:
            at = f"{wanted.name}@{there.version}"
            return _Plan(wanted, there, left_out=(f"{wanted.at}: {at} was deleted in {self._target.storage.url}",))
        entries, left_out = [], []
        for variant in wanted.variants:
            entry = wanted.record.variants[variant]
            old = there.variants.get(variant) if there else None
            try:
                if old is None or (old.manifest != entry.manifest and self._differs(wanted, variant, entry, old)):
                    entries.append(variant)
            except ConflictError as error:
                if not self._everything:
                    raise
                left_out.append(f"{wanted.at}:{variant}: {error}")
        needs: list[tuple[str, str, str]] = []
        for variant in entries:
            needs += self._needs(wanted, wanted.record.variants[variant].manifest)
        return _Plan(wanted, there, tuple(entries), tuple(dict.fromkeys(needs)), tuple(left_out))

    def _there(self, wanted: Wanted) -> VersionRecord | None:
        """The version that an earlier copy made of this one, or that it was copied from; one that is deleted only where that
        counts."""
        catalog, record = self._target.catalog, wanted.record
        highest = catalog.highest(wanted.name)
        try:
            same = catalog.version(wanted.name, record.version)
        except NotFoundError:
            return None  # its number is free, and never was another's
        if self._is(same, record, wanted.name) and (not same.deleted or self._everything):
            return same
        deleted = None
        for version in range(highest, 0, -1):
            try:
                first = catalog.first(wanted.name, version)
            except NotFoundError:
                continue  # numbers that a copy left out
            if first.writer == self._writer(record):
                head = catalog.version(wanted.name, version)
                if not head.deleted:
                    return head
                deleted = deleted or head
        return deleted if self._everything else None

    def _is(self, one: VersionRecord, record: VersionRecord, name: str) -> bool:
        """Whether a version of the other store is this one: made by a copy of it, or of the same values and files."""
        mine, others = record.variants[ORIGINAL], one.variants[ORIGINAL]
        if mine.manifest == others.manifest:
            return True
        if self._target.catalog.first(name, one.version).writer == self._writer(record):
            return True
        try:
            a = self._source.manifests.entry(record.model, mine)
            b = self._target.manifests.entry(name, others)
        except CorruptionError:
            return False
        files = [{(file.name, file.digest) for file in m.files} for m in (a, b)]
        return a.content == b.content and files[0] == files[1]

    def _differs(self, wanted: Wanted, variant: str, entry: VariantEntry, old: VariantEntry) -> bool:
        """Whether a variant that is there is to be replaced by this one, of the same values in other chunks or with other
        metrics; `ConflictError` where its values are others."""
        mine = self._source.manifests.entry(wanted.record.model, entry)
        others = self._target.manifests.entry(wanted.name, old)
        if mine.content != others.content:
            raise ConflictError(
                f"{self._target.storage.url} has a variant {variant!r} of {wanted.name}@{wanted.record.version} with other "
                f"values: delete it there first, or leave the variant out",
                model=wanted.name,
            )
        return form(mine) != form(others)

    def _needs(self, wanted: Wanted, digest: str) -> list[tuple[str, str, str]]:
        """The manifests under a variant's, and its own, last."""
        found = [(wanted.name, wanted.record.model, digest)]
        manifest = self._source.manifests.read(wanted.record.model, digest)
        while manifest.base is not None:
            base = manifest.base
            try:
                manifest = self._source.manifests.read(base.model, base.manifest)
            except CorruptionError as error:
                raise CorruptionError(
                    f"{wanted.at} is stored as the difference to a version of {base.model!r} that cannot be read, and is "
                    f"not copied without it: {error}",
                    model=wanted.record.model,
                    object=error.object,
                ) from error
            found.append((base.model, base.model, base.manifest))
        return found[::-1]

    def packs_of(self, plan: _Plan) -> Iterator[str]:
        """The packs that a version needs there, in their order; some more than once."""
        for _, model, digest in plan.needs:
            yield from self._source.manifests.read(model, digest).packs

    def missing(self, needed: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        """The packs that are to be sent, and those that are there, with their sizes."""
        wanted = sorted(set(needed))
        found = self._sizes((self._target.storage,), wanted)
        right = self._sizes((self._source.storage, *self._source.mirrors), wanted)
        there = {pack: size for pack, size in found.items() if size is not None and size == (right[pack] or size)}
        missing = {pack: size for pack, size in right.items() if pack not in there}
        lost = [pack for pack, size in missing.items() if size is None]
        if lost:
            raise CorruptionError(
                f"{self._source.storage.url} has lost {len(lost)} packs, the first of them {pack_key(lost[0])}: nothing was "
                f"copied; run 'modelstore verify' to see which models need them",
                object=pack_key(lost[0]),
            )
        return {pack: size for pack, size in missing.items() if size is not None}, there

    @staticmethod
    def _sizes(storages: Sequence[Storage], wanted: Sequence[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(wanted)
        for storage in storages:
            left = [pack for pack, size in found.items() if size is None]
            if len(left) > _ONE_LISTING:
                sizes = {info.key: info.size for info in storage.list(PACKS)}
                found |= {pack: sizes.get(pack_key(pack)) for pack in left}
            elif left:
                with ThreadPoolExecutor(16, thread_name_prefix="modelstore-copy") as pool:
                    infos = pool.map(lambda pack: storage.info(pack_key(pack)), left)  # noqa: B023  used at once
                    found |= {pack: info.size if info else None for pack, info in zip(left, infos, strict=True)}
        return found

    # ------------------------------------------------------------------ doing

    def send(self, missing: dict[str, int], limits: Limits, report: Progress | None) -> None:
        """Send packs, several at once as far as memory allows."""
        threads = max(1, min(_AT_ONCE, limits.threads or _AT_ONCE, limits.memory // _PER_PACK))
        with ThreadPoolExecutor(threads, thread_name_prefix="modelstore-copy") as pool:
            sending = [pool.submit(self._send, pack, size, report) for pack, size in missing.items()]
            try:
                for one in sending:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, pack: str, size: int, report: Progress | None) -> None:
        """Stream a pack, from the first copy that gives the bytes that its name stands for."""
        key = pack_key(pack)
        reasons = []
        for storage in (self._source.storage, *self._source.mirrors):
            try:
                pieces = Pieces(lambda at=storage: self._told(checked_pieces(at, pack, size), report))  # type: ignore[misc]
                self._target.storage.put(key, pieces, size)
            except (NotFoundError, CorruptionError) as error:
                reasons.append(str(error))
                continue
            with self._lock:
                self.sent += size
                self.sent_packs += 1
            return
        raise CorruptionError(
            f"pack {key} cannot be copied, because its bytes are not those that its name stands for "
            f"({'; '.join(reasons)}): mend it with 'modelstore repair --from URL', then copy again",
            object=key,
        )

    def _told(self, pieces: Iterable[bytes], report: Progress | None) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            if report:
                with self._lock:
                    report(len(piece))

    def publish(self, plan: _Plan) -> CopiedVersion:
        """Write the manifests, and make the version, or what it lacks, visible."""
        wanted, record = plan.wanted, plan.wanted.record
        copies = {}
        for there, model, digest in plan.needs:
            copies[there, digest] = self._write_manifest(there, model, digest)
        entries = {}
        for variant in plan.entries:
            entry = record.variants[variant]
            entries[variant] = msgspec.structs.replace(entry, copy=copies[wanted.name, entry.manifest])
        if plan.there is None:
            return CopiedVersion(wanted.at, wanted.name, self._new(wanted, entries), plan.entries, True)
        if entries:
            self._add(wanted, plan.there, entries)
        return CopiedVersion(wanted.at, wanted.name, plan.there.version, plan.entries, False)

    def _add(self, wanted: Wanted, there: VersionRecord, entries: dict[str, VariantEntry]) -> None:
        """Give a version that is there variants, instead of those of the same values that it had when it was looked at."""
        old = {variant: entry.manifest for variant, entry in there.variants.items()}
        self._target.catalog.publish_variants(wanted.name, there.version, entries, uuid.uuid4().hex, instead_of=old)

    def _new(self, wanted: Wanted, entries: dict[str, VariantEntry]) -> int:
        """A new version, with the number that it has here where that was never used there; else the next one."""
        number, catalog = wanted.record.version, self._target.catalog
        writer = self._writer(wanted.record)
        for _ in range(_RACES):
            made = msgspec.structs.replace(
                wanted.record,
                model=wanted.name,
                version=number,
                number=1,
                writer=writer,
                created=time.time(),
                variants=entries,
            )
            try:
                catalog.version(wanted.name, number)
            except NotFoundError:
                if catalog.publish_made(made):
                    return number
            there = self._there(wanted)
            if there is not None and not there.deleted:  # another copy of it was quicker
                self._add(wanted, there, entries)
                return there.version
            number = catalog.highest(wanted.name) + 1
        raise ConflictError(
            f"{_RACES} writers of model {wanted.name!r} came first: try again when fewer write at once",
            model=wanted.name,
        )

    def _write_manifest(self, there: str, model: str, digest: str) -> str:
        """Write a manifest as it is, and its copy; the copy's name."""
        data = self._bytes(model, digest)
        copy = copy_pack(there, digest, data)
        packs.store(self._target.storage, copy, self._refresh_before)
        self._target.storage.put(manifest_key(there, digest), [data], len(data))
        return copy.digest

    def _bytes(self, model: str, digest: str) -> bytes:
        """A manifest's object, from the store or a mirror."""
        key = manifest_key(model, digest)
        for storage in (self._source.storage, *self._source.mirrors):
            try:
                data = storage.get(key)
                man.decode(data, digest, key)
            except _LOST:
                continue
            return data
        return man.encode(self._source.manifests.read(model, digest))[1]  # says what is wrong

    def tag(self, plan: _Plan, version: int) -> list[str]:
        """Let the version's tags name it there, too."""
        name, catalog = plan.wanted.name, self._target.catalog
        known = catalog.tags(name) if plan.wanted.tags else {}
        for tag in plan.wanted.tags:
            if known.get(tag) != version:
                catalog.set_tag(name, tag, version, uuid.uuid4().hex)
        return [f"{name}@{tag}" for tag in plan.wanted.tags]

    def _writer(self, record: VersionRecord) -> str:
        """The writer that all copies of a version have in common, so that they know what one of them made."""
        return blake3(f"copy\0{self._source_id}\0{record.model}\0{record.version}".encode()).hexdigest()[:32]
