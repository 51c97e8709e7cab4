"""The state and work of a cluster, as plain data."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from modelstore.errors import StorageError
from modelstore.format.answers import cluster_results

if TYPE_CHECKING:
    from modelstore.cluster.control.session import Session


def status(session: Session) -> cluster_results.ClusterStatus:
    """Every host with its content and counters; a host that does not answer does not have figures."""
    import ray  # not before the session, which tells it the cluster's token

    from modelstore.cluster.control.protocol import Control
    from modelstore.cluster.network.calls import ask_directory

    stats = session.stats()
    view = session.view()
    left = session.left() if any(member.draining for member in view.members) else {}
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
    hosts = tuple(
        cluster_results.HostStatus(
            member.id,
            member.node,
            member.zone,
            None if stats.get(member.id) is None else msgspec.to_builtins(stats[member.id]),
            nodes.get(member.node, ""),
            member.draining,
            left.get(member.id),
        )
        for member in view.members
    )
    problems: dict[str, str] = {}
    with contextlib.suppress(StorageError):
        problems = ask_directory(Control.problems)
    return cluster_results.ClusterStatus(view.epoch, session.settings.replicas, hosts, problems)
