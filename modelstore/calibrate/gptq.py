"""GPTQ: columns are rounded one after the other, and those that follow make up for what was lost.

Frantar and others, 2210.17323. Scales are found first, on the weights as they were, so that groups are the same as without it;
columns are then rounded in the order of how much comes through them, and the order undone: the layout is the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.codecs.integer.weighted import by_column, search
from modelstore.codecs.kernels import gptq as kernel

_DAMP, _MOST_DAMP = 0.01, 0.1  # of the mean of the diagonal, columns through which nothing comes left out
_EXACT = 4096  # columns up to which the factor is computed in float64
_OUTPUTS = 1024  # that are solved together: they need several copies of their weights


@dataclass(frozen=True)
class Solved:
    """A weight's codes, int8 (rows, columns), and the scales of its groups, float32 (rows, groups), as they are stored.

    `damping`: the share of the mean diagonal that was added so that the factor exists; None if it did not, and the codes are
    those of plain rounding with the same scales.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    damping: float | None


@dataclass(frozen=True)
class Factored:
    """The shared state of layers that read one input: how much comes through each column, the columns by that, and the factor."""

    diagonal: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor | None
    damping: float | None

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Factored:
        """hessian: float64, or float32, (columns, columns), the sum of outer products of the inputs."""
        diagonal = hessian.diagonal().clone()  # a view would keep all of it
        order = torch.argsort(diagonal, descending=True, stable=True)
        return cls(diagonal, order, *factor(hessian, order, diagonal == 0))


def solve(
    weight: torch.Tensor, inputs: Factored, bits: int, group: int, stored: torch.dtype, *, across: bool = False
) -> Solved:
    """Codes and scales of a weight (rows, columns), each column read by an input.

    inputs: what comes to it; group: columns that share a scale, fewer at the end; stored: the dtype of the scales. across: the
    weight is given, and its codes and scales are, with inputs as rows; groups run along the outputs then.
    """
    axis, step = int(across), max(1, _OUTPUTS // group) * group
    parts = [_solve(one, inputs, bits, group, stored, across=across) for one in torch.split(weight, step, axis)]
    codes, scales = (np.concatenate(each, axis) for each in zip(*parts, strict=True))
    return Solved(codes, scales, inputs.damping)


def _solve(
    weight: torch.Tensor, inputs: Factored, bits: int, group: int, stored: torch.dtype, *, across: bool
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The solution for a few outputs, which do not depend on the others."""
    weight = weight.to(torch.float32, copy=True)
    dead = inputs.diagonal == 0
    weight[dead if across else (slice(None), dead)] = 0
    alike = (
        torch.ones(weight.shape[1]) if across else inputs.diagonal.float()
    )  # a group of outputs is read by one input
    scales = search(weight, alike, bits, group, stored)
    each = by_column(scales, group, weight.shape[1])
    if across:
        weight, each = weight.T, each.T
    order = inputs.order
    codes = _rounded(weight[:, order], inputs.upper, each[:, order], bits)
    back = np.empty_like(codes)
    back[:, order.numpy()] = codes
    return np.ascontiguousarray(back.T) if across else back, scales.numpy()


def factor(hessian: torch.Tensor, order: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor | None, float | None]:
    """The upper Cholesky factor of the inverse, and the damping that it took; None and None if none is enough.

    order: of the columns in the factor. dead: those through which nothing comes; they count as much as the others do on
    average, so that no scale of the inputs matters.
    """
    kind = torch.float64 if len(hessian) <= _EXACT else torch.float32
    diagonal = hessian.diagonal().to(kind, copy=True)
    mean = live_mean(diagonal)
    diagonal[dead] = mean
    damping = _DAMP
    while damping <= _MOST_DAMP:
        upper = _upper(hessian.to(kind), (diagonal + damping * mean)[order], order)
        if upper is not None:
            return upper.float(), damping
        damping *= 10
    return None, None


def _upper(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor of the inverse of a matrix in this order and with this diagonal, None if it has none.

    It is computed in place: wide matrices are large.
    """
    found = hessian[order][:, order]
    found.diagonal().copy_(diagonal)
    failed = torch.zeros((), dtype=torch.int32)
    torch.linalg.cholesky_ex(found, out=(found, failed))
    if failed:
        return None
    torch.cholesky_inverse(found, out=found)
    torch.linalg.cholesky_ex(found, upper=True, out=(found, failed))
    return None if failed or not bool(torch.isfinite(found).all()) else found


def live_mean(diagonal: torch.Tensor) -> torch.Tensor:
    """The mean of what comes through the columns through which anything does; 1 where there are none."""
    live = int((diagonal != 0).sum())
    return diagonal.sum() / live if live else torch.ones((), dtype=diagonal.dtype)


def _rounded(weight: torch.Tensor, upper: torch.Tensor | None, scales: torch.Tensor, bits: int) -> NDArray[np.int8]:
    """Codes (rows, columns), of columns in the order in which they come."""
    half = 1 << (bits - 1)
    if upper is None:
        return (weight / scales).round().clamp(-half, half - 1).to(torch.int8).numpy()
    left = np.ascontiguousarray(weight.numpy().T)
    each = np.ascontiguousarray(scales.numpy().T)
    factors = upper.numpy()
    columns, rows = left.shape
    codes = np.empty((columns, rows), np.int8)
    run, least, most = kernel.columns(), np.float32(-half), np.float32(half - 1)
    for start in range(0, columns, kernel.BLOCK):
        stop = min(columns, start + kernel.BLOCK)
        errors = np.empty((stop - start, rows), np.float32)
        inner = np.ascontiguousarray(factors[start:stop, start:stop])
        run(left[start:stop], inner, each[start:stop], least, most, codes[start:stop], errors)
        if stop < columns:
            left[stop:] -= factors[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)
