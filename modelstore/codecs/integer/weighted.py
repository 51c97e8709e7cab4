"""The scales of groups that lose least where columns count by their importance: the clip of each group is looked for.

The norm is that of "mse" (`codec.Int`); computed with torch, since all groups of some rows are looked at together.
"""

from __future__ import annotations

import torch

from modelstore.codecs.look import Look
from modelstore.codecs.numeric.numbers import Floats
from modelstore.codecs.numeric.scaled import scale_dtype
from modelstore.format.region import full

_STEPS = 20  # of the search for a clip: from the whole range down to 0.32 of it
_NORM = 2.4
_ROWS = 1 << 22  # numbers that the search looks at a time


def weighted(look: Look, importance: Floats, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 (rows, columns), and scales, float32 (rows, groups), of a matrix whose columns have an importance."""
    values, half = look.read(full(look.shape)), 1 << (bits - 1)
    weight = torch.from_numpy(values).view(getattr(torch, look.dtype.name)).reshape(look.shape).float()
    scales = search(weight, torch.from_numpy(importance), bits, group, getattr(torch, scale_dtype(look.dtype)))
    wide = by_column(scales, group, weight.shape[1])
    return (weight / wide).round().clamp(-half, half - 1).to(torch.int8), scales


def search(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, group: int, stored: torch.dtype, *, steps: int = _STEPS
) -> torch.Tensor:
    """The scale of each group (rows, groups) that loses least, where each column counts by its importance.

    `steps` clips are tried, from the whole range down: 1 is the whole range. The longer side of a group's range is turned to
    where there is one more code, by a negative scale where that is above zero.
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    wide = torch.nn.functional.pad(weight, (0, groups * group - columns)).reshape(rows, groups, group)
    heavy = torch.nn.functional.pad(importance, (0, groups * group - columns)).reshape(1, groups, group)
    found = torch.empty(rows, groups)
    step = max(1, _ROWS // max(1, groups * group))
    for at in range(0, rows, step):
        found[at : at + step] = _best(wide[at : at + step], heavy, bits, stored, steps)
    return found


def by_column(groups: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """The value of each group (rows, groups), for each of its columns."""
    return groups.repeat_interleave(group, 1)[:, :columns]


def _best(part: torch.Tensor, heavy: torch.Tensor, bits: int, stored: torch.dtype, steps: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    low, high = part.amin(-1), part.amax(-1)
    sign = torch.where(high > -low, -1.0, 1.0)
    widest = torch.maximum(high, -low)
    best = torch.full_like(widest, torch.inf)
    found = torch.ones_like(widest)
    for at in range(steps):
        scale = (sign * widest * (1 - at / 28) / (half - 0.5)).to(stored).float()
        scale = torch.where(scale == 0, 1.0, scale)
        lost = ((part / scale[..., None]).round_().clamp_(-half, half - 1).mul_(scale[..., None]) - part).abs_()
        error = (lost.pow_(_NORM) * heavy).sum(-1)
        better = error < best
        found, best = torch.where(better, scale, found), torch.where(better, error, best)
    return found
