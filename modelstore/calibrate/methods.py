"""How weights are found on data, by the names that recipes have for it: a method is a row here and one in `format/recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from modelstore.calibrate import awq, gptq, lowrank, pruned, tuned
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.integer.weighted import by_column, search
from modelstore.codecs.look import FactorPair, Look, ReadCodes, ReadValues, Statistics
from modelstore.codecs.lowrank.codec import factor_dtype
from modelstore.codecs.numeric.levels import narrowed
from modelstore.codecs.numeric.numbers import limit
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.codecs.sparse.codec import Sparse
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.codecs.weight import Encode, WeightCodec
from modelstore.format import boxes
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.recipe import BY_COLUMNS, Value


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

    def stored(self, statistics: Statistics) -> Encode:
        """How regions of it are encoded once that is known of it."""
        read = partial(boxes.cut, raw_of(self.weight, self.kind), tuple(self.weight.shape), self.kind.itemsize)
        return self.codec.fit(Look(read, tuple(self.weight.shape), self.kind, statistics=statistics))


@dataclass(frozen=True)
class Solution:
    """A weight that was found: how its regions are encoded, and why it looks at no data where it could not (`note`).

    `coded`: what was found, where that are codes which can be tuned.
    """

    encode: Encode
    note: str = ""
    coded: gptq.Solved | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics that a method gives the codec of a layer, and remarks for the layer's owner."""

    statistics: Statistics
    note: str = ""
    coded: gptq.Solved | None = None


@dataclass(frozen=True)
class Way:
    """A method. `prepare`: what layers of one input share, of its sum of outer products; `by_codec`: what it knows of a layer;
    `tunes`: whether the layers of a block are then tuned together; `across`: whether weights may have inputs as rows; `folds`:
    whether columns are scaled first, and what comes before them.
    """

    prepare: Callable[[torch.Tensor], Any]
    by_codec: Mapping[str, Callable[[Layer, Any], LayerStatistics]]
    tunes: bool = False
    across: bool = False
    folds: bool = False

    def solve(self, layer: Layer, prepared: Any) -> Solution:
        """A layer, stored by a codec that the method is for."""
        known = self.by_codec[layer.codec.name](layer, prepared)
        return Solution(layer.stored(known.statistics), known.note, known.coded)


def _gptq(layer: Layer, inputs: gptq.Factored) -> LayerStatistics:
    codec = _int(layer)
    stored = getattr(torch, scale_dtype(layer.kind))
    found = gptq.solve(layer.weight, inputs, codec.bits, codec.group_size, stored, across=layer.across)
    note = "its inputs have no factor: plain rounding" if found.damping is None else ""
    return LayerStatistics(_codes(layer, found), note, found)


def coded(layer: Layer, found: gptq.Solved, note: str = "") -> Solution:
    """A layer whose codes and scales were found."""
    return Solution(layer.stored(_codes(layer, found)), note, found)


def rounding_of(layer: Layer, start: gptq.Solved) -> tuned.Rounding:
    """A layer's rounding, to be tuned from what was found for it."""
    codec, stored = _int(layer), getattr(torch, scale_dtype(layer.kind))
    return tuned.Rounding.of(layer.weight, start, codec.bits, codec.group_size, stored)


def _scaled(layer: Layer, inputs: awq.Squares) -> LayerStatistics:
    """Plain rounding, by the clip of each group that loses least of what the group gives."""
    codec, weight = _int(layer), layer.weight.float()
    bits, group, stored = codec.bits, codec.group_size, getattr(torch, scale_dtype(layer.kind))
    whole = layer.compared
    scales = awq.plain(weight, bits, group, stored) if whole else awq.clipped(weight, inputs, bits, group, stored)
    found = awq.codes(weight, scales, bits, group).to(torch.int8).numpy()
    return LayerStatistics(_codes(layer, gptq.Solved(found, scales.numpy(), None)))


def _importance(hessian: torch.Tensor) -> Statistics:
    """With mean 1; if nothing comes through any column, all are alike."""
    found = hessian.diagonal().float()
    found = found / found.mean() if bool(found.any()) else torch.ones_like(found)
    return Statistics(importance=found.numpy())


def _weighted(_: Layer, importance: Statistics) -> LayerStatistics:
    """What the codec makes of a weight where each column counts by what comes through it."""
    return LayerStatistics(importance)


def _codes(layer: Layer, found: gptq.Solved) -> Statistics:
    codec, kind = _int(layer), layer.kind

    def codes(bits: int, group_size: int) -> ReadCodes:
        assert (bits, group_size) == (codec.bits, codec.group_size), "they were found for this codec"
        return codec.codes_in(found.codes, found.scales, kind)

    return Statistics(codes=codes)


def _wanda(layer: Layer, inputs: pruned.Moments) -> LayerStatistics:
    return _kept(layer, inputs, pruned.wanda(layer.weight.float(), inputs, _sparse(layer).pruning))


def _sparsegpt(layer: Layer, inputs: pruned.Moments) -> LayerStatistics:
    weight, pruning = layer.weight.float(), _sparse(layer).pruning
    factored = inputs.factored(pruning.m)
    if factored is None:
        return _kept(layer, inputs, pruned.wanda(weight, inputs, pruning), "its inputs have no factor: pruned by Wanda")
    return _kept(layer, inputs, pruned.sparsegpt(weight, factored, pruning))


def _pruned_codes(layer: Layer, inputs: pruned.Moments) -> LayerStatistics:
    """Pruned and rounded column by column: what follows makes up for both."""
    codec, told = _int(layer), layer.params
    weight = torch.where(inputs.diagonal == 0, 0.0, layer.weight.float())  # no scale is as wide as what goes
    half = 1 << (codec.bits - 1)
    pruning = Pruning(sparsity=float(told["sparsity"]), n=int(told["n"]), m=int(told["m"]))
    stored = getattr(torch, scale_dtype(layer.kind))
    scales = search(weight, inputs.diagonal.float(), codec.bits, codec.group_size, stored)
    wide = by_column(scales, codec.group_size, weight.shape[1])
    factored = inputs.factored(pruning.m)
    if factored is None:
        found, note = (
            pruned.wanda(weight, inputs, pruning),
            "its inputs have no factor: pruned by Wanda, and plain rounding",
        )
    else:
        found, note = pruned.sparsegpt(weight, factored, pruning, wide, codec.bits), ""
    codes = (found / wide).round().clamp(-half, half - 1).to(torch.int8).numpy()
    return LayerStatistics(_codes(layer, gptq.Solved(codes, scales.numpy(), None)), note)


def _kept(layer: Layer, inputs: pruned.Moments, found: torch.Tensor, note: str = "") -> LayerStatistics:
    """The remaining weights, or, if asked for, the weights in their places that lose least."""
    if layer.params["reconstruct"]:
        found = pruned.reconstructed(found, layer.weight.float(), inputs)

    def kept() -> ReadValues:
        return partial(boxes.cut, raw_of(found, layer.kind), tuple(found.shape), layer.kind.itemsize)

    return LayerStatistics(Statistics(kept=kept), note)


def _int(layer: Layer) -> Int:
    assert isinstance(layer.codec, Int), "recipes have the codecs that their methods are for"
    return layer.codec


def _sparse(layer: Layer) -> Sparse:
    assert isinstance(layer.codec, Sparse), "recipes have the codecs that their methods are for"
    return layer.codec


def _low_rank(layer: Layer, inputs: lowrank.Whitening) -> LayerStatistics:
    stored = getattr(torch, factor_dtype(layer.kind).name)

    def factors(rank: int, energy: float) -> FactorPair:
        found = lowrank.solve(layer.weight, inputs, rank, energy, stored)
        return found.left.numpy(), found.right.numpy()

    note = "" if inputs.known else "its inputs have no factor: plain singular vectors"
    return LayerStatistics(Statistics(factors=factors), note)


def raw_of(weight: torch.Tensor, kind: DType) -> Bytes:
    """The raw bytes of a weight, rounded to the dtype that it is stored in."""
    most = float(limit(kind))
    return narrowed(np.ascontiguousarray(weight.clamp(-most, most).float().numpy()), kind)


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "gptq": Way(gptq.Factored.of, {"int": _gptq}, across=True),
        "tuned": Way(gptq.Factored.of, {"int": _gptq}, tunes=True, across=True),
        "awq": Way(awq.Squares, {"int": _scaled}, folds=True),
        "imatrix": Way(_importance, dict.fromkeys(("int", *BY_COLUMNS), _weighted)),
        "wanda": Way(pruned.Moments, {"sparse": _wanda}),
        "sparsegpt": Way(pruned.Moments, {"sparse": _sparsegpt, "int": _pruned_codes}),
        "svd-llm": Way(lowrank.Whitening.of, {"lowrank": _low_rank}),
    }
)
