"""Predictions of a model that is never whole in memory: block after block, all windows through each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from modelstore.compress.stages import Stages
from modelstore.execute.spool import Spool

if TYPE_CHECKING:
    import torch


class Streamed:
    """A model's logits, computed with one block in memory at a time; the same bits as those of the whole model.

    The outputs of blocks take up to `memory` bytes of memory, and beyond them a temporary file.
    """

    def __init__(self, stages: Stages, memory: int) -> None:
        self._stages, self._memory = stages, memory

    def logits(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """For each batch of tokens (windows, tokens), its logits (windows, tokens, vocabulary)."""
        skeleton, before = self._stages.skeleton, Spool(0)
        self._stages.read_only(batches)
        try:
            for stage in range(skeleton.count):
                # Two spools are there at a time.
                before = self._stages.pass_on(stage, self._values(stage), batches, before, self._memory // 2)
            with skeleton.at(skeleton.count, self._values(skeleton.count)) as run:
                for at, ids in enumerate(batches):
                    yield run(ids, before[at])
        finally:
            before.close()

    def _values(self, stage: int) -> dict[str, torch.Tensor]:
        return self._stages.values(stage, self._stages.stored(stage))
