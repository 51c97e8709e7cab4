"""Models, versions and variants described as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from modelstore.errors import ModelStoreError, StorageError
from modelstore.format.answers.history import LogEntry
from modelstore.format.answers.results import (
    Description,
    FileInfo,
    ModelInfo,
    Problem,
    TensorInfo,
    VariantInfo,
    VersionInfo,
)
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VariantEntry, VersionRecord


def model_info(
    model: str, live: Sequence[VersionRecord], tags: Mapping[str, int], damaged: Sequence[ModelStoreError] = ()
) -> ModelInfo:
    """A model from its live versions, oldest first, and its tags; what of it cannot be read."""
    problems = tuple(problem(error, model) for error in damaged)
    if not live:
        return ModelInfo(model, 0, 0, dict(tags), 0, 0, problems)
    original = live[-1].variants[ORIGINAL]
    return ModelInfo(model, len(live), live[-1].version, dict(tags), original.nbytes, original.stored, problems)


def problem(error: ModelStoreError, model: str) -> Problem:
    """An error as an entry of a report; it names the model that this is of."""
    text, of = str(error), error.model or model
    if of and repr(of) not in text and not isinstance(error, StorageError):  # a network is of no model
        text = f"of model {of!r}: {text}"
    return Problem(error.kind, text, of or None, error.tensor, error.chunk, error.object)


def version_info(record: VersionRecord, tags: Mapping[str, int]) -> VersionInfo:
    """A live version, and which of the model's tags name it."""
    original = record.variants[ORIGINAL]
    named = tuple(sorted(tag for tag, version in tags.items() if version == record.version))
    return VersionInfo(record.version, original.created, named, _variants(record), original.nbytes, original.stored)


def log_entry(record: VersionRecord, tags: Mapping[str, int]) -> LogEntry:
    """The newest record of a version, as an entry of its history."""
    note, original = record.note or Note(), record.variants[ORIGINAL]
    return LogEntry(
        record.version,
        original.created,
        note.by,
        note.message,
        note.meta,
        note.source,
        note.parent,
        original.codec,
        original.tensors,
        original.nbytes,
        original.stored,
        _variants(record),
        tuple(sorted(tag for tag, version in tags.items() if version == record.version)),
        record.created if record.deleted else None,
    )


def variant_infos(record: VersionRecord) -> list[VariantInfo]:
    """The variants of a version."""
    entries = [(name, record.variants[name]) for name in _variants(record)]
    return [VariantInfo(name, e.codec, e.nbytes, e.stored, e.tensors, e.created) for name, e in entries]


def _variants(record: VersionRecord) -> tuple[str, ...]:
    """Names of the variants, the original first."""
    return tuple(sorted(record.variants, key=lambda name: (name != ORIGINAL, name)))


def describe(
    record: VersionRecord, variant: str, entry: VariantEntry, tags: tuple[str, ...], manifest: Manifest
) -> Description:
    """All that a record and a manifest say of a variant."""
    parent = f"{manifest.base.model} (manifest {manifest.base.manifest})" if manifest.base else None
    note = record.note or Note()
    return Description(
        record.model,
        record.version,
        variant,
        tags,
        entry.created,
        manifest.nbytes,
        manifest.stored,
        tuple(_tensor(manifest, tensor) for tensor in manifest.tensors),
        tuple(FileInfo(file.name, file.shape[0]) for file in manifest.files),
        manifest.aliases,
        manifest.metadata,
        parent,
        manifest.recipe,
        manifest.metrics,
        note.by,
        note.source,
        note.message,
        note.meta,
    )


def _tensor(manifest: Manifest, tensor: Tensor) -> TensorInfo:
    stored = int(manifest.length[manifest.rows(tensor)].sum())
    codec = manifest.codecs[tensor.codec].name
    return TensorInfo(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        tensor.chunk,
        codec,
        tensor.nbytes,
        stored,
        tensor.chunks,
        tensor.digest,
    )


def weights_of(manifest: Manifest) -> tuple[int, int]:
    """How many numbers a variant's tensors have, and the bytes of their encoded chunks, each distinct one counted once."""
    rows = np.concatenate([manifest.rows(tensor) for tensor in manifest.tensors] or [np.zeros(0, np.int64)])
    at = np.stack([manifest.pack[rows].astype(np.uint64), manifest.offset[rows], manifest.length[rows]])
    stored = int(np.unique(at, axis=1)[2].sum()) if at.size else 0
    return sum(math.prod(tensor.shape) for tensor in manifest.tensors), stored
