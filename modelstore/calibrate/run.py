"""Calibrates a model block by block: statistics, codes, and what the block gives with them, on which the next one is solved.

One block is in memory at a time, with the sums of its inputs; what it gives for the samples waits in a spool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modelstore.calibrate.gptq import Solved, solve
from modelstore.calibrate.statistics import Gathered
from modelstore.calibrate.text import Samples
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.execute.read.tensors import bytes_of, to_torch
from modelstore.execute.spool import Spool
from modelstore.execute.write.encoding import Encoder, Input
from modelstore.execute.write.packs import Written
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DType
from modelstore.format.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.region import Region, extent

Write = Callable[[list[Input]], dict[str, Written]]
_SHARDS = 8  # runs that the samples are divided into
_TOKENS = 2  # for each column: an input that fewer came to says too little


@dataclass
class Calibrated:
    """GPTQ over a model's blocks. `specs`: the codec of each tensor that is compressed; `wanted`: those that are to be solved.

    `notes`, once it has run: why tensors among them were rounded without data, by name.
    """

    stages: Stages
    manifest: Manifest
    samples: Samples
    specs: Mapping[str, CodecSpec]
    wanted: Collection[str]
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
        tried: set[str] = set()
        last = max((at for at in range(self.stages.skeleton.count) if self._layers(at)), default=-1)
        try:
            for block in range(last + 1):
                solved = self._solve(block, shards, before)
                tried |= {tensor for _, _, tensor in self._layers(block).values()}
                fresh = [
                    replace(left[name], encoder=_encoder(self._int(name), one, self.manifest.by_name[name].kind))
                    for name, one in solved.items()
                    if name in left
                ]
                written |= write(fresh) if fresh else {}
                after = Spool(self.memory // 2)
                with self.stages.skeleton.at(block, self.stages.values(block, self._as_stored(solved))) as run:
                    for at, ids in enumerate(shards):
                        after.append(run(ids, before[at] if block else None))
                before.close()
                before = after
        finally:
            before.close()
        rest = [item for name, item in left.items() if name not in written]
        for name in self.wanted:
            if name not in tried:
                self.notes.setdefault(name, "it is no linear layer of a block with a weight of its own")
        return written | (write(rest) if rest else {})

    def _layers(self, block: int) -> dict[str, tuple[torch.nn.Linear, str, str]]:
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

    def _solve(self, block: int, shards: Sequence[torch.Tensor], before: Spool) -> dict[str, Solved]:
        layers = self._layers(block)
        values = self.stages.values(block)
        gathered = Gathered()
        with (
            self.stages.skeleton.at(block, values) as run,
            gathered.watching({name: layer for name, (layer, _, _) in layers.items()}),
        ):
            for at, ids in enumerate(shards):
                gathered.begin()
                run(ids, before[at] if block else None)
        solved = {}
        for name, (_, parameter, tensor) in layers.items():
            read, codec = gathered.read_by(name), self._int(tensor)
            weight = values[parameter]
            if read is None or read.count < _TOKENS * weight.shape[1]:
                self.notes[tensor] = (
                    f"{read.count if read else 0} tokens came to its {weight.shape[1]} columns, and {_TOKENS} for each are due"
                )
                continue
            stored = getattr(torch, scale_dtype(self.manifest.by_name[tensor].kind))
            found = solve(weight, read.hessian, codec.bits, codec.group_size, stored)
            if found.damping is None:
                self.notes[tensor] = "its inputs have no factor: plain rounding"
            solved[tensor] = found
        return solved

    def _int(self, tensor: str) -> Int:
        codec = weight_codec(self.specs[tensor])
        assert isinstance(codec, Int), "recipes with gptq have int codecs"
        return codec

    def _as_stored(self, solved: Mapping[str, Solved]) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """How a tensor of the block will read in the variant."""

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            about = self.manifest.by_name[name]
            if about.name not in self.specs:
                return tensor
            codec = weight_codec(self.specs[about.name])
            one = solved.get(about.name)
            if one is not None:
                planes = self._int(about.name).encode_with(one.codes, one.scales, about.shape, about.kind)
            else:
                raw = bytes_of(tensor.contiguous())
                if raw is None:
                    return tensor
                planes = codec.encode(raw, about.shape, about.kind)
            return _decoded(codec, planes, about)

        return change


def _decoded(codec: WeightCodec, planes: Sequence[Buffer], about: Tensor) -> torch.Tensor:
    out = np.empty((1, about.nbytes), np.uint8)
    codec.decode(planes, about.shape, about.kind, out)
    return to_torch(out.reshape(-1), about.dtype, about.shape)


def _encoder(codec: Int, solved: Solved, kind: DType) -> Encoder:
    """How regions of a weight are encoded that was solved."""

    def encode(_: Bytes, region: Region) -> tuple[Buffer, ...]:
        rows, columns = (slice(*pair) for pair in region)
        groups = slice(columns.start // codec.group_size, -(-columns.stop // codec.group_size))
        return codec.encode_with(solved.codes[rows, columns], solved.scales[rows, groups], extent(region), kind)

    return lambda part, raw: encode  # noqa: ARG005  the part adds nothing
