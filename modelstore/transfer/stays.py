"""Forms that weights keep while they are trained: zero where they are pruned, or whole codes by scales that do not move."""

from __future__ import annotations

from typing import Protocol

import torch

from modelstore.codecs.weight import AffineCodes


class Stays(Protocol):
    """The form that a weight keeps. Masters are float32, of the tensor's shape."""

    @property
    def apart(self) -> bool:
        """Whether the module computes with other values than those that steps move."""

    def used(self, master: torch.Tensor) -> torch.Tensor:
        """The values that the module computes with."""

    def gradient(self, master: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the master, of that of the used values."""

    def settle(self, master: torch.Tensor) -> None:
        """Give a master that a step moved its form again, in place."""

    def codes(self, master: torch.Tensor) -> torch.Tensor | None:
        """The codes of a master, int8 (rows, columns); None if it has none."""


class Mask:
    """A pruned weight: what is 0 stays 0, to the bit, and so do its gradients, so that its moments are 0 too."""

    apart = False

    def __init__(self, weight: torch.Tensor) -> None:
        self._gone = weight == 0

    def used(self, master: torch.Tensor) -> torch.Tensor:
        """As `Stays.used`."""
        return master

    def gradient(self, master: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """As `Stays.gradient`."""
        return gradient.masked_fill_(self._gone, 0)

    def settle(self, master: torch.Tensor) -> None:
        """As `Stays.settle`."""
        master.masked_fill_(self._gone, 0)

    def codes(self, master: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002
        """As `Stays.codes`."""
        return None


class FixedCodes:
    """A quantized weight: it is computed with as its codes stand for it, and gradients go straight through the rounding.

    They are stopped where a number is beyond the last code (PACT, and QAD, 2601.20088). `stored`: the dtype of what the codes
    stand for: they are decoded to it.
    """

    apart = True

    def __init__(self, scales: AffineCodes, shape: tuple[int, int], stored: torch.dtype) -> None:
        self.scales, self._shape, self._stored = scales, shape, stored
        self._half = 1 << (scales.bits - 1)

    def _wide(self, cells: torch.Tensor) -> torch.Tensor:
        """The value of each cell for each number of the matrix."""
        (high, wide), (rows, columns) = self.scales.cell, self._shape
        return cells.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    def _numbers(self, master: torch.Tensor) -> torch.Tensor:
        scales, zeros = (torch.from_numpy(one).to(master.device) for one in (self.scales.scales, self.scales.zeros))
        return master.reshape(self._shape) / self._wide(scales) + self._wide(zeros)

    def _rounded(self, master: torch.Tensor) -> torch.Tensor:
        return self._numbers(master).round_().clamp_(-self._half, self._half - 1)

    def used(self, master: torch.Tensor) -> torch.Tensor:
        """As `Stays.used`: (code - zero) * scale in float32, rounded to the stored dtype, as a reader decodes them."""
        scales, zeros = (torch.from_numpy(one).to(master.device) for one in (self.scales.scales, self.scales.zeros))
        found = (self._rounded(master) - self._wide(zeros)) * self._wide(scales)
        return found.to(self._stored).float().reshape(master.shape)

    def gradient(self, master: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """As `Stays.gradient`."""
        numbers = self._numbers(master)
        beyond = (numbers < -self._half - 0.5) | (numbers > self._half - 0.5)
        return gradient.masked_fill(beyond.reshape(master.shape), 0)

    def settle(self, master: torch.Tensor) -> None:
        """As `Stays.settle`: masters may be any number."""

    def codes(self, master: torch.Tensor) -> torch.Tensor | None:
        """As `Stays.codes`."""
        return self._rounded(master).to(torch.int8)
