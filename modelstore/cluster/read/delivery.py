"""Hands a model's tensors to Ray actors, from memory to memory: by Ray Direct Transport, or through Ray's objects.

On each node that has some of the actors, one sender reads the model through the cluster's hosts and decodes it once, batch by
batch, for all of them. A batch is one buffer of bytes on the sender's device, so that no transport needs to know dtypes; the
receiving process checks it, and gives its own actor views of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelstore.cluster.control.session import Session
from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.read.models import opened
from modelstore.errors import ConflictError, CorruptionError, StorageError
from modelstore.execute.read.loading import Variant
from modelstore.format.buffers import Bytes
from modelstore.format.digest import digest_of, matches
from modelstore.format.progress import Advance
from modelstore.format.region import nbytes
from modelstore.plan.layout import Layout, Share
from modelstore.plan.read import Want
from modelstore.plan.work import Limits, Work

if TYPE_CHECKING:
    import torch

BATCH = 256 << 20  # bytes that are handed over at once, about; a larger tensor comes alone
TRANSPORTS = ("gloo", "nccl", "nixl", "cuda_ipc", "object_store")
_GROUPED = ("gloo", "nccl")  # those whose ends must have joined a group
_WINDOW = 2  # batches on their way at each sender
_ALIGNED = 256  # bytes at which tensors start in a batch: enough for any dtype, and any GPU
_ANSWER = 60.0  # seconds for an actor to say where it is, or for a sender to come up
_MEMORY = 1 << 30  # bytes of a sender's working memory, beside its batches


@dataclass(frozen=True)
class BatchEntry:
    """A tensor within a batch: all names of it, and which bytes of the buffer; `digest` is their BLAKE3."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    digest: bytes = b""


@dataclass(frozen=True)
class Batch:
    """Tensors on their way: one uint8 buffer, 1-d, and the place of each in it. An array is Ray's memory, which others map."""

    buffer: torch.Tensor | Bytes
    entries: tuple[BatchEntry, ...]


def batches(model: Variant, shares: Mapping[str, Share], size: int = BATCH) -> Iterator[list[BatchEntry]]:
    """A model's shares in batches of about `size` bytes, in order; tied names are one tensor. Pure."""
    groups: dict[tuple[str, Share], list[str]] = {}
    for name, share in shares.items():
        groups.setdefault((model.tensor(name).name, share), []).append(name)
    batch: list[BatchEntry] = []
    end = 0
    for (name, share), names in groups.items():
        tensor = model.tensor(name)
        length = nbytes(share.shape, tensor.kind.itemsize)
        if batch and end + length > size:
            yield batch
            batch, end = [], 0
        batch.append(BatchEntry(tuple(names), tensor.dtype, share.shape, end, length))
        end += -(-length // _ALIGNED) * _ALIGNED
    if batch:
        yield batch


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Views of a batch's buffer, by name. `CorruptionError` if bytes are not what was sent."""
    import torch

    from modelstore.execute.read.tensors import torch_dtype

    # A receiver must not write to memory that others map, too.
    buffer = torch.from_numpy(batch.buffer.copy()) if isinstance(batch.buffer, np.ndarray) else batch.buffer
    found: dict[str, torch.Tensor] = {}
    for entry in batch.entries:
        part = buffer[entry.offset : entry.offset + entry.size]
        if not matches(part.cpu().numpy(), entry.digest):
            raise CorruptionError(
                f"tensor {entry.names[0]!r} arrived with other bytes than were sent: deliver it again",
                tensor=entry.names[0],
            )
        kind = torch_dtype(entry.dtype)
        tensor = part.view(kind).reshape(entry.shape) if entry.size else part.new_empty(entry.shape, dtype=kind)
        found.update(dict.fromkeys(entry.names, tensor))
    return found


class Sender:
    """Reads batches of a model, and has them on a device. An actor's class; knows its actors by nothing but its answers."""

    def __init__(self, source: StoreAddress, name: str, digest: str, device: str | None) -> None:
        self._model = opened(Session(), source, name, digest)
        self._device = device

    def ready(self) -> bool:
        """True, once it is there."""
        return True

    def send(self, layout: Layout | None, entries: Sequence[BatchEntry]) -> Batch:
        """These tensors, or what a layout holds of them."""
        return read_batch(self._model, layout, entries, self._device)


def read_batch(model: Variant, layout: Layout | None, entries: Sequence[BatchEntry], device: str | None) -> Batch:
    """Decode a batch into a tensor on a device, or into an array; each chunk is checked, and each tensor gets its digest."""
    import torch

    from modelstore.execute.read.tensors import pinned

    shares = model.shares(layout, [entry.names[0] for entry in entries])
    size = max(1, entries[-1].offset + entries[-1].size)  # an empty buffer is nothing that every transport moves
    memory = pinned(size) if device and device.startswith("cuda") else np.zeros(size, np.uint8)
    wants = [Want(model.tensor(entry.names[0]), shares[entry.names[0]]) for entry in entries]

    def allocate(index: int, _: int) -> Bytes:
        entry = entries[index]
        return memory[entry.offset : entry.offset + entry.size]

    for _ in model.reader.stream(wants, Work(Limits(_MEMORY)), allocate=allocate, bounded=False):
        pass
    digests = [digest_of(allocate(at, 0)) for at in range(len(entries))]
    done = tuple(replace(entry, digest=digest) for entry, digest in zip(entries, digests, strict=True))
    return Batch(memory if device is None else torch.from_numpy(memory).to(device), done)


def deliver(
    model: Variant,
    source: StoreAddress,
    digest: str,
    workers: Sequence[Any],
    method: str,
    *,
    layouts: Sequence[Layout | None],
    names: Iterable[str] | None,
    transport: str | None,
    device: str,
    gpus: float,
    progress: Advance | None = None,
) -> tuple[int, int, str]:
    """Call `method` of every worker with its tensors, batch by batch: bytes handed over, senders, the transport.

    `ConflictError` if a worker is in a group of this transport already; `ValueError` if NCCL is asked for and a GPU is
    that of two; `StorageError` if a worker or a sender is gone, or no sender comes up. Errors of a worker's own method are
    raised here.
    """
    chosen = list(names) if names is not None else None
    used = _transport(transport, device)
    _check(workers, method, used)
    parts = [list(batches(model, model.shares(layout, chosen))) for layout in layouts]
    moved = 0
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(_sender(node, at, workers, model.name, source, digest, used, device, gpus))
            for node, at in _by_node(workers).items()
        ]
        open_: deque[tuple[Any, int]] = deque()
        stack.callback(_finish, open_)
        for batch in range(max(map(len, parts), default=0)):
            for sender, at in nodes:
                for layout, those in _alike([i for i in at if batch < len(parts[i])], layouts):
                    entries = parts[those[0]][batch]
                    ref = _moved(sender.send, used).remote(layout, entries)
                    size = sum(entry.size for entry in entries)
                    open_ += ((workers[i].__ray_call__.remote(_take, ref, method), size) for i in those)
            moved += _settle(open_, _WINDOW * len(workers), progress)
        moved += _settle(open_, 0, progress)
        return moved, len(nodes), used


def _take(worker: Any, batch: Batch, method: str) -> None:
    """Runs in a worker: calls its own method with the tensors, once these are checked."""
    getattr(worker, method)(tensors_of(batch))


def _transport(asked: str | None, device: str) -> str:
    """The transport of the bytes: a sender is on the node of its workers, where host memory needs no network."""
    if asked is None:
        return "object_store" if device == "cpu" else "nixl" if find_spec("nixl") else "nccl"
    if asked not in TRANSPORTS:
        raise ValueError(f"transport={asked!r} is none of {', '.join(TRANSPORTS)}")
    return asked


def _check(workers: Sequence[Any], method: str, transport: str) -> None:
    """`ValueError` if workers are not what can be delivered to: known now, not after a time-out."""
    if not workers:
        raise ValueError("there are no workers to deliver to")
    for worker in workers:
        if not isinstance(worker, ray.actor.ActorHandle):
            raise TypeError(f"a worker is the handle of a Ray actor, not {worker!r:.80}")
        if not hasattr(worker, method):
            raise ValueError(f"{worker!r} has no method {method!r}")
        if transport != "object_store" and not getattr(worker, "_ray_enable_tensor_transport", True):
            raise ValueError(
                f"{worker!r} takes no direct transport: make it with @ray.remote(enable_tensor_transport=True), or deliver "
                f'with transport="object_store"'
            )


def _by_node(workers: Sequence[Any]) -> dict[str, list[int]]:
    """Which workers each node has."""
    asked = [worker.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for worker in workers]
    found: dict[str, list[int]] = {}
    for at, node in enumerate(_get(asked)):
        found.setdefault(node, []).append(at)
    return found


def _alike(those: Sequence[int], layouts: Sequence[Layout | None]) -> list[tuple[Layout | None, list[int]]]:
    """Workers that hold the same part: it is read for all of them together. Pure."""
    found: list[tuple[Layout | None, list[int]]] = []
    for at in those:
        group = next((group for layout, group in found if layout == layouts[at]), None)
        if group is None:
            found.append((layouts[at], [at]))
        else:
            group.append(at)
    return found


@contextlib.contextmanager
def _sender(
    node: str,
    at: Sequence[int],
    workers: Sequence[Any],
    name: str,
    source: StoreAddress,
    digest: str,
    transport: str,
    device: str,
    gpus: float,
) -> Iterator[tuple[Any, Sequence[int]]]:
    """A sender on a node, in a group with its workers if the transport needs one; gone afterwards."""
    made: Any = (
        ray.remote(enable_tensor_transport=transport != "object_store")(Sender)  # type: ignore[call-overload]
        .options(
            num_cpus=0,
            num_gpus=gpus if device.startswith("cuda") else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(source, name, digest, None if transport == "object_store" else device)
    )
    try:
        _get([made.ready.remote()])
        with (
            _group([made, *(workers[i] for i in at)], transport) if transport in _GROUPED else contextlib.nullcontext()
        ):
            yield made, at
    finally:
        ray.kill(made)


@contextlib.contextmanager
def _group(actors: Sequence[Any], transport: str) -> Iterator[None]:
    """The actors in a group, which they leave afterwards, so that they can join the next one.

    Ray's groups of Gloo use the process group of torch, of which a process has one; it is left as it was found.
    """
    from ray.experimental.collective import create_collective_group, destroy_collective_group, get_collective_groups

    if transport == "nccl":
        _check_apart(_get([actor.__ray_call__.remote(_gpus) for actor in actors]))
    taken = [actor for actor in actors if get_collective_groups([actor], backend=transport)]
    if taken or (transport == "gloo" and any(_get([actor.__ray_call__.remote(_in_torch_group) for actor in actors]))):
        raise ConflictError(
            f"a worker is in a group of processes already, and {transport} would need another one: use transport="
            f'"object_store", or "nixl"'
        )
    try:
        group = create_collective_group(list(actors), backend=transport)
    except ray.exceptions.RayError as error:
        raise _died(error) from None
    try:
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ValueError, StorageError):  # one died: Ray ended the group
            destroy_collective_group(group)
            if transport == "gloo":
                _get([actor.__ray_call__.remote(_leave_torch_group) for actor in actors])


def _gpus(_: Any) -> list[str]:
    return [str(one) for one in ray.get_gpu_ids()]


def _check_apart(gpus: Sequence[Sequence[str]]) -> None:
    """`ValueError` if not everyone on a node, the sender first, has a GPU of its own. Pure."""
    taken: set[str] = set()
    for mine in gpus:
        if not mine or not taken.isdisjoint(mine):
            why = f"GPU {mine[0]} is that of two" if mine else "one of them has none from Ray"
            raise ValueError(
                f'transport="nccl" takes a GPU for each worker and one for the sender of a node, and {why}: use "cuda_ipc" where '
                f'they share one, or "nixl", or "object_store"'
            )
        taken |= set(mine)


def _in_torch_group(_: Any) -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave_torch_group(_: Any) -> None:
    import torch.distributed

    torch.distributed.destroy_process_group()


def _moved(method: Any, transport: str) -> Any:
    return method if transport == "object_store" else method.options(tensor_transport=transport)


def _settle(open_: deque[tuple[Any, int]], leave: int, progress: Advance | None) -> int:
    """Wait until at most so many hand-overs are open; bytes of those that ended."""
    done = 0
    while len(open_) > leave:
        ref, size = open_.popleft()
        _get([ref], None)
        done += size
        if progress:
            progress(size)
    return done


def _finish(open_: deque[tuple[Any, int]]) -> None:
    """Let what is on its way arrive: who waits for it can do nothing else, not even leave the group."""
    refs = [ref for ref, _ in open_]
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=_ANSWER)


def _get(refs: Sequence[Any], seconds: float | None = _ANSWER) -> list[Any]:
    try:
        found: list[Any] = ray.get(list(refs), timeout=seconds)
        return found
    except ray.exceptions.GetTimeoutError:
        raise StorageError(
            f"a worker, or a sender beside the workers, did not come up in {_ANSWER:.0f} s: see 'ray status' for what its node "
            f"has left (on a GPU, a sender takes a part of one)"
        ) from None
    except ray.exceptions.ActorUnschedulableError:
        raise StorageError(
            'a node of the workers has no GPU that a sender could take a part of: deliver with device="cpu", or give gpus= less'
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
            raise error.cause from None
        raise _died(error) from None
    except ray.exceptions.RayError as error:
        raise _died(error) from None


def _died(error: Exception) -> StorageError:
    return StorageError(
        f"a worker, or the sender beside it, died while it was given weights ({str(error).splitlines()[0]:.200}): deliver "
        f"to those that live again"
    )
