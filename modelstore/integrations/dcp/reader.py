"""`dcp.load` from a store: every rank reads the boxes that it holds, and no others."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Size
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from modelstore.client import Model, Store
from modelstore.errors import ConflictError, FormatError
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.tensors import torch_dtype
from modelstore.format.names import parse_reference
from modelstore.format.region import Region
from modelstore.integrations.dcp.notes import FILE, VERSION, CheckpointNotes, decoded


class CheckpointReader(StorageReader):
    """Reads a version as a checkpoint: a `StorageReader` for `dcp.load`, into any number of ranks, meshes and parallelisms.

    Each rank reads only the chunks that its own boxes touch, straight into its tensors, and each chunk is checked. Any version
    and variant can be read, whether `dcp.save` made it or not.

    Args:
        store: The store, opened by every rank.
        ref: The model, as `name[@version-or-tag][:variant]`, by default its newest version. A `checkpoint_id` of `dcp.load`
            takes the place of the version or tag. All ranks read the version that the coordinator finds.

    Raises:
        NotFoundError: There is no such model, version or variant.
        CorruptionError: Stored bytes are wrong, and no mirror has good ones. torch wraps errors of ranks in a
            `CheckpointException`.

    Plain values are pickles that torch wrote. `dcp.load` unpickles them: load checkpoints of people you trust.

    Example:
        >>> reader = ms.dcp.Reader(ms.open("s3://bucket/runs"), "acme/run-7")
        >>> dcp.load(state, storage_reader=reader, checkpoint_id="step-1000")
    """

    def __init__(self, store: Store, ref: str) -> None:
        super().__init__()
        if not isinstance(store, Store):
            raise TypeError(f"store is a {type(store).__name__}: give what modelstore.open returns")
        parse_reference(ref)
        self.store, self.ref = store, ref
        self._model: Model | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load; an id names a version or tag in place of the reference's."""
        self._model = None
        if checkpoint_id is not None:
            parsed = parse_reference(self.ref)
            self.ref = str(parse_reference(f"{parsed.name}@{os.fspath(checkpoint_id)}:{parsed.variant}"))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id can name a version or tag."""
        try:
            return bool(parse_reference(f"name@{os.fspath(checkpoint_id)}"))
        except ValueError:
            return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """Describe what is stored: each tensor as one piece, so that a rank asks for exactly its own boxes."""
        self._model = self.store[self.ref]
        return _metadata(self._model.opened(), self._model.ref)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tell every rank which version is read: a save in between could have made another one the newest."""
        assert self._model is not None, "metadata is read first"
        return [replace(plan, storage_data=self._model.ref) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors, and load plain values."""
        assert self._model is not None, "metadata is read first"
        agreed = plan.storage_data
        if isinstance(agreed, str) and agreed != self._model.ref:
            self._model = self.store[agreed]
        items = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in items]
        self._model.fill([(i.storage_index.fqn, _box(i), t) for i, t in zip(items, targets, strict=True)])
        for item, target in zip(items, targets, strict=True):
            planner.commit_tensor(item, target)
        _load_values(self._model, [item for item in plan.items if item.type == LoadItemType.BYTE_IO], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _box(item: ReadItem) -> Region:
    return tuple((a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))


def _notes(variant: Variant) -> CheckpointNotes:
    """What `dcp.save` noted; of a version that was saved otherwise, nothing."""
    files = {file.name for file in variant.manifest.files}
    if FILE not in files:
        return CheckpointNotes(VERSION, {}, {})
    return decoded(variant.file(FILE), files)


def _metadata(variant: Variant, ref: str) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, tensor in variant.manifest.by_name.items():
        whole = ChunkStorageMetadata(Size([0] * len(tensor.shape)), Size(tensor.shape))
        entries[name] = TensorStorageMetadata(TensorProperties(torch_dtype(tensor.dtype)), Size(tensor.shape), [whole])
    notes = _notes(variant)
    entries |= {name: BytesStorageMetadata() for name in notes.values}
    paths: Mapping[str, Any] = {**{name: (name,) for name in entries}, **notes.paths}
    return Metadata(entries, planner_data=dict(paths), storage_meta=StorageMeta(checkpoint_id=ref))


def _load_values(model: Model, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
    if not items:
        return
    variant = model.opened()
    places = _notes(variant).values
    gone = next((i.storage_index.fqn for i in items if i.storage_index.fqn not in places), None)
    if gone is not None:  # the coordinator found another version than this rank
        raise ConflictError(
            f"{model.ref} has no value {gone!r}: a save came between, so name the version", model=model.name
        )
    files = {file: variant.file(file) for file in {places[item.storage_index.fqn].file for item in items}}
    for item in items:
        place = places[item.storage_index.fqn]
        data = files[place.file]
        if place.stop > len(data):
            raise FormatError(f"{FILE} gives a place beyond the end of {place.file}: restore the version", object=FILE)
        planner.load_bytes(item, io.BytesIO(data[place.start : place.stop]))
