"""Which copies of what a host holds are missing elsewhere, and who sends them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from modelstore.cluster.pieces import Piece, section_keys
from modelstore.plan.placement import View, holders


def copies_to_send(me: str, before: View, after: View, replicas: int, parts: Sequence[Piece]) -> dict[str, list[Piece]]:
    """By member, the pieces that this host is to let it have: those it has come to hold in `after`.

    The first of the hosts that held a piece before and still live sends it. If none of them is left, a host that has a copy
    (this host, as it has `parts`) sends it.
    """
    if replicas < 1 or not parts or len(after.members) < 2:
        return {}
    keys = section_keys(parts)
    live = {member.id for member in after.members}
    old, new = _names(before, keys, replicas), _names(after, keys, replicas)
    found: dict[str, list[Piece]] = {}
    for part, held, holds in zip(parts, old, new, strict=True):
        senders = [name for name in held if name in live]
        if senders and senders[0] != me:
            continue
        for member in holds:
            if member != me and member not in senders:
                found.setdefault(member, []).append(part)
    return found


def others(
    me: str, view: View, before: View | None, replicas: int, parts: Sequence[Piece], least: int = 2
) -> dict[str, list[Piece]]:
    """By member, the pieces that it may have: their other holders now (`least`, or more), and as the view was before."""
    keys = section_keys(parts)
    live = {member.id for member in view.members}
    found: dict[str, list[Piece]] = {}
    tables = [_names(view, keys, max(least, replicas))] + ([_names(before, keys, max(1, replicas))] if before else [])
    for at, part in enumerate(parts):
        for name in dict.fromkeys(name for table in tables for name in table[at]):
            if name != me and name in live:
                found.setdefault(name, []).append(part)
    return found


def _names(view: View, keys: object, replicas: int) -> list[list[str]]:
    names = [member.id for member in view.members]
    return [[names[i] for i in row if i >= 0] for row in holders(view, keys, replicas).tolist()]  # type: ignore[arg-type]
