"""The manifests that records need, and those that these are stored against. Garbage collection and compaction go by it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby

from modelstore.errors import CorruptionError, FormatError, ModelStoreError, NotFoundError
from modelstore.format.answers.results import Problem
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import Manifest
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.damage import DAMAGED, listed
from modelstore.store.describe import problem
from modelstore.store.mend.repair import copy_of, read_copy
from modelstore.store.packs import manifest_copies
from modelstore.store.repo import Repo

_DIGEST = re.compile("[0-9a-f]{64}")
_AHEAD = 64  # manifests that are read and not yet looked at
_LONGEST_CHAIN = 1000  # manifests of deltas upon one another; far beyond what is ever written

_Named = dict[tuple[str, str], tuple[str, ...]]  # (model, manifest) → the packs that are its copies, as records say


@dataclass(frozen=True)
class Needed:
    """A manifest that is needed, and the packs that are its copies. `live`: the newest record of some version needs it.

    It has several where the model had another name when a version was saved: a copy says whose it is.
    """

    model: str
    digest: str
    copies: tuple[str, ...]
    manifest: Manifest
    live: bool


@dataclass
class Doubt:
    """The objects that cannot be read. If `everything` is set, it may refer to any manifest and any pack."""

    problems: dict[str | None, Problem] = field(default_factory=dict)
    everything: bool = False

    def add(self, error: ModelStoreError, model: str = "", *, everything: bool) -> None:
        """Note what cannot be read, and whether it may refer to anything."""
        self.problems.setdefault(error.object, problem(error, model))
        self.everything = self.everything or everything


def needed_manifests(repo: Repo, limit: float, doubt: Doubt | None = None) -> Iterator[Needed]:
    """Every manifest that a record needs, or needed until after `limit` (Unix seconds by the storage's clock), each once.

    An error where a record, or a live manifest and its copy, cannot be read: what it refers to is not known then. With `doubt` it
    is noted there instead, and of a model with such a record all manifests that there are count as needed.
    """
    live: _Named = {}
    recent: _Named = {}
    models = repo.catalog.models()
    for found, given_up in ordered(
        lambda model: _needed(repo.storage, model, limit, doubt), models, REQUESTS, "modelstore-gc"
    ):
        live |= {name: tuple(dict.fromkeys((*copies, *given_up.get(name, ())))) for name, copies in found.items()}
        recent |= given_up
    seen: set[tuple[str, str]] = set()
    for needed, is_live in ((live, True), (recent, False)):
        for _ in range(_LONGEST_CHAIN):
            bases: _Named = {}
            fresh = [item for item in needed.items() if item[0] not in seen]
            seen |= {name for name, _ in fresh}
            read = ordered(
                lambda item: _manifest(repo, item[0], item[1]), fresh, REQUESTS, "modelstore-gc", ahead=_AHEAD
            )
            for ((model, digest), _), one in zip(fresh, read, strict=True):
                if isinstance(one, CorruptionError):
                    if is_live or repo.storage.info(rec.manifest_key(model, digest)):
                        if doubt is None:
                            raise one
                        doubt.add(one, model, everything=True)
                    continue  # it was given up, and swept by an earlier collection of a shorter grace
                manifest, copies = one
                yield Needed(model, digest, copies, manifest, is_live)
                if manifest.base is not None:
                    bases[manifest.base.model, manifest.base.manifest] = ()
            if not bases:
                break
            needed = bases
        else:
            raise FormatError(
                f"deltas of deltas are more than {_LONGEST_CHAIN} deep: nothing was swept; delete what made them"
            )


def _needed(storage: Storage, model: str, limit: float, doubt: Doubt | None) -> tuple[_Named, _Named]:
    """The manifests of a model that the newest record of a version names; and those of records given up after `limit`."""
    try:
        return _named(storage, model, limit)
    except DAMAGED as error:
        if doubt is None:
            raise
        doubt.add(error, model, everything=False)
        return _all(storage, model), {}


def _all(storage: Storage, model: str) -> _Named:
    """Every manifest of a model that there is, and those that are lost but for their copies."""
    prefix = rec.manifests_prefix(model)
    names = [info.key[len(prefix) :].removesuffix(".json.zst") for info in storage.list(prefix)]
    found: _Named = {(model, name): () for name in names if rec.manifest_key(model, name) == f"{prefix}{name}.json.zst"}
    for of, digest, copy in manifest_copies(storage):
        if of == model:
            found[model, digest] = (*found.get((model, digest), ()), copy)
    return {name: copies for name, copies in found.items() if _DIGEST.fullmatch(name[1])}


def _named(storage: Storage, model: str, limit: float) -> tuple[_Named, _Named]:
    live: _Named = {}
    recent: _Named = {}
    prefix = rec.versions_prefix(model)
    for folder, infos in groupby(storage.list(prefix), key=lambda info: info.key[len(prefix) :].partition("/")[0]):
        if rec.ascending(folder) is None:
            continue
        superseded = math.inf
        for info in infos:
            if not rec.is_record(info.key[len(prefix) :]):
                continue  # not ours
            if superseded <= limit:
                break
            record = rec.parse_version(listed(storage, info.key), info.key)
            if record.deleted and info.modified <= limit:
                break
            found = live if superseded == math.inf and not record.deleted else recent
            for entry in record.variants.values():
                copies = found.get((model, entry.manifest), ())
                found[model, entry.manifest] = copies if entry.copy in copies else (*copies, entry.copy)
            superseded = info.modified
    return live, recent


def _manifest(
    repo: Repo, name: tuple[str, str], copies: tuple[str, ...]
) -> tuple[Manifest, tuple[str, ...]] | CorruptionError:
    """A manifest, from a copy if need be, and the digests of the packs that are its copies; an error where there is none."""
    model, digest = name
    try:
        manifest = repo.manifests.read(model, digest)
        return manifest, copies or (copy_of(repo.storage, model, digest, manifest).digest,)
    except CorruptionError as error:
        for copy in copies:
            with suppress(NotFoundError, CorruptionError, FormatError):
                return read_copy(repo.storage, copy, digest)[0], copies
        return CorruptionError(
            f"nothing was swept, because what it refers to is not known: {error}", model=model, object=error.object
        )
