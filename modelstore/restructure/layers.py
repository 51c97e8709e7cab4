"""Which layers a model misses least, measured on samples of a text.

By divergence, one layer after the other is left out: that without which the predictions stay nearest to the original's. All
candidates of a round run beside each other, block by block, so that a round reads the weights once. By influence
(ShortGPT, 2403.03853), those go whose output is most like their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from modelstore.compress.evaluate.score import divergence, log_probabilities
from modelstore.compress.stages import Stages
from modelstore.execute.spool import Spool
from modelstore.format.progress import Advance

MOST_LAYERS = 48  # up to which layers are compared by divergence where nothing is said
_ALL = -1  # names the stream that leaves nothing out


@dataclass(frozen=True)
class Dropped:
    """A layer that is left out, and what the model without it, and without those before, loses.

    `loss`: the divergence from the original in nats a token, or the influence, 1 - the mean cosine of input and output.
    """

    layer: int
    loss: float


@dataclass(frozen=True)
class LayerLosses:
    """A model that is run block by block over samples in runs; `memory`: bytes for what blocks hand on."""

    stages: Stages
    runs: Sequence[torch.Tensor]
    memory: int
    advance: Advance | None = None  # hears of blocks as they have run

    def by_divergence(self, count: int) -> list[Dropped]:
        """The layers to leave out so that `count` stay, in the order in which they go."""
        kept = list(range(self.stages.skeleton.count))
        dropped: list[Dropped] = []
        with ExitStack() as held:
            original: Spool | None = None
            while len(kept) > count:
                ends = self._ends(kept)
                try:
                    if original is None:
                        original = ends.pop(_ALL)
                        held.callback(original.close)
                    losses = self._losses(original, {layer: ends[layer] for layer in kept})
                finally:
                    for spool in ends.values():
                        spool.close()
                layer = min(kept, key=lambda one: (losses[one], one))
                kept.remove(layer)
                dropped.append(Dropped(layer, losses[layer]))
        return dropped

    def by_influence(self, count: int) -> list[Dropped]:
        """The same, by how much each layer changes what comes to it, measured once."""
        skeleton = self.stages.skeleton
        found: list[Dropped] = []
        before = self.stages.entries(self.runs, self.memory // 2)
        for stage in range(skeleton.count):
            after, alike, tokens = Spool(self.memory // 2), 0.0, 0
            with skeleton.at(stage, self._values(stage)) as run:
                for at, ids in enumerate(self.runs):
                    given = before[at]
                    made = run(ids, given)
                    after.append(made)
                    alike += float(torch.cosine_similarity(given.double(), made.double(), dim=-1).sum())
                    tokens += ids.numel()
            before.close()
            before = after
            found.append(Dropped(stage, 1 - alike / tokens))
            self._advance()
        before.close()
        return sorted(found, key=lambda one: (one.loss, one.layer))[: skeleton.count - count]

    def _advance(self) -> None:
        if self.advance is not None:
            self.advance(1)

    def _values(self, stage: int) -> dict[str, torch.Tensor]:
        return self.stages.values(stage, self.stages.stored(stage))

    def _ends(self, kept: Sequence[int]) -> dict[int, Spool]:
        """The output of the last kept block, with all these blocks (`_ALL`), and without each one of them."""
        each = self.memory // (2 * (len(kept) + 2))
        streams = {_ALL: self.stages.entries(self.runs, self.memory // 2)}
        for stage in kept:
            after: dict[int, Spool] = {}
            with self.stages.skeleton.at(stage, self._values(stage)) as run:
                for name, before in streams.items():
                    after[name] = Spool(each)
                    for at, ids in enumerate(self.runs):
                        after[name].append(run(ids, before[at]))
            for name, before in streams.items():
                if name != _ALL:
                    before.close()
            after[stage] = streams[_ALL]  # what comes to this block is what the next one is given without it
            streams = after
            self._advance()
        return streams

    def _losses(self, original: Spool, ends: dict[int, Spool]) -> dict[int, float]:
        """The divergence of each end from the original's predictions, in nats a token."""
        skeleton = self.stages.skeleton
        sums, tokens = dict.fromkeys(ends, 0.0), 0
        with skeleton.at(skeleton.count, self._values(skeleton.count)) as run:
            for at, ids in enumerate(self.runs):
                for window in range(len(ids)):  # one after the other: their logits are large
                    one = slice(window, window + 1)
                    known = log_probabilities(run(ids[one], original[at][one]))
                    tokens += len(known)
                    for name, spool in ends.items():
                        there = log_probabilities(run(ids[one], spool[at][one]))
                        sums[name] += float(divergence(known, there).sum())
        return {name: total / tokens for name, total in sums.items()}
