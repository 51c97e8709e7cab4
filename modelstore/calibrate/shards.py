"""How the samples of a text are divided into runs: by shapes alone, so that the sums come out the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from modelstore.architecture.classes.skeleton import Skeleton
from modelstore.architecture.sizes import Sizes
from modelstore.errors import UnsupportedError

_FORWARD = 128 << 20  # bytes of activations of one run that are aimed at
_MOST = 8  # samples of a run
_FLOAT = 4


def activations(shapes: Iterable[tuple[int, ...]], length: int, heads: int, active: int) -> int:
    """Bytes of what a block computes for one sample of `length` tokens, in float32, at most.

    shapes: of the block's parameters: the longer side of each matrix is counted, of experts that are stacked what `active` of
    them; heads: of attention, whose scores may be there whole.
    """
    given = sum(
        max(shape[-2:]) * (min(active, shape[0]) if len(shape) > 2 else 1) for shape in shapes if len(shape) > 1
    )
    return _FLOAT * length * (given + heads * length)


def per_run(sample: int) -> int:
    """Samples that run together, of so many bytes of activations each."""
    return max(1, min(_MOST, _FORWARD // max(1, sample)))


def runs_of(ids: torch.Tensor, model: Skeleton, memory: int) -> tuple[torch.Tensor, ...]:
    """Samples, int64 (samples, length), in runs of a few.

    `UnsupportedError` if one sample alone is computed in more than `memory` bytes.
    """
    length, sizes = ids.shape[1], Sizes(model.config)
    one = activations([tuple(each.shape) for each in model.widest.parameters()], length, sizes.heads, sizes.active)
    if one > memory:
        raise UnsupportedError(
            f"a sample of {length} tokens takes up to {-(-one >> 20)} MiB in one block, and memory= leaves {memory >> 20} MiB "
            f"for it: give shorter samples (length=), or more memory"
        )
    return torch.split(ids, per_run(one))
