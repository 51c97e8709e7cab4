"""Which neurons and heads of each layer a model misses least, and the weights behind them, solved again for those that stay.

A layer's neurons, or heads, are what one of its weights reads. The output of such a weight for each of them, over the samples,
is its importance. The weight of those that stay is solved again by least squares, so that it gives what it gave, as far as
they tell: W H[:, kept] H[kept, kept]⁻¹, where H is the sum of outer products of what the weight reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modelstore.calibrate.layers import Linear, linears
from modelstore.calibrate.statistics import Gathered, Inputs
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.memory import trim
from modelstore.execute.spool import Spool
from modelstore.format.objects.manifest import Tensor
from modelstore.format.progress import Advance
from modelstore.restructure.choose import best
from modelstore.restructure.cut import Along, KeptParts, Structure, positions
from modelstore.restructure.solved import SolvedWeights

_DAMP = 0.01  # of the mean diagonal, added to it
_SUMS = 16  # bytes of sums and factors for each pair of columns


@dataclass
class Widths:
    """Layers that are made narrower, one after the other, each on what those before it give once they are.

    `neurons` and `groups`: how many each layer keeps, None for all. `correct`: whether the weights behind them are solved again.
    """

    stages: Stages
    structure: Structure
    runs: Sequence[torch.Tensor]
    memory: int
    neurons: int | None
    groups: int | None
    correct: bool
    solved: SolvedWeights
    advance: Advance | None = None  # hears of blocks as they have run
    _kept: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=lambda: {"even": {}, "query": {}})

    def run(self, layers: Sequence[int]) -> KeptParts:
        """The kept parts of these layers."""
        before = self.stages.entries(self.runs, self.memory // 2)
        try:
            for layer in layers:
                stored = self.stages.stored(layer)
                for part, count in (("query", self.groups), ("even", self.neurons)):
                    if count is not None:
                        self._narrow(layer, part, count, stored, before)
                values = self.stages.values(layer, stored)
                before = self.stages.pass_on(layer, values, self.runs, before, self.memory // 2)
                if self.advance is not None:
                    self.advance(1)
        finally:
            before.close()
        return KeptParts(tuple(layers), self._kept["even"], self._kept["query"])

    def _narrow(self, layer: int, part: str, count: int, stored: dict[str, torch.Tensor], before: Spool) -> None:
        """Choose what stays of a layer; in `stored` the weight that reads it becomes what it is then, 0 elsewhere."""
        values = self.stages.values(layer, stored)
        tensor, at, linear = self._reader(layer, part)
        sums = self._sums(layer, linear, values, before)
        weight = stored[tensor.name].float()
        rows = weight.T if linear.across else weight
        share = self.structure.groups()[1] if part == "query" else 1
        kept = best(_importance(rows, sums, at, share), count)
        self._kept[part][layer] = kept
        index = torch.from_numpy(positions(at, kept, share))
        fresh = _solved(rows, sums, index) if self.correct else rows[:, index]
        whole = torch.zeros_like(rows)
        whole[:, index] = fresh
        dtype = stored[tensor.name].dtype
        stored[tensor.name] = (whole.T if linear.across else whole).to(dtype).contiguous()
        if self.correct:
            self.solved.put(tensor, (fresh.T if linear.across else fresh).to(dtype))
        del sums
        trim()

    def _reader(self, layer: int, part: str) -> tuple[Tensor, Along, Linear]:
        """The one weight of a layer that reads what is narrowed. `UnsupportedError` if there is not one."""
        about = {one.name: at for one in self.structure.tensors(layer) if (at := self.structure.along(one)) is not None}
        wanted = [name for name, at in about.items() if at.parts == (part,)]
        manifest = self.structure.manifest
        found = [
            one
            for one in linears(self.stages, manifest, layer, wanted).values()
            if about[one.tensor].axis == (0 if one.across else 1)
        ]
        if len(found) != 1:
            what = "neurons" if part == "even" else "heads"
            raise UnsupportedError(f"layer {layer} has {len(found)} weights that read its {what}, and one is cut")
        return manifest.by_name[found[0].tensor], about[found[0].tensor], found[0]

    def _sums(self, layer: int, linear: Linear, values: Mapping[str, torch.Tensor], before: Spool) -> torch.Tensor:
        """The sum of outer products of what a weight reads (columns, columns): float64 up to 4,096 columns, else float32."""
        gathered = Gathered(Inputs)
        gathered.run(self.stages.skeleton, layer, {linear.parameter: linear}, values, self.runs, before)
        read = gathered.read_by(linear.parameter)
        assert read is not None, "the block has run"
        return read.taken()


def _importance(rows: torch.Tensor, sums: torch.Tensor, at: Along, share: int) -> list[float]:
    """For each unit, the squared norm of the weight's output for it; rows: (outputs, inputs), sums: (inputs, inputs).

    share: units that are kept or left together, such as query heads of one key/value head.
    """
    width = at.width[0] * share
    found = []
    for first in range(0, rows.shape[1], width):
        mine = rows[:, first : first + width].double()
        inner = sums[first : first + width, first : first + width].double()
        found.append(float(((mine @ inner) * mine).sum()))
    return found


def _solved(rows: torch.Tensor, sums: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The weights of the kept inputs by which the outputs are nearest to those of all, float32 (outputs, kept)."""
    left = sums[index][:, index]
    mean = float(left.diagonal().mean())
    left.diagonal().add_(_DAMP * mean if mean > 0 else 1.0)
    wanted = rows.to(sums.dtype) @ sums[:, index]
    found: torch.Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(left))
    return found.T.float()


def room(columns: int) -> int:
    """Bytes that measuring takes for a weight with so many columns: sums of outer products, and a factor of those that stay."""
    return _SUMS * columns**2
