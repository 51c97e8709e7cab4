"""What a cluster is and does, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from modelstore.format import results

if TYPE_CHECKING:
    from modelstore.cluster.session import Session


def status(session: Session) -> results.ClusterStatus:
    """Every host with what it holds and did; a host that does not answer has no figures."""
    view = session.view(fresh=True)
    stats = session.stats()
    hosts = tuple(
        results.HostStatus(
            member.id,
            member.node,
            member.zone,
            None if stats.get(member.id) is None else msgspec.to_builtins(stats[member.id]),
        )
        for member in view.members
    )
    return results.ClusterStatus(view.epoch, session.settings.replicas, hosts)
