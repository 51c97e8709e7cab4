"""Methods of a store that are its cluster's: `store.prefetch(ref)` is `store.cluster.prefetch(ref)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.base import OpenedStore
from modelstore.client.cluster import Cluster
from modelstore.client.forwards import told_by
from modelstore.format.progress import Progress
from modelstore.format.units import Duration

if TYPE_CHECKING:
    from modelstore.format.answers import cluster_results
    from modelstore.plan.layout import Shard


class OfCluster(OpenedStore):
    """The part of a store that is its cluster's."""

    @property
    def cluster(self) -> Cluster | None:
        """The cluster that the store was opened with; None without one."""
        return self._joined if self._access.clustered else None

    @property
    def _joined(self) -> Cluster:
        return Cluster(self._access)  # which says so where there is none

    @told_by(Cluster.prefetch, "store.cluster.prefetch(…)")
    def prefetch(
        self,
        ref: str,
        *,
        tier: Literal["memory", "disk", "gpu"] = "memory",
        replicas: int | None = None,
        progress: Progress | None = None,
    ) -> cluster_results.Prefetched:
        return self._joined.prefetch(ref, tier=tier, replicas=replicas, progress=progress)

    @told_by(Cluster.pin, "store.cluster.pin(…)")
    def pin(self, ref: str, *, tier: Literal["memory", "disk", "gpu"] = "memory") -> cluster_results.Prefetched:
        return self._joined.pin(ref, tier=tier)

    @told_by(Cluster.unpin, "store.cluster.unpin(…)")
    def unpin(self, ref: str) -> None:
        self._joined.unpin(ref)

    @told_by(Cluster.evict, "store.cluster.evict(…)")
    def evict(self, ref: str | None = None) -> int:
        return self._joined.evict(ref)

    @told_by(Cluster.deliver, "store.cluster.deliver(…)")
    def deliver(
        self,
        ref: str,
        workers: Sequence[Any],
        method: str,
        *,
        shards: Sequence[Shard | None] | None = None,
        names: Iterable[str] | None = None,
        transport: Literal["gloo", "nccl", "nixl", "cuda_ipc", "object_store"] | None = None,
        device: str = "cpu",
        gpus: float = 0.01,
        progress: Progress | None = None,
    ) -> cluster_results.Delivered:
        return self._joined.deliver(
            ref,
            workers,
            method,
            shards=shards,
            names=names,
            transport=transport,
            device=device,
            gpus=gpus,
            progress=progress,
        )

    @told_by(Cluster.jobs, "store.cluster.jobs(…)")
    def jobs(self) -> list[cluster_results.JobStatus]:
        return self._joined.jobs()

    @told_by(Cluster.cancel, "store.cluster.cancel(…)")
    def cancel(self, job: str) -> None:
        self._joined.cancel(job)

    @told_by(Cluster.drain, "store.cluster.drain(…)")
    def drain(self, node: str, *, wait: Duration = 0.0) -> list[str]:
        return self._joined.drain(node, wait=wait)

    @told_by(Cluster.undrain, "store.cluster.undrain(…)")
    def undrain(self, node: str) -> list[str]:
        return self._joined.undrain(node)

    @told_by(Cluster.status, "store.cluster.status(…)")
    def cluster_status(self) -> cluster_results.ClusterStatus:
        return self._joined.status()
