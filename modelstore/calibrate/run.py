"""Calibrates a model block by block: statistics, codes, and what the block gives with them, on which the next one is solved.

One block is in memory at a time, with the sums of its inputs; what it gives for the samples waits in a spool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modelstore.calibrate.methods import WAYS, Layer, Solution, coded, rounding_of
from modelstore.calibrate.statistics import Gathered
from modelstore.calibrate.text import Samples
from modelstore.calibrate.tuned import Block, tune
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.calibrated import Write
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.execute.read.tensors import bytes_of, to_torch
from modelstore.execute.spool import Spool
from modelstore.execute.write.encoding import Encoder, Input
from modelstore.execute.write.packs import Written
from modelstore.format.buffers import Buffer
from modelstore.format.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.recipe import METHODS, Method
from modelstore.format.region import full

Layers = Mapping[str, tuple[torch.nn.Linear, str, str]]  # by name: the layer, its parameter, and its tensor
_SHARDS = 8  # runs that the samples are divided into
_TOKENS = 2  # for each column: an input that fewer came to says too little


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
        layers = [self._layers(block) for block in range(self.stages.skeleton.count)]
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
        layers: Layers,
        shards: Sequence[torch.Tensor],
        before: Spool,
        keep: Callable[[Mapping[str, Solution]], None],
    ) -> Spool:
        """Solve a block, have that kept, and give what the block as it is stored makes of the samples; it is read once."""
        stored = self.stages.stored(block)
        values, given = self.stages.values(block, stored), Spool(self.memory // 4)
        try:
            solved = self._solve(block, layers, values, shards, before, given)
            solved |= self._tuned(block, layers, values, shards, before, given, solved)
        finally:
            given.close()
        keep(solved)
        made = {name: self._as_stored(name, tensor, solved) for name, tensor in stored.items()}
        return self.stages.pass_on(block, self.stages.values(block, made), shards, before, self.memory // 2)

    def _layers(self, block: int) -> Layers:
        """A block's linear layers that are to be solved, by name: the layer, its parameter, and its tensor."""
        name = f"{self.stages.skeleton.stack}.{block}"
        found = {}
        for below, module in self.stages.built.model.get_submodule(name).named_modules(prefix=name):
            parameter = f"{below}.weight"
            made = self.stages.names.made.get(parameter)
            if not isinstance(module, torch.nn.Linear) or made is None or made.patterns != ("",):
                continue
            tensor = self.manifest.by_name[made.sources[0]].name
            if tensor in self.wanted:
                found[below] = (module, parameter, tensor)
        return found

    def _solve(
        self,
        block: int,
        layers: Layers,
        values: Mapping[str, torch.Tensor],
        shards: Sequence[torch.Tensor],
        before: Spool,
        given: Spool,
    ) -> dict[str, Solution]:
        """Solve layers one by one. `given` is what the block gives, kept where layers are tuned by it."""
        gathered = Gathered()
        kept = any(WAYS[self.wanted[tensor].name].tunes for _, _, tensor in layers.values())
        with (
            self.stages.skeleton.at(block, values) as run,
            gathered.watching({name: layer for name, (layer, _, _) in layers.items()}),
        ):
            for at, ids in enumerate(shards):
                gathered.begin()
                found = run(ids, before[at] if block else None)
                if kept:
                    given.append(found)
        solved = {}
        shared, prepared = None, None  # by layers that follow each other, such as q, k and v
        for name, (_, parameter, tensor) in layers.items():
            read, method = gathered.read_by(name), self.wanted[tensor]
            weight = values[parameter]
            if read is None or read.count < _TOKENS * weight.shape[1]:
                self.notes[tensor] = (
                    f"{read.count if read else 0} tokens came to its {weight.shape[1]} columns, and {_TOKENS} for each are due"
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

    def _tuned(
        self,
        block: int,
        layers: Layers,
        values: Mapping[str, torch.Tensor],
        shards: Sequence[torch.Tensor],
        before: Spool,
        given: Spool,
        solved: Mapping[str, Solution],
    ) -> dict[str, Solution]:
        """Those of the solved layers whose method tunes, tuned together; none where that gains nothing."""
        chosen = {
            parameter: (self._layer(tensor, values[parameter]), solved[tensor].coded)
            for _, parameter, tensor in layers.values()
            if tensor in solved and WAYS[self.wanted[tensor].name].tunes
        }
        starts = {name: (layer, start) for name, (layer, start) in chosen.items() if start is not None}
        if not starts:
            return {}
        roundings = {name: rounding_of(layer, start) for name, (layer, start) in starts.items()}
        told = next(iter(starts.values()))[0].params  # the same for all, as recipes are
        steps, batch, reach = int(told["steps"]), int(told["batch"]), float(told["reach"])
        places = [(at, row) for at, ids in enumerate(shards) for row in range(len(ids))]
        fresh = {name: torch.empty_like(values[name]) for name in starts}
        with self.stages.skeleton.at(block, {**values, **fresh}, list(starts)) as run:

            def loss(batch: Sequence[int]) -> torch.Tensor:
                at = [places[one] for one in batch]
                ids = torch.stack([shards[shard][row] for shard, row in at])
                came = torch.stack([before[shard][row] for shard, row in at]) if block else None
                return (run(ids, came) - torch.stack([given[shard][row] for shard, row in at])).square().mean()

            parameters = {name: self.stages.skeleton.model.get_parameter(name) for name in starts}
            gained = tune(Block(parameters, loss, len(places)), roundings, steps, batch, reach)
        if not gained:
            return {}
        return {
            tensor: coded(
                starts[parameter][0], roundings[parameter].solved(starts[parameter][1].damping), solved[tensor].note
            )
            for _, parameter, tensor in layers.values()
            if parameter in starts
        }

    def _as_stored(self, name: str, tensor: torch.Tensor, solved: Mapping[str, Solution]) -> torch.Tensor:
        """How a tensor of the block will read in the variant."""
        about = self.manifest.by_name[name]
        if about.name not in self.specs:
            return tensor
        codec = weight_codec(self.specs[about.name])
        one = solved.get(about.name)
        if one is not None:
            planes = one.planes(full(about.shape))
        else:
            raw = bytes_of(tensor.contiguous())
            if raw is None:
                return tensor
            planes = codec.encode(raw, about.shape, about.kind)
        return _decoded(codec, planes, about)


def _decoded(codec: WeightCodec, planes: Sequence[Buffer], about: Tensor) -> torch.Tensor:
    out = np.empty((1, about.nbytes), np.uint8)
    codec.decode(planes, about.shape, about.kind, out)
    return to_torch(out.reshape(-1), about.dtype, about.shape)


def _encoder(solved: Solution) -> Encoder:
    """How regions of a weight are encoded that was solved, whatever the values."""
    return lambda part, raw: lambda values, region: solved.planes(region)  # noqa: ARG005
