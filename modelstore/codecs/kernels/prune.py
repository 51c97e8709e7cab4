"""SparseGPT's columns: of each some weights are pruned, and what is lost is made up for by the columns that come after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

_TILE = 64  # rows that are worked on at a time, so that they stay in the first-level cache


def _columns(weights, factor, scales, least, most, n, m, mask, errors):  # type: ignore[no-untyped-def]
    """Prune, and round, the columns of a block, in their order; rows run along the vectors.

    weights: float32 (columns, rows), left as what they are found to be; factor: float32 (columns, columns), upper triangular;
    scales: float32 (columns, rows), of codes from `least` to `most`, 0 if nothing is rounded; n, m: of every m columns the n
    whose loss is largest are kept as they are reached, and with m = 0 those that `mask` says; mask: uint8 (columns, rows), 1
    where a weight is kept; errors: float32 (columns, rows), what each column lost, by the factor's diagonal.
    """
    count, rows = weights.shape
    scores = np.empty((max(1, m), _TILE), np.float32)
    for start in range(0, rows, _TILE):
        stop = min(rows, start + _TILE)
        for i in range(count):
            share = np.float32(1) / factor[i, i]
            if m > 0 and i % m == 0:
                end = min(count, i + m)
                for j in range(i, end):
                    by = np.float32(1) / factor[j, j]
                    for r in range(start, stop):
                        scores[j - i, r - start] = abs(weights[j, r]) * by
                for j in range(end - i):
                    for r in range(stop - start):
                        larger = 0
                        for k in range(j):
                            larger += scores[k, r] >= scores[j, r]
                        for k in range(j + 1, end - i):
                            larger += scores[k, r] > scores[j, r]
                        mask[i + j, start + r] = np.uint8(larger < n)
            for r in range(start, stop):
                weight, scale = weights[i, r], scales[i, r]
                found = weight
                if scale != np.float32(0):
                    found = min(max(np.rint(weight / scale), least), most) * scale
                found = found if mask[i, r] else np.float32(0)
                weights[i, r] = found
                errors[i, r] = (weight - found) * share
            for j in range(i + 1, count):
                by = factor[i, j]
                if by != np.float32(0):
                    for r in range(start, stop):
                        weights[j, r] -= errors[i, r] * by


@cache
def columns() -> Callable[..., Any]:
    """`_columns`, compiled or loaded from the cache the first time."""
    from numba import types

    read = types.Array(types.float32, 2, "C", readonly=True)
    floats = types.Array(types.float32, 2, "C")
    mask = types.Array(types.uint8, 2, "C")
    return jit.compiled(
        _columns,
        types.void(floats, read, read, types.float32, types.float32, types.intp, types.intp, mask, floats),
    )
