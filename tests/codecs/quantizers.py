"""Integers in groups as other tools find them: by error feedback, and clipped for the least error. Plain NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def spread(scales: Floats, group: int, columns: int) -> Floats:
    """A scale for each column, of one for each group."""
    return np.repeat(scales.astype(np.float32), group, axis=1)[:, :columns]


def largest(weights: Floats, group: int) -> Floats:
    """The largest magnitude of each group; the last one of a row may be shorter."""
    rows, columns = weights.shape
    padded = np.zeros((rows, -(-columns // group) * group), np.float32)
    padded[:, :columns] = np.abs(weights)
    most: Floats = padded.reshape(rows, -1, group).max(2)
    return most


def nearest(weights: Floats, scales: Floats, group: int) -> NDArray[np.int8]:
    """Rounded to nearest."""
    return np.clip(np.rint(weights / spread(scales, group, weights.shape[1])), -8, 7).astype(np.int8)


def clipped(weights: Floats, group: int, how: np.dtype) -> NDArray:  # type: ignore[type-arg]
    """Of shrunken scales the ones with the least squared error, as compressed-tensors' MSE observer searches."""
    most, columns = largest(weights, group), weights.shape[1]
    best = np.full(most.shape, np.inf)
    found = np.zeros(most.shape, how)
    for share in np.linspace(0.6, 1, 21):
        scales = np.maximum(most * share / 7.5, 1e-30).astype(how)
        wide = spread(scales, group, columns)
        error = np.zeros((len(weights), most.shape[1] * group))
        error[:, :columns] = (nearest(weights, scales, group) * wide - weights) ** 2
        sums = error.reshape(*most.shape, group).sum(2)
        found = np.where(sums < best, scales, found)
        best = np.minimum(best, sums)
    return found


def feedback(weights: Floats, scales: Floats, group: int, seed: int = 0) -> NDArray[np.int8]:
    """GPTQ (Frantar et al., 2022): each column's rounding error is made good in those after it, for random activations."""
    columns = weights.shape[1]
    random = np.random.default_rng(seed)
    few = random.standard_normal((columns // 4, columns))
    inputs = random.standard_normal((2 * columns, columns // 4)) @ few / 8 + random.standard_normal(
        (2 * columns, columns)
    )
    hessian = inputs.T @ inputs
    hessian += np.eye(columns) * 0.01 * hessian.diagonal().mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, wide = weights.astype(np.float64), spread(scales, group, columns).astype(np.float64)
    codes = np.zeros(weights.shape, np.int8)
    for i in range(columns):
        codes[:, i] = np.clip(np.rint(left[:, i] / wide[:, i]), -8, 7)
        error = (left[:, i] - codes[:, i] * wide[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return codes
