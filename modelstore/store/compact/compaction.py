"""Compaction: what is live of packs that are mostly dead moves to new packs; manifests follow, then records.

It publishes as a save does: packs, manifests, records, each through the catalog. Nothing is taken away here: the old packs and
manifests are given up by the records, and garbage collection removes them when their grace period is over, so that
readers, and saves that refer to them, go on. Killed anywhere, it leaves new packs that nothing refers to, or versions of
which some were changed and some not; the next one goes on from there.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from modelstore.errors import ConflictError, CorruptionError, FormatError, NotFoundError
from modelstore.format.answers.inventory import Compaction, Swept
from modelstore.format.objects.manifest import DIGEST_BYTES, Base, Manifest, first_problem, form
from modelstore.format.objects.record import PACKS, VariantEntry, pack_key
from modelstore.plan.work import Work
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.catalog import Catalog
from modelstore.store.collect.garbage import collect, now_of
from modelstore.store.collect.marking import Doubt, Needed, needed_manifests
from modelstore.store.compact.repack import (
    PLACE,
    DamagedPackError,
    Moved,
    Old,
    PlaceRows,
    arrange,
    moved,
    old_pack,
    write,
)
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

LIVE_SHARE = 0.8  # below it a pack is rewritten
_HEADER = 50  # a gap of less than a fiftieth of a pack is its header: whether something in it is dead is not looked at


def clean(
    repo: Repo,
    *,
    dry_run: bool,
    grace: float,
    bound: float,
    work: Work,
) -> Swept:
    """Compact packs of which less than `bound` is live (0: none), then collect garbage; the answer counts the dead bytes in
    packs.
    """
    limit = now_of(repo.storage, dry_run) - grace
    found = survey(repo, limit)
    opened = dead_packs(repo.storage, found)
    dead = dead_bytes(opened)
    done = None
    if bound:
        olds, left = victims(opened, bound)
        if found.doubt.problems:  # records that cannot be read would go on naming the old places
            olds, left = [], [f"nothing is rewritten: {one.message}" for one in found.doubt.problems.values()]
        heard = work.unheard() if dry_run else work.begin(sum(old.moved for old in olds), "compacting")
        done = compact(repo, found, olds, left, dry_run=dry_run, work=heard)
    swept = collect(repo, dry_run=dry_run, grace=grace)
    return msgspec.structs.replace(swept, dead=dead, compaction=done)


@dataclass
class Survey:
    """The live content of a store's packs, in the order in which manifests name it."""

    manifests: list[Needed] = field(default_factory=list)
    doubt: Doubt = field(default_factory=Doubt)
    places: dict[str, PlaceRows] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def gaps(self) -> list[str]:
        """Packs that have more bytes than are live, and than a header takes."""
        return [
            pack
            for pack, places in self.places.items()
            if self.sizes.get(pack, 0) - int(places["length"].sum()) > self.sizes.get(pack, 0) // _HEADER
        ]


def survey(repo: Repo, limit: float) -> Survey:
    """The content of each pack that records need, or needed until after `limit` (Unix seconds by the storage's clock)."""
    found = Survey()
    for needed in needed_manifests(repo, limit, found.doubt):
        found.manifests.append(needed)
        for pack, places in _places(needed.manifest):
            before = found.places.get(pack)
            found.places[pack] = places if before is None else np.unique(np.concatenate([before, places]))
    found.sizes = {info.key.rpartition("/")[2].partition(".")[0]: info.size for info in repo.storage.list(PACKS)}
    return found


def dead_packs(storage: Storage, found: Survey) -> dict[str, Old | None]:
    """Packs that have dead bytes, opened; None if one's header does not say where its chunks are."""

    def opened(pack: str) -> Old | None:
        try:
            return old_pack(storage, pack, found.places[pack])
        except (NotFoundError, CorruptionError, FormatError):
            return None

    gaps = found.gaps
    return dict(zip(gaps, ordered(opened, gaps, REQUESTS, "modelstore-compact"), strict=True))


def dead_bytes(opened: Mapping[str, Old | None]) -> int:
    """Bytes in packs that nothing live refers to, headers aside."""
    return sum(old.size - old.start - int(old.places["length"].sum()) for old in opened.values() if old is not None)


def victims(opened: Mapping[str, Old | None], bound: float) -> tuple[list[Old], list[str]]:
    """The packs that would be moved, with less live content than the bound; and the remarks on those that cannot be looked
    into.
    """
    olds = [old for old in opened.values() if old is not None and old.moved < bound * (old.size - old.start)]
    left = [f"{pack_key(pack)}: its header does not say what lies in it" for pack, old in opened.items() if old is None]
    return olds, left


def compact(
    repo: Repo,
    found: Survey,
    olds: Sequence[Old],
    left: Sequence[str],
    *,
    dry_run: bool,
    work: Work,
) -> Compaction:
    """Rewrite packs, and what refers to them. A sixth of the memory may hold a pack.

    A pack with a live chunk of which there is no good copy stays as it is.
    """
    chosen, said = list(olds), list(left)
    before = sum(old.size for old in chosen)
    if dry_run or not chosen:
        after = sum(len(new.builder.header(new.metadata)) + new.builder.size for new in arrange(chosen))
        variants = _touched(repo.catalog, found.manifests, {old.digest for old in chosen})
        return Compaction(len(chosen), before, after, variants, tuple(said), dry_run)
    while True:
        news = arrange(chosen)
        try:
            names = [write(repo, new, work) for new in news]
            break
        except DamagedPackError as error:
            said.append(str(error))
            chosen = [old for old in chosen if old.digest != error.pack]
    places, packs = moved(chosen, news, names)
    following = _Following(repo, places, packs)
    changed = following.follow(found.manifests)
    before = sum(old.size for old in chosen)
    after = sum(len(new.builder.header(new.metadata)) + new.builder.size for new in news)
    return Compaction(len(chosen), before, after, tuple(changed), (*said, *following.left), dry_run)


def relocated(manifest: Manifest, places: Mapping[str, Moved], packs: Sequence[str]) -> Manifest:
    """A manifest with the new places of chunks that were moved; everything else is as it was."""
    old = [places.get(digest) for digest in manifest.packs]
    names: dict[str, int] = {}
    pack = np.zeros(len(manifest.pack), np.int64)
    offset = manifest.offset.astype(np.int64)
    for number, digest in enumerate(manifest.packs):
        rows = np.flatnonzero(manifest.pack == number)
        at = old[number]
        if at is None:
            pack[rows] = names.setdefault(digest, len(names)) if len(rows) else 0
            continue
        entry = np.searchsorted(at.start, offset[rows], "right") - 1
        offset[rows] += at.now[entry] - at.start[entry]
        numbers = {p: names.setdefault(packs[p], len(names)) for p in np.unique(at.pack[entry]).tolist()}
        pack[rows] = [numbers[p] for p in at.pack[entry].tolist()]
    table = msgspec.structs.replace(
        manifest.chunks, pack=pack.astype("<u4").tobytes(), offset=offset.astype("<u8").tobytes()
    )
    return msgspec.structs.replace(manifest, packs=tuple(names), chunks=table)


class _Following:
    """Lets manifests and records follow chunks that were moved."""

    def __init__(
        self,
        repo: Repo,
        places: Mapping[str, Moved],
        packs: Sequence[str],
    ) -> None:
        self._catalog = repo.catalog
        self._manifests = repo.manifests
        self._places = places
        self._packs = packs
        self._shelf = Shelf(repo.storage)
        self._made: dict[tuple[str, str], tuple[str, str]] = {}  # (model, manifest) → the new one, and its copy
        self.left: list[str] = []

    def follow(self, needed: Iterable[Needed]) -> list[str]:
        """Rewrite what is live; the variants that are read from the new packs now."""
        live = [one for one in needed if one.live]
        by_name = {(one.model, one.digest): one.manifest for one in live}
        for name in by_name:
            self._manifest(name, by_name)
        return [ref for ref in self._records() if ref is not None]

    def _records(self) -> Iterator[str | None]:
        """Let records name the new manifests: each variant that has its old one still."""
        for model in sorted({model for model, _ in self._made}):
            for record in self._catalog.live(model):
                for variant, entry in record.variants.items():
                    now = self._made.get((model, entry.manifest))
                    if now is not None:
                        ref = f"{model}@{record.version}:{variant}"
                        fresh = msgspec.structs.replace(entry, manifest=now[0], copy=now[1])
                        yield ref if self._replace(ref, record.version, variant, entry.manifest, fresh) else None

    def _replace(self, ref: str, version: int, variant: str, old: str, entry: VariantEntry) -> bool:
        model = ref.partition("@")[0]
        try:
            self._catalog.replace_entry(model, version, variant, uuid.uuid4().hex, entry, instead_of=old)
        except NotFoundError:
            return False  # deleted meanwhile
        except ConflictError as error:
            self.left.append(str(error))
            return False
        return True

    def _manifest(self, name: tuple[str, str], live: Mapping[tuple[str, str], Manifest]) -> Base:
        """A manifest's new name, what it is stored against before it; its own where nothing of it was moved."""
        model, digest = name
        if name in self._made:
            return Base(model, self._made[name][0])
        manifest = live.get(name)
        if manifest is None:
            return Base(model, digest)
        base = manifest.base
        under = self._manifest((base.model, base.manifest), live) if base is not None else None
        if under == base and not any(pack in self._places for pack in manifest.packs):
            return Base(model, digest)
        made = msgspec.structs.replace(relocated(manifest, self._places, self._packs), base=under)
        problem = first_problem(made)
        if problem or form(made) != form(manifest):  # never publish what is not the same
            raise FormatError(
                f"the manifest {digest} of model {model!r} cannot follow its chunks: {problem}", model=model
            )
        self._made[name] = self._manifests.write(model, made, self._shelf)
        return Base(model, self._made[name][0])


def _places(manifest: Manifest) -> Iterator[tuple[str, PlaceRows]]:
    """The distinct places that a manifest has in each of its packs."""
    every = np.empty(len(manifest.pack), PLACE)
    every["offset"], every["length"] = manifest.offset, manifest.length
    every["digest"] = np.frombuffer(manifest.chunks.digest, f"S{DIGEST_BYTES}")
    order = np.argsort(manifest.pack, kind="stable")
    ends = np.searchsorted(manifest.pack[order], np.arange(len(manifest.packs) + 1))
    for number, digest in enumerate(manifest.packs):
        yield digest, np.unique(every[order[ends[number] : ends[number + 1]]])


def _touched(catalog: Catalog, needed: Iterable[Needed], packs: set[str]) -> tuple[str, ...]:
    """The live variants whose manifests name these packs, or are stored against such."""
    live = {(one.model, one.digest): one.manifest for one in needed if one.live}

    def touched(name: tuple[str, str]) -> bool:
        manifest = live.get(name)
        if manifest is None:
            return False
        base = manifest.base
        return bool(packs.intersection(manifest.packs)) or (base is not None and touched((base.model, base.manifest)))

    names = {name for name in live if touched(name)}
    return tuple(
        f"{model}@{record.version}:{variant}"
        for model in sorted({model for model, _ in names})
        for record in catalog.live(model)
        for variant, entry in record.variants.items()
        if (model, entry.manifest) in names
    )
