"""The product of two factors, in an order of sums that is always the same: no BLAS, no contraction to fused operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

BLOCK = 256  # columns whose sums stay in the first-level cache


def _product(left, right, out):  # type: ignore[no-untyped-def]
    """out = left @ right in float32, each number summed over k = 0, 1, … one product at a time.

    left: float32 (rows, rank); right: float32 (rank, columns); out: float32 (rows, columns). Four rows are done together, so
    that a row of `right` is loaded once for them.
    """
    rows, rank = left.shape
    columns = right.shape[1]
    for a in range(0, columns, BLOCK):
        n = min(BLOCK, columns - a)
        r = 0
        while r + 4 <= rows:
            o0, o1 = out[r, a : a + n], out[r + 1, a : a + n]
            o2, o3 = out[r + 2, a : a + n], out[r + 3, a : a + n]
            for i in range(n):
                o0[i] = o1[i] = o2[i] = o3[i] = np.float32(0)
            for k in range(rank):
                v = right[k, a : a + n]
                w0, w1, w2, w3 = left[r, k], left[r + 1, k], left[r + 2, k], left[r + 3, k]
                for i in range(n):
                    o0[i] += w0 * v[i]
                    o1[i] += w1 * v[i]
                    o2[i] += w2 * v[i]
                    o3[i] += w3 * v[i]
            r += 4
        while r < rows:
            o = out[r, a : a + n]
            o[:] = np.float32(0)
            for k in range(rank):
                v = right[k, a : a + n]
                w = left[r, k]
                for i in range(n):
                    o[i] += w * v[i]
            r += 1


@cache
def product() -> Callable[..., Any]:
    """`_product`, compiled or loaded from the cache the first time."""
    from numba import types

    read = types.Array(types.float32, 2, "C", readonly=True, aligned=False)
    return jit.compiled(_product, types.void(read, read, types.Array(types.float32, 2, "C", aligned=False)))
