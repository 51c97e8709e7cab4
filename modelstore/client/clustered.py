"""What a store can do beside a cluster: get models into its memory ahead of time, keep them there, let them go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from modelstore.client.base import Base
from modelstore.errors import NotFoundError
from modelstore.execute.loading import Model
from modelstore.execute.saving import Outcome
from modelstore.format import results
from modelstore.format.names import ORIGINAL, Reference, parse_reference
from modelstore.format.note import Note
from modelstore.format.progress import Progress, meter
from modelstore.format.structure import CHECKPOINT
from modelstore.plan.layout import Shard, Share, as_layout
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    import torch

    from modelstore.cluster.session import Session

log = logging.getLogger("modelstore")


class Clustered(Base):
    """The part of a store that speaks with a cluster."""

    def _in_cluster(self) -> Session:
        if self._session is None:
            raise ValueError(
                'this store was opened without a cluster: open it with cluster="auto", "local" or an address'
            )
        return self._session

    def prefetch(
        self,
        ref: str,
        *,
        tier: Literal["memory", "disk", "gpu"] = "memory",
        replicas: int | None = None,
        progress: Progress | None = None,
    ) -> results.Prefetched:
        """Get a variant's chunks into the hosts' `tier`, each to its home and, with `replicas`, to as many holders.

        Each chunk is read from the storage once; copies go from host to host. Returns when all is there, or as much as the
        tiers take. `StorageError` where hosts cannot read the storage.
        """
        return self._prefetch(ref, tier, replicas, None, progress)

    def pin(self, ref: str, *, tier: Literal["memory", "disk", "gpu"] = "memory") -> results.Prefetched:
        """As `prefetch`; neither the chunks nor the decoded model, where it is mapped, are evicted until `unpin`."""
        done = self._prefetch(ref, tier, None, _pin_of(ref), None)
        self._in_cluster().pin_image(self._model(parse_reference(ref)).manifest.content, _pin_of(ref))
        return done

    def unpin(self, ref: str) -> None:
        """Let the chunks of a pinned variant, and its decoded tensors, be evicted when their place is wanted."""
        self._in_cluster().unpin(_pin_of(ref))

    def evict(self, ref: str | None = None) -> int:
        """Take a variant's chunks and decoded tensors (without `ref`, everything) out of all hosts, except what is pinned.

        Bytes freed.
        """
        session = self._in_cluster()
        if ref is None:
            return session.evict(None)
        manifest = self._model(parse_reference(ref)).manifest
        return session.evict([manifest.digest(row) for row in range(len(manifest.pack))], manifest.content)

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
    ) -> results.Delivered:
        """Give Ray actors a variant's tensors: calls `method` of each with {name: tensor}, some at a time, until it has all.

        On every node with some of the workers, one sender reads and decodes the model once and hands it on: from host memory
        through Ray's own objects ("object_store"), or, with `device="cuda"`, from a GPU by Ray Direct Transport: NIXL where it is
        installed, else NCCL. `transport` chooses another one; all but "object_store" want workers made with
        `@ray.remote(enable_tensor_transport=True)`. `shards`: a layout for each worker. Each tensor is checked where it arrives;
        those of one call share their memory: copy them, or keep all. A sender on a GPU takes `gpus` of it.

        `ConflictError` where a worker is in a group of processes already, and Gloo or NCCL would need one; `StorageError` where
        one died: with Gloo and NCCL, Ray then ends others, too. What a worker's method raises is raised here.
        """
        from modelstore.cluster.delivery import deliver

        self._in_cluster()
        assert self._source is not None
        started = time.monotonic()
        parsed = parse_reference(ref)
        entry = self.repo.catalog.entry(parsed)[1]
        model = self._opened(parsed.name, entry)
        if shards is not None and len(shards) != len(workers):
            raise ValueError(f"there are {len(shards)} shards for {len(workers)} workers: give each worker one")
        layouts = [as_layout(shard) for shard in shards] if shards is not None else [None] * len(workers)
        nbytes, senders, used = deliver(
            model,
            self._source,
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
        return results.Delivered(ref, len(workers), senders, nbytes, used, time.monotonic() - started)

    def jobs(self) -> list[results.JobStatus]:
        """The compressions that run on the cluster now, whoever started them."""
        from modelstore.cluster.jobs import jobs

        self._in_cluster()
        return jobs()

    def cancel(self, job: str) -> None:
        """Stop a job; what it finished stays, and the same compression goes on from there. `NotFoundError` if none runs so."""
        from modelstore.cluster.jobs import cancel

        self._in_cluster()
        if not cancel(job):
            raise NotFoundError(f"no job {job!r} runs on the cluster: list them with 'modelstore jobs'")

    def drain(self, node: str, *, wait: float = 0.0) -> list[str]:
        """Prepare for a node to leave: its hosts become home to nothing, and others are sent what they hold. Their names.

        `node`: its id or the beginning of it, its address, or its host's name. Waits at most `wait` seconds until all is handed
        on, as far as others have room; `cluster_status` shows what is left. `NotFoundError` where no host runs on such a node,
        `ConflictError` where no other host is left, `StorageError` where it takes longer: it goes on.
        """
        return self._in_cluster().drain(node, seconds=wait)

    def undrain(self, node: str) -> list[str]:
        """Let the hosts of a node that does not leave after all be homes again. Their names; errors as for `drain`."""
        return self._in_cluster().drain(node, draining=False)

    def cluster_status(self) -> results.ClusterStatus:
        """Nodes, their hosts, what these hold by tier, hits, and work in flight."""
        from modelstore.cluster.status import status

        return status(self._in_cluster())

    def flush(self, timeout: float | None = None) -> list[results.Saved]:
        """Wait until every save of this object with `ack="memory"` is in the storage: those saves, with their versions.

        `StorageError` where that takes longer than `timeout` seconds; hosts go on trying, and it can be waited for again.
        Also where both hosts of one are gone.
        """
        from modelstore.cluster.acknowledge import wait_durable

        pending = dict(self._pending)
        orders = [order for order, _ in pending.values()]
        found = wait_durable(self._in_cluster(), self.repo.storage, orders, timeout)
        for save in pending:
            self._pending.pop(save, None)
        return [msgspec.structs.replace(done, version=found[save], durable=True) for save, (_, done) in pending.items()]

    def _acknowledged(
        self, name: str, tag: str | None, store_to: Callable[..., Outcome], started: float, note: Note
    ) -> results.Saved:
        """Save to the memory of two nodes."""
        from modelstore.cluster import acknowledge

        session = self._in_cluster()
        assert self._source is not None
        result = acknowledge.save(
            session,
            session.here(),
            self.repo.storage,
            self._source,
            name,
            tag,
            lambda storage: store_to(Repo.on(storage), resumable=False),
            note,
        )
        done = saved(name, result.version, result.outcome, time.monotonic() - started)
        if result.order is not None:
            self._pending[result.order.save] = result.order, done
        return done

    def _mapped(self, ref: Reference, model: Model, shares: Mapping[str, Share]) -> dict[str, torch.Tensor] | None:
        """Tensors that share the node's memory with every other reader there; None while its host is being replaced."""
        from modelstore.cluster.calls import GoneError
        from modelstore.cluster.mapping import mapped

        session = self._in_cluster()
        assert self._source is not None
        try:
            return mapped(session, self._source, model, self.repo.catalog.entry(ref)[1].manifest, shares)
        except GoneError as problem:
            log.warning("model %r is loaded without a map: %s", ref.name, problem)
            return None

    def _prefetch(
        self, ref: str, tier: str, replicas: int | None, pin: str | None, progress: Progress | None
    ) -> results.Prefetched:
        from modelstore.cluster.prefetch import prefetch

        session = self._in_cluster()
        assert self._source is not None
        manifest = self._model(parse_reference(ref)).manifest
        metered = meter(progress, manifest.stored, f"fetching {ref}")
        return prefetch(session, self._source, manifest, ref, tier=tier, replicas=replicas, pin=pin, progress=metered)


def saved(name: str, version: int, outcome: Outcome, seconds: float) -> results.Saved:
    """What a save answers; without a version it is not durable yet."""
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
    )


def _pin_of(ref: str) -> str:
    return str(parse_reference(ref))
