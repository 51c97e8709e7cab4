"""Scales of 4-bit groups that lose least where each column counts by its importance."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.numeric import scaled
from modelstore.codecs.numeric.numbers import Floats, with_nan
from modelstore.codecs.numeric.scaled import Format4, Grid
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType

Importance = NDArray[np.float32]  # of each column, of mean 1
CLIPS = tuple(1 - at / 28 for at in range(20))  # of the largest magnitude, from the whole range down to 0.32 of it


def searched(
    values: Bytes, dtype: DType, grid: Grid, tried: Iterable[Floats], how: Format4, importance: Importance
) -> Floats:
    """For each group, the scale among those tried by which Σ importance · error² is least; the first of equal ones.

    tried: float32 (rows, groups) each. Scales by which a number decodes to none that is finite are left out.
    """
    wide = grid.groups * grid.width - grid.columns
    numbers = with_nan(values, dtype).reshape(grid.rows, grid.columns)
    numbers = np.nan_to_num(numbers, nan=0.0)
    found, least = None, np.full((grid.rows, grid.groups), np.inf)
    for scales in tried:
        codes = scaled.encode4(values, dtype, grid, scales, how)
        out = np.empty((1, values.size), np.uint8)
        scaled.decode4(codes, grid, scales, how, dtype, out)
        with np.errstate(all="ignore"):
            lost = np.square(with_nan(out.reshape(-1), dtype).reshape(numbers.shape) - numbers, dtype=np.float64)
        lost = np.pad(lost * importance, ((0, 0), (0, wide))).reshape(grid.rows, grid.groups, grid.width).sum(-1)
        better = lost < least
        found = scales.copy() if found is None else np.where(better, scales, found)
        least = np.where(better, lost, least)
    assert found is not None, "something is tried"
    return np.asarray(found, np.float32)
