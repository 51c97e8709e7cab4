"""Tensor and expert parallelism: which part of each tensor a rank holds, from the model's `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Literal

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format import given
from modelstore.plan.layout_share import Combines, Config, Range, Share, Tensors, cut, whole
from modelstore.plan.layout_table import ARCHITECTURES, BESIDE, Architecture, Cut, Kind

Plan = Mapping[str, int | None]

_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.|[a-z_]+$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorParallel(Combines):
    """Rank `rank` of `size` tensor-parallel ranks.

    `plan` maps patterns of tensor names (`*` and `?`) to the axis to cut, or None to replicate, before the table is
    asked; the first that matches counts, and such an axis is cut at multiples of ceil(n / size). With a plan any
    architecture works, and what no pattern matches is then replicated if the architecture is unknown.

    `experts="parallel"` gives each rank whole experts instead of a slice of every expert.

    `ValueError` where a tensor cannot be cut in `size` (attention heads, features; the message says which sizes work),
    or where several ranks would each hold all of the model, because no tensor of it has a name that is cut,
    `UnsupportedError` for an architecture that is not in the table and no plan.
    """

    rank: int
    size: int
    plan: Plan | None = field(default=None, hash=False)
    experts: Literal["tensor", "parallel"] = "tensor"

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.size)
        if self.experts not in ("tensor", "parallel"):
            raise ValueError(f"experts={self.experts!r} is neither 'tensor' (cut each) nor 'parallel' (whole experts)")

    def shares(self, config: Config | None, tensors: Tensors) -> dict[str, Share]:
        """Every tensor, cut or whole; none is missing unless `experts="parallel"`."""
        rules = _Rules(config, self.plan)
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
            held[name] = cut(shape, axis, _ranges(name, shape[axis], rule.parts, self, rules))
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

    def shares(self, config: Config | None, tensors: Tensors) -> dict[str, Share]:  # noqa: ARG002
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


def axes(config: Config | None, plan: Plan | None = None) -> Callable[[str], int | None]:
    """The axis along which tensor parallelism would cut a tensor of that name; None where it is replicated.

    Resolved once, then a dictionary lookup a name. For an unknown architecture without a plan the answer is always
    None; an axis that comes from the plan is returned as it is given there.
    """
    rules = _Rules(config, plan, strict=False)

    def axis(name: str) -> int | None:
        rule = rules.find(name)
        return None if rule is None else rule.axis

    return axis


def tensor_parallel_axis(config: Config | None, name: str) -> int | None:
    """`axes(config)(name)`, for one name."""
    return axes(config)(name)


class _Rules:
    """Finds the cut of a tensor from its name. Names that differ in numbers only are looked up once."""

    def __init__(self, config: Config | None, plan: Plan | None, strict: bool = True) -> None:
        kind, architecture, inner = _architecture(config)
        if architecture is None and plan is None and strict:
            raise UnsupportedError(
                f"no tensor-parallel layout is known for model type {kind!r}: give plan={{pattern: axis}} to "
                f"TensorParallel, or Regions; known are {', '.join(ARCHITECTURES)}"
            )
        self.strict = strict
        self.cuts: Mapping[str, Cut] = architecture.cuts if architecture else {}
        self.heads: dict[Kind, int] = {}
        if architecture:
            query = _count(inner, ("num_attention_heads", "n_head", "n_heads", "num_heads")) or architecture.heads
            key = _count(inner, ("num_key_value_heads", "num_kv_heads")) or architecture.key_heads or query
            self.heads = {"query": query, "key": key}
        self.plan = [
            (re.compile(translate(pattern)), None if axis is None else Cut(axis, ("vocabulary",)))
            for pattern, axis in (plan or {}).items()
        ]
        self.found: dict[str, Cut | None] = {}

    def find(self, name: str) -> Cut | None:
        """The cut of that tensor, its axis being that of this tensor (a bias has one only); None: replicated."""
        for pattern, planned in self.plan:
            if pattern.match(name):
                return planned
        general = _NUMBER.sub("*", name)
        if general not in self.found:
            self.found[general] = self._look_up(general)
        return self.found[general]

    def _look_up(self, name: str) -> Cut | None:
        parts = name.split(".")
        if any(part in BESIDE for part in parts):
            return None
        module, parameter = (parts[:-1], parts[-1]) if parts[-1] in ("weight", "bias") else (parts, "")
        rule = self._longest(module)
        if rule is None and not parameter and self.strict and (above := self._longest(parts[:-1])):
            raise UnsupportedError(
                f"{name} belongs to a module that is cut along axis {above.axis}, and nothing is known of how "
                f"{parts[-1]!r} is cut with it: give plan={{{name!r}: axis}}, or None as the axis to replicate it",
                tensor=name,
            )
        if rule is None or parameter != "bias":
            return rule
        return Cut(0, rule.parts) if rule.bias else None

    def _longest(self, module: Sequence[str]) -> Cut | None:
        suffixes = (".".join(module[i:]) for i in range(len(module)))
        return next((self.cuts[suffix] for suffix in suffixes if suffix in self.cuts), None)


def _architecture(config: Config | None) -> tuple[str | None, Architecture | None, Config]:
    """(model type, its entry or None, the config of the language model, which is nested in a multimodal one)."""
    if config is None:
        return None, None, {}
    kind = config.get("model_type")
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return kind, ARCHITECTURES.get(str(kind)), config
    known = ARCHITECTURES.get(str(inner.get("model_type"))) or ARCHITECTURES.get(str(kind))
    return kind, known, inner


def _count(config: Config, keys: Sequence[str]) -> int | None:
    """The first of those entries that the config has, as a positive number."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"config.json has {key} = {value!r}: expected a positive whole number")
        return value
    return None


def _ranges(name: str, length: int, parts: Sequence[Kind], layout: TensorParallel, rules: _Rules) -> list[Range]:
    """The ranges of an axis that a rank holds; each part is cut by itself, in units that stay whole."""
    if parts == ("vocabulary",):
        step = -(-length // layout.size)
        return [(min(layout.rank * step, length), min((layout.rank + 1) * step, length))]
    if length == 0:
        return [(0, 0)]
    if len(parts) == 1:
        units = {parts[0]: {"even": length, "pair": length // 2}.get(parts[0]) or rules.heads.get(parts[0], length)}
    elif "even" in parts:
        units = {"even": length // len(parts)}
    else:
        units = {part: rules.heads[part] for part in parts}
    total = sum(units[part] for part in parts)
    if total == 0 or length % total:
        raise ValueError(
            f"{name} has {length} elements along the axis that is cut, which is no multiple of the {total} "
            f"{'heads' if 'query' in parts or 'key' in parts else 'features'} expected there: check config.json"
        )
    width = length // total  # elements of one unit
    ranges, at = [], 0
    for part in parts:
        start, stop = _units(name, part, units[part], layout, rules)
        ranges.append((at + start * width, at + stop * width))
        at += units[part] * width
    return ranges


def _units(name: str, part: Kind, count: int, layout: TensorParallel, rules: _Rules) -> Range:
    """Which of `count` units of a part a rank holds: as many to each, or one where heads of k and v are repeated."""
    rank, size = layout.rank, layout.size
    if count % size == 0:
        return rank * (count // size), (rank + 1) * (count // size)
    if part == "key" and size % count == 0:
        head = rank * count // size
        return head, head + 1
    works = [n for n in range(1, min(count, 4096) + 1) if count % n == 0]
    if part in ("query", "key"):  # one size has to do for both
        query, key = rules.heads["query"], rules.heads["key"]
        works = [n for n in range(1, min(query, 4096) + 1) if query % n == 0 and (key % n == 0 or n % key == 0)]
    unit = {"query": "attention heads", "key": "key/value heads"}.get(part, "features")
    raise ValueError(
        f"{name} has {count} {unit}, which do not divide over {size} ranks; sizes that work are "
        f"{', '.join(map(str, works[:12]))}{', …' if len(works) > 12 else ''}"
    )


def _balanced(count: int, rank: int, size: int) -> Range:
    """`count` things in order over `size` ranks, the first ranks taking one more where they do not divide."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def _check_rank(rank: int, size: int) -> None:
    given.whole("rank", rank)
    given.whole("size", size)
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank {rank} of size {size}: a rank is at least 0 and below the size")
