"""Saving from many real processes: killed at any write, and as torch.distributed holds tensors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.errors import NotFoundError
from modelstore.storage.local import LocalStorage
from tests.helpers.stores import all_bits, contents, half_written, journal, shrink, weights

ROOT = Path(__file__).parents[2]
RANKS = 3
SPAWN = multiprocessing.get_context("spawn")


def part(rank: int) -> dict[str, Any]:
    """A rank's part of `weights(1)`: rows of the matrices, small tensors whole."""
    found: dict[str, Any] = {}
    for number, (name, tensor) in enumerate(weights(1).items()):
        if tensor.ndim == 2 and len(tensor):
            n = -(-len(tensor) // RANKS)
            found[name] = ms.Slice(tensor[rank * n : (rank + 1) * n], (rank * n, 0), tensor.shape)
        elif number % RANKS == rank:
            found[name] = tensor
    return found


def save(url: str, rank: int) -> None:
    """What a rank's process runs."""
    with pytest.MonkeyPatch.context() as patch:  # tests call it in their own process, too
        shrink(patch)
        ms.open(url, memory="64MiB", threads=2).save_part("m", part(rank), session="s", rank=rank, ranks=RANKS)


def run_all(target: Callable[..., None], *arguments: object, ranks: int = RANKS) -> None:
    """One process a rank, all at once."""
    processes = [SPAWN.Process(target=target, args=(*arguments, rank)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def test_processes_save_side_by_side(tmp_path: Path) -> None:
    run_all(save, str(tmp_path))
    store = ms.open(str(tmp_path))
    assert contents(store) == {}
    store.publish("m", "s", ranks=RANKS)
    assert all_bits(store.load("m")) == all_bits(weights(1))
    assert not store.verify("m", deep=True).problems


# Does its work; at the `at`-th call of a method of the storage it says so, and waits for its end.
WORKER = """
import sys
import modelstore as ms
from modelstore.storage.local import LocalStorage
from tests.client.test_parts_processes import RANKS, save

work, url, method, at = sys.argv[1:]
calls = 0

def wait():
    print("here", flush=True)
    sys.stdin.read()

def half(pieces):
    first, *rest = pieces
    yield first
    wait()

original = getattr(LocalStorage, method)

def hooked(self, key, *rest):
    global calls
    calls += "/clock-" not in key  # the storage is asked for its time by several threads
    if calls == int(at) and "/clock-" not in key:
        if method == "put":
            return original(self, key, half(rest[0]), *rest[1:])  # a part of the object is written
        wait()
    return original(self, key, *rest)

setattr(LocalStorage, method, hooked)
if work == "save":
    save(url, 1)
else:
    ms.open(url).publish("m", "s", ranks=RANKS)
print("done", flush=True)
"""


def killed(work: str, url: str, method: str, at: int) -> bool:
    """Kill a worker at a moment; whether it came to that moment."""
    command = [sys.executable, "-c", WORKER, work, url, method, str(at)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL or said == "done\n"
    return said == "here\n"


# Of a save: packs, each followed by a page of the journal; the last create is the rank's page. Then the journal is removed.
@pytest.mark.parametrize(("method", "at"), [("put", 1), ("create", 1), ("create", 2), ("delete", 1)])
def test_a_rank_killed_while_saving(method: str, at: int, tmp_path: Path) -> None:
    url = str(tmp_path)
    for rank in (0, 2):
        save(url, rank)
    assert killed("save", url, method, at)
    store = ms.open(url)
    assert contents(store) == {}
    if method != "delete":  # its page was not there
        with pytest.raises(NotFoundError, match="rank 1 of 3"):
            store.publish("m", "s", ranks=RANKS)
    save(url, 1)
    check(store, url)


# Of a publish: the mark that it goes on; the intent; the record; what the session became. Then intent and pages are removed.
@pytest.mark.parametrize(("method", "at"), [("put", 1), ("create", 2), ("create", 3), ("create", 4), ("delete", 1)])
def test_a_publisher_killed(method: str, at: int, tmp_path: Path) -> None:
    url = str(tmp_path)
    for rank in range(RANKS):
        save(url, rank)
    assert killed("publish", url, method, at)
    store = ms.open(url)
    visible = method == "delete" or (method, at) == ("create", 4)
    assert bool(contents(store)) == visible
    check(store, url)


def check(store: ms.Store, url: str) -> None:
    """Publish, and see that one version is there, whole, and nothing left over."""
    assert store.publish("m", "s", ranks=RANKS).version == 1
    assert [version.version for version in store.versions("m")] == [1]
    assert all_bits(store.load("m")) == all_bits(weights(1))
    store.gc(dry_run=False, grace=0)
    assert not journal(LocalStorage(url))
    assert not half_written(Path(url))
    assert all_bits(store.load("m")) == all_bits(weights(1))


# ---------------------------------------------------------------------- torch.distributed


def whole() -> dict[str, torch.Tensor]:
    """What the processes hold together."""
    torch.manual_seed(0)
    return {"rows": torch.randn(37, 8), "columns": torch.randn(6, 20).bfloat16(), "same": torch.randn(5, 3)}


def distributed(folder: str, shape: tuple[int, ...], rank: int) -> None:
    """One process of a mesh: tensors sharded over it in several ways, saved as they are."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    world = 1
    for n in shape:
        world *= n
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    names = ("data", "tensor")[: len(shape)]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    full = whole()
    other: list[Any] = [Replicate()] * (len(shape) - 1)
    state: dict[str, Any] = {
        "rows": distribute_tensor(full["rows"], mesh, [*other, Shard(0)]),
        "columns": distribute_tensor(full["columns"], mesh, [*other, Shard(1)]),
        "same": distribute_tensor(full["same"], mesh, [Replicate()] * len(shape)),
        "tie": distribute_tensor(full["same"], mesh, [Replicate()] * len(shape)),
    }
    if len(shape) == 2:
        state["both"] = distribute_tensor(full["rows"], mesh, [Shard(0), Shard(1)])
        state["twice"] = distribute_tensor(full["columns"], mesh, [Shard(1), Shard(1)])
    state["tie"] = state["same"]
    store = ms.open(f"{folder}/store", memory="64MiB", threads=1)
    store.save_part("tensors", state, session="s", rank=rank, ranks=world)
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.LayerNorm(7))
    fully_shard(module, mesh=mesh[names[0]])
    store.save_part("module", module, session="s", rank=rank, ranks=world) if len(shape) == 1 else None
    dist.barrier()
    if rank == 0:
        store.publish("tensors", "s", ranks=world)
        if len(shape) == 1:
            store.publish("module", "s", ranks=world)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_dtensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    world = 2 ** len(shape)
    run_all(distributed, str(tmp_path), shape, ranks=world)
    store = ms.open(str(tmp_path / "store"))
    full = whole()
    full["tie"] = full["same"]
    if len(shape) == 2:
        full |= {"both": full["rows"], "twice": full["columns"]}
    loaded = store.load("tensors")
    assert all_bits(loaded) == all_bits({name: full[name] for name in loaded})
    assert loaded.keys() == full.keys()
    assert loaded["tie"] is loaded["same"]
    if len(shape) == 1:
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.LayerNorm(7))
        assert all_bits(store.load("module")) == all_bits(module.state_dict())
