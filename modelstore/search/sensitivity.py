"""How much a model loses where one of its tensors is stored in a format: its Fisher information, by one pass back.

The divergence of what a model predicts, where a weight is moved by d, is ½ F d² to second order, F being the mean square of the
gradient of log p(token), of tokens that the model itself draws. F is summed over sequences block by block, from the last to the
first, on activations that wait in a spool; each weight's F is used for all formats and let go. Costs add up: those of
tensors, and of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modelstore.architecture.classes.names import Made, values
from modelstore.calibrate.layers import as_stored, linears
from modelstore.calibrate.statistics import Gathered, Inputs
from modelstore.codecs.weight import WeightCodec
from modelstore.compress.stages import Stages
from modelstore.errors import FormatError
from modelstore.execute.spool import Spool
from modelstore.format.objects.manifest import Manifest
from modelstore.search.gains import gains

CountRun = Callable[[int], None]  # hears of bytes of weights that were run, twice each


@dataclass
class Measuring:
    """One measurement. `wanted`: names of tensors; `formats`: the codecs whose costs are asked for.

    `solved`: the number of a format, its bits and its columns of a group, in which it is tried what solving codes for the data
    gains; `gains` then says it.
    `costs`, once it has run: of each tensor in nats a token, by format; None if the codec refuses the tensor, the model
    does not compute with it, or no gradient came to it; 0 if the format stores it exactly.
    """

    stages: Stages
    manifest: Manifest
    ids: torch.Tensor
    formats: Sequence[WeightCodec]
    wanted: Collection[str]
    seed: int
    memory: int
    count: CountRun | None = None
    solved: tuple[int, int, int] | None = None
    gains: dict[str, float] = field(default_factory=dict)
    costs: dict[str, list[float | None]] = field(default_factory=dict)

    def run(self) -> dict[str, list[float | None]]:
        """The costs. `FormatError` names the block where activations or gradients are not finite."""
        self.costs = {name: [None] * len(self.formats) for name in self.wanted}
        last, sequences = self.stages.skeleton.count, torch.split(self.ids, 1)
        given, back = Spool(self.memory // 2), Spool(0)
        try:
            for stage in range(last):
                self._forward(stage, sequences, given)
            for stage in range(last, -1, -1):
                behind = back
                back = Spool(self.memory // 4)
                self._backward(stage, sequences, given, behind, back)
                behind.close()
        finally:
            given.close()
            back.close()
        return self.costs

    def _forward(self, stage: int, sequences: Sequence[torch.Tensor], given: Spool) -> None:
        """Append what a stage gives for each sequence."""
        stored = self.stages.stored(stage)
        placed, gathered = self.stages.values(stage, stored), Gathered(Inputs)
        layers = linears(self.stages, self.manifest, stage, self.costs) if self.solved else {}
        layers = {name: layer for name, layer in layers.items() if layer.part is None}  # of stacks' there are many sums
        with self.stages.skeleton.at(stage, placed) as run, gathered.watching(layers, placed):
            for at, ids in enumerate(sequences):
                gathered.begin()
                before = given[(stage - 1) * len(sequences) + at] if stage else None
                found = run(ids, before)
                self._check(stage, found)
                given.append(found)
        if self.solved is not None:
            format, bits, group = self.solved

            def rounded(parameter: str) -> torch.Tensor:
                source = self.stages.names.made[parameter].sources[0]
                return as_stored(self.formats[format], stored[source], self.manifest.by_name[source])

            self.gains |= gains(layers, gathered, placed, rounded, self.manifest, bits, group)
        self._done(stored)

    def _backward(
        self, stage: int, sequences: Sequence[torch.Tensor], given: Spool, behind: Spool, back: Spool
    ) -> None:
        """Add a stage's costs, and append the gradient of what came into it, of each sequence.

        `behind`: the gradients of what it gave, which the last stage finds itself.
        """
        stored = self.stages.stored(stage)
        placed = self.stages.values(stage, stored)
        made = self._made(stage)
        draw = torch.Generator().manual_seed(self.seed)
        squares: dict[str, torch.Tensor] = {}
        with self.stages.skeleton.at(stage, placed, made) as run:
            parameters = {name: self.stages.skeleton.model.get_parameter(name) for name in made}
            for at, ids in enumerate(sequences):
                before = None
                if stage:
                    before = given[(stage - 1) * len(sequences) + at].detach().requires_grad_()
                found = run(ids, before)
                self._check(stage, found)
                if found.requires_grad:
                    upon = behind[at] if stage < self.stages.skeleton.count else _drawn(found, draw)
                    torch.autograd.backward(found, upon)
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        square = parameter.grad.square()
                        self._check(stage, square)
                        squares[name] = squares[name].add_(square) if name in squares else square
                        parameter.grad = None
                if before is not None:
                    back.append(before.grad if before.grad is not None else torch.zeros_like(before))
        for name, square in squares.items():
            self._add(made[name], self.stages.names.tied.get(name, name), square, stored)
        self._done(stored)

    def _made(self, stage: int) -> dict[str, Made]:
        """For the parameters that a stage computes with, the recipe of each that is made of wanted tensors."""
        found = {}
        known = {name for name, _ in self.stages.skeleton.model.named_parameters(remove_duplicate=False)}
        for name in self.stages.skeleton.needs(stage):
            made = self.stages.names.made.get(self.stages.names.tied.get(name, name))
            if name in known and made and any(self.manifest.by_name[one].name in self.costs for one in made.sources):
                found[name] = made
        return found

    def _add(self, made: Made, parameter: str, square: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> None:
        """Add the costs of the tensors that make a parameter, whose F is given as its sum over all tokens."""
        names = [self.manifest.by_name[source].name for source in made.sources]
        owner = self._owner(made, parameter, stored)
        weight = _sums(square, owner, len(names))
        true = self._value(made, parameter, stored)
        for at, codec in enumerate(self.formats):
            fits = {
                source: name
                for source, name in zip(made.sources, names, strict=True)
                if name in self.costs
                and codec.refuses((about := self.manifest.by_name[name]).shape, about.kind) is None
            }
            if not fits:
                continue
            rounded = {
                source: as_stored(codec, stored[source], self.manifest.by_name[name]) for source, name in fits.items()
            }
            lost = (self._value(made, parameter, dict(stored) | rounded) - true).square_().mul_(square).double()
            sums = _sums(lost, owner, len(names))
            for source, name in fits.items():
                of = made.sources.index(source)
                if float(weight[of]) > 0:  # else the data say nothing of it
                    before = self.costs[name][at] or 0.0
                    self.costs[name][at] = before + float(sums[of]) / (2 * self.ids.numel())

    def _value(self, made: Made, parameter: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values(self.stages.built, made, stored.__getitem__, torch.float32)[parameter]

    def _owner(self, made: Made, parameter: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """For each number of a parameter, the source that it is of; None if there is one.

        It is asked of the same conversion, by tensors that hold their number.
        """
        if len(made.sources) == 1:
            return None
        numbered = {
            source: torch.full(stored[source].shape, float(at), dtype=torch.float32)
            for at, source in enumerate(made.sources)
        }
        return self._value(made, parameter, numbered).round().long()

    def _check(self, stage: int, values: torch.Tensor) -> None:
        if bool(torch.isfinite(values.detach().sum())) or bool(torch.isfinite(values.detach()).all()):
            return
        skeleton = self.stages.skeleton
        where = f"block {skeleton.stack}.{stage}" if stage < skeleton.count else "the head"
        raise FormatError(
            f"what {where} computes on the calibration text is not finite: its weights, or what they make, overflow or are not "
            f"numbers; look at the tensors there"
        )

    def _done(self, stored: Mapping[str, torch.Tensor]) -> None:
        if self.count is not None:
            self.count(sum(one.nbytes for one in stored.values()))


def _sums(numbers: torch.Tensor, owner: torch.Tensor | None, count: int) -> torch.Tensor:
    """Sums of a parameter's numbers, of each tensor that makes it."""
    found = torch.zeros(count, dtype=torch.float64)
    if owner is None:
        found[0] = numbers.double().sum()
        return found
    return found.index_add_(0, owner.reshape(-1), numbers.double().reshape(-1))


def _drawn(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The gradient of -log p of tokens that are drawn from what is predicted."""
    likely = logits.detach().float().softmax(-1)
    tokens = torch.multinomial(likely.reshape(-1, likely.shape[-1]), 1, generator=draw)
    return likely.scatter_add_(-1, tokens.reshape(*likely.shape[:-1], 1), torch.full_like(likely[..., :1], -1.0))
