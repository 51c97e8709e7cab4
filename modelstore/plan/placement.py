"""Where chunks are held: rendezvous hashing over the members of a cluster, zones apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from modelstore.plan.placement_kernel import place

_SLICE = 1 << 14  # keys that one thread places in one go


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


def holders(view: View, keys: NDArray[np.uint64], replicas: int, *, threads: int = 2) -> NDArray[np.int32]:
    """Who holds each key: indices into `view.members`, home first, shape [len(keys), replicas].

    Holders are in zones of their own as long as there are any left, then on nodes of their own. -1 stands where the view
    has no more members. A pure function of the members' names, zones, nodes and weights; their order does not matter.
    """
    out = np.full((len(keys), replicas), -1, np.int32)
    members = view.members
    if not members or not len(keys):
        return out
    seeds = np.array([int.from_bytes(blake3(m.id.encode()).digest()[:8], "little") for m in members], np.uint64)
    weights = np.array([m.weight for m in members], np.float64)
    zones = _numbered([m.zone for m in members])
    nodes = _numbered([m.node for m in members])
    equal = bool((weights == weights[0]).all())
    keys = np.ascontiguousarray(keys, np.uint64)
    kernel = place()

    def run(start: int) -> None:
        piece = slice(start, start + _SLICE)
        kernel(keys[piece], seeds, weights, zones, nodes, equal, out[piece], np.empty(len(members)))

    starts = range(0, len(keys), _SLICE)
    if len(starts) == 1:
        run(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, starts))
    return out


def _numbered(names: list[str]) -> NDArray[np.int32]:
    """Equal names have equal numbers."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
