"""A cluster of three nodes on this machine, for the tests of one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelstore.cluster import runtime
from modelstore.cluster.nodes import FAST_HEALTH, KEEP_STORES, PROMPT, QUIET


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three Ray nodes with a host each, two copies of each chunk; this process is connected to the first."""
    pytest.importorskip("ray")
    os.environ.update({"RAY_AUTH_MODE": "disabled", **FAST_HEALTH, **KEEP_STORES, **PROMPT, **QUIET})
    import ray
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        cluster.others = [cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
        settings = runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2)
        runtime.deploy(settings, hosts=3)
        yield cluster
        runtime.undeploy()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not Path(settings.root).exists(), "hosts leave nothing in shared memory"
