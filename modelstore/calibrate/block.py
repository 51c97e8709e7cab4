"""One block is solved: statistics of what comes to its layers, and codes, masks or factors by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modelstore.calibrate.layers import Linears, linears
from modelstore.calibrate.methods import WAYS, Layer, Solution, coded, rounding_of
from modelstore.calibrate.statistics import TOKENS, Gathered, Inputs
from modelstore.calibrate.tuned import Block, tune
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.execute.spool import Spool
from modelstore.format.manifest import CodecSpec, Manifest
from modelstore.format.recipe import METHODS, Method


@dataclass(frozen=True)
class Asked:
    """What is asked of a model's layers. `specs`: the codec of each tensor that is compressed; `wanted`: how those are found that
    are to be solved.
    """

    stages: Stages
    manifest: Manifest
    specs: Mapping[str, CodecSpec]
    wanted: Mapping[str, Method]

    def layers(self) -> list[Linears]:
        """The layers of each block that are to be solved, up to the last block that has any."""
        count = self.stages.skeleton.count
        found: list[Linears] = [linears(self.stages, self.manifest, block, self.wanted) for block in range(count)]
        while found and not found[-1]:
            found.pop()
        return found

    def no_layers(self, layers: Sequence[Linears]) -> dict[str, str]:
        """Why those are not solved that are none of these layers, by the tensor's name."""
        there = {layer.tensor for mine in layers for layer in mine.values()}
        why = "it is no linear layer of a block with a weight of its own"
        return {name: why for name in self.wanted if name not in there}

    def layer(self, tensor: str, weight: torch.Tensor) -> Layer:
        """A layer by its tensor's name, with its weight, float32 (rows, columns)."""
        codec, kind = weight_codec(self.specs[tensor]), self.manifest.by_name[tensor].kind
        return Layer(weight, codec, kind, self.wanted[tensor].told)

    def unfit(self, tensor: str) -> str:
        """Why a tensor's method cannot find what is stored of it; "" where it can."""
        method = self.wanted[tensor].name
        if self.specs[tensor].name in METHODS[method].codecs:
            return ""
        return f"it takes the scheme of a layer that it is fused with, which {method} is not for"

    def tunes(self, tensor: str) -> bool:
        """Whether a tensor's method tunes what was solved."""
        return WAYS[self.wanted[tensor].name].tunes


def too_few(tokens: int, columns: int) -> str:
    """Why a layer is not solved that so many tokens came to."""
    return f"{tokens} tokens came to its {columns} columns, and {TOKENS} for each are due"


@dataclass(frozen=True)
class Solving:
    """A block that is solved: its number, its layers that are to be, its values, and the samples with what comes to it."""

    asked: Asked
    number: int
    layers: Linears
    values: Mapping[str, torch.Tensor]
    shards: Sequence[torch.Tensor]
    before: Spool
    notes: dict[str, str] = field(default_factory=dict)  # why tensors are made of their weights alone, by name

    def solve(self, given: Spool) -> dict[str, Solution]:
        """What was found for each layer's tensor. `given`: for what the block gives, kept where layers are tuned by it."""
        gathered = self._gathered(given)
        found: dict[str, Solution] = {}
        for first, names in self._by_input(gathered).items():
            solved = self._solved(names, gathered.inputs.get(first))
            found |= {self.layers[name].tensor: one for name, one in solved.items()}
            gathered.inputs.pop(first, None)  # one input's sums after the other are let go of
        in_order = [layer.tensor for layer in self.layers.values() if layer.tensor in found]
        found = {tensor: found[tensor] for tensor in in_order}
        return found | self._tuned(given, found)

    def came(self, shard: int) -> torch.Tensor | None:
        """What the block before gave for a shard; None where there is none before."""
        return self.before[shard] if self.number else None

    def _gathered(self, given: Spool) -> Gathered:
        gathered, skeleton = Gathered(), self.asked.stages.skeleton
        kept = any(self.asked.tunes(layer.tensor) for layer in self.layers.values())
        with (
            skeleton.at(self.number, self.values) as run,
            gathered.watching({name: layer.module for name, layer in self.layers.items()}),
        ):
            for at, ids in enumerate(self.shards):
                gathered.begin()
                found = run(ids, self.came(at))
                if kept:
                    given.append(found)
        return gathered

    def _by_input(self, gathered: Gathered) -> dict[str, list[str]]:
        """The layers' names by the first layer that reads the same; those that read nothing each by their own."""
        found: dict[str, list[str]] = {}
        for name in self.layers:
            found.setdefault(gathered.of.get(name, name), []).append(name)
        return found

    def _solved(self, names: Sequence[str], read: Inputs | None) -> dict[str, Solution]:
        """Layers of one input, by name."""
        found: dict[str, Solution] = {}
        hessian = read.hessian if read is not None and read.enough else None
        methods: dict[str, list[str]] = {}
        for name in names:
            _, parameter, tensor = self.layers[name]
            method = self.asked.wanted[tensor].name
            if hessian is None:
                self.notes[tensor] = too_few(read.count if read else 0, self.values[parameter].shape[1])
            elif why := self.asked.unfit(tensor):
                self.notes[tensor] = why
            else:
                methods.setdefault(method, []).append(name)
        for method, those in methods.items():
            prepared = WAYS[method].prepare(hessian) if hessian is not None else None
            if len(methods) == 1:
                hessian = None  # it may be large
            for name in those:
                _, parameter, tensor = self.layers[name]
                found[name] = WAYS[method].solve(self.asked.layer(tensor, self.values[parameter]), prepared)
                if found[name].note:
                    self.notes[tensor] = found[name].note
        return found

    def _tuned(self, given: Spool, solved: Mapping[str, Solution]) -> dict[str, Solution]:
        """Those of the solved layers whose method tunes, tuned together; none where that gains nothing."""
        starts = {
            parameter: (tensor, self.asked.layer(tensor, self.values[parameter]), found)
            for _, parameter, tensor in self.layers.values()
            if tensor in solved and self.asked.tunes(tensor) and (found := solved[tensor].coded) is not None
        }
        if not starts:
            return {}
        roundings = {name: rounding_of(layer, found) for name, (_, layer, found) in starts.items()}
        told = next(layer.params for _, layer, _ in starts.values())  # the same for all, as recipes are
        steps, batch, reach = int(told["steps"]), int(told["batch"]), float(told["reach"])
        places = [(at, row) for at, ids in enumerate(self.shards) for row in range(len(ids))]
        fresh = {name: torch.empty_like(self.values[name]) for name in starts}
        skeleton = self.asked.stages.skeleton
        with skeleton.at(self.number, {**self.values, **fresh}, list(starts)) as run:

            def loss(batch: Sequence[int]) -> torch.Tensor:
                at = [places[one] for one in batch]
                ids = torch.stack([self.shards[shard][row] for shard, row in at])
                came = torch.stack([self.before[shard][row] for shard, row in at]) if self.number else None
                return (run(ids, came) - torch.stack([given[shard][row] for shard, row in at])).square().mean()

            parameters = {name: skeleton.model.get_parameter(name) for name in starts}
            gained = tune(Block(parameters, loss, len(places)), roundings, steps, batch, reach)
        if not gained:
            return {}
        return {
            tensor: coded(layer, roundings[name].solved(found.damping), solved[tensor].note)
            for name, (tensor, layer, found) in starts.items()
        }
