"""The Ray actor of a cluster's directory and its supervisor: a thin shell over them. `protocol.Control` says what it does."""

from __future__ import annotations

import threading

import ray

from modelstore.cluster.control.directory import ClusterSettings, Directory, Started
from modelstore.cluster.control.supervisor import Supervisor
from modelstore.cluster.logs import log_as_json
from modelstore.format.answers.cluster_results import JobStatus
from modelstore.plan.placement import View


class DirectoryActor:
    """The cluster's directory and its supervisor, in a process of their own."""

    def __init__(self, settings: ClusterSettings) -> None:
        log_as_json(host="directory", node=ray.get_runtime_context().get_node_id())
        self._directory = Directory(settings)
        self._supervisor = Supervisor(self._directory)
        threading.Thread(target=self._supervisor.run, daemon=True, name="modelstore-supervisor").start()

    @ray.method(concurrency_group="control")
    def view(self) -> View:
        return self._directory.view()

    @ray.method(concurrency_group="control")
    def settings(self) -> ClusterSettings:
        return self._directory.settings

    @ray.method(concurrency_group="control")
    def wait(self, hosts: int, node: str, seconds: float) -> Started:
        return self._supervisor.wait(hosts, node, seconds)

    @ray.method(concurrency_group="control")
    def report(self, status: JobStatus | None, job: str) -> bool:
        return self._directory.report(status, job)

    @ray.method(concurrency_group="control")
    def jobs(self) -> list[JobStatus]:
        return self._directory.jobs()

    @ray.method(concurrency_group="control")
    def cancel(self, job: str) -> bool:
        return self._directory.cancel(job)

    @ray.method(concurrency_group="control")
    def drain(self, node: str, draining: bool = True) -> list[str]:
        return self._supervisor.drain(node, draining)

    @ray.method(concurrency_group="control")
    def problems(self) -> dict[str, str]:
        return self._supervisor.problems()

    @ray.method(concurrency_group="control")
    def homes(self) -> frozenset[str]:
        return self._supervisor.homes

    @ray.method(concurrency_group="control")
    def retire(self, node: str) -> None:
        self._supervisor.retire(node)

    @ray.method(concurrency_group="control")
    def stop(self) -> list[str]:
        return self._supervisor.stop()
