"""The placement of chunks: rendezvous hashing over the members of a cluster, zones apart. Pure: views in, views and arrays
out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from modelstore.format.digest import digest_of
from modelstore.plan.placement_kernel import place
from modelstore.storage.pool import ordered

_SLICE = 1 << 14  # keys that one thread places in one go
_LIGHTEST, _HEAVIEST = 1e-9, 1e9
_CORRECTION = 2.0  # a correction lies between one half and this, whatever the loads are
_ROUNDS = 8


class Member(msgspec.Struct, frozen=True):
    """A host of a cluster: its name, the node it runs on, that node's zone, and its share of what is held.

    `address` is where it gives out pieces over TCP, "" where it does not.

    `weight` is relative to the others', between 1e-9 and 1e9; `correction` is what `balanced` multiplies it with. A
    draining member is home to nothing, but serves what it has. `ValueError` for a weight or correction out of range.
    """

    id: str
    node: str
    zone: str = ""
    weight: float = 1.0
    draining: bool = False
    correction: float = 1.0
    address: str = ""

    def __post_init__(self) -> None:
        if not _LIGHTEST <= self.weight <= _HEAVIEST:
            raise ValueError(
                f"member {self.id!r} has weight {self.weight}: give one from {_LIGHTEST:g} to {_HEAVIEST:g}"
            )
        if not 1 / _CORRECTION <= self.correction <= _CORRECTION:
            limits = f"{1 / _CORRECTION:g} to {_CORRECTION:g}"
            raise ValueError(f"member {self.id!r} has correction {self.correction}: it lies in {limits}")


class View(msgspec.Struct, frozen=True, cache_hash=True):
    """The members of a cluster: `epoch` counts its changes; members in ascending order of their names."""

    epoch: int
    members: tuple[Member, ...] = ()


class Moves(NamedTuple):
    """Copies to make, one a line: `keys[key]` goes to `after.members[target]`.

    It comes from `after.members[source]`, which held it before; where `source` is -1 only object storage has it. All three
    are 1-d and equally long: int64, int32, int32, in ascending order of `key`.
    """

    key: NDArray[np.int64]
    target: NDArray[np.int32]
    source: NDArray[np.int32]


@lru_cache(maxsize=16)
def addresses(view: View) -> dict[str, str]:
    """Every member's address, by its name."""
    return {member.id: member.address for member in view.members}


def joined(view: View, member: Member) -> View:
    """The view with that member, in the place of the one of the same name if there is one."""
    others = (m for m in view.members if m.id != member.id)
    return _next(view, [*others, member])


def left(view: View, ids: Collection[str]) -> View:
    """The view without those members; the same view where none of them is in it."""
    rest = [m for m in view.members if m.id not in ids]
    return view if len(rest) == len(view.members) else _next(view, rest)


def draining(view: View, id: str) -> View:
    """The view in which that member is home to nothing more. `ValueError` if it is not in the view."""
    if not any(m.id == id for m in view.members):
        raise ValueError(f"there is no member {id!r} in the view of epoch {view.epoch}: it has left")
    return _next(view, [msgspec.structs.replace(m, draining=True) if m.id == id else m for m in view.members])


def holders(view: View, keys: NDArray[np.uint64], replicas: int, *, threads: int | None = None) -> NDArray[np.int32]:
    """The holders of each key: indices into `view.members`, home first, shape [len(keys), replicas].

    Holders are in zones of their own as long as there are any left, then on nodes of their own. Draining members hold
    nothing while there are others. -1 stands where there are fewer members than replicas. A pure function of the members'
    names, zones, nodes and shares; their order does not matter. Equal keys next to each other cost as much as one.
    """
    if replicas < 0:
        raise ValueError(f"{replicas} replicas: give 0 or more")
    out = np.full((len(keys), replicas), -1, np.int32)
    if not view.members or not out.size:
        return out
    table = _table(view)
    keys = np.ascontiguousarray(keys, np.uint64)
    kernel = place()

    def run(start: int) -> None:
        piece = slice(start, start + _SLICE)
        scratch = np.empty((2, len(table.seeds)))
        kernel(keys[piece], table.seeds, table.shares, table.zones, table.nodes, table.equal, out[piece], scratch)
        # -1 stays -1: it stands at the end, too
        out[piece] = table.places[out[piece]]

    starts = range(0, len(keys), _SLICE)
    if len(starts) == 1:
        run(0)
    else:
        list(ordered(run, starts, threads or os.cpu_count() or 1, "modelstore-place"))
    return out


def moved(before: View, after: View, keys: NDArray[np.uint64], replicas: int, *, threads: int | None = None) -> Moves:
    """The copies that `after` needs and `before` did not: those to send when members leave, drain or join.

    A member's copies are taken to be gone when it left, or came back under its name on another node.
    """
    here = {(m.id, m.node): at for at, m in enumerate(after.members)}
    still = np.array([here.get((m.id, m.node), -1) for m in before.members] + [-1], np.int32)
    held = still[holders(before, keys, replicas, threads=threads)]
    holds = holders(after, keys, replicas, threads=threads)
    fresh = holds >= 0
    source = np.full(len(keys), -1, np.int32)
    for rank in range(replicas - 1, -1, -1):  # so that the first that is left remains
        fresh &= holds != held[:, rank, None]
        source = np.where(held[:, rank] >= 0, held[:, rank], source)
    key, rank_ = np.nonzero(fresh)
    return Moves(key.astype(np.int64), holds[key, rank_], source[key])


def loads(view: View, keys: NDArray[np.uint64], nbytes: NDArray[np.int64], replicas: int) -> NDArray[np.float64]:
    """Bytes that each member holds where `keys[i]` has `nbytes[i]`: shape [len(view.members)]."""
    table = holders(view, keys, replicas)
    total = np.zeros(len(view.members))
    for rank in range(replicas):
        found = table[:, rank] >= 0
        total += np.bincount(table[found, rank], np.asarray(nbytes)[found], len(view.members))
    return total


def balanced(
    view: View, keys: NDArray[np.uint64], nbytes: NDArray[np.int64], replicas: int, *, within: float = 0.05
) -> View:
    """The view with corrections by which every member's bytes are at most `within` above its share, as far as possible.

    Chance gives some of n members, with s sections each, more than others: about sqrt(2 ln(n) / s) more. Here shares are
    multiplied by the root of what is missing, again and again (at most 8 times), until these very keys are even; the whole of
    it overshoots where a member has few. Later keys fall as corrections say, so these need renewing. Readers need no table of
    where things are, as they would for placement with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): the view alone
    still says it. The best view found is returned; the same one, with its epoch, where nothing is better.
    """
    wanted = np.array([0.0 if m.draining else m.weight for m in view.members])
    if not wanted.sum() or not np.sum(nbytes):
        return view
    active = wanted > 0
    best, found, now = math.inf, view, view
    for _ in range(_ROUNDS + 1):
        held = loads(now, keys, nbytes, replicas)
        ratio = held[active] / held.sum() * wanted.sum() / wanted[active]
        if ratio.max() < best:
            best, found = float(ratio.max()), now
        if best <= 1 + within:
            break
        corrections = np.array([m.correction for m in view.members])
        corrections[active] = np.array([m.correction for m in now.members])[active] / np.sqrt(np.maximum(ratio, 1e-3))
        corrections[active] /= np.average(corrections[active], weights=wanted[active])  # newcomers have 1
        corrections = np.clip(corrections, 1 / _CORRECTION, _CORRECTION)
        pairs = zip(view.members, corrections.tolist(), strict=True)
        now = _next(view, [msgspec.structs.replace(m, correction=c) for m, c in pairs])
    return found


class _Table(NamedTuple):
    """The view as the kernel needs it, of the members that may hold something, in ascending order of their names."""

    seeds: NDArray[np.uint64]
    shares: NDArray[np.float64]
    zones: NDArray[np.int32]
    nodes: NDArray[np.int32]
    equal: bool
    places: NDArray[np.int32]  # where each is in the view, and -1 at the end


@lru_cache(maxsize=16)
def _table(view: View) -> _Table:
    some = [at for at, m in enumerate(view.members) if not m.draining] or range(len(view.members))
    places = sorted(some, key=lambda at: view.members[at].id)
    members = [view.members[at] for at in places]
    shares = np.array([m.weight * m.correction for m in members], np.float64)
    return _Table(
        np.array([int.from_bytes(digest_of(m.id.encode())[:8], "little") for m in members], np.uint64),
        shares,
        _numbered([m.zone for m in members]),
        _numbered([(m.zone, m.node) for m in members]),
        bool((shares == shares[0]).all()),
        np.array([*places, -1], np.int32),
    )


def _next(view: View, members: Sequence[Member]) -> View:
    return View(view.epoch + 1, tuple(sorted(members, key=lambda m: m.id)))


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int32]:
    """Equal names have equal numbers, from 0."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
