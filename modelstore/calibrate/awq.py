"""AWQ: columns through which much comes are scaled up before rounding, and what comes before them gives that much less.

Lin and others, 2306.00978, with both of its forms of scales (`duo` of llm-compressor); then a clip for each group. `folding`
says which columns are scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modelstore.codecs.integer.weighted import by_column, search

_RATIOS = 20  # from 0 up to below 1
_LEAST = 1e-4
_CLIPS, _NARROWEST = 20, 0.5  # steps of the search for a clip, and the share of the range that it ends at
_ROWS = 1 << 22  # numbers that the search looks at a time


def magnitude(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The mean of each column's absolute weights by the largest of their group, float32 (columns)."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    wide = torch.nn.functional.pad(weight.abs(), (0, groups * group - columns)).reshape(rows, groups, group)
    return (wide / (wide.amax(-1, keepdim=True) + 1e-6)).reshape(rows, -1)[:, :columns].mean(0)


def scales(inputs: torch.Tensor, weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Scales of columns to try, float32 (columns); the first are all 1. inputs, weights: mean magnitudes of the columns.

    Columns through which nothing comes keep theirs.
    """
    dead = inputs == 0
    live = torch.where(dead, 1.0, inputs)
    for at in range(_RATIOS):
        ratio = at / _RATIOS
        for alone in (True, False):
            one = live**ratio if alone else live**ratio / (weights ** (1 - ratio) + _LEAST)
            one = one.clamp(min=_LEAST)
            known = one[~dead] if not bool(dead.all()) else one
            yield torch.where(dead, 1.0, one / (known.max() * known.min()).sqrt())


def rounded(weight: torch.Tensor, bits: int, group: int, stored: torch.dtype) -> torch.Tensor:
    """A weight by plain rounding over the whole range of each group."""
    return _coded(weight, plain(weight, bits, group, stored), bits, group)


def plain(weight: torch.Tensor, bits: int, group: int, stored: torch.dtype) -> torch.Tensor:
    """The scales of groups (rows, groups) that reach over their whole range."""
    return search(weight, torch.ones(weight.shape[1]), bits, group, stored, steps=1)


@dataclass(frozen=True)
class Squares:
    """The sum of outer products of the inputs (columns, columns); of each group of columns a clip needs its own."""

    sums: torch.Tensor

    def groups(self, group: int) -> torch.Tensor:
        """float32 (groups, group, group); beyond the last column there are zeros."""
        columns = len(self.sums)
        count = -(-columns // group)
        found = torch.zeros(count, group, group)
        for at in range(count):
            here = self.sums[at * group : (at + 1) * group, at * group : (at + 1) * group]
            found[at, : len(here), : len(here)] = here
        return found


def clipped(weight: torch.Tensor, inputs: Squares, bits: int, group: int, stored: torch.dtype) -> torch.Tensor:
    """The scales of groups (rows, groups) by which least is lost of what each group gives, down to half of the range."""
    rows, columns = weight.shape
    sums = inputs.groups(group)
    widest = plain(weight, bits, group, stored)
    best, found = torch.full_like(widest, torch.inf), widest.clone()
    step = max(1, _ROWS // max(1, columns))
    for at in range(0, rows, step):
        part = slice(at, at + step)
        for number in range(_CLIPS):
            narrow = (widest[part] * (1 - (1 - _NARROWEST) * number / _CLIPS)).to(stored).float()
            narrow = torch.where(narrow == 0, 1.0, narrow)
            lost = _coded(weight[part], narrow, bits, group) - weight[part]
            wide = torch.nn.functional.pad(lost, (0, len(sums) * group - columns)).reshape(len(lost), -1, group)
            turned = wide.transpose(0, 1)  # (groups, rows, group)
            error = (torch.bmm(turned, sums) * turned).sum(-1).T
            better = error < best[part]
            found[part] = torch.where(better, narrow, found[part])
            best[part] = torch.where(better, error, best[part])
    return found


def codes(weight: torch.Tensor, groups: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The codes (rows, columns) of a weight for scales of its groups."""
    half = 1 << (bits - 1)
    return (weight / by_column(groups, group, weight.shape[1])).round_().clamp_(-half, half - 1)


def joined(weights: Sequence[torch.Tensor], groups: Sequence[int]) -> torch.Tensor:
    """The mean magnitudes of the columns of weights that read one input, each in groups of its own."""
    rows = [len(one) for one in weights]
    found = [magnitude(one, group) * len(one) for one, group in zip(weights, groups, strict=True)]
    return torch.stack(found).sum(0) / sum(rows)


def _coded(weight: torch.Tensor, groups: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return codes(weight, groups, bits, group).mul_(by_column(groups, group, weight.shape[1]))
