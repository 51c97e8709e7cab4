"""Ray's control plane is killed and started again, with its state on disk, or in Redis, as KubeRay's fault tolerance has it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelstore as ms
from modelstore.cluster.control import runtime
from modelstore.cluster.control.nodes import NODE
from tests.cluster.test_cluster import equal, tensors, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
NO_REDIS = pytest.mark.skipif(not shutil.which("redis-server"), reason="wants a Redis server")


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """A server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:

        def answers() -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", port)) == 0

        until(answers)
        yield f"127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(params=["disk", pytest.param("redis", marks=NO_REDIS)])
def state(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the control plane keeps what it knows."""
    with contextlib.ExitStack() as stack:
        if request.param == "redis":
            monkeypatch.setenv("RAY_REDIS_ADDRESS", stack.enter_context(redis()))
        else:
            monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
            monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
        yield


@pytest.fixture
def cluster(state: None) -> Iterator[Any]:
    pytest.importorskip("ray")
    os.environ.update({"RAY_AUTH_MODE": "disabled", **NODE})
    import ray
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=arguments)
    settings = runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=100 << 20)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
        runtime.deploy(settings, hosts=3)
        yield made
        runtime.undeploy()
    finally:
        ray.shutdown()
        made.shutdown()
    assert not Path(settings.root).exists()


def test_the_control_plane_is_killed_and_started_again(cluster: Any, tmp_path: Path) -> None:
    ms.open(tmp_path / "store").save("m", tensors())
    store = ms.open(tmp_path / "store", cluster="auto")
    assert equal(store.load("m"), tensors())
    before = {host.member for host in store.cluster_status().hosts}
    cluster.head_node.kill_gcs_server()
    assert equal(store.load("m"), tensors()), "readers need it for nothing"
    cluster.head_node.start_gcs_server()
    assert equal(store.load("m"), tensors())
    until(lambda: len(now := store.cluster_status().hosts) == 3 and all(host.stats for host in now))
    assert {host.member for host in store.cluster_status().hosts} == before, "the same hosts, with what they hold"
    assert equal(ms.open(tmp_path / "store", cluster="auto").load("m"), tensors())
