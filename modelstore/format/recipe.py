"""Recipes: which codec, with which parameters, for which tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from modelstore.format.given import told
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import CodecSpec

Kind = Literal[
    "linear",
    "convolution",
    "depthwise",
    "embedding",
    "head",
    "router",
    "norm",
    "bias",
    "state-space",
    "quantized",
    "unknown",
    "other",
]
KINDS: tuple[str, ...] = get_args(Kind)
_EXPRESSION = "re:"


Value = int | float | str | bool


class Takes(NamedTuple):
    """The codecs that can store a method's results, and the method's parameters, with their defaults."""

    codecs: tuple[str, ...]
    params: Mapping[str, Value] = MappingProxyType({})


BY_COLUMNS = ("nf4", "mxfp4", "nvfp4", "kmeans")  # codecs beside int that can look at what comes through each column
# Whether what is left is made to lose least; and the pattern, where the codec does not say it.
_LEFT: Mapping[str, Value] = MappingProxyType({"reconstruct": False})
_PRUNED: Mapping[str, Value] = MappingProxyType({**_LEFT, "sparsity": 0.0, "n": 0, "m": 0})
# Steps, samples that each looks at, and how far all steps together can move a number between two codes.
_TUNED: Mapping[str, Value] = MappingProxyType({"steps": 100, "batch": 1, "reach": 0.1})
# Samples on which scales are looked for.
_SCALED: Mapping[str, Value] = MappingProxyType({"samples": 2})
METHODS: Mapping[str, Takes] = MappingProxyType(
    {
        "gptq": Takes(("int",)),
        "tuned": Takes(("int",), _TUNED),
        "awq": Takes(("int",), _SCALED),
        "imatrix": Takes(("int", *BY_COLUMNS)),
        "wanda": Takes(("sparse",), _LEFT),
        "sparsegpt": Takes(("sparse", "int"), _PRUNED),
        "svd-llm": Takes(("lowrank",)),
    }
)
MIXABLE = ("gptq", "imatrix")  # methods that find the values of a mix's formats


class Method(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the values that a codec stores are found, if that takes data, such as "gptq" or "wanda"; and its parameters."""

    name: str
    params: dict[str, Value] = {}

    @property
    def told(self) -> Mapping[str, Value]:
        """All its parameters, with the defaults of those that are left out."""
        return {**METHODS[self.name].params, **self.params}


class Rule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Tensors, and what becomes of them: a codec, or None to keep them as they are.

    Each target is a kind ("linear", "convolution", "embedding", …), a pattern of names with `*` and `?`, or an expression
    after "re:" that the whole name matches. A kind speaks of the tensors that are meant to be compressed so; a pattern of
    whatever it matches. `method`: how the codec's values are found, if they are not a function of the weights alone.
    """

    targets: tuple[str, ...]
    codec: CodecSpec | None = None
    method: Method | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise TypeError(f"targets is a list of kinds and patterns: write ({self.targets!r},)")
        if self.codec is not None and not isinstance(self.codec, CodecSpec):
            raise TypeError(f"codec is a CodecSpec, such as CodecSpec('int', {{'bits': 4}}), not {told(self.codec)}")


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rules, of which the first that speaks of a tensor counts; a tensor that none speaks of is kept as it is.

    `name` is the variant's, where no other is given. `prune` is a share of all weights that the rules prune, the smallest
    in the whole model, before they are encoded: its threshold goes to every rule with codec `sparse`.
    """

    name: str
    rules: tuple[Rule, ...]
    prune: float | None = None
    description: str = ""

    def rule(self, tensor: str, kind: str) -> Rule | None:
        """The rule that speaks of a tensor."""
        return next((rule for rule in self.rules if any(matches(t, tensor, kind) for t in rule.targets)), None)

    @property
    def calibrated(self) -> bool:
        """Whether it takes a text to look at."""
        return any(rule.method is not None for rule in self.rules)

    def with_rules(self, *rules: Rule) -> Recipe:
        """The recipe with rules that come before its own."""
        return msgspec.structs.replace(self, rules=(*rules, *self.rules))


def matches(target: str, tensor: str, kind: str) -> bool:
    """Whether a target speaks of a tensor of that name and kind."""
    if target in KINDS:
        return target == kind
    if target.startswith(_EXPRESSION):
        return re.fullmatch(target[len(_EXPRESSION) :], tensor) is not None
    return fnmatchcase(tensor, target)


def recipe(value: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as JSON has it; `ValueError` says what is wrong with it."""
    try:
        made = msgspec.convert(dict(value), prepared(Recipe))
    except msgspec.ValidationError as error:
        raise ValueError(f"the recipe is not valid: {error}") from None
    check(made)
    return made


def as_checked(value: Recipe) -> Recipe:
    """A recipe that was made in Python, all of whose values are of their kinds; `ValueError` says what is wrong with it."""
    try:
        return recipe(msgspec.to_builtins(value))
    except TypeError as error:
        raise ValueError(f"the recipe is not valid: {error}") from None


def _check_method(name: str, rule: Rule) -> None:
    method, codec = rule.method, rule.codec
    assert method is not None, "asked for rules with one"
    known = METHODS.get(method.name)
    if known is None:
        raise ValueError(f"recipe {name!r}: method {method.name!r} is not one of {', '.join(METHODS)}")
    for key, value in method.params.items():
        if key not in known.params:
            takes = f"it takes {', '.join(known.params)}" if known.params else "it takes none"
            raise ValueError(f"recipe {name!r}: method {method.name} has no parameter {key!r}; {takes}")
        kind = type(known.params[key])
        if type(value) is not kind:
            raise ValueError(f"recipe {name!r}: method {method.name}, {key}: {value!r} is no {kind.__name__}")
    wrong = _wrong_counts(method)
    if wrong:
        raise ValueError(f"recipe {name!r}: method {method.name} {wrong}")
    params = codec.params if codec else {}
    plain = params.get("symmetric", True) is True and params.get("granularity", "group") == "group"
    if codec is None or codec.name not in known.codecs or (codec.name == "int" and not plain):
        which = " or ".join(one + ", symmetric and in groups" * (one == "int") for one in known.codecs)
        raise ValueError(f"recipe {name!r}: method {method.name} is for codec {which}")
    wrong = _wrong_pattern(method, codec) if "reconstruct" in known.params else None
    if wrong:
        raise ValueError(f"recipe {name!r}: method {method.name} {wrong}")


def _wrong_counts(method: Method) -> str | None:
    """The problem with how often or how far a method is told to go, or None."""
    told = method.told
    for key, most in (("steps", 100_000), ("batch", 1 << 20), ("samples", 1 << 20)):
        if key in told and not 1 <= int(told[key]) <= most:
            return f"has {key}={told[key]}, which is not a whole number from 1 to {most}"
    if 0 < float(told.get("reach", 1)) <= 1:
        return None
    return f"has reach={told['reach']}, which is not above 0 and at most 1"


def _wrong_pattern(method: Method, codec: CodecSpec) -> str | None:
    """The problem with the pattern that a method should prune, of which a codec of codes says nothing; or None."""
    said = {"sparsity", "n", "m"} & method.params.keys()
    if codec.name == "sparse":
        if said:
            return f"takes its pattern from codec sparse: give {', '.join(sorted(said))} there"
        return _wrong_share(method.name, codec.params)
    told = method.told
    share, n, m = told["sparsity"], told["n"], told["m"]
    if told["reconstruct"]:
        return f"reconstructs weights as they are, and codec {codec.name} stores codes: leave reconstruct out"
    if (share, n, m) == (0, 0, 0) or (share and (n or m)) or not 0 <= float(share) < 1:
        return f"prunes a share of what codec {codec.name} stores: give it a sparsity between 0 and 1, or n and m"
    return (
        None if share or 0 < int(n) < int(m) <= 64 else f"has n, m = {n}, {m}: n of every m are kept, 0 < n < m <= 64"
    )


def _wrong_share(method: str, params: Mapping[str, Any]) -> str | None:
    """The problem with the pattern that codec sparse has for a method, or None; its values are checked when the codec is made."""
    if params.get("threshold"):
        return "prunes by no threshold: give codec sparse a sparsity, or n and m, and leave threshold out"
    if params.get("n") or params.get("m"):
        return None
    if not params.get("sparsity"):
        return "prunes a share above 0: give codec sparse a sparsity, or n and m"
    if method == "wanda" and params.get("scope") != "row":
        return 'prunes each row by itself: give codec sparse "scope": "row" beside its sparsity, or n and m'
    return None


def check(value: Recipe) -> None:
    """`ValueError` if a recipe cannot be meant so."""
    if value.prune is not None and not 0 < value.prune < 1:
        raise ValueError(f"recipe {value.name!r}: prune={value.prune} is not a share between 0 and 1")
    if (
        len(
            {tuple(sorted(one.method.told.items())) for one in value.rules if one.method and one.method.name == "tuned"}
        )
        > 1
    ):
        raise ValueError(
            f"recipe {value.name!r}: rules tell method tuned different things, and all layers of a block are tuned together"
        )
    for rule in value.rules:
        if value.prune is not None and rule.codec and (rule.codec.name != "sparse" or rule.codec.params):
            raise ValueError(
                f"recipe {value.name!r}: prune= is for rules whose codec is sparse, without parameters of its own"
            )
        if rule.method is not None:
            _check_method(value.name, rule)
        if not rule.targets:
            raise ValueError(
                f"recipe {value.name!r}: a rule has no targets; name kinds ({', '.join(KINDS)}) or patterns"
            )
        for target in rule.targets:
            if target.startswith(_EXPRESSION):
                try:
                    re.compile(target[len(_EXPRESSION) :])
                except re.error as error:
                    raise ValueError(
                        f"recipe {value.name!r}: target {target!r} is not a regular expression ({error})"
                    ) from None
