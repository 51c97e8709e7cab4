"""Copies versions from store to store: packs as they are, then manifests, then the record that makes a version visible.

A pack is streamed, and its digest checked on the way; what the other store has is not sent. Killed at any point, a copy that
is started again goes on: nothing that was sent is sent again, and no version is made twice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from modelstore.errors import ConflictError, CorruptionError, FormatError, NotFoundError, StorageError
from modelstore.execute.copy.plan import CopyPlan, Planner, Wanted
from modelstore.format.answers.inventory import Copied, CopiedVersion
from modelstore.format.buffers import Pieces
from modelstore.format.locks import Lock
from modelstore.format.objects import manifest as man
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key, pack_key
from modelstore.plan.work import Limits, Work
from modelstore.storage.pool import ordered
from modelstore.store import packs
from modelstore.store.mend.heal import checked_pieces, pack_is_good
from modelstore.store.relying import GoneError, again
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

_LOST = (NotFoundError, CorruptionError, FormatError, StorageError)
_PER_PACK = 96 << 20  # working memory of a pack on its way: parts of an upload under way, and a piece
_AT_ONCE = 8
_RACES = 1000


def copy(
    source: Repo,
    target: Repo,
    wanted: Sequence[Wanted],
    *,
    everything: bool,
    work: Work,
    what: str,
) -> Copied:
    """Copy versions, in this order. `everything`: as one of many, so that a version that was deleted there stays deleted, and
    one that does not fit is left out and reported; else it is copied again, or an error.

    `what` names the operation for the receiver of progress.
    """
    started = time.monotonic()
    copying = _Copying(source, target, Planner(source, target, everything), everything)
    left = list(wanted)
    while left:
        left = copying.bring(left, work, what)
    return Copied(
        target.storage.url,
        tuple(copying.made),
        tuple(copying.tags),
        copying.sent_packs,
        copying.sent,
        copying.there,
        tuple(copying.left_out),
        time.monotonic() - started,
    )


class _Copying:
    """One copy, and what it did so far."""

    def __init__(self, source: Repo, target: Repo, planner: Planner, everything: bool) -> None:
        self._source = source
        self._target = target
        self._planner = planner
        self._everything = everything
        self._shelf = Shelf(target.storage)
        self._lock = Lock()
        self.made: list[CopiedVersion] = []
        self.tags: list[str] = []
        self.left_out: list[str] = []
        self.there = 0
        self.sent = 0
        self.sent_packs = 0

    def bring(self, wanted: Sequence[Wanted], work: Work, what: str) -> list[Wanted]:
        """Copy versions; those that were compacted or deleted meanwhile, so that what they named is gone, as they are now."""
        planner = self._planner
        plans = [planner.plan(one) for one in wanted]
        try:
            missing, there = planner.missing({pack for plan in plans for pack in planner.packs_of(plan)})
        except CorruptionError:
            moved = [planner.now(plan.wanted) for plan in plans]
            if not any(moved):
                raise
            return [now or plan.wanted for now, plan in zip(moved, plans, strict=True)]
        work = work.begin(sum(missing.values()) + sum(there.values()), what)
        missing |= {pack: there.pop(pack) for pack in self.bad(there, work)}
        self.there += sum(there.values())
        moved = []
        for plan in plans:
            if not plan.nothing:
                try:
                    version = again(lambda plan=plan: self._version(plan, missing, work))  # type: ignore[misc]
                except CorruptionError as error:
                    if now := planner.now(plan.wanted):
                        moved.append(now)
                        continue
                    if not self._everything:
                        raise
                    self.left_out.append(f"{plan.wanted.at}: {error}")
                    continue
                self.made.append(version)
                self.tags += self.tag(plan, version.version)
            self.left_out += plan.left_out
        return [now for now in moved if now is not None]

    def _version(self, plan: CopyPlan, missing: dict[str, int], work: Work) -> CopiedVersion:
        """Send what is `missing` of a version, which is then missing no more, and make it visible."""
        fresh = [pack for pack in dict.fromkeys(self._planner.packs_of(plan)) if pack in missing]
        self.send(fresh, work)
        for pack in fresh:
            del missing[pack]
        try:
            return self.publish(plan)
        except GoneError:  # what was there, or sent long ago, was collected: once more, with what is there now
            missing.update(self._planner.missing(self._planner.packs_of(plan))[0])
            raise

    def bad(self, there: Mapping[str, int], work: Work) -> list[str]:
        """The packs among those there whose bytes are wrong: they are sent again, before anything relies on them."""

        def good(pack: str) -> bool:
            right = pack_is_good(self._target.storage, pack)
            with self._lock:
                work.done(there[pack])
            return right

        looked = ordered(good, there, self._threads(work.limits), "modelstore-copy")
        return [pack for pack, right in zip(there, looked, strict=True) if not right]

    @staticmethod
    def _threads(limits: Limits) -> int:
        """Packs on their way in parallel, as far as memory allows."""
        return max(1, min(_AT_ONCE, limits.threads or _AT_ONCE, limits.memory // _PER_PACK))

    def send(self, missing: Iterable[str], work: Work) -> None:
        """Send packs."""
        list(ordered(lambda pack: self._send(pack, work), missing, self._threads(work.limits), "modelstore-copy"))

    def _send(self, pack: str, work: Work) -> None:
        """Stream a pack, from the first copy that gives the bytes that its name stands for."""
        key = pack_key(pack)
        reasons = []
        for storage in (self._source.storage, *self._source.mirrors):
            info = storage.info(key)
            if info is None:
                reasons.append(f"{storage.url} has no {key}")
                continue
            try:
                pieces = Pieces(lambda at=storage, n=info.size: self._told(checked_pieces(at, pack, n), work))  # type: ignore[misc]
                self._target.storage.put(key, pieces, info.size)
            except (NotFoundError, CorruptionError) as error:
                reasons.append(str(error))
                continue
            with self._lock:
                self.sent += info.size
                self.sent_packs += 1
            return
        raise CorruptionError(
            f"pack {key} cannot be copied, because its bytes are not those that its name stands for "
            f"({'; '.join(reasons)}): repair it with 'modelstore repair --from URL', then copy again",
            object=key,
        )

    def _told(self, pieces: Iterable[bytes], work: Work) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            with self._lock:
                work.done(len(piece))

    def publish(self, plan: CopyPlan) -> CopiedVersion:
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
        writer = self._planner.writer(wanted.record)
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
            there = self._planner.there(wanted)
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
        copy = packs.copy_pack(there, digest, data)
        self._shelf.put(copy)
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

    def tag(self, plan: CopyPlan, version: int) -> list[str]:
        """Let the version's tags name it there, too."""
        name, catalog = plan.wanted.name, self._target.catalog
        known = catalog.tags(name, []) if plan.wanted.tags else {}
        for tag in plan.wanted.tags:
            if known.get(tag) != version:
                catalog.set_tag(name, tag, version, uuid.uuid4().hex)
        return [f"{name}@{tag}" for tag in plan.wanted.tags]
