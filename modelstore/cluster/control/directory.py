"""The members of a cluster: plain state behind the directory actor. Out of the path of reads: readers keep the last view."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from modelstore.cluster.node.folders import ROOT
from modelstore.format.answers.cluster_results import JobStatus
from modelstore.plan.placement import Member, View

_SILENT = 15.0  # seconds without a word of its driver after which a job is taken for ended


class ClusterSettings(msgspec.Struct, frozen=True):
    """The settings that every host of a cluster gets. Sizes are bytes a node."""

    cluster: str  # a name of its own, part of paths and of the namespace
    memory: int  # of shared memory, for encoded chunks
    images: int  # of shared memory, for decoded models
    disk: str | None = None
    disk_bytes: int = 0
    replicas: int = 1
    pending: int = 0  # of shared memory, for saves that are not in the storage yet
    device_bytes: int = 0  # of one GPU of each node that has one, none where 0
    device: str = "cuda"  # torch's name of what device_bytes lie on
    secret: str = ""  # by which hosts know who may ask them over TCP, which they do not offer without one

    @property
    def root(self) -> str:
        """The cluster's folder in shared memory; each host has its own in it."""
        return f"/dev/shm/{ROOT}{self.cluster}"

    def folder(self, member: str) -> str:
        """A host's folder in shared memory."""
        return f"{self.root}/{member}"


class Started(NamedTuple):
    """The members of a cluster, by node why a host could not be started, and whether the requested node is served."""

    view: View
    problems: dict[str, str]
    served: bool


class Directory:
    """The view of a cluster, changed by one at a time. Epochs grow across restarts, because they start with the time."""

    def __init__(self, settings: ClusterSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._heard: dict[str, float] = {}  # when each job's driver last said how far it is
        self._lock = threading.Lock()
        self._view = View(_now(), ())
        self._jobs: dict[str, JobStatus] = {}
        self._cancelled: set[str] = set()

    def view(self) -> View:
        """The members now."""
        return self._view

    def join(self, member: Member) -> View:
        """Add a member, or put it in the place of the one of that name."""
        with self._lock:
            others = [m for m in self._view.members if m.id != member.id]
            return self._change(*others, member)

    def leave(self, ids: Collection[str]) -> View:
        """Remove members."""
        with self._lock:
            if not any(m.id in ids for m in self._view.members):
                return self._view
            return self._change(*(m for m in self._view.members if m.id not in ids))

    def drain(self, ids: Collection[str], draining: bool = True) -> View:
        """Let members be home to nothing any more, or again; meanwhile they serve, and send on, what they hold."""
        with self._lock:
            changed = [msgspec.structs.replace(m, draining=draining) if m.id in ids else m for m in self._view.members]
            return self._change(*changed)

    def report(self, status: JobStatus | None, job: str) -> bool:
        """Note how far a job is (None: it ended); whether it must be cancelled."""
        with self._lock:
            if status is None:
                self._forget(job)
                return False
            self._jobs[status.job], self._heard[status.job] = status, self._clock()
            return status.job in self._cancelled

    def jobs(self) -> list[JobStatus]:
        """The jobs that run: those whose driver says so, as it does every second, and not those of one that was killed."""
        with self._lock:
            self._forget_silent()
            return list(self._jobs.values())

    def cancel(self, job: str) -> bool:
        """Have a job's driver stop it; whether there is such a job."""
        with self._lock:
            self._forget_silent()
            if job in self._jobs:
                self._cancelled.add(job)
            return job in self._jobs

    def _forget_silent(self) -> None:
        for job in [job for job, heard in self._heard.items() if self._clock() - heard > _SILENT]:
            self._forget(job)

    def _forget(self, job: str) -> None:
        self._jobs.pop(job, None)
        self._heard.pop(job, None)
        self._cancelled.discard(job)

    def _change(self, *members: Member) -> View:
        self._view = View(max(self._view.epoch + 1, _now()), tuple(sorted(members, key=lambda m: m.id)))
        return self._view


def _now() -> int:
    return int(time.time() * 1000)
