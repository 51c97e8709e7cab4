"""Keeps one host on every node: finds the dead, puts new ones in their place, tells the others."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelstore.cluster.control.directory import ClusterSettings, Directory, Started
from modelstore.cluster.host.actor import GROUPS, StorageActor
from modelstore.cluster.metrics import JobMetrics
from modelstore.cluster.network.calls import NAMESPACE, actor, host_name, told
from modelstore.errors import ConflictError
from modelstore.plan.placement import Member

log = logging.getLogger("modelstore")

RESOURCE = "modelstore_storage"  # where some nodes have it, only these get hosts
ZONE = "ray.io/availability-zone"
_GPU_SHARE = 0.01  # of a GPU: hosts take memory of it, and next to no time
_PERIOD = 0.5  # seconds between two looks
_LOOKS = 20  # looks without an answer after which a host is given up: ten seconds
_PAUSE = 10.0  # seconds until a host that could not be started is tried again
_ANSWER = 10.0  # seconds that a host of an earlier directory has to say who it is


class Supervisor:
    """Runs in the directory's process."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        self._starting: dict[str, tuple[Member, Any, Any]] = {}
        self._silent: dict[str, int] = {}  # looks since its ping was sent
        self._pings: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._metrics = JobMetrics()
        self._stopped = threading.Event()
        self._retired: set[str] = set()
        self._draining: set[str] = set()  # nodes, whose next hosts drain, too
        self._problems: dict[str, tuple[str, float]] = {}  # by node, why its host could not start, and when that was
        self._looks = 0
        self._seen = directory.view().epoch
        self.homes: frozenset[str] = frozenset()  # nodes that have hosts, or are to have them

    def adopt(self) -> None:
        """Take over the hosts that an earlier directory started, where there was one."""
        for found in ray.util.list_named_actors(all_namespaces=True):
            if found["namespace"] == NAMESPACE and found["name"].startswith(host_name("")):
                with contextlib.suppress(ValueError, ray.exceptions.RayError):
                    handle = actor(found["name"])
                    member = ray.get(handle.member.remote(), timeout=_ANSWER)
                    self._handles[member.id] = handle
                    self._draining |= {member.node} if member.draining else set()
                    self._directory.join(member)

    def run(self) -> None:
        """Look again and again until stopped."""
        self.adopt()
        while not self._stopped.wait(_PERIOD if self._handles else 0.05):
            try:
                self.look()
            except Exception:  # the control plane may be away for a while: hosts and readers go on without it
                log.exception("the supervisor could not look at the cluster; it tries again")

    def look(self) -> None:
        """Find who is gone and who is new, once."""
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        gone = self._gone(set(nodes))
        if gone:
            log.warning("hosts %s are gone", ", ".join(gone))
            self._directory.leave(gone)
            for member in gone:
                handle = self._handles.pop(member, None)
                self._silent.pop(member, None)
                self._pings.pop(member, None)
                if handle is not None:
                    with contextlib.suppress(Exception):
                        ray.kill(handle)
        self.homes = self._homes(nodes)
        self._welcome(set(nodes))
        for node in self._without_host():
            if time.monotonic() - self._problems.get(node, ("", -_PAUSE))[1] >= _PAUSE:
                self._start(node, nodes[node])
        self._tell()
        with self._changed:
            self._looks += 1
            self._changed.notify_all()
        view = self._directory.view()
        self._metrics.show(self._directory.jobs(), len(view.members), view.epoch)

    def wait(self, hosts: int, node: str, seconds: float) -> Started:
        """The members, once there are so many, and one of them on that node if it must have one; or they cannot be, or the
        time is up.
        """
        first = self._looks + 2  # a whole one from now on, which knows the node

        def served() -> bool:
            nodes = {member.node for member in self._directory.view().members}
            return node in nodes or node not in self.homes

        def over() -> bool:
            possible = self.homes - self.problems().keys()
            ready = len(self._directory.view().members) >= hosts and served()
            return self._looks >= first and (ready or node in self.problems() or not (possible or not self.homes))

        with self._changed:
            self._changed.wait_for(over, timeout=seconds)
        return Started(self._directory.view(), self.problems(), served())

    def problems(self) -> dict[str, str]:
        """By node, why its host could not be started."""
        return {node: why for node, (why, _) in list(self._problems.items()) if node in self.homes}

    def drain(self, node: str, draining: bool = True) -> list[str]:
        """Let a node's hosts be home to nothing: others are sent what they hold, and they serve it until they go. Their names.

        `node`: its id or the start of it, its address, or the name of its host. `ValueError` if that is several nodes,
        `ConflictError` if no other host would be left to hold anything. Without `draining` they are homes again.
        """
        members = self._directory.view().members
        chosen = [m for m in members if m.node.startswith(node) or m.id == node or m.address.rpartition(":")[0] == node]
        nodes = {member.node for member in chosen}
        if len(nodes) > 1:
            raise ValueError(f"{node!r} is the beginning of {len(nodes)} nodes' ids: give more of it")
        if draining and chosen and not any(m.node not in nodes and not m.draining for m in members):
            raise ConflictError(
                f"no other host is left that could hold what those of node {node!r} do: add a node first"
            )
        ids = [member.id for member in chosen]
        if ids:
            self._draining = self._draining | nodes if draining else self._draining - nodes
            self._directory.drain(ids, draining)
            self._tell()
        return ids

    def retire(self, node: str) -> None:
        """Start no host on a node any more, since it is about to go."""
        self._retired.add(node)

    def stop(self) -> list[str]:
        """Look no more; the names of all hosts."""
        self._stopped.set()
        return [*self._handles, *(member.id for member, _, _ in self._starting.values())]

    def _gone(self, nodes: set[str]) -> list[str]:
        """Members whose node or process is dead, or that were silent for many looks: its own delays count for nothing."""
        gone = []
        for member in self._directory.view().members:
            ref = self._pings.get(member.id)
            if ref is None:
                self._pings[member.id], self._silent[member.id] = self._handles[member.id].ping.remote(), 0
            elif ray.wait([ref], timeout=0)[0]:
                del self._pings[member.id]
                try:
                    ray.get(ref)
                except ray.exceptions.RayError:
                    gone.append(member.id)
                    continue
            else:
                self._silent[member.id] += 1
            if member.node not in nodes or self._silent[member.id] > _LOOKS:
                gone.append(member.id)
        return gone

    def _homes(self, nodes: dict[str, dict[str, Any]]) -> frozenset[str]:
        chosen = [name for name, node in nodes.items() if node["Resources"].get(RESOURCE)] or list(nodes)
        return frozenset(chosen) - self._retired

    def _without_host(self) -> list[str]:
        served = {member.node for member in self._directory.view().members} | set(self._starting)
        return sorted(self.homes - served)

    def _start(self, node: str, info: dict[str, Any]) -> None:
        """Begin a host on a node; it becomes a member when it answers."""
        settings, view = self._directory.settings, self._directory.view()
        device = device_of(settings, info["Resources"])
        zone = info.get("Labels", {}).get(ZONE, "")
        member = Member(f"{node[:12]}-{view.epoch}", node, zone, draining=node in self._draining)
        made: Any = (
            ray.remote(concurrency_groups=GROUPS)(StorageActor)  # type: ignore[call-overload]
            .options(
                name=host_name(member.id),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                num_cpus=0,
                num_gpus=_GPU_SHARE if device and device.startswith("cuda") else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(member, settings, view, device)
        )
        self._starting[node] = (member, made, made.member.remote())

    def _welcome(self, nodes: set[str]) -> None:
        """Let started hosts that answer become members; those that failed are started again after a pause."""
        for node, (member, made, ref) in list(self._starting.items()):
            if node in nodes and not ray.wait([ref], timeout=0)[0]:
                continue
            del self._starting[node]
            try:
                member = ray.get(ref, timeout=0 if node in nodes else 0.01)  # which knows its address now
            except ray.exceptions.RayError as error:
                why = str(told(error, f"the host of node {node[:12]}"))
                log.warning("no host could be started on node %s: %s", node[:12], why)
                if isinstance(error, ray.exceptions.RayTaskError):  # it says itself that it cannot be, and will again
                    self._problems[node] = why, time.monotonic()
                with contextlib.suppress(Exception):
                    ray.kill(made)
                continue
            self._problems.pop(node, None)
            self._handles[member.id] = made
            self._directory.join(member)

    def _tell(self) -> None:
        """Give every host the newest view."""
        view = self._directory.view()
        if view.epoch == self._seen:
            return
        self._seen = view.epoch
        for member in view.members:
            with contextlib.suppress(Exception):
                self._handles[member.id].see.remote(view)


def device_of(settings: ClusterSettings, resources: Mapping[str, float]) -> str | None:
    """The device that a host on a node with these resources keeps chunks on, None if it has none. Pure.

    Ray shows a process only the GPU that it was given a share of, so that is its first one.
    """
    if not settings.device_bytes:
        return None
    if settings.device != "cuda":
        return settings.device
    return "cuda:0" if resources.get("GPU", 0) >= _GPU_SHARE else None
