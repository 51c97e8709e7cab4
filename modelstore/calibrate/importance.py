"""How much each column of a model's linear layers is used on a text: what other tools weigh their own rounding by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from modelstore.calibrate.layers import linears
from modelstore.calibrate.shards import runs_of
from modelstore.calibrate.statistics import ColumnSquares, Gathered
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.spool import Spool
from modelstore.format.objects.manifest import Manifest


class ColumnImportance(NamedTuple):
    """The sum of the squares of each column of a layer's inputs, float32 (columns), over so many tokens.

    `tensor` is the stored weight of the layer.
    """

    tensor: str
    squares: torch.Tensor
    tokens: int


def importance(stages: Stages, manifest: Manifest, ids: torch.Tensor, memory: int) -> Iterator[ColumnImportance]:
    """Each linear layer's, block by block, for samples of tokens, int64 (samples, length); in up to `memory` bytes.

    Every block reads what the original gives. `UnsupportedError` if one sample takes more than a quarter of the memory, or
    where nothing came to a layer, such as an expert that no token was sent to.
    """
    shards = runs_of(ids, stages.skeleton, memory // 4)
    stages.read_only(shards)
    before = after = Spool(0)
    try:
        for block in range(stages.skeleton.count):
            after = Spool(memory // 4)
            yield from _of_block(stages, manifest, block, shards, before, after)
            before.close()
            before = after
    finally:
        before.close()
        after.close()


def _of_block(
    stages: Stages, manifest: Manifest, block: int, shards: Sequence[torch.Tensor], before: Spool, after: Spool
) -> Iterator[ColumnImportance]:
    """Those of one block; `after` gets the output of the block."""
    layers = linears(stages, manifest, block, manifest.by_name)
    values = stages.values(block, stages.stored(block))
    gathered = Gathered(ColumnSquares)
    gathered.run(stages.skeleton, block, layers, values, shards, before, after)
    for name, layer in layers.items():
        found = gathered.read_by(name)
        if found is None or found.sums is None:
            raise UnsupportedError(
                f"no token of the text came to {layer.tensor!r}, so nothing is known of its columns: give more samples",
                tensor=layer.tensor,
            )
        yield ColumnImportance(layer.tensor, found.sums.float(), found.count)
