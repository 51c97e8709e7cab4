"""How weights are found on data, by the names that recipes have for it: a method is a row here and one in `format/recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from modelstore.calibrate import gptq, lowrank, pruned
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.lowrank.codec import LowRank, factor_dtype, packed
from modelstore.codecs.numeric.levels import narrowed
from modelstore.codecs.numeric.numbers import limit
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.codecs.sparse.codec import Sparse
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.codecs.weight import WeightCodec
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes
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


def _pruned(layer: Layer, inputs: pruned.Moments, *, second_order: bool) -> Solution:
    """By Wanda, or where the inputs have a factor by SparseGPT; then what is left loses least, where that is asked for."""
    pruning, weight, note = _pruning(layer), layer.weight.float(), ""
    factored = inputs.factored(pruning.m) if second_order else None
    if factored is not None:
        found = pruned.sparsegpt(weight, factored, pruning)
    else:
        found = pruned.wanda(weight, inputs, pruning)
        note = "its inputs have no factor: pruned by Wanda" if second_order else ""
    if layer.params["reconstruct"]:
        found = pruned.reconstructed(found, weight, inputs)
    raw = raw_of(found, layer.kind)

    def planes(region: Region) -> tuple[Buffer, ...]:
        part = boxes.cut(raw, tuple(found.shape), layer.kind.itemsize, region)
        return Sparse().encode(part, extent(region), layer.kind)  # all that is no zero

    return Solution(planes, note)


def _pruning(layer: Layer) -> Pruning:
    codec = layer.codec
    assert isinstance(codec, Sparse), "recipes have the codecs that their methods are for"
    return codec.pruning


def _low_rank(layer: Layer, inputs: lowrank.Whitening) -> Solution:
    codec, stored = layer.codec, factor_dtype(layer.kind)
    assert isinstance(codec, LowRank), "recipes have the codecs that their methods are for"
    rank = codec.rank_of(*layer.weight.shape)
    found = lowrank.solve(layer.weight, inputs, rank, codec.energy, getattr(torch, stored.name))

    def planes(region: Region) -> tuple[Buffer, ...]:
        (a, b), (c, d) = region
        left, right = raw_of(found.left[a:b], stored), raw_of(found.right[:, c:d], stored)
        return packed(left, right, len(found.right), stored)

    return Solution(planes, "" if inputs.known else "its inputs have no factor: plain singular vectors")


def raw_of(weight: torch.Tensor, kind: DType) -> Bytes:
    """The raw bytes of a weight, rounded to the dtype that it is stored in."""
    most = float(limit(kind))
    return narrowed(np.ascontiguousarray(weight.clamp(-most, most).float().numpy()), kind)


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "gptq": Way(gptq.Factored.of, _gptq),
        "wanda": Way(pruned.Moments, partial(_pruned, second_order=False)),
        "sparsegpt": Way(pruned.Moments, partial(_pruned, second_order=True)),
        "svd-llm": Way(lowrank.Whitening.of, _low_rank),
    }
)
