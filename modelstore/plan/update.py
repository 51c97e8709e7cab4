"""The plan that turns one version in memory into another: a pure comparison of two manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.registry import codec
from modelstore.format import grid
from modelstore.format.objects.manifest import DIGEST_BYTES, Manifest, Tensor
from modelstore.format.region import Region
from modelstore.plan.layout import Share
from modelstore.plan.layout_share import overlaps

Slot = tuple[str, Share]  # a tensor's name in the manifest, no tied one's, and the part of it that is held


@dataclass(frozen=True)
class Update:
    """Slots of the new version: which old slot has the same values; of which only some chunks differ; which are read whole."""

    same: Mapping[Slot, Slot] = field(default_factory=dict)
    patched: Mapping[Slot, tuple[Slot, tuple[int, ...]]] = field(default_factory=dict)
    read: tuple[Slot, ...] = ()


def slots(manifest: Manifest, shares: Mapping[str, Share]) -> dict[str, Slot]:
    """The slot of each name; tied names have one."""
    return {name: (manifest.by_name[name].name, share) for name, share in shares.items()}


def plan_update(old: Manifest, held: Iterable[Slot], new: Manifest, wanted: Iterable[Slot]) -> Update:
    """How `wanted` slots of the new manifest are made of the `held` ones of the old.

    Tensors of equal dtype, shape and digest are the same. If the grid and the codec are equal too, chunks whose encoded bytes
    have the same digests are equal. All other changed parts are read whole.
    """
    there = set(held)
    same: dict[Slot, Slot] = {}
    patched: dict[Slot, tuple[Slot, tuple[int, ...]]] = {}
    read: list[Slot] = []
    for slot in dict.fromkeys(wanted):
        name, share = slot
        tensor, before = new.by_name[name], old.by_name.get(name)
        source = (before.name, share) if before is not None else None
        if before is None or source is None or source not in there:
            read.append(slot)
        elif (before.dtype, before.shape, before.digest) == (tensor.dtype, tensor.shape, tensor.digest):
            same[slot] = source
        else:
            changed = changed_chunks(old, before, new, tensor)
            touched = None if changed is None else np.intersect1d(changed, touching(tensor, share)).tolist()
            if touched is None or len(touched) == len(touching(tensor, share)):
                read.append(slot)
            elif touched:
                patched[slot] = source, tuple(touched)
            else:  # what changed lies outside of the share
                same[slot] = source
    return Update(same, patched, tuple(read))


def changed_chunks(old: Manifest, before: Tensor, new: Manifest, tensor: Tensor) -> NDArray[np.int64] | None:
    """Indices in the grid of the chunks whose encoded bytes differ; None if the two cannot be compared so."""
    spec = new.codecs[tensor.codec]
    planes = [plane.name for plane in tensor.planes]
    if (
        (before.dtype, before.shape, before.chunk) != (tensor.dtype, tensor.shape, tensor.chunk)
        or old.codecs[before.codec] != spec
        or [plane.name for plane in before.planes] != planes
        or codec(spec.name, spec.params).needs_base  # what the bytes mean depends on another manifest
    ):
        return None
    n = tensor.chunks
    differ = np.zeros(n, bool)
    for a, b in zip(before.planes, tensor.planes, strict=True):
        differ |= (_digests(old, a.first, n) != _digests(new, b.first, n)).any(axis=1)
    return np.flatnonzero(differ)


def _digests(manifest: Manifest, first: int, n: int) -> NDArray[np.uint8]:
    rows = np.frombuffer(manifest.chunks.digest, np.uint8).reshape(-1, DIGEST_BYTES)
    return rows[first : first + n]


def touching(tensor: Tensor, share: Share) -> NDArray[np.int64]:
    """Indices in the grid, ascending, of the chunks that a share touches."""
    found = [grid.touching(tensor.shape, tensor.chunk, stored) for stored, _ in share.pieces()]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def boxes(tensor: Tensor, share: Share, chunk: int) -> Iterator[tuple[Region, Region]]:
    """The parts of a chunk that a share holds, as boxes: (region of the whole tensor, region of the share's own)."""
    return overlaps(share.pieces(), grid.chunk_region(tensor.shape, tensor.chunk, chunk))
