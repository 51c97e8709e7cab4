"""On a real GPU: the same bits as in host memory, wherever a model is read to, held, compressed or delivered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cluster.control import runtime
from modelstore.cluster.control.nodes import NODE
from tests.cluster.leftovers import Leftovers
from tests.cluster.test_delivery import Worker, bits, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_host(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert all(value.device.type == "cuda" for value in values.values())
    return {name: bits(value.cpu()) for name, value in values.items()}


@pytest.fixture
def store(tmp_path: Path) -> ms.Store:
    """A store with a model of all dtypes, two versions."""
    plain = ms.open(tmp_path / "store")
    first = tensors()
    plain.save("m", first)
    second = {name: value.clone() for name, value in first.items() if name != "tied"}
    second["model.layers.1.mlp.up_proj.weight"][5] += 1
    second["counts"] += 1
    plain.save("m", second | {"tied": second["model.layers.0.mlp.up_proj.weight"]})
    return plain


def wanted(store: ms.Store, ref: str) -> dict[str, Any]:
    return {name: bits(value) for name, value in store.load(ref).items()}


def test_load_and_stream_have_the_bits_of_the_host(store: ms.Store) -> None:
    assert on_host(dict(store.stream("m@2", device="cuda"))) == wanted(store, "m@2")


def test_a_saved_state_of_the_gpu_is_that_of_the_host(store: ms.Store) -> None:
    there = {name: value.cuda() for name, value in tensors().items() if name != "tied"}
    saved = store.save("from-gpu", there)
    assert saved.stored == 0, "every chunk is known from the host's copy"


def test_a_module_on_the_gpu_is_loaded_in_place(store: ms.Store) -> None:
    module = torch.nn.Linear(64, 32).bfloat16()
    store.save("linear", module)
    other = torch.nn.Linear(64, 32).bfloat16().cuda()
    held = other.weight
    store.load_into(other, "linear")
    assert other.weight is held
    assert on_host(dict(other.state_dict())) == {name: bits(value) for name, value in module.state_dict().items()}


def test_a_model_that_is_followed_on_the_gpu_is_swapped_there(store: ms.Store) -> None:
    live = store.follow("m@1", device="cuda")
    assert on_host(dict(live.tensors)) == wanted(store, "m@1")
    done = live.swap_to(2)
    assert done.version == 2
    assert on_host(dict(live.tensors)) == wanted(store, "m@2")
    live.rollback()
    assert on_host(dict(live.tensors)) == wanted(store, "m@1")


def test_a_delta_is_applied_to_what_the_gpu_holds(store: ms.Store) -> None:
    live = store.follow("m@2", device="cuda")
    third = dict(store.load("m@2"))
    weight = third["model.layers.1.mlp.up_proj.weight"]
    third["model.layers.1.mlp.up_proj.weight"] = torch.where(torch.rand(weight.shape) < 0.01, -weight, weight)
    saved = store.save("m", third, codec="delta", parent="m@2")
    assert live.swap_to(3).bytes <= saved.stored
    assert on_host(dict(live.tensors)) == wanted(store, "m@3")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Ray node with a GPU and a host that holds chunks on it."""
    ray = pytest.importorskip("ray")
    left = Leftovers(os.urandom(16).hex(), tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        left.watch(patch)
        os.environ.update({"RAY_AUTH_MODE": "disabled", **NODE})
        try:
            ray.init(
                num_cpus=4,
                num_gpus=1,
                object_store_memory=1 << 30,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                namespace="modelstore",
            )
            settings = runtime.default_settings(memory=256 << 20, images=256 << 20, device_bytes=1 << 30)
            runtime.deploy(settings, hosts=1, seconds=180)
            yield ray
            runtime.undeploy()
            assert not left.memory(), "hosts leave nothing in shared memory"
        finally:
            ray.shutdown()
    left.check()


@pytest.fixture
def clustered(node: Any, store: ms.Store, tmp_path: Path) -> ms.Store:
    return ms.open(tmp_path / "store", cluster="auto")


def used(store: ms.Store) -> tuple[int, int]:
    """Bytes that the one host holds in memory and on its GPU."""
    (host,) = store.cluster.status().hosts
    tiers = host.stats["tiers"]
    return tiers["memory"]["bytes"], tiers["gpu"]["bytes"]


def test_chunks_that_lie_on_the_gpu_are_read_from_there(clustered: ms.Store) -> None:
    clustered.cluster.evict()
    done = clustered.cluster.prefetch("m@2", tier="gpu")
    assert done.bytes > 0
    memory, gpu = used(clustered)
    assert (memory, gpu > 0) == (0, True)
    assert wanted(clustered, "m@2") == {name: bits(value) for name, value in clustered.load("m@2").items()}
    assert clustered.cluster.evict() >= gpu
    assert used(clustered)[1] == 0


def test_a_job_on_the_gpu_makes_the_bytes_of_the_cpu(clustered: ms.Store, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.proj.weight": torch.randn(512, 512, generator=random).bfloat16() for i in range(4)}
    recipe = {
        "name": "mse4",
        "rules": [
            {"targets": ["*"], "codec": {"name": "int", "params": {"bits": 4, "group_size": 64, "method": "mse"}}}
        ],
    }
    alone = ms.open(tmp_path / "alone")
    for one in (clustered, alone):
        one.save("w", weights)
        one.compress("w", recipe)
    assert wanted(clustered, "w:mse4") == wanted(alone, "w:mse4")


@pytest.fixture
def worker(node: Any) -> Iterator[Any]:
    class OnGpu(Worker):
        def given(self) -> tuple[dict[str, Any], int, bool]:
            assert all(value.device.type == "cuda" for value in self.weights.values())
            tied = self.weights.get("tied") is self.weights.get("model.layers.0.mlp.up_proj.weight")
            return {name: bits(value.cpu()) for name, value in self.weights.items()}, self.calls, tied

    made: Any = node.remote(enable_tensor_transport=True)(OnGpu).options(num_gpus=0.3).remote()
    yield made
    node.kill(made)


@pytest.mark.parametrize("transport", ["cuda_ipc", *(["nixl"] if find_spec("nixl") else [])])
def test_weights_go_from_gpu_to_gpu(node: Any, worker: Any, clustered: ms.Store, transport: Any) -> None:
    done = clustered.deliver("m@2", [worker], "load_weights", transport=transport, device="cuda")
    assert (done.transport, done.senders) == (transport, 1)
    given, _, tied = node.get(worker.given.remote())
    assert given == wanted(clustered, "m@2")
    assert tied


def test_nccl_on_one_gpu_is_refused(worker: Any, clustered: ms.Store) -> None:
    """Sender and worker share the one GPU, which NCCL does not take; Ray would end both."""
    with pytest.raises(ValueError, match=r"takes a GPU for each worker.*GPU 0 is that of two"):
        clustered.deliver("m@2", [worker], "load_weights", transport="nccl", device="cuda")
