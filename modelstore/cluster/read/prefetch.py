"""Gets a manifest's chunks into the tiers of a cluster, in order, in a bounded window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from modelstore.cluster.host.protocol import Host
from modelstore.cluster.network.calls import HostGoneError
from modelstore.cluster.pieces import Piece, StoreAddress, pieces, section_keys
from modelstore.errors import StorageError
from modelstore.format.answers import cluster_results
from modelstore.format.objects.manifest import Manifest
from modelstore.format.progress import Advance
from modelstore.plan.placement import View, holders

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session

Hold = Callable[[str, list[Piece]], "Future[int]"]  # (member, pieces) → bytes of them that it holds then

_ROUNDS = 5  # times that hosts may die meanwhile
_BATCH = 64 << 20  # bytes that one host gets at once
_WINDOW = 2  # such batches under way at each host


def batches(
    view: View, replicas: int, parts: Sequence[Piece], size: int = _BATCH
) -> Iterator[tuple[int, str, list[Piece]]]:
    """(holder's rank, member, pieces): first all homes', then all second holders', and so on. Pure."""
    table = holders(view, section_keys(parts), replicas)
    names = [member.id for member in view.members]
    for rank in range(table.shape[1] if len(parts) else 0):
        filling: dict[int, list[Piece]] = {}
        nbytes: dict[int, int] = {}
        for part, at in zip(parts, table[:, rank].tolist(), strict=True):
            if at < 0:
                continue
            filling.setdefault(at, []).append(part)
            nbytes[at] = nbytes.get(at, 0) + part.length
            if nbytes[at] >= size:
                yield rank, names[at], filling.pop(at)
                nbytes[at] = 0
        yield from ((rank, names[at], left) for at, left in filling.items() if left)


def prefetch(
    session: Session,
    source: StoreAddress,
    manifest: Manifest,
    ref: str,
    *,
    tier: str,
    replicas: int | None,
    pin: str | None,
    progress: Advance | None,
) -> cluster_results.Prefetched:
    """Have every holder hold its chunks; where hosts die meanwhile, those that take their place.

    `StorageError` if none of the hosts answers, or they die again and again.
    """
    started = time.monotonic()
    copies = replicas if replicas is not None else session.settings.replicas
    if copies < 1:
        raise ValueError(f"replicas={copies} is not positive")
    unique = {part.digest: part for part in pieces(manifest, range(len(manifest.pack))) if part.length}
    parts = sorted(unique.values(), key=lambda part: (part.pack, part.offset))
    lost: set[str] = set()
    for attempt in range(_ROUNDS):
        view = session.without(lost)
        if not view.members:
            raise StorageError("the cluster has no hosts: look at 'modelstore cluster status'")

        def hold(member: str, batch: list[Piece]) -> Future[int]:
            return session.peers.ask(member, Host.hold, source, batch, tier, pin)

        held, lost = _round(view, copies, parts, hold, progress if attempt == 0 else None)
        if not lost:
            wanted = sum(part.length for part in parts)
            members = min(copies, len(view.members))
            return cluster_results.Prefetched(ref, wanted, held, members, time.monotonic() - started)
    raise HostGoneError(
        f"hosts {', '.join(sorted(lost))} died while they were to hold {ref!r}: call it again, which goes on"
    )


def _round(
    view: View, copies: int, parts: Sequence[Piece], hold: Hold, progress: Advance | None
) -> tuple[int, set[str]]:
    """Ask every holder once: bytes that they hold, and which of them are gone."""
    open_: dict[Future[int], tuple[int, str, int]] = {}
    lost: set[str] = set()
    held = last_rank = 0

    def settle(leave: int) -> int:
        """Wait until at most so many batches are open; bytes that those which ended hold."""
        got = 0
        while len(open_) > leave:
            done, _ = wait(open_, return_when=FIRST_COMPLETED)
            for future in done:
                rank, member, wanted = open_.pop(future)
                try:
                    got += future.result()
                except HostGoneError:
                    lost.add(member)
                if progress and rank == 0:
                    progress(wanted)
        return got

    for rank, member, batch in batches(view, copies, parts):
        if member in lost:
            continue
        if rank != last_rank:  # copies come from homes, which must have them first
            held, last_rank = held + settle(0), rank
        open_[hold(member, batch)] = (rank, member, sum(part.length for part in batch))
        held += settle(_WINDOW * len(view.members))
    return held + settle(0), lost
