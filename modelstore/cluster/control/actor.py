"""The Ray actor of a cluster's directory and its supervisor: a thin shell over them."""

from __future__ import annotations

import threading

import ray

from modelstore.cluster.control.directory import ClusterSettings, Directory
from modelstore.cluster.control.supervisor import Started, Supervisor
from modelstore.cluster.logs import log_as_json
from modelstore.format.results import JobStatus
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
        """The members now."""
        return self._directory.view()

    @ray.method(concurrency_group="control")
    def settings(self) -> ClusterSettings:
        """What hosts are given."""
        return self._directory.settings

    @ray.method(concurrency_group="control")
    def wait(self, hosts: int, node: str, seconds: float) -> Started:
        """Who is there, once it is so many and one on that node, if it is to have one; or they cannot be, or the time is up."""
        return self._supervisor.wait(hosts, node, seconds)

    @ray.method(concurrency_group="control")
    def report(self, status: JobStatus | None, job: str) -> bool:
        """Note how far a job is (None: it ended); whether it is to be cancelled."""
        return self._directory.report(status, job)

    @ray.method(concurrency_group="control")
    def jobs(self) -> list[JobStatus]:
        """The jobs that run."""
        return self._directory.jobs()

    @ray.method(concurrency_group="control")
    def cancel(self, job: str) -> bool:
        """Have a job's driver stop it; whether there is such a job."""
        return self._directory.cancel(job)

    @ray.method(concurrency_group="control")
    def drain(self, node: str, draining: bool = True) -> list[str]:
        """As `Supervisor.drain`."""
        return self._supervisor.drain(node, draining)

    @ray.method(concurrency_group="control")
    def problems(self) -> dict[str, str]:
        """By node, why its host could not be started."""
        return self._supervisor.problems()

    @ray.method(concurrency_group="control")
    def homes(self) -> frozenset[str]:
        """The nodes that have hosts, or are to have them."""
        return self._supervisor.homes

    @ray.method(concurrency_group="control")
    def retire(self, node: str) -> None:
        """Start no host on a node any more, since it is about to go."""
        self._supervisor.retire(node)

    @ray.method(concurrency_group="control")
    def stop(self) -> list[str]:
        """Stop supervising; the hosts' names."""
        return self._supervisor.stop()
