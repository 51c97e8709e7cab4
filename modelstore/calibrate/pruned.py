"""Which weights a layer can do without, by what comes to it, and what those that are left become.

Wanda (Sun and others, 2306.11695) prunes, in each row, those that least comes through; the others stay as they were. SparseGPT
(Frantar and Alistarh, 2301.00774) goes over the columns as GPTQ does: those after a pruned weight make up for it. Reconstruction
looks for the weights of least error that a mask leaves, each row by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.calibrate.gptq import factor, live_mean
from modelstore.codecs.kernels import prune as kernel
from modelstore.codecs.numeric.numbers import Floats
from modelstore.codecs.sparse.kernels import kernels
from modelstore.codecs.sparse.pruning import Pruning
from modelstore.format.buffers import Bytes

_BLOCK = 128  # columns that are pruned before the others hear of it
_LEAST = 1e-10  # of the largest norm: a column through which nothing comes counts so much, so that magnitude orders its weights
_DAMP = 0.01  # of the mean of the diagonal, columns through which nothing comes left out
_STEPS = 40  # of conjugate gradients, at most
_NEAR = 1e-3  # of the gradient that there was: where no row has more, they end
_ROWS = 1 << 22  # numbers that they look at a time


@dataclass(frozen=True)
class InOrder:
    """The order in which columns are pruned, the upper factor of the inverse in it, and which columns in it are dead.

    Nothing comes through a dead column.
    """

    order: torch.Tensor
    upper: torch.Tensor
    dead: torch.Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of an input that layers share: the sum of outer products, float64, and everything computed from it once."""

    hessian: torch.Tensor
    _factored: dict[int, InOrder | None] = field(default_factory=dict)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """How much comes through each column."""
        return self.hessian.diagonal()

    def factored(self, width: int) -> InOrder | None:
        """The input of SparseGPT, None if there is no factor.

        Patterns of `width` columns come in the order of how much comes through them. Without patterns (0), columns keep their
        order: half of each block of them goes, and should not be half of those that matter most.
        """
        if width not in self._factored:
            order = self._order(width) if width else torch.arange(len(self.diagonal))
            dead = self.diagonal == 0
            upper = factor(self.hessian, order, dead)[0]
            self._factored[width] = InOrder(order, upper, dead[order]) if upper is not None else None
        return self._factored[width]

    def _order(self, width: int) -> torch.Tensor:
        whole = len(self.diagonal) // width * width  # a last pattern that is shorter stays the last
        most = self.diagonal[:whole].reshape(-1, width).sum(1)
        first = torch.argsort(most, descending=True, stable=True) * width
        patterns = (first[:, None] + torch.arange(width)).reshape(-1)
        return torch.cat([patterns, torch.arange(whole, len(self.diagonal))])

    @cached_property
    def damped(self) -> torch.Tensor:
        """The matrix of the error that reconstruction minimises, float32."""
        found = self.hessian.clone()
        found.diagonal().add_(_DAMP * live_mean(self.diagonal))
        return found.float()


def wanda(weight: torch.Tensor, inputs: Moments, pruning: Pruning) -> torch.Tensor:
    """A weight (rows, columns) without those that least comes through, by |weight| · ‖input‖: of each row, or pattern in it."""
    norms = inputs.diagonal.sqrt()
    norms = norms.clamp_min(_LEAST * norms.max()) if bool(norms.max() > 0) else torch.ones_like(norms)
    scores = np.ascontiguousarray((weight.double() * (norms / norms.max())).float().numpy())
    mask: Bytes = np.empty(scores.shape, np.uint8)
    if pruning.m:
        kernels()[2](scores, pruning.n, pruning.m, mask)
    else:
        kernels()[1](scores, _count(pruning.sparsity, scores.shape[1]), mask)
    return torch.where(torch.from_numpy(mask) != 0, weight, 0.0)


def sparsegpt(
    weight: torch.Tensor, inputs: InOrder, pruning: Pruning, scales: torch.Tensor | None = None, bits: int = 0
) -> torch.Tensor:
    """A weight (rows, columns) pruned column by column, and rounded to codes of `bits` with these scales (rows, columns).

    Weights of dead columns all go, and count in the share that does: the others are pruned for the rest of it.
    """
    order, dead = inputs.order, inputs.dead.numpy()
    left = np.array(weight[:, order].numpy().T, np.float32, order="C")
    left[dead] = 0
    columns, rows = left.shape
    quota = Quota.of(pruning.sparsity, dead)
    each = np.zeros_like(left) if scales is None else np.ascontiguousarray(scales[:, order].numpy().T, np.float32)
    factors, half = inputs.upper.numpy(), 1 << max(0, bits - 1)
    run, gone = kernel.columns(), 0
    step = _BLOCK if not pruning.m else max(1, _BLOCK // pruning.m) * pruning.m
    for start in range(0, columns, step):
        stop = min(columns, start + step)
        inner = np.ascontiguousarray(factors[start:stop, start:stop])
        mask: Bytes = np.ones((stop - start, rows), np.uint8)
        if not pruning.m:
            gone += _mask(left[start:stop] / inner.diagonal()[:, None], pruning.scope, (quota, stop, gone), mask)
        errors = np.empty((stop - start, rows), np.float32)
        run(left[start:stop], inner, each[start:stop], -half, half - 1, pruning.n, pruning.m, mask, errors)
        if stop < columns:
            left[stop:] -= factors[start:stop, stop:].T @ errors
    found = torch.empty_like(weight)
    found[:, order] = torch.from_numpy(left.T)
    return found


def reconstructed(pruned: torch.Tensor, weight: torch.Tensor, inputs: Moments) -> torch.Tensor:
    """The weights of least error where `pruned` (rows, columns) is not 0, starting at those: no row loses more than it did."""
    found = pruned.clone()
    step = max(1, _ROWS // weight.shape[1])
    for at in range(0, len(weight), step):
        part = slice(at, at + step)
        found[part] = _least(pruned[part], weight[part].float(), inputs.damped)
    return found


def lost(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """For each row, the squared error of a layer's output, summed up over its inputs; float64."""
    gap = (found - weight).double()
    return ((gap @ hessian.double()) * gap).sum(1)


def _least(start: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients, every row by itself, over the weights that are left, each scaled by its own curvature."""
    mask = (start != 0).float()
    found, over = start.clone(), 1 / hessian.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    slope = ((weight - found) @ hessian) * mask
    scaled = slope * over
    way = scaled.clone()
    size = (slope * scaled).sum(1, keepdim=True)
    enough = size * _NEAR**2
    for _ in range(_STEPS):
        going = size > enough
        if not bool(going.any()):
            break
        curved = (way @ hessian) * mask
        bend = (way * curved).sum(1, keepdim=True)
        pace = torch.where(going & (bend > 0), size / bend, 0.0)
        found += pace * way
        slope -= pace * curved
        scaled = slope * over
        fresh = (slope * scaled).sum(1, keepdim=True)
        way = scaled + torch.where(going, fresh / size, 0.0) * way
        size = fresh
    better = lost(found, weight, hessian) <= lost(start, weight, hessian)
    return torch.where(better[:, None], found, start)


def _mask(scores: Floats, scope: str, upto: tuple[Quota, int, int], mask: Bytes) -> int:
    """Prune the smallest of a block's scores (columns, rows), so many that the share holds up to its end; how many go.

    upto: what is to go, the columns up to the block's end, and what went before; with scope "row" that of each row.
    """
    quota, stop, before = upto
    rows = scores.shape[1]
    if scope == "row":
        pruned = quota.until(stop, 1) - before
        along = np.ascontiguousarray(np.abs(scores).T)
        if pruned:
            smallest = np.argsort(along, axis=1, kind="stable")[:, :pruned]
            mask[smallest, np.arange(rows)[:, None]] = 0
        return pruned
    pruned = quota.until(stop, rows) - before
    if pruned:
        flat = np.abs(scores).reshape(-1)
        mask.reshape(-1)[np.argpartition(flat, min(pruned, flat.size - 1))[:pruned]] = 0
    return pruned


@dataclass(frozen=True)
class Quota:
    """How many weights go, column by column: those of dead columns, and of the others a `share`."""

    share: float
    dead: NDArray[np.int64]  # how many of the first columns are

    @classmethod
    def of(cls, sparsity: float, dead: NDArray[np.bool_]) -> Quota:
        """sparsity: the share that goes of all columns, where no more of them are dead."""
        gone, columns = int(dead.sum()), dead.size
        share = sparsity if not gone else max(0.0, sparsity * columns - gone) / max(1, columns - gone)
        return cls(share, np.concatenate([[0], np.cumsum(dead)]))

    def until(self, stop: int, rows: int) -> int:
        """How many go of the first `stop` columns."""
        dead = int(self.dead[stop])
        return dead * rows + _count(self.share, (stop - dead) * rows)


def _count(share: float, of: int) -> int:
    return math.floor(share * of + 0.5)
