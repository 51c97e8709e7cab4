"""Weights handed to Ray actors, from memory to memory: the same bits, whatever moves them; what cannot be is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

import modelstore as ms
from modelstore.cluster.read import delivery
from modelstore.cluster.read.delivery import Batch, BatchEntry, tensors_of

ray = pytest.importorskip("ray")

TRANSPORTS = ["gloo", "object_store", *(["nixl"] if find_spec("nixl") else [])]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 8, "hidden_size": 256}


def tensors() -> dict[str, torch.Tensor]:
    """Of every size of dtype, 0-d, empty, tied, with odd lengths, and with NaNs that have a payload."""
    g = torch.Generator().manual_seed(1)
    made = {
        f"model.layers.{i}.mlp.{name}.weight": torch.randn(shape, generator=g).to(torch.bfloat16)
        for i in range(3)
        for name, shape in {"up_proj": (512, 256), "down_proj": (256, 512)}.items()
    }
    odd = torch.arange(7, dtype=torch.int32) - 3
    made |= {
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "odd": (odd.float() / 3).to(torch.float8_e4m3fn),
        "flags": odd > 0,
        "counts": odd.to(torch.int64),
        "double": torch.tensor([float("nan"), float("inf"), -0.0, 1e-310], dtype=torch.float64),
        "nan": torch.tensor([0x7FC1, 0xFFA3], dtype=torch.uint16).view(torch.bfloat16),
    }
    return made | {"tied": made["model.layers.0.mlp.up_proj.weight"]}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


class Worker:
    """As a user would write one: keeps what it is given."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.calls = 0

    def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        self.calls += 1
        self.weights.update(tensors)

    def refuse(self, tensors: dict[str, torch.Tensor]) -> None:
        raise LookupError(f"no place for {len(tensors)} tensors")

    def die(self, tensors: dict[str, torch.Tensor]) -> None:
        import os

        os._exit(1)

    def forget(self) -> None:
        self.weights, self.calls = {}, 0

    def given(self) -> tuple[dict[str, Any], int, bool]:
        tied = self.weights.get("tied") is self.weights.get("model.layers.0.mlp.up_proj.weight")
        return {name: bits(tensor) for name, tensor in self.weights.items()}, self.calls, tied


@pytest.fixture
def store(nodes: Any, tmp_path: Path) -> ms.Store:
    import json

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    from safetensors.torch import save_file

    made = tensors()
    save_file({name: t for name, t in made.items() if name != "tied"}, tmp_path / "model" / "model.safetensors")
    plain = ms.open(tmp_path / "store")
    plain.save("folder", tmp_path / "model")
    plain.save("m", made)
    return ms.open(tmp_path / "store", cluster="auto")


def made(nodes: Any, count: int, *, transport: bool = True) -> list[Any]:
    """Actors on two nodes in turn."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ids = [nodes.head_node.node_id, nodes.others[0].node_id]
    kind = ray.remote(enable_tensor_transport=transport)(Worker)
    return [
        kind.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(ids[i % 2], soft=False)).remote()
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def three(nodes: Any) -> Iterator[list[Any]]:
    """Workers: the first and the last on one node."""
    handles = made(nodes, 3)
    yield handles
    gone(handles)


@pytest.fixture
def there(three: list[Any]) -> list[Any]:
    """The same ones, with nothing in their memory."""
    ray.get([worker.forget.remote() for worker in three])
    return three


def gone(handles: list[Any]) -> None:
    for handle in handles:
        ray.kill(handle)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_same_bits_whatever_moves_them(
    there: list[Any], store: ms.Store, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.batches, "__defaults__", (300_000,))
    done = store.deliver("m", there, "load_weights", transport=transport)
    wanted = {name: bits(tensor) for name, tensor in store.load("m").items()}
    for given, calls, tied in ray.get([worker.given.remote() for worker in there]):
        assert given == wanted
        assert calls > 3
        assert tied
    unique = {name: value for name, value in wanted.items() if name != "tied"}
    assert done.bytes == 3 * sum(len(data) for _, _, data in unique.values())
    assert (done.workers, done.senders, done.transport) == (3, 2, transport)

    def overwrite(worker: Any) -> None:
        worker.weights["odd"].view(torch.uint8).fill_(0)

    ray.get(there[0].__ray_call__.remote(overwrite))
    neighbour, _, _ = ray.get(there[2].given.remote())  # of the same node
    assert neighbour == wanted, "each worker's memory is its own"


def test_each_worker_its_part(there: list[Any], store: ms.Store) -> None:
    """Two ranks of which one is there twice, on one node: who holds the same is given the same."""
    shards = [ms.TensorParallel(rank % 2, 2) for rank in range(3)]
    store.deliver("folder", there, "load_weights", shards=shards, transport="gloo")
    for shard, (given, _, _) in zip(shards, ray.get([worker.given.remote() for worker in there]), strict=True):
        wanted = {name: bits(tensor) for name, tensor in store.load("folder", shard=shard).items()}
        assert given == wanted
        assert given["model.layers.0.mlp.up_proj.weight"][1] == (256, 256)


def test_a_group_is_left_when_all_is_delivered_or_nothing_can_be(there: list[Any], store: ms.Store) -> None:
    """So that the next delivery can begin; what a worker's method raises is raised."""
    one = there[:1]
    with pytest.raises(LookupError, match="no place for"):
        store.deliver("m", one, "refuse", transport="gloo")
    again = store.deliver("folder", one, "load_weights", names=["scalar", "empty"], transport="gloo")
    assert again.bytes == 4


def test_a_worker_that_dies_is_said(nodes: Any, store: ms.Store) -> None:
    with pytest.raises(ms.errors.StorageError, match="died while it was given weights"):
        store.deliver("m", made(nodes, 1, transport=False), "die")


def test_what_cannot_be_is_said_before_anything_is_moved(
    nodes: Any, three: list[Any], store: ms.Store, tmp_path: Path
) -> None:
    there, plain = three[:1], made(nodes, 1, transport=False)
    with pytest.raises(ValueError, match="no workers"):
        store.deliver("m", [], "load_weights")
    with pytest.raises(TypeError, match="handle of a Ray actor"):
        store.deliver("m", [Worker()], "load_weights")
    with pytest.raises(ValueError, match="no method 'load'"):
        store.deliver("m", there, "load")
    with pytest.raises(ValueError, match="enable_tensor_transport=True"):
        store.deliver("m", plain, "load_weights", transport="gloo")
    with pytest.raises(ValueError, match=r"transport is one of 'gloo'.*not the text 'tcp'"):
        store.deliver("m", there, "load_weights", transport="tcp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 shards for 1 workers"):
        store.deliver("m", there, "load_weights", shards=[None, None])
    with pytest.raises(ms.errors.StorageError, match="has no GPU"):
        store.deliver("m", there, "load_weights", device="cuda")
    with pytest.raises(ms.errors.NotFoundError):
        store.deliver("nobody", there, "load_weights")
    with pytest.raises(ValueError, match="without a cluster"):
        ms.open(tmp_path / "store").deliver("m", there, "load_weights")
    from ray.experimental.collective import create_collective_group, destroy_collective_group

    group = create_collective_group(there, backend="gloo")
    with pytest.raises(ms.errors.ConflictError, match="in a group of processes already"):
        store.deliver("m", there, "load_weights", transport="gloo")
    destroy_collective_group(group)
    gone(plain)


def test_bytes_that_change_on_the_way_are_found_out() -> None:
    data = torch.arange(64, dtype=torch.uint8)
    entry = BatchEntry(("w",), "int16", (4, 8), 0, 64, blake3(data.numpy().tobytes()).digest())
    assert torch.equal(tensors_of(Batch(data, (entry,)))["w"], data.view(torch.int16).reshape(4, 8))
    data[17] ^= 1
    with pytest.raises(ms.errors.CorruptionError, match="'w' arrived with other bytes"):
        tensors_of(Batch(data, (entry,)))


@pytest.mark.parametrize(
    ("gpus", "why"),
    [([["0"], ["0"]], "GPU 0 is that of two"), ([["0"], []], "has none"), ([["0"], ["1", "2"], ["2"]], "GPU 2")],
)
def test_nccl_takes_a_gpu_for_each(gpus: list[list[str]], why: str) -> None:
    with pytest.raises(ValueError, match=f"takes a GPU for each worker.*{why}"):
        delivery._check_apart(gpus)


def test_gpus_of_their_own_are_right_for_nccl() -> None:
    delivery._check_apart([["0"], ["1"], ["GPU-2f"]])
