"""A cluster's state as `cluster status`, `start` and `top` show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modelstore.cli.terminal import output, units

if TYPE_CHECKING:
    from modelstore.format.answers.cluster_results import ClusterStatus


def state(address: str) -> ClusterStatus:
    """The state of a cluster and of its work."""
    from modelstore.cluster.control.joining import join
    from modelstore.cluster.status import status as look

    return look(join(address))


def state_lines(found: ClusterStatus) -> Iterator[str]:
    """A cluster's state, for people: a line for each host, without columns that are empty for all."""
    copies = f"{found.replicas} {'copy' if found.replicas == 1 else 'copies'} of each chunk"
    yield f"epoch {found.epoch}, {units.count(len(found.hosts), 'host')}, {copies}"
    rows = [[host.member, host.address or "—", host.zone or "—", *_figures(host.stats)] for host in found.hosts]
    if rows:
        heads = ("host", "address", "zone", "memory", "disk", "gpu", "hits", "storage", "peers", "busy")
        used = [
            i
            for i in range(len(heads))
            if heads[i] not in ("zone", "disk", "gpu") or any(row[i] not in ("—", "") for row in rows)
        ]
        right = [at for at, i in enumerate(used) if i > 2]
        yield from output.table([[row[i] for i in used] for row in rows], [heads[i] for i in used], right=right)
    for host in found.hosts:
        if host.draining:
            left = "how much is left is not known" if host.left is None else f"{units.size(host.left)} to hand on"
            yield f"{host.member} drains: {'it has handed on what it held, and may go' if host.left == 0 else left}"
    for node, why in found.problems.items():
        yield f"node {node[:12]} has no host: {why}"
    for host in found.hosts:
        pending = (host.stats or {}).get("pending")
        if pending and pending["saves"]:
            why = f": {pending['problem']}" if pending["problem"] else ""
            yield f"{host.member} has {units.count(pending['saves'], 'save')} to store ({units.size(pending['bytes'])}){why}"


def _figures(stats: dict[str, Any] | None) -> list[str]:
    if stats is None:
        return ["silent", *[""] * 6]
    tiers = stats["tiers"]
    held = [units.size(tiers[name]["bytes"]) if name in tiers else "—" for name in ("memory", "disk", "gpu")]
    hits = f"{100 * stats['hits'] / stats['asked']:.0f} %" if stats["asked"] else "—"
    return [*held, hits, units.size(stats["from_storage"]), units.size(stats["from_peers"]), str(stats["in_flight"])]
