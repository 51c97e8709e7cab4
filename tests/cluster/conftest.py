"""A cluster of three nodes on this machine, for the tests of one file; nothing of it may be left afterwards."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from modelstore.cluster.control import runtime
from modelstore.cluster.control.nodes import NODE
from tests.cluster.leftovers import Leftovers


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three Ray nodes with a host each, two copies of each chunk; this process is connected to the first."""
    pytest.importorskip("ray")
    left = Leftovers(uuid.uuid4().hex, tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        left.watch(patch)
        os.environ.update({"RAY_AUTH_MODE": "disabled", **NODE})
        import ray
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            cluster.others = [  # type: ignore[attr-defined]
                cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)
            ]
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
            settings = runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2)
            runtime.deploy(settings, hosts=3, seconds=180)  # other tests may keep the machine busy
            yield cluster
            runtime.undeploy()
            assert not left.memory(), "hosts leave nothing in shared memory"
        finally:
            ray.shutdown()
            cluster.shutdown()
    left.check()
