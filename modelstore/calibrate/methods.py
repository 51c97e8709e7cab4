"""How weights are found on data, by the names that recipes have for it: a method is a row here and one in `format/recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from modelstore.calibrate import gptq
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.codecs.weight import WeightCodec
from modelstore.format.buffers import Buffer
from modelstore.format.dtypes import DType
from modelstore.format.recipe import Value
from modelstore.format.region import Region, extent


@dataclass(frozen=True)
class Layer:
    """A weight that is to be found: float32 (rows, columns), its codec, its dtype as stored, and what its method is told."""

    weight: torch.Tensor
    codec: WeightCodec
    kind: DType
    params: Mapping[str, Value]


@dataclass(frozen=True)
class Solution:
    """A weight that was found: the planes of any region of it, and why it looks at no data where it could not (`note`)."""

    planes: Callable[[Region], tuple[Buffer, ...]]
    note: str = ""


@dataclass(frozen=True)
class Way:
    """A method. `prepare`: what layers of one input share, of its sum of outer products; `solve`: one of them by that."""

    prepare: Callable[[torch.Tensor], Any]
    solve: Callable[[Layer, Any], Solution]


def _gptq(layer: Layer, inputs: gptq.Factored) -> Solution:
    codec, kind = layer.codec, layer.kind
    assert isinstance(codec, Int), "recipes have the codecs that their methods are for"
    stored = getattr(torch, scale_dtype(kind))
    found = gptq.solve(layer.weight, inputs, codec.bits, codec.group_size, stored)

    def planes(region: Region) -> tuple[Buffer, ...]:
        rows, columns = (slice(*pair) for pair in region)
        groups = slice(columns.start // codec.group_size, -(-columns.stop // codec.group_size))
        return codec.encode_with(found.codes[rows, columns], found.scales[rows, groups], extent(region), kind)

    return Solution(planes, "its inputs have no factor: plain rounding" if found.damping is None else "")


WAYS: Mapping[str, Way] = MappingProxyType({"gptq": Way(gptq.Factored.of, _gptq)})
