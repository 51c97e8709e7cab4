"""Weights reduced to their signs: binary and ternary codes with the scale of each group.

Sums are taken in sixteen lanes in float64, always in the same order, so that they vectorise and give the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from modelstore.codecs.kernels import jit

_FINITE = np.float32(3.4028235e38)  # the largest


def _binary(numbers, group, codes, scales):  # type: ignore[no-untyped-def]
    """codes 1 where a number is negative, else 0; scales: the mean magnitude of each group's finite numbers.

    numbers: float32 (rows, columns), no NaN; codes: uint8 (rows, columns); scales: float32 (rows, groups of a row).
    """
    rows, columns = numbers.shape
    lanes = np.empty(16, np.float64)
    counts = np.empty(16, np.int64)
    for r in range(rows):
        row = numbers[r]
        for g in range(scales.shape[1]):
            a, b = g * group, min(columns, (g + 1) * group)
            lanes[:] = 0
            counts[:] = 0
            for i in range(a, b - 15, 16):
                for j in range(16):
                    known = abs(row[i + j]) <= _FINITE
                    lanes[j] += np.float64(abs(row[i + j]) if known else np.float32(0))
                    counts[j] += np.int64(known)
            for i in range(b - (b - a) % 16, b):
                if abs(row[i]) <= _FINITE:
                    lanes[0] += np.float64(abs(row[i]))
                    counts[0] += 1
            total = 0.0
            count = 0
            for j in range(16):
                total += lanes[j]
                count += counts[j]
            scales[r, g] = np.float32(total / count) if count else np.float32(0)
        for i in range(columns):
            codes[r, i] = np.uint8(row[i] < np.float32(0))


def _ternary(numbers, group, factor, codes, scales):  # type: ignore[no-untyped-def]
    """codes 0, 1, 2 for -, 0, +: 0 within `factor` times the mean magnitude; scales: the mean magnitude of the others.

    Infinities are left out of both means."""
    rows, columns = numbers.shape
    lanes = np.empty(16, np.float64)
    counts = np.empty(16, np.int64)
    for r in range(rows):
        row = numbers[r]
        for g in range(scales.shape[1]):
            a, b = g * group, min(columns, (g + 1) * group)
            lanes[:] = 0
            counts[:] = 0
            for i in range(a, b - 15, 16):
                for j in range(16):
                    known = abs(row[i + j]) <= _FINITE
                    lanes[j] += np.float64(abs(row[i + j]) if known else np.float32(0))
                    counts[j] += np.int64(known)
            for i in range(b - (b - a) % 16, b):
                if abs(row[i]) <= _FINITE:
                    lanes[0] += np.float64(abs(row[i]))
                    counts[0] += 1
            total = 0.0
            count = 0
            for j in range(16):
                total += lanes[j]
                count += counts[j]
            limit = np.float32(factor * total / count) if count else np.float32(0)
            lanes[:] = 0
            counts[:] = 0
            for i in range(a, b - 15, 16):
                for j in range(16):
                    large = limit < abs(row[i + j]) <= _FINITE
                    lanes[j] += np.float64(abs(row[i + j]) if large else np.float32(0))
                    counts[j] += np.int64(large)
            for i in range(b - (b - a) % 16, b):
                if limit < abs(row[i]) <= _FINITE:
                    lanes[0] += np.float64(abs(row[i]))
                    counts[0] += 1
            total = 0.0
            count = 0
            for j in range(16):
                total += lanes[j]
                count += counts[j]
            scales[r, g] = np.float32(total / count) if count else np.float32(0)
            for i in range(a, b):
                codes[r, i] = np.uint8(1) + np.uint8(row[i] > limit) - np.uint8(row[i] < -limit)


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(binary, ternary), compiled or loaded from the cache the first time."""
    from numba import types

    def array(item: Any, readonly: bool = False) -> Any:
        return types.Array(item, 2, "C", readonly=readonly, aligned=False)

    numbers, codes, scales = array(types.float32, True), array(types.uint8), array(types.float32)
    binary = types.void(numbers, types.intp, codes, scales)
    ternary = types.void(numbers, types.intp, types.float64, codes, scales)
    return jit.compiled(_binary, binary), jit.compiled(_ternary, ternary)
