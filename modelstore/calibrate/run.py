"""Calibrates a model block by block: statistics, codes, and what the block gives with them, on which the next one is solved.

One block is in memory at a time, with the sums of its inputs; what it gives for the samples waits in a spool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelstore.calibrate.layers import Linears, as_stored, decoded, linears
from modelstore.calibrate.methods import WAYS, Layer, Solution, coded, rounding_of
from modelstore.calibrate.statistics import TOKENS, Gathered
from modelstore.calibrate.text import Samples
from modelstore.calibrate.tuned import Block, tune
from modelstore.compress.calibrated import Write
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.execute.spool import Spool
from modelstore.execute.write.encoding import Encoder, Input
from modelstore.execute.write.packs import Written
from modelstore.format.manifest import CodecSpec, Manifest
from modelstore.format.recipe import METHODS, Method
from modelstore.format.region import full

_SHARDS = 8  # runs that the samples are divided into


@dataclass(frozen=True)
class _Solving:
    """A block that is solved: its number, its layers that are to be, its values, and the samples with what comes to it."""

    number: int
    layers: Linears
    values: Mapping[str, torch.Tensor]
    shards: Sequence[torch.Tensor]
    before: Spool

    def came(self, shard: int) -> torch.Tensor | None:
        """What the block before gave for a shard; None where there is none before."""
        return self.before[shard] if self.number else None


@dataclass
class Calibrated:
    """A model's blocks, solved in their order. `specs`: the codec of each tensor that is compressed; `wanted`: how those are
    found that are to be solved.

    `notes`, once it has run: why tensors among them were made of their weights alone, by name.
    """

    stages: Stages
    manifest: Manifest
    samples: Samples
    specs: Mapping[str, CodecSpec]
    wanted: Mapping[str, Method]
    memory: int
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a manifest says of the data."""
        return self.samples.recorded

    def run(self, items: Sequence[Input], write: Write) -> dict[str, Written]:
        """Write items, those that are to be solved with their codes. The order is that of the model."""
        left = {item.plan.name: item for item in items}
        written: dict[str, Written] = {}
        shards = torch.tensor_split(self.samples.ids, min(_SHARDS, len(self.samples.ids)))
        before = Spool(0)
        count = self.stages.skeleton.count
        layers = [linears(self.stages, self.manifest, block, self.wanted) for block in range(count)]
        while layers and not layers[-1]:  # nothing is to be solved behind
            layers.pop()

        def keep(solved: Mapping[str, Solution]) -> None:
            fresh = [replace(left[name], encoder=_encoder(one)) for name, one in solved.items() if name in left]
            written.update(write(fresh) if fresh else {})

        try:
            for block, mine in enumerate(layers):
                before = self._pass(block, mine, shards, before, keep)
        finally:
            before.close()
        rest = [item for name, item in left.items() if name not in written]
        tried = {tensor for mine in layers for _, _, tensor in mine.values()}
        for name in self.wanted:
            if name not in tried:
                self.notes.setdefault(name, "it is no linear layer of a block with a weight of its own")
        return written | (write(rest) if rest else {})

    def _pass(
        self,
        block: int,
        layers: Linears,
        shards: Sequence[torch.Tensor],
        before: Spool,
        keep: Callable[[Mapping[str, Solution]], None],
    ) -> Spool:
        """Solve a block, have that kept, and give what the block as it is stored makes of the samples; it is read once."""
        stored = self.stages.stored(block)
        given = Spool(self.memory // 4)
        mine = _Solving(block, layers, self.stages.values(block, stored), shards, before)
        try:
            solved = self._solve(mine, given)
            solved |= self._tuned(mine, given, solved)
        finally:
            given.close()
        keep(solved)
        made = {name: self._as_stored(name, tensor, solved) for name, tensor in stored.items()}
        return self.stages.pass_on(block, self.stages.values(block, made), shards, before, self.memory // 2)

    def _solve(self, block: _Solving, given: Spool) -> dict[str, Solution]:
        """Solve layers one by one. `given` is what the block gives, kept where layers are tuned by it."""
        gathered = Gathered()
        kept = any(self._tunes(layer.tensor) for layer in block.layers.values())
        with (
            self.stages.skeleton.at(block.number, block.values) as run,
            gathered.watching({name: layer.module for name, layer in block.layers.items()}),
        ):
            for at, ids in enumerate(block.shards):
                gathered.begin()
                found = run(ids, block.came(at))
                if kept:
                    given.append(found)
        solved = {}
        shared, prepared = None, None  # by layers that follow each other, such as q, k and v
        for name, (_, parameter, tensor) in block.layers.items():
            read, method = gathered.read_by(name), self.wanted[tensor]
            weight = block.values[parameter]
            if read is None or not read.enough:
                self.notes[tensor] = (
                    f"{read.count if read else 0} tokens came to its {weight.shape[1]} columns, and {TOKENS} for each are due"
                )
                continue
            if self.specs[tensor].name not in METHODS[method.name].codecs:
                self.notes[tensor] = (
                    f"it takes the scheme of a layer that it is fused with, which {method.name} is not for"
                )
                continue
            way = WAYS[method.name]
            if shared != (gathered.of[name], method.name):
                shared, prepared = (gathered.of[name], method.name), way.prepare(read.hessian)
            one = way.solve(self._layer(tensor, weight), prepared)
            if one.note:
                self.notes[tensor] = one.note
            solved[tensor] = one
        return solved

    def _layer(self, tensor: str, weight: torch.Tensor) -> Layer:
        codec, kind = weight_codec(self.specs[tensor]), self.manifest.by_name[tensor].kind
        return Layer(weight, codec, kind, self.wanted[tensor].told)

    def _tunes(self, tensor: str) -> bool:
        return WAYS[self.wanted[tensor].name].tunes

    def _tuned(self, block: _Solving, given: Spool, solved: Mapping[str, Solution]) -> dict[str, Solution]:
        """Those of the solved layers whose method tunes, tuned together; none where that gains nothing."""
        starts = {
            parameter: (tensor, self._layer(tensor, block.values[parameter]), found)
            for _, parameter, tensor in block.layers.values()
            if tensor in solved and self._tunes(tensor) and (found := solved[tensor].coded) is not None
        }
        if not starts:
            return {}
        roundings = {name: rounding_of(layer, found) for name, (_, layer, found) in starts.items()}
        told = next(layer.params for _, layer, _ in starts.values())  # the same for all, as recipes are
        steps, batch, reach = int(told["steps"]), int(told["batch"]), float(told["reach"])
        places = [(at, row) for at, ids in enumerate(block.shards) for row in range(len(ids))]
        fresh = {name: torch.empty_like(block.values[name]) for name in starts}
        with self.stages.skeleton.at(block.number, {**block.values, **fresh}, list(starts)) as run:

            def loss(batch: Sequence[int]) -> torch.Tensor:
                at = [places[one] for one in batch]
                ids = torch.stack([block.shards[shard][row] for shard, row in at])
                came = torch.stack([block.before[shard][row] for shard, row in at]) if block.number else None
                return (run(ids, came) - torch.stack([given[shard][row] for shard, row in at])).square().mean()

            parameters = {name: self.stages.skeleton.model.get_parameter(name) for name in starts}
            gained = tune(Block(parameters, loss, len(places)), roundings, steps, batch, reach)
        if not gained:
            return {}
        return {
            tensor: coded(layer, roundings[name].solved(found.damping), solved[tensor].note)
            for name, (tensor, layer, found) in starts.items()
        }

    def _as_stored(self, name: str, tensor: torch.Tensor, solved: Mapping[str, Solution]) -> torch.Tensor:
        """How a tensor of the block will read in the variant."""
        about = self.manifest.by_name[name]
        if about.name not in self.specs:
            return tensor
        codec = weight_codec(self.specs[about.name])
        one = solved.get(about.name)
        if one is None:
            return as_stored(codec, tensor, about)
        return decoded(codec, one.planes(full(about.shape)), about)


def _encoder(solved: Solution) -> Encoder:
    """How regions of a weight are encoded that was solved, whatever the values."""
    return lambda part, raw: lambda values, region: solved.planes(region)  # noqa: ARG005
