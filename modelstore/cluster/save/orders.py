"""A save's request to the two hosts that keep it, and these hosts. Pure."""

from __future__ import annotations

import msgspec

from modelstore.cluster.pieces import StoreAddress
from modelstore.format.digest import digest_of
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VariantEntry
from modelstore.plan.placement import View


class Order(msgspec.Struct, frozen=True):
    """A save to be published when all its objects are in the storage. `save` is its id, and its record's writer.

    `began` (Unix seconds by the saver's clock) orders the saves of a model; `after` is its newest version at that time.
    """

    save: str
    source: StoreAddress
    model: str
    entry: VariantEntry
    tag: str | None
    began: float
    after: int
    keepers: tuple[str, ...]
    keys: tuple[str, ...]
    note: Note | None = None


class PendingStats(msgspec.Struct):
    """The content that is not in the storage yet: bytes held (of `limit`), acknowledged saves, and the obstacle, if known."""

    bytes: int = 0
    limit: int = 0
    saves: int = 0
    problem: str | None = None


def keepers(view: View, save: str, first: str | None) -> list[str]:
    """Members in the order in which they are asked to keep a save, one a node: `first`, or the one that its name falls to."""
    names = sorted(
        (member for member in view.members if not member.draining),
        key=lambda member: (member.id != first, digest_of(f"{save}/{member.id}".encode())),
    )
    nodes: dict[str, str] = {}
    for member in names:
        nodes.setdefault(member.node, member.id)
    return list(nodes.values())
