"""Calibrates a model block by block: statistics, codes, and what the block gives with them, on which the next one is solved.

One block is in memory at a time, with the sums of its inputs; what it gives for the samples waits in a spool. A block that an
earlier run finished is not solved again: it is read as it is stored, and run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from modelstore.calibrate.block import Asked, Solving
from modelstore.calibrate.layers import Linears, as_stored, decoded, differing
from modelstore.calibrate.methods import Solution, raw_of
from modelstore.calibrate.shards import runs_of
from modelstore.calibrate.text import Samples
from modelstore.compress.calibrated import Begun, Write
from modelstore.compress.plan import weight_codec
from modelstore.execute.memory import trim
from modelstore.execute.read.tensors import bytes_of
from modelstore.execute.spool import Spool
from modelstore.execute.write.encoding import Encoder, Input
from modelstore.execute.write.packs import Written
from modelstore.format import boxes
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import full

_STACKED = "transformers changes it where it is stacked with others"


@dataclass
class Calibrated:
    """A model's blocks, solved in their order, of what is asked; `memory`: bytes for what blocks hand on.

    `notes`, once it has run: why tensors among them were made of their weights alone, by name; `folded`: what was divided by
    factors, and what was multiplied by them.
    """

    asked: Asked
    samples: Samples
    shards: Sequence[torch.Tensor]
    memory: int
    notes: dict[str, str] = field(default_factory=dict)
    folded: dict[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: Asked, samples: Samples, memory: int) -> Calibrated:
        """On samples of a text, in `memory` bytes. `UnsupportedError` if one sample alone takes more than a quarter."""
        skeleton = asked.stages.skeleton
        return cls(asked, samples, runs_of(samples.ids, skeleton, memory // 4), memory // 4)

    @property
    def recorded(self) -> dict[str, Any]:
        """A manifest's entry on the data."""
        return self.samples.recorded

    @cached_property
    def gains(self) -> Sequence[str]:
        """Gains of norms, which may be folded into what comes behind."""
        return self.asked.gains()

    def run(self, items: Sequence[Input], write: Write, begun: Begun) -> dict[str, Written]:
        """Write items, the ones to solve with their codes. The order is that of the model."""
        left = {item.plan.name: item for item in items}
        written: dict[str, Written] = {}
        before = Spool(0)
        self.asked.stages.read_only(self.shards)
        layers = self.asked.layers()

        def keep(solved: Mapping[str, Solution], meant: Mapping[str, torch.Tensor]) -> None:
            names = [*solved, *(name for name in meant if name not in solved)]
            fresh = [_fresh(left[name], solved.get(name), meant.get(name)) for name in names if name in left]
            written.update(write(fresh) if fresh else {})

        try:
            for block, mine in enumerate(layers):
                done = _finished(begun, block)
                if done is not None:
                    self.notes |= done["notes"]
                    self.folded |= done["folded"]
                    before = self._pass_on(block, before, self._read(block, begun))
                else:
                    before = self._solve(block, mine, before, keep, begun.note)
        finally:
            before.close()
        kept = {*written, *self.gains}
        rest = [item for name, item in left.items() if name not in kept]
        self.notes = self.asked.no_layers(layers) | self.notes
        return written | (write(rest) if rest else {})

    def _solve(
        self,
        block: int,
        layers: Linears,
        before: Spool,
        keep: Callable[[Mapping[str, Solution], Mapping[str, torch.Tensor]], None],
        note: Callable[[str, Any], None],
    ) -> Spool:
        """Solve a block, have that kept and noted, and give what the block as it is stored makes of the samples."""
        stages = self.asked.stages
        stored = stages.stored(block)
        given = Spool(self.memory // 4)
        values = stages.values(block, stored)
        strange = {layers[name].tensor: _STACKED for name in differing(layers, values, stored)}
        layers = {name: layer for name, layer in layers.items() if layer.tensor not in strange}
        solving = Solving(self.asked, block, layers, values, self.shards, before, self.memory, strange)
        del values
        trim()
        try:
            solved = solving.solve(given)
        finally:
            given.close()
        notes, folded, meant = solving.notes, solving.folded, solving.meant
        del solving  # the block's values are made again, as they are stored
        self.notes |= notes
        self.folded |= folded
        keep(solved, meant)
        there = sorted({*solved, *meant})
        note(_page(block), {"solved": there, "notes": notes, "folded": folded})
        meant = {name: one for name, one in meant.items() if name not in solved}
        made = {}
        for name in list(stored):  # one after the other is let go of
            made[name] = self._as_stored(name, stored.pop(name), solved, meant)
        del solved
        trim()
        return self._pass_on(block, before, made)

    def _read(self, block: int, begun: Begun) -> dict[str, torch.Tensor]:
        """The tensors of a finished block as the variant reads them; those that were not solved are made again from their
        weights.
        """
        stored = self.asked.stages.stored(block, begun.reader)
        there = begun.reader.manifest.by_name
        return {
            name: tensor if self.asked.manifest.by_name[name].name in there else self._as_stored(name, tensor, {}, {})
            for name, tensor in stored.items()
        }

    def _pass_on(self, block: int, before: Spool, made: Mapping[str, torch.Tensor]) -> Spool:
        """The output of a block of these tensors for the samples; its input is released."""
        stages = self.asked.stages
        return stages.pass_on(block, stages.values(block, made), self.shards, before, self.memory // 2)

    def _as_stored(
        self,
        name: str,
        tensor: torch.Tensor,
        solved: Mapping[str, Solution],
        meant: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """How a tensor of the block will read in the variant; `meant`: what is stored exactly in place of the original's."""
        about = self.asked.manifest.by_name[name]
        if about.name in meant:
            return meant[about.name].to(tensor.dtype)
        if about.name not in self.asked.specs:
            return tensor
        codec = weight_codec(self.asked.specs[about.name])
        one = solved.get(about.name)
        if one is None:
            return as_stored(codec, tensor, about)
        raw = bytes_of(tensor.contiguous())
        assert raw is not None, "it is the weight of a layer"
        return decoded(codec, one.encode(raw, full(about.shape)), about)


def _page(block: int) -> str:
    """By what name it is noted that a block is finished."""
    return f"block {block}"


def _finished(begun: Begun, block: int) -> dict[str, Any] | None:
    """The notes on a block from when it was finished; None if it was not, or if a solved tensor is gone."""
    page = begun.notes.get(_page(block))
    if page is None or not set(page["solved"]) <= set(begun.written):
        return None
    found: dict[str, Any] = page
    return found


def _fresh(item: Input, solved: Solution | None, meant: torch.Tensor | None) -> Input:
    """The written form of a tensor that was solved, of other values than the original's, or both."""
    encoder = _encoder(solved) if solved is not None else None
    if meant is None:
        return replace(item, encoder=encoder)
    raw, plan = raw_of(meant, DTYPES[item.plan.dtype]), item.plan
    return replace(item, encoder=encoder, instead=lambda region: boxes.cut(raw, plan.shape, plan.itemsize, region))


def _encoder(solved: Solution) -> Encoder:
    """How regions of a weight are encoded that was solved."""
    return lambda part, raw: solved.encode  # noqa: ARG005  a part adds nothing to what is known
