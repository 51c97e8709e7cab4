"""Where chunks are held: rendezvous hashing over the members of a cluster, zones apart."""

from __future__ import annotations

import msgspec


class Member(msgspec.Struct, frozen=True):
    """A host of a cluster: its name, the node it runs on, that node's zone, and its share of what is held (weight > 0)."""

    id: str
    node: str
    zone: str = ""
    weight: float = 1.0


class View(msgspec.Struct, frozen=True):
    """Who is in a cluster: `epoch` counts its changes; members in ascending order of their names."""

    epoch: int
    members: tuple[Member, ...] = ()
