"""Tensor and expert parallelism: which part of each tensor a rank holds, from the model's `config.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from modelstore.architecture.config import Config
from modelstore.architecture.described import look
from modelstore.architecture.ranks.parallel import AxisPlan, Cuts, in_table
from modelstore.architecture.ranks.parallel_table import AxisCut, Cut
from modelstore.format import given
from modelstore.format.objects.architecture import Architecture
from modelstore.plan.layout_share import AxisRange, Combines, Shapes, Share, cut, whole

_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.|[a-z_]+$)")


@dataclass(frozen=True)
class TensorParallel(Combines):
    """Rank `rank` of `size` tensor-parallel ranks.

    `plan` maps patterns of tensor names (`*` and `?`) to the axis to cut, or None to replicate, before the table is
    asked; the first that matches counts, and such an axis is cut at multiples of ceil(n / size). With a plan any
    architecture works, and what no pattern matches is then replicated if the architecture is unknown.

    `experts="parallel"` gives each rank whole experts instead of a slice of every expert.

    `ValueError` if a tensor cannot be cut in `size` (attention heads, features; the message says which sizes work),
    or where several ranks would each hold all of the model, because no tensor of it has a name that is cut,
    `UnsupportedError` without a plan for an architecture of which neither the table, nor the model's manifest, nor
    transformers where it is installed, says how it is cut.
    """

    rank: int
    size: int
    plan: AxisPlan | None = field(default=None, hash=False)
    experts: Literal["tensor", "parallel"] = "tensor"

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.size)
        if self.experts not in ("tensor", "parallel"):
            raise ValueError(f"experts={self.experts!r} is neither 'tensor' (cut each) nor 'parallel' (whole experts)")

    def shares(self, config: Config | None, tensors: Shapes, known: Architecture | None = None) -> dict[str, Share]:
        """Every tensor, cut or whole; none is missing unless `experts="parallel"`."""
        if known is None and self.plan is None and config is not None and not in_table(config):
            known = look(config, tensors)
        rules = Cuts(config, self.plan, known)
        experts = ExpertParallel(self.rank, self.size).shares(config, tensors) if self.experts == "parallel" else {}
        held: dict[str, Share] = {}
        cuts = 0
        for name, shape in tensors.items():
            if self.experts == "parallel" and _EXPERT.search(name):
                if name in experts:
                    held[name] = experts[name]
                continue
            rule = rules.find(name)
            if rule is None:
                held[name] = whole(shape)
                continue
            if rule.axis >= len(shape) or rule.axis < -len(shape):
                raise ValueError(f"{name} has shape {shape}: it has no axis {rule.axis} to cut")
            axis = rule.axis % len(shape)
            held[name] = cut(shape, axis, _ranges(name, shape[axis], rule, self, rules))
            cuts += 1
        replicated = any(axis is None for axis in (self.plan or {}).values())  # which was asked for
        if self.size > 1 and held and not cuts and not replicated and not experts:
            raise ValueError(
                f"no tensor of the model is cut, so each of {self.size} ranks would hold all of it: give "
                f"plan={{pattern: axis}} with its tensors' names, Regions, or no tensor parallelism"
            )
        return held


@dataclass(frozen=True)
class ExpertParallel(Combines):
    """Rank `rank` of `size` expert-parallel ranks: whole experts are divided, everything else is replicated.

    Experts stay in order; where they do not divide evenly the first ranks hold one more. Works for every architecture
    that names its experts `….experts.<n>.…`, or stacks them along axis 0 of `….experts.<parameter>`. `ValueError` for
    a model without experts, of which each of several ranks would hold all.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.size)

    def shares(
        self,
        config: Config | None,  # noqa: ARG002
        tensors: Shapes,
        known: Architecture | None = None,  # noqa: ARG002
    ) -> dict[str, Share]:
        """Every tensor but those of other ranks' experts."""
        if self.size > 1 and tensors and not any(map(_EXPERT.search, tensors)):
            raise ValueError(
                f"the model has no experts, so each of {self.size} ranks would hold all of it: leave expert parallelism out"
            )
        single: dict[str, tuple[str, int]] = {}  # name → (its block of experts, its number there)
        count: dict[str, int] = {}
        for name in tensors:
            if (found := _EXPERT.search(name)) and found[1]:
                block = name[: found.start()]
                single[name] = (block, int(found[1]))
                count[block] = max(count.get(block, 0), int(found[1]) + 1)
        held = {}
        for name, shape in tensors.items():
            if name in single:
                block, number = single[name]
                start, stop = _balanced(count[block], self.rank, self.size)
                if start <= number < stop:
                    held[name] = whole(shape)
            elif _EXPERT.search(name) and shape:
                held[name] = cut(shape, 0, [_balanced(shape[0], self.rank, self.size)])
            else:
                held[name] = whole(shape)
        return held


def _ranges(name: str, length: int, rule: AxisCut, layout: TensorParallel, rules: Cuts) -> list[AxisRange]:
    """The ranges of an axis that a rank holds; each part is cut by itself, in units that stay whole."""
    if rule.parts == ("vocabulary",):
        step = -(-length // layout.size)
        return [(min(layout.rank * step, length), min((layout.rank + 1) * step, length))]
    if length == 0:
        return [(0, 0)]
    units = rule.units or _units_of(length, rule.parts, rules)
    total = sum(units)
    if total == 0 or length % total:
        raise ValueError(
            f"{name} has {length} elements along the axis that is cut, which is not a multiple of the {total} "
            f"{'heads' if 'query' in rule.parts or 'key' in rule.parts else 'features'} expected there: check config.json"
        )
    width = length // total  # elements of one unit
    ranges, at = [], 0
    for part, count in zip(rule.parts, units, strict=True):
        start, stop = _held_of(name, part, count, layout, rules)
        ranges.append((at + start * width, at + stop * width))
        at += count * width
    return ranges


def _units_of(length: int, parts: Sequence[Cut], rules: Cuts) -> Sequence[int]:
    """How many units each part along an axis of that length has: heads as the config says, features as they are."""
    if len(parts) == 1:
        return [{"even": length, "pair": length // 2}.get(parts[0]) or rules.heads.get(parts[0], length)]
    if "even" in parts:
        return [length // len(parts)] * len(parts)
    return [rules.heads[part] for part in parts]


def _held_of(name: str, part: Cut, count: int, layout: TensorParallel, rules: Cuts) -> AxisRange:
    """Which of `count` units of a part a rank holds: as many to each, or one where heads of k and v are repeated."""
    rank, size = layout.rank, layout.size
    if count % size == 0:
        return rank * (count // size), (rank + 1) * (count // size)
    if part == "key" and size % count == 0:
        head = rank * count // size
        return head, head + 1
    works = [n for n in range(1, min(count, 4096) + 1) if count % n == 0]
    if part in ("query", "key") and rules.heads:  # one size has to do for both
        query, key = rules.heads["query"], rules.heads["key"]
        works = [n for n in range(1, min(query, 4096) + 1) if query % n == 0 and (key % n == 0 or n % key == 0)]
    unit = {"query": "attention heads", "key": "key/value heads"}.get(part, "features")
    raise ValueError(
        f"{name} has {count} {unit}, which do not divide over {size} ranks; sizes that work are "
        f"{', '.join(map(str, works[:12]))}{', …' if len(works) > 12 else ''}"
    )


def _balanced(count: int, rank: int, size: int) -> AxisRange:
    """`count` things in order over `size` ranks, the first ranks taking one more where they do not divide."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def _check_rank(rank: int, size: int) -> None:
    given.whole("rank", rank)
    given.whole("size", size)
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank {rank} of size {size}: a rank is at least 0 and below the size")
