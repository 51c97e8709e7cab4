"""GPTQ: columns are rounded one after the other, and those that follow make up for what was lost.

Frantar and others, 2210.17323. Scales are found first, on the weights as they were, so that groups lie where they do without it;
columns are then rounded in the order of how much comes through them, and the order undone: the layout is the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.codecs.kernels import gptq as kernel

_STEPS = 20  # of the search for a clip: from the whole range down to 0.32 of it
_NORM = 2.4
_DAMP, _MOST_DAMP = 0.01, 0.1  # of the mean of the diagonal, columns through which nothing comes left out
_EXACT = 4096  # columns up to which the factor is computed in float64
_ROWS = 1 << 22  # numbers that the search looks at a time


@dataclass(frozen=True)
class Solved:
    """A weight's codes, int8 (rows, columns), and the scales of its groups, float32 (rows, groups), as they are stored.

    `damping`: the share of the mean diagonal that was added so that the factor exists; None where it did not, and the codes are
    those of plain rounding with the same scales.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    damping: float | None


@dataclass(frozen=True)
class Factored:
    """What layers that read one input have in common: how much comes through each column, the columns by that, and the factor."""

    diagonal: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor | None
    damping: float | None

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Factored:
        """hessian: float64, or float32, (columns, columns), the sum of outer products of the inputs."""
        diagonal = hessian.diagonal().clone()  # a view would keep all of it
        order = torch.argsort(diagonal, descending=True, stable=True)
        return cls(diagonal, order, *factor(hessian[order][:, order], diagonal[order] == 0))


def solve(weight: torch.Tensor, inputs: Factored, bits: int, group: int, stored: torch.dtype) -> Solved:
    """Codes and scales of a weight (rows, columns).

    inputs: what comes to it; group: columns that share a scale, fewer at the end; stored: the dtype of the scales.
    """
    weight = weight.float().clone()
    weight[:, inputs.diagonal == 0] = 0
    scales = search(weight, inputs.diagonal.float(), bits, group, stored)
    order = inputs.order
    each = by_column(scales, group, weight.shape[1])[:, order]
    codes = _rounded(weight[:, order], inputs.upper, each, bits)
    back = np.empty_like(codes)
    back[:, order.numpy()] = codes
    return Solved(back, scales.numpy(), inputs.damping)


def search(weight: torch.Tensor, importance: torch.Tensor, bits: int, group: int, stored: torch.dtype) -> torch.Tensor:
    """The scale of each group (rows, groups) that loses least, where each column counts by its importance.

    The longer side of a group's range is turned to where there is one more code, by a negative scale where that is above zero.
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    wide = torch.nn.functional.pad(weight, (0, groups * group - columns)).reshape(rows, groups, group)
    heavy = torch.nn.functional.pad(importance, (0, groups * group - columns)).reshape(1, groups, group)
    found = torch.empty(rows, groups)
    step = max(1, _ROWS // max(1, groups * group))
    for at in range(0, rows, step):
        found[at : at + step] = _best(wide[at : at + step], heavy, bits, stored)
    return found


def by_column(groups: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """What each group (rows, groups) has, for each of its columns."""
    return groups.repeat_interleave(group, 1)[:, :columns]


def _best(part: torch.Tensor, heavy: torch.Tensor, bits: int, stored: torch.dtype) -> torch.Tensor:
    half = 1 << (bits - 1)
    low, high = part.amin(-1), part.amax(-1)
    sign = torch.where(high > -low, -1.0, 1.0)
    widest = torch.maximum(high, -low)
    best = torch.full_like(widest, torch.inf)
    found = torch.ones_like(widest)
    for at in range(_STEPS):
        scale = (sign * widest * (1 - at / 28) / (half - 0.5)).to(stored).float()
        scale = torch.where(scale == 0, 1.0, scale)
        lost = ((part / scale[..., None]).round_().clamp_(-half, half - 1).mul_(scale[..., None]) - part).abs_()
        error = (lost.pow_(_NORM) * heavy).sum(-1)
        better = error < best
        found, best = torch.where(better, scale, found), torch.where(better, error, best)
    return found


def factor(hessian: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor | None, float | None]:
    """The upper Cholesky factor of the inverse, and the damping that it took; None and None where none is enough.

    hessian: which is changed. dead: the columns through which nothing comes; they count as much as the others do on average, so
    that no scale of the inputs matters.
    """
    kind = torch.float64 if len(hessian) <= _EXACT else torch.float32
    damped = hessian.to(kind)
    diagonal = damped.diagonal().clone()
    mean = live_mean(diagonal)
    diagonal[dead] = mean
    damping = _DAMP
    while damping <= _MOST_DAMP:
        damped.diagonal().copy_(diagonal + damping * mean)
        upper = _upper(damped)
        if upper is not None:
            return upper.float(), damping
        damping *= 10
    return None, None


def _upper(matrix: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor of a matrix's inverse, None where it has none; at most two more matrices are there at a time."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not bool(torch.isfinite(upper).all()) else upper


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
