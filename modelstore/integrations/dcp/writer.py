"""`dcp.save` and `dcp.async_save` into a store: every rank stores its part, and one write publishes them as a version."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from modelstore.client import Store
from modelstore.errors import UnsupportedError
from modelstore.format.answers.results import Saved
from modelstore.format.names import check_model, check_tag
from modelstore.integrations.dcp.notes import FILE, BytesPlace, bytes_file, encoded
from modelstore.integrations.dcp.retention import META, retire
from modelstore.sources.slices import Slice


@dataclass(frozen=True, slots=True)
class RankOrder:
    """The order of the coordinator to a rank: the session of all ranks, this rank's number, how many there are."""

    session: str
    rank: int
    ranks: int


class CheckpointWriter(StorageWriter):
    """Saves checkpoints of one training run as versions of a model: a `StorageWriter` for `dcp.save` and `dcp.async_save`.

    A checkpoint becomes visible when all ranks have stored their parts, and not before. `checkpoint_id`, such as "step-1000",
    becomes a tag of the version. Unchanged chunks are not stored again.

    Args:
        store: The store, opened by every rank.
        model: The model's name, the same on every rank.
        codec: "packed", "lossless" or "raw", as for `save`.
        keep_last: After each save, delete checkpoints of this run but the newest so many. `gc` frees their bytes.
        keep_every: With `keep_last`, keep each version whose number this divides, too.
        message: A description of the versions, as for `save`.
        meta: Plain values that are kept with each, as for `save`.

    A checkpoint with a tag other than its own id is never deleted. `saved` is, on the coordinator, the answer of the last save.

    Raises:
        UnsupportedError: The state holds a tensor that cannot be stored, or of which a rank holds several pieces; the planner
            caches plans; or `use_collectives=False` is given. torch wraps errors of ranks in a `CheckpointException`.

    Example:
        >>> writer = ms.dcp.Writer(ms.open("s3://bucket/runs"), "acme/run-7", keep_last=3, keep_every=10)
        >>> dcp.save({"model": model_state, "optim": optim_state}, storage_writer=writer, checkpoint_id="step-1000")
    """

    def __init__(
        self,
        store: Store,
        model: str,
        *,
        codec: Literal["packed", "lossless", "raw"] = "packed",
        keep_last: int | None = None,
        keep_every: int | None = None,
        message: str | None = None,
        meta: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(store, Store):
            raise TypeError(f"store is a {type(store).__name__}: give what modelstore.open returns")
        if codec not in ("packed", "lossless", "raw"):
            raise ValueError(f"codec {codec!r} is not one of packed, lossless, raw")
        for name, number in (("keep_last", keep_last), ("keep_every", keep_every)):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name}={number!r} is not valid: it is a number of versions, at least 1")
        if keep_every is not None and keep_last is None:
            raise ValueError("keep_every= is what stays beside the newest: give keep_last= too")
        self.store, self.model, self.codec = store, check_model(model), codec
        self.saved: Saved | None = None
        self._keep = (keep_last, keep_every)
        self._message, self._meta = message, dict(meta or {})
        self._tag: str | None = None
        self._order: RankOrder | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint; its id becomes a tag. `ValueError` if it cannot be one."""
        self._tag = check_tag(os.fspath(checkpoint_id)) if checkpoint_id is not None else None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id can be a tag."""
        try:
            return bool(check_tag(os.fspath(checkpoint_id)))
        except ValueError:
            return False

    def storage_meta(self) -> StorageMeta:
        """The ids of this save, for torch's own notes."""
        return StorageMeta(checkpoint_id=self._tag, save_id=uuid.uuid4().hex)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """`UnsupportedError` for a save in which ranks do not hear of each other."""
        if kwargs.get("use_collectives") is False:
            raise UnsupportedError(
                "use_collectives=False saves a checkpoint for each rank alone, which is not one version: leave it out"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank the session of this checkpoint."""
        if not all(plan.usable for plan in plans):
            raise UnsupportedError(
                "the planner repeats the plan of an earlier save (enable_plan_caching=True), by which ranks do not learn which "
                "checkpoint they save: leave enable_plan_caching out"
            )
        session = f"dcp-{uuid.uuid4().hex}"
        return [replace(plan, storage_data=RankOrder(session, rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Store this rank's part; nothing is visible yet."""
        order = plan.storage_data
        if not isinstance(order, RankOrder):
            raise UnsupportedError(f"{type(planner).__name__}.finish_plan drops the plan's storage_data: keep it")
        self._order = order
        state: dict[str, Slice] = {}
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                _add(state, item, planner)
        values, places = _values(plan, planner, bytes_file(order.rank))
        self.store.save_part(
            self.model,
            state,
            session=order.session,
            rank=order.rank,
            ranks=order.ranks,
            codec=self.codec,
            files={bytes_file(order.rank): values} if places else None,
        )
        done: Future[list[WriteResult]] = Future()
        done.set_result([_result(item, state, places) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the parts of all ranks as the next version, and retire what it supersedes. The coordinator alone does this."""
        assert self._order is not None, "the coordinator writes data before it finishes"
        found = (result for part in results for result in part)
        values = {one.index.fqn: one.storage_data for one in found if isinstance(one.storage_data, BytesPlace)}
        self.saved = self.store.publish(
            self.model,
            self._order.session,
            ranks=self._order.ranks,
            tag=self._tag,
            files={FILE: encoded(values, metadata.planner_data)},
            message=self._message,
            meta={**self._meta, META: self._tag or ""},
        )
        last, every = self._keep
        if last is not None:
            retire(self.store, self.model, last, every)


def _add(state: dict[str, Slice], item: WriteItem, planner: SavePlanner) -> None:
    """Add the tensor of an item, at its place in the whole one."""
    name, said = item.index.fqn, item.tensor_data
    assert said is not None, "an item is bytes or a tensor"
    if name in state:
        raise UnsupportedError(
            f"tensor {name!r} is on this rank in several pieces: give one DTensor, whose shard is a box of it",
            tensor=name,
        )
    if 0 in said.chunk.sizes and 0 not in said.size:
        return  # the shard of a rank that an uneven split left without elements
    values = planner.resolve_data(item)
    assert isinstance(values, torch.Tensor), "the data of a tensor's item is a tensor"
    state[name] = Slice(values, tuple(said.chunk.offsets), tuple(said.size))


def _values(plan: SavePlan, planner: SavePlanner, file: str) -> tuple[bytes, dict[str, BytesPlace]]:
    """The plain values of a plan, one after another, and the place of each."""
    joined = io.BytesIO()
    places: dict[str, BytesPlace] = {}
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            data = planner.resolve_data(item)
            assert isinstance(data, io.BytesIO), "the data of an item of bytes is a buffer"
            start = joined.tell()
            joined.write(data.getbuffer())
            places[item.index.fqn] = BytesPlace(file, start, joined.tell())
    return joined.getvalue(), places


def _result(item: WriteItem, state: Mapping[str, Slice], places: Mapping[str, BytesPlace]) -> WriteResult:
    place = places.get(item.index.fqn)
    if place is not None:
        return WriteResult(item.index, place.stop - place.start, place)
    held = state.get(item.index.fqn)
    return WriteResult(item.index, held.tensor.nbytes if held is not None else 0, None)
