"""What the processes of a world run: states sharded in several ways, saved and loaded through `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import modelstore as ms

WIDE = 24


def entered(folder: str, name: str, world: int, rank: int) -> None:
    """Join a world of processes."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world)


def opened(folder: str) -> ms.Store:
    """The store that all processes share."""
    return ms.open(f"{folder}/store", memory="64MiB", threads=1)


def module(seed: int) -> torch.nn.Module:
    """A small network of odd sizes, whose rows no number of ranks divides."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(10, WIDE), torch.nn.LayerNorm(WIDE), torch.nn.Linear(WIDE, 7))


def trained(model: torch.nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    """Train a little, so that there is an optimizer's state; every rank sees the same data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    for _ in range(steps):
        model(torch.randn(5, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def sharded(kind: str, seed: int) -> torch.nn.Module:
    """The network, divided over this world: by FSDP, by FSDP within replicas, or by tensor parallelism with and without FSDP."""
    world, model = dist.get_world_size(), module(seed)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    return model


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """All that a trainer keeps."""
    weights, optim = get_state_dict(model, optimizer)
    return {"model": weights, "optim": optim, "step": step, "loader": {"seen": [1, 2, step], "name": "né"}}


def full(value: Any) -> Any:
    """A state with every DTensor gathered."""
    if isinstance(value, dict):
        return {key: full(inner) for key, inner in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


KINDS = ("fsdp", "hsdp", "tp")


def save_all(folder: str, rank: int) -> None:
    """Four ranks save each kind of state, and what it is when it is gathered, for comparison."""
    entered(folder, "save", 4, rank)
    store = opened(folder)
    for kind in KINDS:
        model = sharded(kind, 1)
        optimizer = trained(model)
        state = state_of(model, optimizer, 2)
        writer = ms.dcp.Writer(store, f"run/{kind}")
        if kind == "fsdp":
            dcp.async_save(state, storage_writer=writer, checkpoint_id="step-2").result()
        else:
            dcp.save(state, storage_writer=writer, checkpoint_id="step-2")
        gathered = full(state)
        if rank == 0:
            assert writer.saved is not None
            torch.save(gathered, f"{folder}/{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


def load_all(folder: str, world: int, rank: int) -> None:
    """Another world loads each of them, divided by FSDP, and compares every bit of what it gathers."""
    entered(folder, f"load-{world}", world, rank)
    store = opened(folder)
    for kind in KINDS:
        model = sharded("fsdp", 2)
        optimizer = trained(model, 1)
        state = state_of(model, optimizer, 0)
        dcp.load(state, storage_reader=ms.dcp.Reader(store, f"run/{kind}"), checkpoint_id="step-2")
        expected = torch.load(f"{folder}/{kind}.pt", weights_only=False)
        same(full(state), expected, kind)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    dist.destroy_process_group()


def same(found: Any, expected: Any, where: str) -> None:
    """Fail unless two gathered states have the same keys, values and bits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, inner in expected.items():
            same(found[key], inner, f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)), where
    else:
        assert found == expected, where


def killed_while_saving(folder: str, rank: int) -> None:
    """One of two ranks ends as soon as its first pack is stored; the other gets an error, and publishes nothing."""
    from modelstore.storage.local import LocalStorage

    entered(folder, "killed", 2, rank)
    store = opened(folder)
    mesh = init_device_mesh("cpu", (2,))
    state = {"w": distribute_tensor(torch.arange(64.0).reshape(16, 4), mesh, [Shard(0)])}
    if rank == 1:
        put: Callable[..., None] = LocalStorage.put

        def last(self: LocalStorage, *arguments: Any) -> None:
            put(self, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        LocalStorage.put = last  # type: ignore[method-assign]
    try:
        dcp.save(state, storage_writer=ms.dcp.Writer(store, "killed"), checkpoint_id="step-1")
    except Exception:  # gloo, or torch's own, by what it noticed first
        os._exit(3)
