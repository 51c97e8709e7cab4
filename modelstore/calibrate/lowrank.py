"""The product of two thin matrices that loses least of what a layer gives for what comes to it.

SVD-LLM (Wang and others, 2403.07378): the singular vectors that are cut off are those of the weight times a root of its inputs'
second moments. Once the right factor is rounded, the left one is the least squares for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DAMP = 0.01  # of the mean of the diagonal


@dataclass(frozen=True)
class Factors:
    """left (rows, rank) and right (rank, columns), float32 that the stored dtype holds."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Whitening:
    """Second moments of an input, float64 and of mean 1, and their root. `known`: they are its own, not any input's."""

    moments: torch.Tensor
    root: torch.Tensor
    known: bool

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Whitening:
        """hessian: float64 (columns, columns), the sum of outer products of the inputs, to which 1 % of its mean is added."""
        mean = hessian.diagonal().mean()
        found = hessian.double() / mean
        found.diagonal().add_(_DAMP)
        found /= 1 + _DAMP
        root, failed = torch.linalg.cholesky_ex(found)
        if not failed and bool(torch.isfinite(root).all()):
            return cls(found, root, known=True)
        any_input = torch.eye(len(found), dtype=torch.float64)
        return cls(any_input, any_input, known=False)


def solve(weight: torch.Tensor, inputs: Whitening, rank: int, energy: float, stored: torch.dtype) -> Factors:
    """Factors of a weight (rows, columns) of that rank, or with rank 0 of the least that keeps this share of what it gives.

    stored: the dtype of the factors.
    """
    moments, root = inputs.moments, inputs.root
    whole = weight.double()
    rows, columns = whole.shape
    if rows <= columns:
        squares, vectors = torch.linalg.eigh(whole @ moments @ whole.T)
        rank = rank or _enough(squares, energy)
        left = _largest(vectors, rank)
        right = left.T @ whole
    else:
        across = whole @ root
        squares, vectors = torch.linalg.eigh(across.T @ across)
        rank = rank or _enough(squares, energy)
        inner = _largest(vectors, rank)
        left = across @ inner
        right = torch.linalg.solve_triangular(root, inner.T, upper=False, left=False)
    sizes = (
        (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    )  # each has half of a component
    left, right = left * sizes, right / sizes[:, None]
    right = _rounded(right, stored)
    inside, across = right.double() @ moments, whole @ moments
    gram, failed = torch.linalg.cholesky_ex(inside @ right.double().T)
    if not failed:
        best = torch.cholesky_solve((across @ right.double().T).T, gram).T
        left = best if bool(torch.isfinite(best).all()) else left
    return Factors(_rounded(left, stored), right)


def _largest(vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """The vectors of the largest values, each with a sign of its own: that of its largest number is plus."""
    found = vectors.flip(1)[:, :rank]
    signs = torch.gather(found, 0, found.abs().argmax(0, keepdim=True)).sign()
    return found * torch.where(signs == 0, 1.0, signs)


def _enough(squares: torch.Tensor, energy: float) -> int:
    until = squares.flip(0).clamp_min(0).cumsum(0)
    return min(len(until), int(torch.searchsorted(until, energy * until[-1])) + 1)


def _rounded(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    most = torch.finfo(stored).max
    return values.clamp(-most, most).to(stored).float()
