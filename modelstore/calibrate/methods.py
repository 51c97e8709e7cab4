"""How weights are found on data, by the names that recipes have for it: a method is a row here and one in `format/recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.calibrate import awq, gptq, lowrank, pruned, tuned
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.lowrank.codec import LowRank, factor_dtype, packed
from modelstore.codecs.numeric.levels import narrowed
from modelstore.codecs.numeric.numbers import Floats, limit
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.codecs.sparse.codec import Sparse
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.codecs.weight import WeightCodec, Weighted
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.recipe import BY_COLUMNS, Value
from modelstore.format.region import Region, extent


@dataclass(frozen=True)
class Layer:
    """A weight to find: float32 (rows, columns), its codec, its dtype as stored, and the parameters of its method.

    `across`: its rows are what it reads, its columns what it gives. `compared`: its output is compared with that of others, as
    queries with keys, and must not be clipped.
    """

    weight: torch.Tensor
    codec: WeightCodec
    kind: DType
    params: Mapping[str, Value]
    across: bool = False
    compared: bool = False


Planes = Callable[[Region], tuple[Buffer, ...]]


@dataclass(frozen=True)
class Solution:
    """A weight that was found: the planes of any region of it, and why it looks at no data where it could not (`note`).

    `coded`: what was found, where that are codes which can be tuned.
    """

    planes: Planes
    note: str = ""
    coded: gptq.Solved | None = None


@dataclass(frozen=True)
class Way:
    """A method. `prepare`: what layers of one input share, of its sum of outer products; `by_codec`: how one is solved; `tunes`:
    whether the layers of a block are then tuned together; `across`: whether weights may have inputs as rows; `folds`: whether
    columns are scaled first, and what comes before them.
    """

    prepare: Callable[[torch.Tensor], Any]
    by_codec: Mapping[str, Callable[[Layer, Any], Solution]]
    tunes: bool = False
    across: bool = False
    folds: bool = False

    def solve(self, layer: Layer, prepared: Any) -> Solution:
        """A layer, stored by a codec that the method is for."""
        return self.by_codec[layer.codec.name](layer, prepared)


def _gptq(layer: Layer, inputs: gptq.Factored) -> Solution:
    codec, kind = layer.codec, layer.kind
    assert isinstance(codec, Int), "recipes have the codecs that their methods are for"
    stored = getattr(torch, scale_dtype(kind))
    found = gptq.solve(layer.weight, inputs, codec.bits, codec.group_size, stored, across=layer.across)
    note = "its inputs have no factor: plain rounding" if found.damping is None else ""
    return coded(layer, found, note)


def coded(layer: Layer, found: gptq.Solved, note: str = "") -> Solution:
    """A layer whose codes and scales were found."""
    assert isinstance(layer.codec, Int), "recipes have the codecs that their methods are for"
    return Solution(_coded(layer.codec, found.codes, found.scales, layer.kind), note, found)


def rounding_of(layer: Layer, start: gptq.Solved) -> tuned.Rounding:
    """A layer's rounding, to be tuned from what was found for it."""
    assert isinstance(layer.codec, Int), "recipes have the codecs that their methods are for"
    stored = getattr(torch, scale_dtype(layer.kind))
    return tuned.Rounding.of(layer.weight, start, layer.codec.bits, layer.codec.group_size, stored)


def _weighted(layer: Layer, importance: torch.Tensor) -> Solution:
    """Plain rounding, with the clip of each group that loses least where each column counts by what comes through it."""
    codec, weight = layer.codec, layer.weight.float()
    assert isinstance(codec, Int), "recipes have the codecs that their methods are for"
    half, stored = 1 << (codec.bits - 1), getattr(torch, scale_dtype(layer.kind))
    scales = gptq.search(weight, importance, codec.bits, codec.group_size, stored)
    wide = gptq.by_column(scales, codec.group_size, weight.shape[1])
    codes = (weight / wide).round().clamp(-half, half - 1).to(torch.int8).numpy()
    return Solution(_coded(codec, codes, scales.numpy(), layer.kind))


def _by_columns(layer: Layer, importance: torch.Tensor) -> Solution:
    """The codec's result for a weight if each column counts by what comes through it."""
    codec, kind, shape = layer.codec, layer.kind, (layer.weight.shape[0], layer.weight.shape[1])
    assert isinstance(codec, Weighted), "recipes have the codecs that their methods are for"
    raw = raw_of(layer.weight.float(), kind)
    encode = codec.weighted(raw, shape, kind, importance.numpy())
    return Solution(lambda region: encode(boxes.cut(raw, shape, kind.itemsize, region), region))


def _scaled(layer: Layer, inputs: awq.Squares) -> Solution:
    """Plain rounding, by the clip of each group that loses least of what the group gives."""
    codec, weight = layer.codec, layer.weight.float()
    assert isinstance(codec, Int), "recipes have the codecs that their methods are for"
    bits, group, stored = codec.bits, codec.group_size, getattr(torch, scale_dtype(layer.kind))
    whole = layer.compared
    scales = awq.plain(weight, bits, group, stored) if whole else awq.clipped(weight, inputs, bits, group, stored)
    found = awq.codes(weight, scales, bits, group).to(torch.int8).numpy()
    return Solution(_coded(codec, found, scales.numpy(), layer.kind))


def _importance(hessian: torch.Tensor) -> torch.Tensor:
    """With mean 1; if nothing comes through any column, all are alike."""
    found = hessian.diagonal().float()
    return found / found.mean() if bool(found.any()) else torch.ones_like(found)


def _coded(codec: Int, codes: NDArray[np.int8], scales: Floats, kind: DType) -> Planes:
    def planes(region: Region) -> tuple[Buffer, ...]:
        rows, columns = (slice(*pair) for pair in region)
        groups = slice(columns.start // codec.group_size, -(-columns.stop // codec.group_size))
        return codec.encode_with(codes[rows, columns], scales[rows, groups], extent(region), kind)

    return planes


def _wanda(layer: Layer, inputs: pruned.Moments) -> Solution:
    return _kept(layer, inputs, pruned.wanda(layer.weight.float(), inputs, _sparse(layer).pruning))


def _sparsegpt(layer: Layer, inputs: pruned.Moments) -> Solution:
    weight, pruning = layer.weight.float(), _sparse(layer).pruning
    factored = inputs.factored(pruning.m)
    if factored is None:
        return _kept(layer, inputs, pruned.wanda(weight, inputs, pruning), "its inputs have no factor: pruned by Wanda")
    return _kept(layer, inputs, pruned.sparsegpt(weight, factored, pruning))


def _pruned_codes(layer: Layer, inputs: pruned.Moments) -> Solution:
    """Pruned and rounded column by column: what follows makes up for both."""
    codec, told = layer.codec, layer.params
    assert isinstance(codec, Int), "recipes have the codecs that their methods are for"
    weight = torch.where(inputs.diagonal == 0, 0.0, layer.weight.float())  # no scale is as wide as what goes
    half = 1 << (codec.bits - 1)
    pruning = Pruning(sparsity=float(told["sparsity"]), n=int(told["n"]), m=int(told["m"]))
    stored = getattr(torch, scale_dtype(layer.kind))
    scales = gptq.search(weight, inputs.diagonal.float(), codec.bits, codec.group_size, stored)
    wide = gptq.by_column(scales, codec.group_size, weight.shape[1])
    factored = inputs.factored(pruning.m)
    if factored is None:
        found, note = (
            pruned.wanda(weight, inputs, pruning),
            "its inputs have no factor: pruned by Wanda, and plain rounding",
        )
    else:
        found, note = pruned.sparsegpt(weight, factored, pruning, wide, codec.bits), ""
    codes = (found / wide).round().clamp(-half, half - 1).to(torch.int8).numpy()
    return Solution(_coded(codec, codes, scales.numpy(), layer.kind), note)


def _kept(layer: Layer, inputs: pruned.Moments, found: torch.Tensor, note: str = "") -> Solution:
    """The remaining weights, or, if asked for, the weights in their places that lose least."""
    if layer.params["reconstruct"]:
        found = pruned.reconstructed(found, layer.weight.float(), inputs)
    raw = raw_of(found, layer.kind)

    def planes(region: Region) -> tuple[Buffer, ...]:
        part = boxes.cut(raw, tuple(found.shape), layer.kind.itemsize, region)
        return Sparse().encode(part, extent(region), layer.kind)  # all that is not zero

    return Solution(planes, note)


def _sparse(layer: Layer) -> Sparse:
    assert isinstance(layer.codec, Sparse), "recipes have the codecs that their methods are for"
    return layer.codec


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
        "gptq": Way(gptq.Factored.of, {"int": _gptq}, across=True),
        "tuned": Way(gptq.Factored.of, {"int": _gptq}, tunes=True, across=True),
        "awq": Way(awq.Squares, {"int": _scaled}, folds=True),
        "imatrix": Way(_importance, {"int": _weighted} | dict.fromkeys(BY_COLUMNS, _by_columns)),
        "wanda": Way(pruned.Moments, {"sparse": _wanda}),
        "sparsegpt": Way(pruned.Moments, {"sparse": _sparsegpt, "int": _pruned_codes}),
        "svd-llm": Way(lowrank.Whitening.of, {"lowrank": _low_rank}),
    }
)
