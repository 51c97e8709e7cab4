"""A stored model that is run block by block: the weights of one stage are read, used and let go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelstore.architecture.classes.names import parameters, values
from modelstore.compress.built import built_of
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.execute.read.unsaved import made_again
from modelstore.execute.spool import Spool
from modelstore.plan.work import Limits, Work

if TYPE_CHECKING:
    import torch


class Stages:
    """A variant's blocks, its embedding before the first and its head behind the last, as float32.

    `UnsupportedError` if its architecture cannot be run so, `FormatError` if tensors that it needs are missing.
    """

    def __init__(self, model: Variant, class_name: str, limits: Limits) -> None:
        from modelstore.architecture.classes.skeleton import Skeleton

        self._model, self._limits = model, limits
        self.built = built_of(model, class_name)
        self.skeleton = Skeleton(self.built.model.eval())
        self.names = parameters(self.built, model.manifest.by_name)
        try:
            made = made_again(self.built.model, strict=True)
        except ValueError as error:
            raise UnsupportedError(f"a {class_name} cannot be run block by block: {error}") from None
        self._buffers = {buffer.name: value for buffer, value in made.items()}

    def read_only(self, batches: Sequence[torch.Tensor]) -> None:
        """From now on the embedding is placed with the rows of these tokens alone: as float32 it is large beside a block."""
        import torch

        self.skeleton.rows = torch.unique(torch.cat([one.reshape(-1) for one in batches])) if batches else None

    def stored(self, stage: int, instead: Reader | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors that make what a stage computes with: its block's parameters and those around the blocks.

        `instead`: what gives those that it has.
        """
        sources = [name for one in self.names.of(self.skeleton.needs(stage)) for name in one.sources]
        about = self._model.manifest.by_name
        other = {one for one in sources if instead is not None and about[one].name in instead.manifest.by_name}
        found = self._load(self._model, [one for one in sources if one not in other])
        if instead is not None:
            replaced = self._load(self._model.read_by(instead), sorted({about[one].name for one in other}))
            found |= {one: replaced[about[one].name] for one in other}
        return found

    def _load(self, model: Variant, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return model.load(model.shares(None, names), Work(self._limits)) if names else {}

    def values(self, stage: int, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values that a stage computes with, made of `stored`, or of their replacements."""
        import torch

        needed = self.skeleton.needs(stage)
        found = dict(self._buffers)
        table, rows = self.skeleton.table, self.skeleton.rows
        made = self.names.made.get(self.names.tied.get(table, table))
        cut = made if stage == 0 and rows is not None and made is not None and made.patterns == ("",) else None
        for one in self.names.of(needed):
            if one is cut and rows is not None:
                found[table] = stored[one.sources[0]][rows].to(torch.float32)
            else:
                found |= values(self.built, one, stored.__getitem__, torch.float32)
        tied = {name: of for name, of in self.names.tied.items() if name in needed and name not in found}
        return found | {name: found[of] for name, of in tied.items()}

    def entries(self, batches: Sequence[torch.Tensor], memory: int) -> Spool:
        """The input of the first block for batches of tokens, in up to `memory` bytes."""
        found = Spool(memory)
        with self.skeleton.entry(self.values(0, self.stored(0))) as run:
            for ids in batches:
                found.append(run(ids))
        return found

    def pass_on(
        self,
        stage: int,
        values: Mapping[str, torch.Tensor],
        batches: Sequence[torch.Tensor],
        before: Spool,
        memory: int,
    ) -> Spool:
        """The output of a stage for batches of tokens, from the output of the stage before, which is released; in up to
        `memory` bytes.
        """
        after = Spool(memory)
        with self.skeleton.at(stage, values) as run:
            for at, ids in enumerate(batches):
                after.append(run(ids, before[at] if stage else None))
        before.close()
        return after
