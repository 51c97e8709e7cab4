"""How ranks slice a model: along which axis each tensor is cut for tensor parallelism, and what lies along it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate

from modelstore.architecture.config import Config, count, language, model_type
from modelstore.architecture.parallel_table import ARCHITECTURES, BESIDE, Architecture, Cut, Kind
from modelstore.errors import UnsupportedError

Plan = Mapping[str, int | None]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def axes(config: Config | None, plan: Plan | None = None) -> Callable[[str], int | None]:
    """The axis along which tensor parallelism would cut a tensor of that name; None where it is replicated.

    Resolved once, then a dictionary lookup a name. For an unknown architecture without a plan the answer is always
    None; an axis that comes from the plan is returned as it is given there.
    """
    rules = Cuts(config, plan, strict=False)

    def axis(name: str) -> int | None:
        rule = rules.find(name)
        return None if rule is None else rule.axis

    return axis


class Cuts:
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
            query = count(inner, "num_attention_heads", "n_head", "n_heads", "num_heads") or architecture.heads
            key = count(inner, "num_key_value_heads", "num_kv_heads") or architecture.key_heads or query
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
    inner = language(config)
    known = ARCHITECTURES.get(model_type(inner)) or ARCHITECTURES.get(model_type(config))
    return config.get("model_type"), known, inner
