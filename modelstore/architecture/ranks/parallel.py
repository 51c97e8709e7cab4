"""How ranks slice a model: along which axis each tensor is cut for tensor parallelism, and the parts along it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate

from modelstore.architecture.config import Config, count, language, model_type, type_told
from modelstore.architecture.ranks.parallel_table import BESIDE, FAMILIES, KINDS, AxisCut, Cut, ParallelPlan
from modelstore.errors import UnsupportedError
from modelstore.format.objects.architecture import Architecture, Sliced, find

AxisPlan = Mapping[str, int | None]

_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def axes(
    config: Config | None, plan: AxisPlan | None = None, known: Architecture | None = None
) -> Callable[[str], int | None]:
    """The axis along which tensor parallelism would cut a tensor of that name; None if it is replicated.

    Resolved once, then a dictionary lookup a name. For an unknown architecture without a plan the answer is always
    None; an axis that comes from the plan is returned as it is given there.
    """
    rules = Cuts(config, plan, known, strict=False)

    def axis(name: str) -> int | None:
        rule = rules.find(name)
        return None if rule is None else rule.axis

    return axis


def in_table(config: Config | None) -> bool:
    """Whether the table has the architecture, so that nobody else needs to be asked."""
    return _family(config)[0] is not None


def key_heads(config: Config, heads: int, kind: str) -> int:
    """How many heads keys have, and values, in a model of type `kind` whose queries have `heads`.

    The number is that of the config. If it has no such entry, it is that of the model type. An entry that is null means
    `heads`, as in transformers: a SmolLM3 without the entry has 4, one whose entry is null has 16.
    """
    found = count(config, *_KEY_HEADS)
    if found is None and not any(key in config for key in _KEY_HEADS) and (family := FAMILIES.get(kind)):
        found = family.key_heads
    return found or heads


class Cuts:
    """Finds the cut of a tensor from its name. Names that differ in numbers only are looked up once.

    The user's plan counts first, then the table, then what is `known` of the model.
    """

    def __init__(
        self, config: Config | None, plan: AxisPlan | None, known: Architecture | None = None, strict: bool = True
    ) -> None:
        family, inner = _family(config)
        self.slices = known.slices if known and family is None else None
        if family is None and self.slices is None and plan is None and strict:
            said = (
                "the model has no config.json that can be read"
                if config is None
                else f"config.json has {type_told(config)}"
            )
            raise UnsupportedError(
                f"no tensor-parallel layout is known: {said}, of which neither this package knows one nor transformers (where it "
                f"is installed): give plan={{pattern: axis}} to TensorParallel, or Regions; known are {', '.join(FAMILIES)}"
            )
        self.strict = strict
        self.cuts: Mapping[str, AxisCut] = family.cuts if family else {}
        self.heads: dict[Cut, int] = {}
        if family and config is not None:
            query = _heads(inner) or family.heads
            self.heads = {"query": query, "key": key_heads(inner, query, _known_type(config, inner))}
        self.plan = [
            (re.compile(translate(pattern)), None if axis is None else AxisCut(axis, ("vocabulary",)))
            for pattern, axis in (plan or {}).items()
        ]
        self.found: dict[str, AxisCut | None] = {}

    def find(self, name: str) -> AxisCut | None:
        """The cut of that tensor, its axis being that of this tensor (a bias has one only); None: replicated."""
        for pattern, planned in self.plan:
            if pattern.match(name):
                return planned
        if self.slices is not None:
            return self._sliced(name, self.slices)
        general = _NUMBER.sub("*", name)
        if general not in self.found:
            self.found[general] = self._look_up(general)
        return self.found[general]

    def _sliced(self, name: str, slices: Mapping[str, Sliced]) -> AxisCut | None:
        """As the model's own class says; it must also say how a tensor beside a sliced weight is cut."""
        said = find(slices, name)
        if said is not None:
            parts = tuple(_kind(part) for part, _ in said.parts)
            return AxisCut(said.axis, parts, units=tuple(n for _, n in said.parts)) if parts else None
        module, _, last = name.rpartition(".")
        weight = find(slices, f"{module}.weight")
        if weight is not None and last not in ("weight", "bias") and self.strict:
            raise UnsupportedError(
                f"{name} belongs to a module that is cut along axis {weight.axis}, and nothing is known of how {last!r} is cut "
                f"with it: give plan={{{name!r}: axis}}, or None as the axis to replicate it",
                tensor=name,
            )
        return None

    def _look_up(self, name: str) -> AxisCut | None:
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
        return AxisCut(0, rule.parts) if rule.bias else None

    def _longest(self, module: Sequence[str]) -> AxisCut | None:
        suffixes = (".".join(module[i:]) for i in range(len(module)))
        return next((self.cuts[suffix] for suffix in suffixes if suffix in self.cuts), None)


def _heads(inner: Config) -> int | None:
    """Attention heads; of an encoder and a decoder with different numbers, what divides both."""
    sides = [found for side in ("encoder", "decoder") if (found := count(inner, f"{side}_attention_heads"))]
    if sides:
        return math.gcd(*sides)
    return count(inner, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


def _kind(part: str) -> Cut:
    """The kind of the parts along an axis, as a manifest names it."""
    if part not in KINDS:
        raise UnsupportedError(f"the manifest says that {part[:40]!r} lies along an axis: use a newer modelstore")
    return part  # type: ignore[return-value]


def _family(config: Config | None) -> tuple[ParallelPlan | None, Config]:
    """(the entry of its model type or None, the config of the language model, which is nested in a multimodal one)."""
    if config is None:
        return None, {}
    inner = language(config)
    return FAMILIES.get(_known_type(config, inner)), inner


def _known_type(config: Config, inner: Config) -> str:
    """The model type that the table has: that of the language model, else that of the whole."""
    return model_type(inner) if model_type(inner) in FAMILIES else model_type(config)
