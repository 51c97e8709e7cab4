"""One block is solved: statistics of what comes to its layers, and codes, masks or factors by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modelstore.architecture.classes.skeleton import Run
from modelstore.architecture.sizes import Sizes
from modelstore.calibrate.folding import TRIED, Folding
from modelstore.calibrate.layers import Linear, Linears, linears, norms
from modelstore.calibrate.methods import WAYS, Layer, Solution, coded, rounding_of
from modelstore.calibrate.statistics import TOKENS, Gathered, Inputs
from modelstore.calibrate.tuned import Block, tune
from modelstore.compress.plan import weight_codec
from modelstore.compress.stages import Stages
from modelstore.execute.memory import trim
from modelstore.execute.spool import Spool
from modelstore.format.objects.manifest import CodecSpec, Manifest
from modelstore.format.recipe import METHODS, Method

_SUM = 4  # bytes of sums for each pair of an input's numbers: float64, each pair once
_COMPARED = re.compile(r"(^|[._])(q|k|query|key|qk|qkv|query_key_value)([._]|$)")


@dataclass(frozen=True)
class Asked:
    """The tensors of a model's layers to solve. `specs`: the codec of each tensor that is compressed; `wanted`: how to find
    the values of those to solve.
    """

    stages: Stages
    manifest: Manifest
    specs: Mapping[str, CodecSpec]
    wanted: Mapping[str, Method]

    def layers(self) -> list[Linears]:
        """The layers of each block to solve, up to the last block that has any."""
        count = self.stages.skeleton.count
        found: list[Linears] = [linears(self.stages, self.manifest, block, self.wanted) for block in range(count)]
        while found and not found[-1]:
            found.pop()
        return found

    def no_layers(self, layers: Sequence[Linears]) -> dict[str, str]:
        """Why those are not solved that are none of these layers, by the tensor's name."""
        there = {layer.tensor for mine in layers for layer in mine.values()}
        why = "it is not a linear layer of a block with a weight of its own"
        return {name: why for name in self.wanted if name not in there}

    def layer(self, one: Linear, values: Mapping[str, torch.Tensor]) -> Layer:
        """A layer with its weight, of the block's values."""
        codec, kind = weight_codec(self.specs[one.tensor]), self.manifest.by_name[one.tensor].kind
        compared = _COMPARED.search(one.parameter) is not None
        return Layer(one.weight(values), codec, kind, self.wanted[one.tensor].told, one.across, compared)

    def unfit(self, layer: Linear) -> str:
        """Why a layer's method cannot find what is stored of it; "" where it can."""
        method = self.wanted[layer.tensor].name
        if layer.across and not WAYS[method].across:
            return f"its weight has inputs as rows, which {method} is not for"
        if self.specs[layer.tensor].name in METHODS[method].codecs:
            return ""
        return f"it takes the scheme of a layer that it is fused with, which {method} is not for"

    def tunes(self, layer: Linear) -> bool:
        """Whether a layer's method tunes what was solved; parts of a stack are left as they were."""
        return layer.part is None and WAYS[self.wanted[layer.tensor].name].tunes

    def folds(self, layer: Linear) -> bool:
        """Whether a layer's columns may be scaled; parts of a stack are left as they were."""
        fit = layer.part is None and not self.unfit(layer)
        return fit and WAYS[self.wanted[layer.tensor].name].folds

    def gains(self) -> list[str]:
        """The tensors that are kept exact and may yet be other ones than the original's: gains of norms."""
        found: list[str] = []
        for block, mine in enumerate(self.layers()):
            if any(self.folds(layer) for layer in mine.values()):
                found += norms(self.stages, self.manifest, block).values()
        return [name for name in found if name not in self.specs]


def too_few(tokens: int, columns: int) -> str:
    """Why a layer is not solved that so many tokens came to."""
    return f"{tokens} tokens came to its {columns} columns, and {TOKENS} for each are due"


@dataclass(frozen=True)
class Solving:
    """A block that is solved: its number, its layers to solve, its values, and the samples with its inputs."""

    asked: Asked
    number: int
    layers: Linears
    values: dict[str, torch.Tensor]
    shards: Sequence[torch.Tensor]
    before: Spool
    memory: int  # bytes for sums of stacks' layers
    notes: dict[str, str] = field(default_factory=dict)  # why tensors are made of their weights alone, by name
    meant: dict[str, torch.Tensor] = field(default_factory=dict)  # what is stored of tensors that were scaled, float32
    folded: dict[str, list[str]] = field(
        default_factory=dict
    )  # tensors that were divided, with those that make up for it

    def solve(self, given: Spool) -> dict[str, Solution]:
        """The solution for each layer's tensor. `given`: for what the block gives, kept where layers are tuned by it."""
        found: dict[str, Solution] = {}
        for turn, layers in enumerate(self._turns()):
            gathered = self._gathered(layers, None if turn else given)
            self._fold(layers, gathered)
            for first, names in _by_input(layers, gathered).items():
                solved = self._solved(names, gathered.inputs.get(first))
                found |= {self.layers[name].tensor: one for name, one in solved.items()}
                gathered.inputs.pop(first, None)  # one input's sums after the other are let go of
                trim()
        in_order = [layer.tensor for layer in self.layers.values() if layer.tensor in found]
        found = {tensor: found[tensor] for tensor in in_order}
        return found | self._tuned(given, found)

    def came(self, shard: int) -> torch.Tensor | None:
        """The output of the block before for a shard; None if there is none before."""
        return self.before[shard] if self.number else None

    def _turns(self) -> list[Linears]:
        """The layers whose sums are taken together: those that are alone, then of stacks as many as the memory has room for."""
        alone = {name: layer for name, layer in self.layers.items() if layer.part is None}
        turns: list[dict[str, Linear]] = [alone]
        left = 0
        by_matrix: dict[tuple[str, int], dict[str, Linear]] = {}
        for name, layer in self.layers.items():
            if layer.part is not None:
                by_matrix.setdefault((layer.parameter, layer.part.matrix), {})[name] = layer
        for layers in by_matrix.values():
            size = _SUM * next(iter(layers.values())).inputs(self.values) ** 2
            if size > left:
                turns.append({})
                left = max(self.memory, size)
            left -= size
            turns[-1] |= layers
        return [turn for turn in turns if turn]

    def _gathered(self, layers: Linears, given: Spool | None) -> Gathered[Inputs]:
        """The inputs of layers. `given` is appended what the block gives, where layers are tuned by it."""
        gathered = Gathered(Inputs)
        kept = given if any(self.asked.tunes(layer) for layer in self.layers.values()) else None
        gathered.run(self.asked.stages.skeleton, self.number, layers, self.values, self.shards, self.before, kept)
        return gathered

    def _fold(self, layers: Linears, gathered: Gathered[Inputs]) -> None:
        """Scale the columns of layers whose method does, and what comes before them; the sums are then of what comes now."""
        mine = {
            name: layer
            for name, layer in layers.items()
            if self.asked.folds(layer) and (read := gathered.read_by(name)) is not None and read.enough
        }
        groups = {first: names for first, names in _by_input(layers, gathered).items() if mine.keys() >= set(names)}
        if not groups:
            return
        stages, by_name = self.asked.stages, self.asked.manifest.by_name
        gains = norms(stages, self.asked.manifest, self.number)
        told = {name: self.asked.layer(layer, self.values) for name, layer in mine.items()}
        samples = max(int(layer.params["samples"]) for layer in told.values())
        kinds = {parameter: getattr(torch, by_name[tensor].dtype) for parameter, tensor in gains.items()}
        with stages.skeleton.at(self.number, self.values) as run:
            folding = Folding(stages.skeleton.model, mine, told, kinds, _first(run, self, samples), _head(stages))
            found = list(folding.found(groups, gathered.inputs))
        tensors = gains | {layer.parameter: layer.tensor for layer in mine.values()}
        for one in found:
            before, readers = one.before, [mine[name].parameter for name in one.readers]
            value = self.values[before.parameter]
            kind = kinds.get(before.parameter, torch.float32)
            self.values[before.parameter], factors = before.divided(value, one.factors, kind)
            wide = before.spread(factors, gathered.inputs[one.readers[0]].columns)
            self.values.update({name: self.values[name] * wide for name in readers})
            gathered.inputs[one.readers[0]].divide(wide.double())
            self.folded[tensors[before.parameter]] = [tensors[name] for name in readers]
        changed = {name for one in found for name in (one.before.parameter, *(mine[r].parameter for r in one.readers))}
        self.meant.update({tensors[name]: self.values[name] for name in changed})

    def _solved(self, names: Sequence[str], read: Inputs | None) -> dict[str, Solution]:
        """Layers of one input, by name."""
        found: dict[str, Solution] = {}
        hessian = read.taken() if read is not None and read.enough else None
        methods: dict[str, list[str]] = {}
        for name in names:
            layer = self.layers[name]
            method = self.asked.wanted[layer.tensor].name
            if hessian is None:
                self.notes[layer.tensor] = too_few(read.count if read else 0, layer.inputs(self.values))
            elif why := self.asked.unfit(layer):
                self.notes[layer.tensor] = why
            else:
                methods.setdefault(method, []).append(name)
        for method, those in methods.items():
            prepared = WAYS[method].prepare(hessian) if hessian is not None else None
            if len(methods) == 1:
                hessian = None
            for name in those:
                found[name] = WAYS[method].solve(self.asked.layer(self.layers[name], self.values), prepared)
                if found[name].note:
                    self.notes[self.layers[name].tensor] = found[name].note
        return found

    def _tuned(self, given: Spool, solved: Mapping[str, Solution]) -> dict[str, Solution]:
        """Those of the solved layers whose method tunes, tuned together; none where that gains nothing."""
        starts = {
            one.parameter: (one.tensor, self.asked.layer(one, self.values), found)
            for one in self.layers.values()
            if one.tensor in solved and self.asked.tunes(one) and (found := solved[one.tensor].coded) is not None
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


def _first(run: Run, solving: Solving, samples: int) -> Callable[[bool], torch.Tensor]:
    """A block that is run on the first samples, or on a few tokens of the first."""
    ids, came = solving.shards[0][:samples], solving.came(0)
    came = came[:samples] if came is not None else None

    def first(few: bool) -> torch.Tensor:
        cut = (slice(1), slice(TRIED)) if few else slice(None)
        return run(ids[cut], came[cut] if came is not None else None)

    return first


def _head(stages: Stages) -> int:
    """The number of rows of a head of attention."""
    return Sizes(stages.skeleton.config).head


def _by_input(layers: Linears, gathered: Gathered[Inputs]) -> dict[str, list[str]]:
    """The layers' names by the first layer that reads the same; those that read nothing each by their own."""
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(gathered.of.get(name, name), []).append(name)
    return found
