"""The cluster beside a store: what its hosts hold ahead of time, the jobs on it, nodes that leave."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.access import Access
from modelstore.client.arguments import Checked
from modelstore.errors import NotFoundError
from modelstore.format.names import parse_reference
from modelstore.format.progress import Progress, meter
from modelstore.format.units import Duration, parse_duration

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session
    from modelstore.cluster.pieces import StoreAddress
    from modelstore.cluster.save.orders import Order
    from modelstore.format.answers import cluster_results, results
    from modelstore.plan.layout import Shard


class Cluster(Checked):
    """The Ray cluster that a store was opened with: `store.cluster`. May be used from many threads."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def __reduce__(self) -> tuple[Any, ...]:
        return Cluster, (self._access,)

    def __repr__(self) -> str:
        return f"Cluster({self._access.repo.storage.url!r})"

    @property
    def session(self) -> Session:
        """The connection to the cluster's hosts. For tools that look inside."""

        from modelstore.client.clustered import in_cluster

        return in_cluster(self._access)[0]

    @property
    def source(self) -> StoreAddress:
        """How the cluster's hosts open the store. For tools that look inside."""

        from modelstore.client.clustered import in_cluster

        return in_cluster(self._access)[1]

    @property
    def pending(self) -> dict[str, tuple[Order, results.Saved]]:
        """Saves with `ack="memory"` that hosts still have to store, by id; `Store.flush` waits for them."""
        return self._access.pending

    # ------------------------------------------------------------------ what hosts hold

    def prefetch(
        self,
        ref: str,
        *,
        tier: Literal["memory", "disk", "gpu"] = "memory",
        replicas: int | None = None,
        progress: Progress | None = None,
    ) -> cluster_results.Prefetched:
        """Get a variant's chunks into the hosts' tier. Each chunk is read from the storage once.

        Args:
            ref: The variant, as `name[@version-or-tag][:variant]`.
            tier: The tier of the hosts that holds them.
            replicas: How many hosts hold each chunk (default: its home alone). Copies go from host to host.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The amounts that are there now; less than all if the tiers take no more.

        Raises:
            NotFoundError: There is no such model, version or variant.
            StorageError: The hosts cannot read the storage.

        Example:
            >>> store.cluster.prefetch("acme/llama@prod:int4", replicas=2)
        """
        return self._prefetch(ref, tier, replicas, None, progress)

    def pin(self, ref: str, *, tier: Literal["memory", "disk", "gpu"] = "memory") -> cluster_results.Prefetched:
        """Prefetch a variant, and evict neither its chunks nor the decoded model, where it is mapped, until `unpin`.

        Args:
            ref: The variant.
            tier: The tier of the hosts that holds it.

        Returns:
            The amounts that are there now, as for `prefetch`.

        Raises:
            NotFoundError: There is no such model, version or variant.
            StorageError: The hosts cannot read the storage.

        Example:
            >>> store.cluster.pin("acme/llama@prod")
        """
        done = self._prefetch(ref, tier, None, _pin_of(ref), None)
        self.session.pin_image(self._access.stored(parse_reference(ref)).manifest.content, _pin_of(ref))
        return done

    def unpin(self, ref: str) -> None:
        """Let the chunks of a pinned variant, and its decoded tensors, be evicted when their place is wanted.

        Args:
            ref: The variant, as it was given to `pin`.

        Raises:
            UnsupportedError: The store was opened in a process of which this one was forked.

        Example:
            >>> store.cluster.unpin("acme/llama@prod")
        """
        self.session.unpin(_pin_of(ref))

    def evict(self, ref: str | None = None) -> int:
        """Take a variant's chunks and decoded tensors out of all hosts, except what is pinned.

        Args:
            ref: The variant; without it, everything.

        Returns:
            Bytes freed.

        Raises:
            NotFoundError: There is no such model, version or variant.

        Example:
            >>> store.cluster.evict("acme/llama@3")
        """
        session = self.session
        if ref is None:
            return session.evict(None)
        manifest = self._access.stored(parse_reference(ref)).manifest
        return session.evict([manifest.digest(row) for row in range(len(manifest.pack))], manifest.content)

    def _prefetch(
        self, ref: str, tier: str, replicas: int | None, pin: str | None, progress: Progress | None
    ) -> cluster_results.Prefetched:
        from modelstore.client.clustered import in_cluster
        from modelstore.cluster.read.prefetch import prefetch

        session, source = in_cluster(self._access)
        manifest = self._access.stored(parse_reference(ref)).manifest
        metered = meter(progress, manifest.stored, f"fetching {ref}")
        return prefetch(session, source, manifest, ref, tier=tier, replicas=replicas, pin=pin, progress=metered)

    # ------------------------------------------------------------------ handing tensors out

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
        """Give Ray actors a variant's tensors: calls `method` of each with {name: tensor}, some at a time, until it has all.

        On every node with some of the workers, one sender reads and decodes the model once and hands it on: from host memory
        through Ray's own objects ("object_store"), or, with `device="cuda"`, from a GPU by Ray Direct Transport: NIXL where it
        is installed, else NCCL. Each tensor is checked where it arrives; those of one call share their memory: copy them, or
        keep all. Errors of a worker's method are raised here.

        Args:
            ref: The variant.
            workers: Handles of Ray actors.
            method: The name of the workers' method that takes {name: tensor}.
            shards: A layout for each worker.
            names: Only these tensors.
            transport: Another transport; all but "object_store" need workers made with
                `@ray.remote(enable_tensor_transport=True)`.
            device: The device on which the senders hold the tensors.
            gpus: The share of a GPU that a sender takes.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The delivery: bytes, senders, the transport, seconds.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.
            ConflictError: A worker is in a group of processes already, and Gloo or NCCL would need one.
            StorageError: A worker died; with Gloo and NCCL, Ray then ends others, too.

        Example:
            >>> store.cluster.deliver("acme/llama:int8", workers, "take_weights")
        """

        from modelstore.cluster.read.delivery import deliver
        from modelstore.format.answers import cluster_results
        from modelstore.plan.layout import as_layout

        access = self._access
        source, started = self.source, time.monotonic()
        parsed = parse_reference(ref)
        entry = access.repo.catalog.entry(parsed)[1]
        model = access.opened(parsed.name, entry)
        if shards is not None and len(shards) != len(workers):
            raise ValueError(f"there are {len(shards)} shards for {len(workers)} workers: give each worker one")
        layouts = [as_layout(shard) for shard in shards] if shards is not None else [None] * len(workers)
        nbytes, senders, used = deliver(
            model,
            source,
            entry.manifest,
            workers,
            method,
            layouts=layouts,
            names=names,
            transport=transport,
            device=device,
            gpus=gpus,
            progress=meter(progress, model.manifest.nbytes * len(workers), f"delivering {ref}"),
        )
        return cluster_results.Delivered(ref, len(workers), senders, nbytes, used, time.monotonic() - started)

    # ------------------------------------------------------------------ jobs and nodes

    def jobs(self) -> list[cluster_results.JobStatus]:
        """List the compressions that run on the cluster now, of all users.

        Returns:
            Each job: its name, what it makes, and how far it is.

        Raises:
            UnsupportedError: The store was opened in a process of which this one was forked.
            StorageError: The cluster does not have any hosts left.

        Example:
            >>> [job.job for job in store.cluster.jobs()]
        """

        from modelstore.client.clustered import in_cluster
        from modelstore.cluster.work.jobs import jobs

        in_cluster(self._access)
        return jobs()

    def cancel(self, job: str) -> None:
        """Stop a job. Its finished parts stay, and the same compression continues from there.

        Args:
            job: The job's name, as `jobs` lists it.

        Raises:
            NotFoundError: No such job runs.

        Example:
            >>> store.cluster.cancel(store.cluster.jobs()[0].job)
        """

        from modelstore.client.clustered import in_cluster
        from modelstore.cluster.work.jobs import cancel

        in_cluster(self._access)
        if not cancel(job):
            raise NotFoundError(f"no job {job!r} runs on the cluster: list them with 'modelstore jobs'")

    def drain(self, node: str, *, wait: Duration = 0.0) -> list[str]:
        """Prepare for a node to leave: its hosts get no new chunks, and send what they hold to other hosts.

        Args:
            node: The node's id or the start of it, its address, or its host's name.
            wait: How long to wait at most, in seconds or as a text such as "10m", until all is handed on as far as
                others have room; `status` shows what is left.

        Returns:
            The names of the node's hosts.

        Raises:
            NotFoundError: No host runs on such a node.
            ConflictError: No other host is left.
            StorageError: It takes longer than `wait`; it goes on.

        Example:
            >>> store.cluster.drain("10.0.0.7", wait=60)
        """
        return self.session.drain(node, seconds=parse_duration(wait))

    def undrain(self, node: str) -> list[str]:
        """Let the hosts of a node that does not leave after all be homes again.

        Args:
            node: As for `drain`.

        Returns:
            The names of the node's hosts.

        Raises:
            NotFoundError: No host runs on such a node.

        Example:
            >>> store.cluster.undrain("10.0.0.7")
        """
        return self.session.drain(node, draining=False)

    def status(self) -> cluster_results.ClusterStatus:
        """Tell of nodes, their hosts, what these hold by tier, hits, and work in flight.

        Returns:
            The status, as plain data; sizes are bytes.

        Raises:
            UnsupportedError: The store was opened in a process of which this one was forked.

        Example:
            >>> [host.node for host in store.cluster.status().hosts]
        """
        from modelstore.cluster.status import status

        return status(self.session)


def _pin_of(ref: str) -> str:
    return str(parse_reference(ref))
