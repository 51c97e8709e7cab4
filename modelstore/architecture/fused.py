"""Which layers engines run as one, and that therefore need one scheme."""

from __future__ import annotations

from collections.abc import Iterable

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_MEMBER = {member: group for group in FUSED for member in group}


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Weights that engines run as one, two or more together, in the order of the names."""
    groups: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for name in names:
        parts = name.split(".")
        for at in range(len(parts) - 1, -1, -1):
            if parts[at] in _MEMBER:
                key = (".".join(parts[:at]), _MEMBER[parts[at]], ".".join(parts[at + 1 :]))
                groups.setdefault(key, []).append(name)
                break
    return [tuple(group) for group in groups.values() if len(group) > 1]
