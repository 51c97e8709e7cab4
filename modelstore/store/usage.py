"""The content of a store's packs that models, versions and variants hold, alone and shared, and the content that nothing
holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from modelstore.errors import ModelStoreError
from modelstore.format.answers.inventory import StoreUsage, Usage
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import JOBS, MODELS, PACKS, VersionRecord, is_own, manifest_key, pack_key
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.damage import noting
from modelstore.store.mend.repair import copy_of
from modelstore.store.packs import data_start
from modelstore.store.repo import Repo

_HEADER = 50  # a gap of less than a fiftieth of a pack is its header: whether something in it is dead is not looked at

Extents = NDArray[np.uint64]  # lines of pack, offset, length


def usage(repo: Repo, model: str | None = None) -> StoreUsage:
    """The usage of a store; versions and variants, and the models listed, are those of `model` if one is given.

    Manifests of everything live are read, and all objects listed; no weights are.
    """
    work = _Counting(repo)
    damaged: list[ModelStoreError] = []
    for name in repo.catalog.models():
        for record in repo.catalog.live(name, damaged):
            noting(damaged, partial(work.add, record))
    found = work.held(model)
    left = noting(damaged, partial(repo.storage.sweep, math.inf, dry_run=True)) or ()  # by writers that were broken off
    return StoreUsage(*found, *work.totals(sum(info.size for info in left)), tuple(map(str, damaged)))


@dataclass
class _Counting:
    """The places that each live variant holds; packs have numbers."""

    repo: Repo
    packs: dict[str, int] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)  # keys of manifests and of their copies
    variants: list[tuple[str, int, str]] = field(default_factory=list)
    places: list[Extents] = field(default_factory=list)

    def add(self, record: VersionRecord) -> None:
        """Note what the variants of a version hold."""
        for variant, entry in record.variants.items():
            manifest = self.repo.manifests.entry(record.model, entry)
            self.needed |= {manifest_key(record.model, entry.manifest), pack_key(entry.copy)}
            held = [self._places(manifest)]
            while manifest.base is not None:
                base = manifest.base
                manifest = self.repo.manifests.read(base.model, base.manifest)
                if manifest_key(base.model, base.manifest) not in self.needed:
                    copy = copy_of(self.repo.storage, base.model, base.manifest, manifest)
                    self.needed |= {manifest_key(base.model, base.manifest), pack_key(copy.digest)}
                held.append(self._places(manifest))
            self.variants.append((record.model, record.version, variant))
            self.places.append(np.unique(np.concatenate(held), axis=0))

    def _places(self, manifest: Manifest) -> Extents:
        numbers = np.array([self.packs.setdefault(p, len(self.packs)) for p in manifest.packs] or [0], np.uint64)
        return np.stack([numbers[manifest.pack], manifest.offset, manifest.length], axis=1)

    def held(self, model: str | None) -> tuple[tuple[Usage, ...], tuple[Usage, ...], tuple[Usage, ...]]:
        """Bytes held by models, versions, variants."""
        every, at = np.unique(np.concatenate(self.places or [_NONE]), axis=0, return_inverse=True)
        ends = np.cumsum([len(places) for places in self.places])[:-1]
        ids = np.split(at.reshape(-1), ends) if self.places else []
        levels = []
        for depth in (1, 2, 3):
            groups: dict[tuple[str | int, ...], list[NDArray[np.int64]]] = {}
            for name, one in zip(self.variants, ids, strict=True):
                groups.setdefault(name[:depth], []).append(one)
            levels.append(tuple(_alone(groups, every[:, 2], model)))
        return levels[0], levels[1], levels[2]

    def totals(self, left: int) -> tuple[int, int, int, int, int]:
        """Bytes that are live, dead, unused, of manifests, and all; `left` are those of files that nobody writes any more."""
        live = np.zeros(len(self.packs), np.int64)
        every = np.unique(np.concatenate(self.places or [_NONE]), axis=0)
        np.add.at(live, every[:, 0].astype(np.int64), every[:, 2].astype(np.int64))
        unused = total = left
        manifests = 0
        gaps: list[tuple[str, int]] = []
        for info in self._objects():
            total += info[1]
            digest = info[0].rpartition("/")[2].partition(".")[0]
            number = self.packs.get(digest)
            if number is not None and info[0].startswith(PACKS):
                if info[1] - live[number] > info[1] // _HEADER:
                    gaps.append((info[0], info[1] - int(live[number])))
            elif info[0] in self.needed:
                manifests += info[1]
            elif is_own(info[0]) and not info[0].startswith(JOBS):
                unused += info[1]
        starts = ordered(lambda gap: data_start(self.repo.storage, gap[0]), gaps, REQUESTS, "modelstore-du")
        dead = sum(max(0, gap - start) for (_, gap), start in zip(gaps, starts, strict=True))
        return int(live.sum()), dead, unused, manifests, total

    def _objects(self) -> Iterator[tuple[str, int]]:
        for prefix in (PACKS, MODELS, JOBS):
            yield from ((info.key, info.size) for info in self.repo.storage.list(prefix))


_NONE: Extents = np.zeros((0, 3), np.uint64)


def _alone(
    groups: Mapping[tuple[str | int, ...], Sequence[NDArray[np.int64]]], lengths: NDArray[np.uint64], model: str | None
) -> Iterator[Usage]:
    """The bytes that each group holds, and holds alone; those of a model, or all."""
    holders = np.zeros(len(lengths), np.int64)
    ids = {name: np.unique(np.concatenate(held)) for name, held in groups.items()}
    for held in ids.values():
        holders[held] += 1
    for name, held in ids.items():
        if model in (None, name[0]):
            text = "".join(f"{sign}{part}" for sign, part in zip(("", "@", ":"), name, strict=False))
            yield Usage(text, int(lengths[held].sum()), int(lengths[held][holders[held] == 1].sum()))
