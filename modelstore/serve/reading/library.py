"""A store as the Hub speaks of it: models, the revisions of each, and the files of a revision.

A revision is `main` (the newest version), a version's number, a tag, a variant of the newest version, `VERSION-OR-TAG:VARIANT`,
or a commit: 40 hexadecimal digits, which are a digest of model, version, variant and manifest. A model `NAME-GGUF` that is not
stored has the GGUF files of `NAME`, as such models are called on the Hub: llama.cpp looks on `main` alone.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from modelstore.errors import ModelStoreError, NotFoundError, UnsupportedError
from modelstore.format.digest import name_of
from modelstore.format.names import LATEST, MAX_VERSION, ORIGINAL, Reference, is_model, is_word
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.structure import CHECKPOINT
from modelstore.integrations.gguf.quants import TYPES
from modelstore.serve.refusals import ENTRY, REVISION, RefusedError, no_model

if TYPE_CHECKING:
    from modelstore.client import Store
    from modelstore.execute.export.view import ExportedFile

T = TypeVar("T")
MAIN = "main"
GGUF = "-GGUF"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORM = "1"  # of what is made of a variant: another number where its files get other bytes
_OPENED = 32  # commits whose files are held open
_WARMED = 8
_AWAITED = 10_000
_KNOWN = 4096  # commits that are found without a look at every version


@dataclass(frozen=True)
class Commit:
    """One variant of one version under the name by which it was asked for: a model's own, or that of its GGUF files."""

    model: str
    reference: Reference  # with the number of its version
    id: str
    record: VersionRecord

    @property
    def created(self) -> float:
        """When the variant was made, in Unix seconds."""
        return self.record.variants[self.reference.variant].created

    @property
    def title(self) -> str:
        """The version's description, in a line."""
        said = self.record.note.message if self.record.note else ""
        variant = self.reference.variant
        of = f"version {self.record.version}" + (f", {variant}" if variant != ORIGINAL else "")
        return (f"{said} ({of})" if said else of).splitlines()[0]


class Library:
    """The models of a store. May be used from many threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._catalog = store.repo.catalog
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Reference] = OrderedDict()
        self._awaited: OrderedDict[str, float] = OrderedDict()  # made, and without a version yet
        self._opened: OrderedDict[str, Mapping[str, ExportedFile]] = OrderedDict()

    def models(self) -> list[str]:
        """The names of all models that have a record, ascending."""
        return self._catalog.recorded()

    def commit(self, model: str, revision: str) -> Commit:
        """The commit that a revision of a model names; `RefusedError` if there is no such model or revision.

        A model that has no version yet has version 0, without files.
        """
        since = self._since(model)
        if since is not None and revision in (MAIN, "HEAD", _empty(model, since).id):
            return _empty(model, since)
        name = self._name(model)
        if _COMMIT.fullmatch(revision):
            return self._by_id(model, name, revision)
        where, colon, variant = revision.partition(":")
        if colon and not is_word(variant):
            raise _no_revision(model, revision)
        at = _reference(name, where)
        record = self._resolved(at) if at is not None else None
        if record is not None and (variant or ORIGINAL) in record.variants:
            return self._commit(model, record, variant or ORIGINAL)
        if not colon and record is None and is_word(revision):  # no tag of that name: a variant
            newest = self._catalog.newest(name)
            if revision in newest.variants:
                return self._commit(model, newest, revision)
        raise _no_revision(model, revision)

    def commits(self, model: str) -> list[Commit]:
        """Every variant of every live version of a model, the newest version first, its original before the others."""
        since = self._since(model)
        if since is not None:
            return [_empty(model, since)]
        name = self._name(model)
        damaged: list[ModelStoreError] = []
        return [
            self._commit(model, record, variant)
            for record in reversed(self._catalog.live(name, damaged))
            for variant in sorted(record.variants, key=lambda one: (one != ORIGINAL, one))
            if variant != CHECKPOINT
        ]

    def tags(self, model: str) -> dict[str, int]:
        """A model's tags, and the versions that they name."""
        if self._since(model) is not None:
            return {}
        damaged: list[ModelStoreError] = []
        return self._catalog.tags(self._name(model), damaged)

    def files(self, commit: Commit) -> Mapping[str, ExportedFile]:
        """The files of a commit by their paths, ascending; none of their bytes are made."""
        if not commit.record.version:
            return {}
        with self._lock:
            found = self._opened.get(commit.id)
            if found is not None:
                self._opened.move_to_end(commit.id)
                return found
        made = self._made(commit)
        with self._lock:
            return _kept(self._opened, commit.id, dict(sorted(made.items())), _OPENED)

    def file(self, commit: Commit, path: str) -> ExportedFile:
        """One file of a commit; `RefusedError` if it has none of that path."""
        found = self.files(commit).get(path)
        if found is None:
            raise RefusedError(
                404, f"{commit.model} has no file {path[:80]!r} in this revision", ENTRY, {"X-Repo-Commit": commit.id}
            )
        return found

    def await_first(self, name: str) -> None:
        """Let a model be, before its first version."""
        with self._lock:
            _kept(self._awaited, name, time.time(), _AWAITED)

    def forget_first(self, name: str) -> None:
        """Await no more: there is a version, or none is to come."""
        with self._lock:
            self._awaited.pop(name, None)

    def _since(self, model: str) -> float | None:
        """Since when a model is without a version; None where it has one, or was not made."""
        with self._lock:
            since = self._awaited.get(model)
        return since if since is not None and not self._lives(model) else None

    def _lives(self, name: str) -> bool:
        """Whether there is a model with a version that is not deleted."""
        return self._catalog.head(name) is not None and self._resolved(Reference(name)) is not None

    def warm(self) -> None:
        """Open the files of some variants, so that the first who asks does not wait for what reading them imports."""
        left = _WARMED
        for model in self.models():
            for commit in self.commits(model)[:2]:  # the newest original, and a variant of it
                with suppress(ModelStoreError):  # who asks for it is told
                    self.files(commit)
                left -= 1
            if left <= 0:
                return

    # ------------------------------------------------------------------ what is behind a name

    def _name(self, model: str) -> str:
        """The stored model behind a name; `RefusedError` where there is none."""
        if is_model(model) and self._lives(model):
            return model
        base = model.removesuffix(GGUF)
        if base != model and is_model(base) and self._lives(base):
            return base
        raise no_model(model)

    def _resolved(self, at: Reference) -> VersionRecord | None:
        with suppress(NotFoundError):
            return self._catalog.resolve(at)
        return None

    def _commit(self, model: str, record: VersionRecord, variant: str) -> Commit:
        parts = (_FORM, model, str(record.version), variant, record.variants[variant].manifest)
        id = name_of("\0".join(parts).encode())[:40]
        reference = Reference(record.model, record.version, None, variant)
        with self._lock:
            _kept(self._known, id, reference, _KNOWN)
        return Commit(model, reference, id, record)

    def _by_id(self, model: str, name: str, id: str) -> Commit:
        """A commit by its id: where it was not seen lately, among all of the model's."""
        with self._lock:
            known = self._known.get(id)
        if known is not None and known.name == name:
            record = self._resolved(known)
            if record is not None and known.variant in record.variants:
                found = self._commit(model, record, known.variant)
                if found.id == id:
                    return found
        for found in self.commits(model):
            if found.id == id:
                return found
        raise _no_revision(model, id)

    def _made(self, commit: Commit) -> Mapping[str, ExportedFile]:
        model = self.store[str(commit.reference)]
        if commit.model == commit.reference.name:
            try:
                made = model.exported()
            except UnsupportedError:  # engines have no packing for it: the weights that it stands for
                made = model.exported(dequantize=True)
            if commit.record.variants[commit.reference.variant].tensors:
                return made
            own = {file.path for file in model.describe().files}  # an export has weights, if none
            return {path: file for path, file in made.items() if path in own}
        return _gguf_files(model.exported)


def _gguf_files(exported: Callable[..., Mapping[str, ExportedFile]]) -> Mapping[str, ExportedFile]:
    """The GGUF file of each type that a model can be written as: of one that was saved as blocks, those."""
    found: dict[str, ExportedFile] = {}
    for kind in TYPES:
        with suppress(UnsupportedError, ValueError):
            found.update(exported(format="gguf", gguf_type=kind))
    return found or exported(format="gguf")


def _empty(model: str, since: float) -> Commit:
    """What a model is before its first version."""
    entry = VariantEntry("", "", 0, 0, 0, "", since)
    record = VersionRecord(FORMAT, model, 0, 0, "", since, {ORIGINAL: entry})
    return Commit(model, Reference(model), name_of(f"{_FORM}\0{model}".encode())[:40], record)


def _reference(name: str, where: str) -> Reference | None:
    """The version that the first part of a revision names, None if it can name none."""
    if where in (MAIN, "HEAD", LATEST):
        return Reference(name)
    if where.isascii() and where.isdigit() and len(where) <= 8 and 1 <= int(where) <= MAX_VERSION:
        return Reference(name, int(where))
    return Reference(name, tag=where) if is_word(where) else None


def _no_revision(model: str, revision: str) -> RefusedError:
    return RefusedError(
        404,
        f"{model} has no revision {revision[:80]!r}: name main, a version, a tag, a variant, or VERSION:VARIANT",
        REVISION,
    )


def _kept(held: OrderedDict[str, T], key: str, value: T, most: int) -> T:
    """The value, or the one that is held by that name already; the one not asked for the longest goes."""
    value = held.setdefault(key, value)
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)
    return value
