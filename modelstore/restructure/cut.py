"""Which regions of which stored tensors make the tensors of the smaller model: pure, by names, shapes and rank layouts.

The units along an axis (attention heads, neurons) are known from how tensor-parallel ranks slice the model: the same knowledge
says where one may cut, and which tensors are cut together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modelstore.architecture.blocks import Blocks
from modelstore.architecture.ranks.parallel import Cuts
from modelstore.architecture.ranks.parallel_table import AxisCut
from modelstore.errors import UnsupportedError
from modelstore.format.objects.manifest import Manifest, Tensor

_EXPERTS = "experts"


@dataclass(frozen=True)
class KeptParts:
    """The kept parts of a model: the numbers of its layers, and for each kept layer those of its neurons and key/value heads.

    All numbers are the original's. A layer that `neurons` or `groups` does not name keeps all of them.
    """

    layers: tuple[int, ...]
    neurons: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    groups: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Along:
    """The units along an axis of a tensor: neurons or heads, in parts one behind the other, each of so many units.

    `width`: numbers of one unit, by part.
    """

    axis: int
    parts: tuple[str, ...]
    units: tuple[int, ...]
    width: tuple[int, ...]

    @property
    def neurons(self) -> bool:
        """Whether the units are neurons, and not heads."""
        return set(self.parts) == {"even"}


@dataclass(frozen=True)
class CutTensor:
    """A tensor of the smaller model: `source`, under another name, with these numbers along an axis; all where `axis` is None."""

    name: str
    source: Tensor
    axis: int | None = None
    index: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is left."""
        if self.axis is None or self.index is None:
            return self.source.shape
        return (*self.source.shape[: self.axis], len(self.index), *self.source.shape[self.axis + 1 :])


class Structure:
    """A stored model's layers and the units along the axes of their tensors.

    `stack`: the name before the layers' numbers; `layers`: how many there are. `UnsupportedError` if there is not one such
    stack.
    """

    def __init__(self, manifest: Manifest, found: Blocks, cuts: Cuts) -> None:
        if len(found.stacks) != 1:
            named = ", ".join(found.stacks) or "none"
            raise UnsupportedError(f"a model is cut whose layers are in one stack, and this one has {named}")
        self.manifest = manifest
        ((self.stack, numbers),) = found.stacks.items()
        self._numbers = {manifest.by_name[name].name: number for name, number in numbers.items()}
        self.layers = max(self._numbers.values()) + 1
        if set(self._numbers.values()) != set(range(self.layers)):
            raise UnsupportedError(f"tensors of some layers of {self.stack!r} are missing: save the whole model")
        self._cuts = cuts
        self._of_layer: list[list[Tensor]] = [[] for _ in range(self.layers)]
        for tensor in manifest.tensors:
            if tensor.name in self._numbers:
                self._of_layer[self._numbers[tensor.name]].append(tensor)

    def tensors(self, layer: int) -> list[Tensor]:
        """The tensors of one layer."""
        return self._of_layer[layer]

    def along(self, tensor: Tensor) -> Along | None:
        """The units along the axis that is cut; None if the tensor is whole whatever is cut."""
        if tensor.name not in self._numbers:
            return None
        found = self._cuts.find(tensor.name)
        if found is None or "vocabulary" in found.parts:
            return None
        if "pair" in found.parts or found.axis >= len(tensor.shape):
            raise UnsupportedError(f"nothing is known of how {tensor.name} would be cut", tensor=tensor.name)
        return self._along(tensor, found)

    def _along(self, tensor: Tensor, found: AxisCut) -> Along:
        length = tensor.shape[found.axis]
        if set(found.parts) == {"even"}:
            each, rest = divmod(length, len(found.parts))
            units, widths = (each,) * len(found.parts), (1,) * len(found.parts)
        else:
            units = found.units or tuple(self._cuts.heads[part] for part in found.parts)
            width, rest = divmod(length, sum(units))
            widths = (width,) * len(units)
        if rest:
            raise UnsupportedError(
                f"{tensor.name} has {length} numbers along axis {found.axis}, which {len(found.parts)} parts do not divide",
                tensor=tensor.name,
            )
        return Along(found.axis, found.parts, units, widths)

    def neurons(self) -> int:
        """How many neurons each layer has. `UnsupportedError` if layers differ, or have experts."""
        return self._units("even", "neurons")

    def groups(self) -> tuple[int, int]:
        """How many key/value heads each layer has, and how many query heads use each. `UnsupportedError` if layers differ."""
        query = self._units("query", "attention heads")
        parts = {part for tensor in self.tensors(0) if (at := self.along(tensor)) for part in at.parts}
        key = self._units("key", "key/value heads") if "key" in parts else query
        if query % key:
            raise UnsupportedError(f"{query} query heads are not divided by {key} key/value heads")
        return key, query // key

    def _units(self, part: str, what: str) -> int:
        """How many units of that kind each layer has."""
        found: set[int] = set()
        for layer in range(self.layers):
            there = [(tensor, at) for tensor in self.tensors(layer) if (at := self.along(tensor)) and part in at.parts]
            if not there:
                raise UnsupportedError(f"nothing is known of {what} in layer {layer}, so they cannot be cut")
            expert = next((tensor.name for tensor, _ in there if _EXPERTS in tensor.name), None)
            if expert is not None:
                raise UnsupportedError(f"{expert} belongs to experts, whose {what} cannot be cut", tensor=expert)
            found |= {n for _, at in there for one, n in zip(at.parts, at.units, strict=True) if one == part}
        if len(found) != 1:
            told = ", ".join(map(str, sorted(found)))
            raise UnsupportedError(f"layers have different numbers of {what} ({told}), so they cannot be cut")
        return found.pop()

    def cut(self, kept: KeptParts) -> list[CutTensor]:
        """The tensors of the smaller model, in the order of the original's."""
        place = {layer: at for at, layer in enumerate(kept.layers)}
        found = []
        for tensor in self.manifest.tensors:
            layer = self._numbers.get(tensor.name)
            if layer is None:
                found.append(CutTensor(tensor.name, tensor))
            elif layer in place:
                name = renamed(tensor.name, self.stack, layer, place[layer])
                axis, index = self._index(tensor, layer, kept)
                found.append(CutTensor(name, tensor, axis, index))
        return found

    def aliases(self, kept: KeptParts) -> dict[str, str]:
        """The further names of tied tensors in the smaller model."""
        names = {one.source.name: one.name for one in self.cut(kept)}
        place = {layer: at for at, layer in enumerate(kept.layers)}
        found = {}
        for alias, of in self.manifest.aliases.items():
            number = alias.removeprefix(f"{self.stack}.").partition(".")[0]
            inside = alias.startswith(f"{self.stack}.") and number.isdecimal()
            if of in names and not inside:
                found[alias] = names[of]
            elif of in names and int(number) in place:
                found[renamed(alias, self.stack, int(number), place[int(number)])] = names[of]
        return found

    def _index(self, tensor: Tensor, layer: int, kept: KeptParts) -> tuple[int | None, NDArray[np.int64] | None]:
        neurons, groups = kept.neurons.get(layer), kept.groups.get(layer)
        if neurons is None and groups is None:
            return None, None
        at = self.along(tensor)
        chosen = None if at is None else neurons if at.neurons else groups
        if at is None or chosen is None:
            return None, None
        share = 1 if at.neurons else self.groups()[1]
        return at.axis, positions(at, chosen, share)


def positions(at: Along, chosen: Sequence[int], share: int) -> NDArray[np.int64]:
    """The places of the chosen units along an axis, in ascending order. `share`: query heads that use one key/value head."""
    found, first = [], 0
    for part, units, width in zip(at.parts, at.units, at.width, strict=True):
        each = share if part == "query" else 1
        units_kept = (np.asarray(chosen, np.int64)[:, None] * each + np.arange(each)).reshape(-1)
        found.append((first + units_kept[:, None] * width + np.arange(width)).reshape(-1))
        first += units * width
    return np.concatenate(found)


def renamed(name: str, stack: str, layer: int, place: int) -> str:
    """A tensor's name in a layer that has another number."""
    return f"{stack}.{place}.{name.removeprefix(f'{stack}.{layer}.')}"
