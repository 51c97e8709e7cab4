"""Tensors of a variant that are those of the version before: the original did not change, and so neither did they."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from modelstore.codecs.loss import Loss
from modelstore.compress.kept import LOSSES
from modelstore.compress.parent import Parent
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import Tally, Viewed, Written
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.objects.manifest_builder import chunk_places
from modelstore.plan.work import Work
from modelstore.store.shelf import Shelf


@dataclass(frozen=True)
class Previous:
    """A variant of the version before, and the original of that version."""

    original: Manifest
    variant: Manifest

    def made_by(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the variant was made of this original, by the recipe that a manifest records so."""
        return self.variant.recipe == recorded and self.variant.parent == self.original.content

    def written(self, tensor: Tensor, item: Input) -> Written | None:
        """A tensor as the variant has it, if it would now be made of the same values in the same way."""
        before, made = self.original.by_name.get(tensor.name), self.variant.by_name.get(tensor.name)
        if before is None or made is None or made.name != tensor.name:
            return None
        same = (before.digest, before.dtype, before.shape) == (tensor.digest, tensor.dtype, tensor.shape)
        spec = self.variant.codecs[made.codec]
        if not tensor.digest or not same or spec != item.plan.codec or made.chunk != item.plan.chunk:
            return None
        loss = Loss() if item.views[0].exact else _loss(self.variant.metrics.get(LOSSES), tensor.name)
        if loss is None:
            return None
        return Written(tensor.digest, chunk_places(self.variant, made), (Viewed(made.digest, loss),))


def _loss(sums: object, name: str) -> Loss | None:
    """What a manifest keeps of a tensor's loss; None where an earlier release made it."""
    try:
        return msgspec.convert(sums[name] if isinstance(sums, dict) else None, prepared(Loss))
    except (KeyError, msgspec.ValidationError):
        return None


def reused(
    previous: Previous | None,
    parent: Parent,
    inputs: Iterable[Input],
    recorded: Mapping[str, Any],
    shelf: Shelf,
    tally: Tally,
    work: Work,
) -> dict[str, Written]:
    """Those of the inputs that need not be read, nor encoded; they are added to the tally. For variants that are made alone.

    A tensor is made again if one of its packs is not good.
    """
    found: dict[str, Written] = {}
    if previous is None or not previous.made_by(recorded):
        return found
    shelf.expect(previous.variant.packs)
    for item in inputs:
        tensor = parent.manifest.by_name.get(item.plan.name)
        done = previous.written(tensor, item) if tensor is not None and len(item.views) == 1 else None
        if tensor is None or done is None:
            continue
        chunks = [chunk for plane in done.planes.values() for chunk in plane]
        if not all(shelf.good(pack) for pack in {at[0] for _, at in chunks}):
            continue
        for digest, at in chunks:
            tally.find(digest, at[2])
        tally.raw += tensor.nbytes
        work.done(tensor.nbytes)
        found[tensor.name] = done
    return found
