"""The calls to a cluster's directory from another process: each with its types, as `ask_directory` takes it."""

from __future__ import annotations

from typing import Protocol

from modelstore.cluster.control.directory import ClusterSettings, Started
from modelstore.format.answers.cluster_results import JobStatus
from modelstore.plan.placement import View


class Control(Protocol):
    """The cluster's directory and its supervisor, which say what each call does, and raises."""

    def view(self) -> View:
        """The members now."""

    def settings(self) -> ClusterSettings:
        """The settings that hosts get."""

    def wait(self, hosts: int, node: str, seconds: float) -> Started:
        """The members, once there are so many and one on that node, if it must have one; or they cannot be, or the time is up."""

    def report(self, status: JobStatus | None, job: str) -> bool:
        """Note how far a job is (None: it ended); whether it must be cancelled."""

    def jobs(self) -> list[JobStatus]:
        """The jobs that run."""

    def cancel(self, job: str) -> bool:
        """Have a job's driver stop it; whether there is such a job."""

    def drain(self, node: str, draining: bool = True) -> list[str]:
        """Let a node's hosts be home to nothing, or again; their names."""

    def problems(self) -> dict[str, str]:
        """By node, why its host could not be started."""

    def homes(self) -> frozenset[str]:
        """The nodes that have hosts, or are to have them."""

    def retire(self, node: str) -> None:
        """Start no host on a node any more, since it is about to go."""

    def stop(self) -> list[str]:
        """Stop supervising; the hosts' names."""
