"""Tuned rounding: codes and scales of a block's layers, moved together until the block gives what it gave.

SignRound (Cheng and others, 2309.05516), as AutoRound has it: each weight over its scale is a number that is rounded; each
step moves it, and the scale of each group, by the same small amount against the gradient of the squared error of the block's
output; rounding counts as no change where gradients pass. It starts with GPTQ's result: with numbers that round to its codes,
as near to the weights as such numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelstore.calibrate.gptq import Solved
from modelstore.codecs.integer.weighted import by_column

_EDGE = 0.49  # from a code, where a number is still rounded to it
_NARROWEST, _WIDEST = 0.5, 1.5  # scales, by the initial ones
_SHARE = 4.0  # a step of scales by one of numbers is this to the power of 1 - bits: what scales move adds up over their columns
_CHECKED = 4  # samples by which it is judged whether tuning gained anything


@dataclass
class Rounding:
    """A weight's rounding that is tuned.

    `numbers`: float32 (rows, columns), weights over the initial scales; `ratios`: float32 (rows, groups), scales by those;
    `begun`: those, float32 (rows, groups); `stored`: the dtype of scales.
    """

    numbers: torch.Tensor
    begun: torch.Tensor
    ratios: torch.Tensor
    bits: int
    group: int
    stored: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor, start: Solved, bits: int, group: int, stored: torch.dtype) -> Rounding:
        """The rounding of a weight, from the codes and scales that were found for it."""
        begun, codes = torch.from_numpy(start.scales).float(), torch.from_numpy(start.codes).float()
        numbers = weight.float() / by_column(begun, group, weight.shape[1])
        numbers = codes + (numbers - codes).clamp_(-_EDGE, _EDGE)
        return cls(numbers, begun, torch.ones_like(begun), bits, group, stored)

    @property
    def scales(self) -> torch.Tensor:
        """The scales of now, as they are stored."""
        found = (self.begun * self.ratios).to(self.stored).float()
        return torch.where(found == 0, self.begun, found)

    def _numbers(self) -> torch.Tensor:
        """Weights over the scales of now."""
        return self.numbers * by_column(self.begun / self.scales, self.group, self.numbers.shape[1])

    def codes(self) -> torch.Tensor:
        """The codes of now, float32 (rows, columns)."""
        half = 1 << (self.bits - 1)
        return self._numbers().round_().clamp_(-half, half - 1)

    def values(self) -> torch.Tensor:
        """The weight that the codes of now give."""
        return self.codes().mul_(by_column(self.scales, self.group, self.numbers.shape[1]))

    def move(self, gradient: torch.Tensor, rate: float) -> None:
        """Against the gradient of a loss by the weight: numbers by `rate`, scales by a share of it."""
        rows, columns = gradient.shape
        half, scales = 1 << (self.bits - 1), self.scales
        numbers = self._numbers()
        inside = (numbers >= -half - 0.5) & (numbers <= half - 0.5)
        codes = numbers.round().clamp_(-half, half - 1)
        by_scale = (gradient * (codes - numbers.mul_(inside))).double()
        groups = self.begun.shape[1]
        padded = torch.nn.functional.pad(by_scale, (0, groups * self.group - columns))
        turned = padded.reshape(rows, groups, self.group).sum(-1) * self.begun
        self.ratios.sub_(turned.sign().float(), alpha=rate * _SHARE ** (1 - self.bits)).clamp_(_NARROWEST, _WIDEST)
        signs = gradient.sign().mul_(inside).mul_(by_column(scales.sign(), self.group, columns))
        self.numbers.sub_(signs, alpha=rate)

    def solved(self, damping: float | None) -> Solved:
        """The codes and scales of now."""
        return Solved(self.codes().to(torch.int8).numpy(), self.scales.numpy().copy(), damping)


@dataclass(frozen=True)
class Block:
    """The interface of a block for tuning: its parameters by name, the mean squared error of its output for some of the
    samples, and how many samples there are.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    loss: Callable[[Sequence[int]], torch.Tensor]
    samples: int


def tune(block: Block, roundings: Mapping[str, Rounding], steps: int, batch: int, reach: float) -> bool:
    """Tune roundings of a block's parameters; whether that gained anything, by the same few samples before and after.

    steps: of descent; batch: samples that each looks at, in turn; reach: how far all steps together move a number, between codes.
    """
    batches = [[one % block.samples for one in range(at * batch, (at + 1) * batch)] for at in range(steps)]
    rate = 2 * reach / max(1, steps)  # which falls to 0

    def lost() -> float:
        _place(block, roundings)
        with torch.no_grad():
            return sum(float(block.loss([one])) for one in range(min(_CHECKED, block.samples)))

    first = lost()
    now = [rate]
    hooks = [_when_graded(parameter, roundings[name], now) for name, parameter in block.parameters.items()]
    try:
        for at, those in enumerate(batches):
            now[0] = rate * (1 - at / steps)
            _place(block, roundings)
            block.loss(those).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return lost() < first


def _place(block: Block, roundings: Mapping[str, Rounding]) -> None:
    for name, parameter in block.parameters.items():
        parameter.data.copy_(roundings[name].values())


def _when_graded(parameter: torch.nn.Parameter, rounding: Rounding, rate: Sequence[float]) -> Any:
    """A hook that moves a rounding as soon as its gradient is there, and lets go of that: one layer's at a time is held."""

    def move(found: torch.Tensor) -> None:
        assert found.grad is not None, "called when it is there"
        rounding.move(found.grad, rate[0])
        found.grad = None

    return parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
