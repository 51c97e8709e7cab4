"""The part of a model that one of several processes holds: tensors, and slices of tensors that others hold the rest of."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from modelstore.errors import UnsupportedError
from modelstore.format.region import Region, Shape, extent, full
from modelstore.sources.base import Source
from modelstore.sources.open import checked_files, open_source

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor

    from modelstore.sources.open import Openable


@dataclass(frozen=True, eq=False)
class Slice:
    """A box of a larger tensor: its values (torch or NumPy), the index of its first element, the whole tensor's shape."""

    tensor: Any
    offset: Sequence[int]
    shape: Sequence[int]

    def __repr__(self) -> str:
        here = tuple(getattr(self.tensor, "shape", ()))
        return f"Slice({here} at {tuple(self.offset)} of {tuple(self.shape)})"


@dataclass(frozen=True, slots=True)
class SliceBounds:
    """The place of a slice: the whole tensor's shape, and the region of it."""

    shape: Shape
    region: Region


@dataclass(frozen=True)
class PartSource:
    """A process's own tensors as a source, by the shapes they have here; and the places of those that are slices."""

    source: Source
    places: Mapping[str, SliceBounds] = field(default_factory=dict)


def open_part(what: Openable, *, files: Mapping[str, str | Path | bytes] | None = None) -> PartSource:
    """A process's part of a model: anything that `open_source` takes, whose values may be `Slice`s and DTensors too.

    The first of a DTensor's replicas gives the values, and the others nothing. Slices without elements are left out.
    `ValueError` for a slice that is not within its tensor, `UnsupportedError` for a DTensor with pending sums.
    """
    own: Mapping[str, Any] = {}
    found: Mapping[str, Path | bytes] = {}
    if isinstance(what, Mapping):
        own = what
    elif "torch" in sys.modules and isinstance(what, sys.modules["torch"].nn.Module):
        from modelstore.sources.torch import module_state

        own, found = module_state(what)
    else:
        return PartSource(open_source(what, files=files))
    from modelstore.sources.torch import StateDictSource

    state: dict[str, Any] = {}
    places: dict[str, SliceBounds] = {}
    for name, value in own.items():
        held = _held(str(name), value)
        if held is None:
            continue
        state[name], place = held
        if place is not None:
            places[name] = place
    extra = {**found, **checked_files(files or {})}
    return PartSource(StateDictSource(state, files=extra, apart=places), places)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, told without an import of what they are made of."""
    distributed = sys.modules.get("torch.distributed.tensor")  # a DTensor can only exist once this is imported
    return distributed is not None and isinstance(value, distributed.DTensor)


def _held(name: str, value: Any) -> tuple[Any, SliceBounds | None] | None:
    """The values of an entry and their place (None: they are the whole tensor); None if another rank gives them."""
    if is_dtensor(value):
        return _of_dtensor(name, value)
    if not isinstance(value, Slice):
        return value, None
    return _placed(name, value.tensor, value.offset, value.shape)


def _placed(
    name: str, values: Any, offset: Sequence[int], shape: Sequence[int]
) -> tuple[Any, SliceBounds | None] | None:
    whole, here = tuple(int(n) for n in shape), tuple(getattr(values, "shape", ()))
    region = tuple((int(a), int(a) + n) for a, n in zip(offset, here, strict=False))
    fits = len(offset) == len(whole) == len(here) and all(
        a >= 0 and b <= n for (a, b), n in zip(region, whole, strict=True)
    )
    if not fits:
        raise ValueError(
            f"the slice of tensor {name!r} has shape {here} at offset {tuple(offset)}, which does not lie within {whole}"
        )
    if region == full(whole):
        return values, None
    if 0 in whole:
        return values.reshape(whole), None
    return (values, SliceBounds(whole, region)) if 0 not in here else None


def box_of(name: str, tensor: DTensor) -> Region | None:
    """The box of a DTensor that this process holds in `to_local()`; None if it holds nothing of it.

    `UnsupportedError` if sums are pending, or the local part is not a box.
    """
    if tensor.device_mesh.get_coordinate() is None:  # the tensor is not on this process
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedError(
            f"tensor {name!r} is a DTensor with placements {tensor.placements}, of which the sums are not done: "
            f"call .redistribute() first",
            tensor=name,
        )
    local = tuple(tensor.to_local().shape)
    # The protocol by which torch's own checkpoints find a shard's place.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if 0 in local and tensor.numel():
        return None
    box = tuple((a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
    if extent(box) != local:
        raise UnsupportedError(
            f"tensor {name!r} is a DTensor whose shard is not a box of it (placements {tensor.placements}): "
            f"call .redistribute() to Shard placements first",
            tensor=name,
        )
    return box


def _of_dtensor(name: str, tensor: DTensor) -> tuple[torch.Tensor, SliceBounds | None] | None:
    box = box_of(name, tensor)
    if box is None:
        return None
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "who is not on the mesh holds no box"
    if any(at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()):
        return None  # the first replica gives the values
    return _placed(name, tensor.to_local().detach(), tuple(a for a, _ in box), tuple(tensor.shape))
