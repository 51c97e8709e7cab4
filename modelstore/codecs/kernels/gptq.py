"""GPTQ's columns: each is rounded, and what it loses is made up for by those that come after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

BLOCK = 128  # columns that are rounded before the others hear of it
_TILE = 64  # rows that are worked on at a time, so that they stay in the first-level cache


def _columns(weights, factor, scales, least, most, codes, errors):  # type: ignore[no-untyped-def]
    """Round the columns of a block, in their order; rows run along the vectors.

    weights: float32 (columns, rows), changed; factor: float32 (columns, columns), upper triangular; scales: float32 (columns,
    rows); least, most: of a code; codes: int8 (columns, rows); errors: float32 (columns, rows), what each column lost, by the
    factor's diagonal.
    """
    count, rows = weights.shape
    for start in range(0, rows, _TILE):
        stop = min(rows, start + _TILE)
        for i in range(count):
            share = np.float32(1) / factor[i, i]
            for r in range(start, stop):
                scale = scales[i, r]
                code = min(max(np.rint(weights[i, r] / scale), least), most)
                codes[i, r] = np.int8(code)
                errors[i, r] = (weights[i, r] - code * scale) * share
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
    codes = types.Array(types.int8, 2, "C")
    return jit.compiled(_columns, types.void(floats, read, read, types.float32, types.float32, codes, floats))
