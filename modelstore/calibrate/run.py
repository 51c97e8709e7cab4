"""Calibrates a model block by block: statistics, codes, and what the block gives with them, on which the next one is solved.

One block is in memory at a time, with the sums of its inputs; what it gives for the samples waits in a spool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modelstore.calibrate.methods import WAYS, Layer, Solution
from modelstore.calibrate.statistics import Gathered
from modelstore.calibrate.text import Samples
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
        solved = self._solve(block, layers, self.stages.values(block, stored), shards, before)
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
    ) -> dict[str, Solution]:
        gathered = Gathered()
        with (
            self.stages.skeleton.at(block, values) as run,
            gathered.watching({name: layer for name, (layer, _, _) in layers.items()}),
        ):
            for at, ids in enumerate(shards):
                gathered.begin()
                run(ids, before[at] if block else None)
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
            about = self.manifest.by_name[tensor]
            found = way.solve(Layer(weight, weight_codec(self.specs[tensor]), about.kind, method.told), prepared)
            if found.note:
                self.notes[tensor] = found.note
            solved[tensor] = found
        return solved

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
