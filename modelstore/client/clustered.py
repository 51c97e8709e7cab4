"""Operations of a store through a cluster: saves to the memory of two nodes, tensors that share a node's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from modelstore.client.access import Access, log
from modelstore.execute.read.loading import Variant
from modelstore.format.answers import results
from modelstore.format.names import ORIGINAL, Reference
from modelstore.format.structure import CHECKPOINT
from modelstore.plan.layout_share import Share
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    import torch

    from modelstore.cluster.control.session import Session
    from modelstore.cluster.pieces import StoreAddress
    from modelstore.execute.write.save import Outcome
    from modelstore.format.objects.note import Note


def in_cluster(access: Access) -> tuple[Session, StoreAddress]:
    """The connection to the cluster, and how its hosts open the store; `ValueError` without a cluster."""
    session = access.session
    if session is None:
        raise ValueError('this store was opened without a cluster: open it with cluster="auto" or the address of one')
    assert access.source is not None
    return session, access.source


def acknowledged(
    access: Access, name: str, tag: str | None, store_to: Callable[..., Outcome], started: float, note: Note
) -> results.Saved:
    """Save to the memory of two nodes."""
    from modelstore.cluster.save import acknowledge

    session, source = in_cluster(access)
    result = acknowledge.save(
        session,
        session.here(),
        access.repo.storage,
        source,
        name,
        tag,
        lambda storage: store_to(Repo.on(storage), resumable=False),
        note,
    )
    done = saved(name, result.version, result.outcome, time.monotonic() - started)
    if result.order is not None:
        access.pending[result.order.save] = result.order, done
    return done


def mapped(
    access: Access, ref: Reference, model: Variant, shares: Mapping[str, Share]
) -> dict[str, torch.Tensor] | None:
    """Tensors that share the node's memory with every other reader there; None while its host is being replaced."""
    from modelstore.cluster.network.calls import HostGoneError
    from modelstore.cluster.read.mapping import mapped

    session, source = in_cluster(access)
    try:
        return mapped(session, source, model, access.repo.catalog.entry(ref)[1].manifest, shares)
    except HostGoneError as problem:
        log.warning("model %r is loaded without a map: %s", ref.name, problem)
        return None


def saved(name: str, version: int, outcome: Outcome, seconds: float) -> results.Saved:
    """The answer of a save; without a version it is not durable yet."""
    entry, tally = outcome.others.get(CHECKPOINT, outcome.entry), outcome.tally
    return results.Saved(
        name,
        version,
        ORIGINAL,
        entry.tensors,
        entry.nbytes,
        tally.stored,
        tally.reused,
        seconds,
        outcome.entry.manifest,
        durable=version > 0,
        left_out=outcome.left_out,
        remarks=outcome.remarks,
    )
