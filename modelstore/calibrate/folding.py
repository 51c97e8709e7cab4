"""Scales of columns that a block's weights take on before rounding, and what comes before these weights gives up.

Names do not tell which parts can be folded into which: it is tried on a few tokens. Two factors that leave what the block
gives as it was are one function, whatever else reads a norm (a router, a second layer) or is done between two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from modelstore.calibrate import awq
from modelstore.calibrate.layers import Linears
from modelstore.calibrate.methods import Layer
from modelstore.calibrate.statistics import Inputs
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.numeric.scaled import scale_dtype

TRIED = 64  # tokens on which it is tried whether a fold leaves a block as it was
_SAME = 1e-2  # of what one factor without the other changes


@dataclass(frozen=True)
class Before:
    """The part before layers: a norm's gain, `weight + plus`, or a linear layer's rows (`plus` is None); its parameter's name.

    `head`: of rows that several heads read, how many belong to one head; 0 if each row is read by one column.
    """

    parameter: str
    plus: float | None = None
    head: int = 0

    def spread(self, by: torch.Tensor, columns: int) -> torch.Tensor:
        """Factors of its outputs, for each of the columns that read them."""
        times = columns // len(by)
        return by if times == 1 else by.reshape(-1, 1, self.head).expand(-1, times, -1).reshape(-1)

    def gathered(self, columns: torch.Tensor, outputs: int) -> torch.Tensor:
        """Means of what its outputs' columns have."""
        times = len(columns) // outputs
        return columns if times == 1 else columns.reshape(-1, times, self.head).mean(1).reshape(-1)

    def divided(self, value: torch.Tensor, by: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Its parameter with outputs divided by factors, and the factors that are then true.

        A gain is rounded to how it is stored, and what is multiplied takes on what was divided indeed.
        """
        if self.plus is None:
            return value / by[:, None], by
        gain = value + self.plus
        fresh = (gain / by - self.plus).to(stored).float()
        true = gain / (fresh + self.plus)
        good = torch.isfinite(true) & (true > 0)
        return torch.where(good, fresh, value), torch.where(good, true, 1.0)


@dataclass
class Folding:
    """A block in which scales are looked for; it is placed while that lasts (`Skeleton.at`).

    layers: by name, those that may be scaled; weights: of each, its weight and codec. run: the block, for the first `samples`
    samples, or for a few tokens of the first.
    """

    model: torch.nn.Module
    layers: Linears
    weights: Mapping[str, Layer]
    norms: Mapping[str, torch.dtype]  # parameters that are gains of norms, with the dtype of each as it is stored
    run: Callable[[bool], torch.Tensor]
    head: int

    def found(self, groups: Mapping[str, Sequence[str]], inputs: Mapping[str, Inputs]) -> Iterator[Fold]:
        """For each group of layers that read one input, its folding; groups for which nothing is better are left out.

        groups: by the layer under which `inputs` has what they read.
        """
        pairs = {first: before for first, names in groups.items() if (before := self._before(names)) is not None}
        with self._seen([_module(groups[first]) for first in pairs]) as calls:
            self.run(False)
        for first, before in pairs.items():
            read = inputs[first]
            assert read.magnitude is not None, "something was read"
            factors = self._searched(before, groups[first], read.magnitude.float() / read.count, calls)
            if factors is not None:
                yield Fold(before, tuple(groups[first]), factors)

    def _before(self, names: Sequence[str]) -> Before | None:
        """The part that leaves the block unchanged when it is divided, and layers are multiplied."""
        random = torch.Generator().manual_seed(0)
        columns = self.weights[names[0]].weight.shape[1]
        was = self.run(True)
        for before in self._candidates(names, columns):
            outputs = len(self._value(before.parameter))
            by = torch.exp2(torch.rand(outputs, generator=random) * 2 - 1)
            divided, by = before.divided(self._value(before.parameter), by, torch.float32)
            wide = before.spread(by, columns)
            scaled = {self.layers[name].parameter: self.weights[name].weight * wide for name in names}
            with self._placed({before.parameter: divided}):
                alone = (self.run(True) - was).norm()
                with self._placed(scaled):
                    both = (self.run(True) - was).norm()
            if bool(alone > 0) and bool(both <= _SAME * alone):
                return before
        return None

    def _candidates(self, names: Sequence[str], columns: int) -> Iterator[Before]:
        for parameter in self.norms:
            plus = self._plus(parameter)
            if plus is not None and len(self._value(parameter)) == columns:
                yield Before(parameter, plus)
        for name, layer in self.layers.items():
            rows = len(self._value(layer.parameter))
            if name in names or columns % rows or getattr(layer.module, "bias", None) is not None:
                continue
            if rows == columns or rows % self.head == 0:
                yield Before(layer.parameter, None, self.head)

    def _plus(self, parameter: str) -> float | None:
        """What a norm adds to its weight: 0, or Gemma's 1; None if its weight is no gain."""
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        weight = self._value(parameter)
        values = torch.linspace(1, 2, len(weight)).reshape(1, 1, -1)
        with torch.no_grad():
            with self._placed({parameter: torch.zeros_like(weight)}):
                none = module(values)
            with self._placed({parameter: torch.ones_like(weight)}):
                one = module(values)
        if not bool(none.any()):
            return 0.0 if bool(one.any()) else None
        return 1.0 if torch.allclose(one, 2 * none) else None

    def _searched(
        self, before: Before, names: Sequence[str], sizes: torch.Tensor, calls: Mapping[str, Call]
    ) -> torch.Tensor | None:
        """Factors by which the module that reads loses least of what it gives; None if that is least without any.

        sizes: the mean magnitude of each column that comes.
        """
        value = self._value(before.parameter)
        outputs, name = len(value), _module(names)
        told = [(self.layers[one].parameter, self.weights[one]) for one in names]
        weights = [layer.weight.float() for _, layer in told]
        each = [_told(layer) for _, layer in told]
        heavy = awq.joined(weights, [group for _, group, _ in each])
        was = calls[name].again()
        least, best = torch.inf, None
        tried = awq.scales(before.gathered(sizes, outputs), before.gathered(heavy, outputs))
        for number, by in enumerate(tried):
            _, by = before.divided(value, by, self.norms.get(before.parameter, torch.float32))
            wide = before.spread(by, len(sizes))
            made = {
                parameter: awq.rounded(weight * wide, *how) / wide
                for (parameter, _), weight, how in zip(told, weights, each, strict=True)
            }
            with self._placed(made):
                error = float((calls[name].again() - was).square().mean())
            if error < least:
                least, best = error, (by if number else None)
        return best

    def _value(self, parameter: str) -> torch.Tensor:
        return self.model.get_parameter(parameter).data

    @contextmanager
    def _placed(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While these are the parameters' values."""
        held = {name: self.model.get_parameter(name).data for name in values}
        try:
            for name, value in values.items():
                self.model.get_parameter(name).data = value
            yield
        finally:
            for name, value in held.items():
                self.model.get_parameter(name).data = value

    @contextmanager
    def _seen(self, names: Sequence[str]) -> Iterator[dict[str, Call]]:
        """The arguments that modules are called with while this lasts."""
        found: dict[str, Call] = {}

        def hook(module: torch.nn.Module, name: str) -> Any:
            def see(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
                found[name] = Call(module, args, kwargs)

            return module.register_forward_pre_hook(see, with_kwargs=True)

        hooks = [hook(self.model.get_submodule(name), name) for name in dict.fromkeys(names)]
        try:
            yield found
        finally:
            for one in hooks:
                one.remove()


@dataclass(frozen=True)
class Fold:
    """A folding: factors (outputs of `before`) by which it is divided, and its readers' columns are multiplied."""

    before: Before
    readers: tuple[str, ...]
    factors: torch.Tensor


@dataclass(frozen=True)
class Call:
    """A module, and what it was called with."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def again(self) -> torch.Tensor:
        """The first of what it gives for the same."""
        with torch.no_grad():
            found = self.module(*self.args, **self.kwargs)
        first: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return first


def _module(names: Sequence[str]) -> str:
    """The module that has all of these: what reads one input gives its outputs together; one layer is a module itself."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(one) > shared and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def _told(layer: Layer) -> tuple[int, int, torch.dtype]:
    """Bits, group and the dtype of scales of a layer."""
    assert isinstance(layer.codec, Int), "recipes have the codecs that their methods are for"
    return layer.codec.bits, layer.codec.group_size, getattr(torch, scale_dtype(layer.kind))
