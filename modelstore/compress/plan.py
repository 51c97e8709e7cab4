"""The plan of compressing a variant, tensor by tensor, decided from its manifest alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from modelstore.architecture.fused import fused
from modelstore.architecture.kinds import kinds_in
from modelstore.architecture.quantized import method
from modelstore.codecs.registry import codec as make_codec
from modelstore.codecs.weight import WeightCodec, as_weight_codec
from modelstore.compress.codes import Given
from modelstore.compress.presets import preset
from modelstore.errors import UnsupportedError
from modelstore.format.answers.results import CodecChoice, CompressionPlan
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.recipe import KINDS, Kind, Recipe, Rule, as_checked, check, matches, recipe
from modelstore.plan.write import TensorPlan, plan_tensor


class DequantizedWeights(Protocol):
    """The weights of a checkpoint that are made of quantized ones."""

    @property
    def by(self) -> str:
        """The method by which they are quantized."""

    @property
    def stored(self) -> Mapping[str, int]:
        """In how many bytes the codes and scales of each are stored."""


def weight_codec(spec: CodecSpec) -> WeightCodec:
    """The codec of a rule; `ValueError` or `UnsupportedError` if it is none that compresses."""
    made = as_weight_codec(make_codec(spec.name, spec.params))
    if made is None:
        raise UnsupportedError(f"codec {spec.name!r} stores a model, it does not compress one: save with it instead")
    return made


def plan_compression(
    manifest: Manifest,
    config: Mapping[str, Any] | None,
    chosen: Recipe,
    known: Architecture | None = None,
    dequantized: DequantizedWeights | None = None,
) -> CompressionPlan:
    """Choose a codec for every tensor; nothing is read but the manifest. `known`: what the model's own class says of it.

    `dequantized`: the weights of a manifest that are made of quantized ones, each of which has to be compressed.

    Tensors that a codec refuses are kept, and the reason is given. Layers that engines fuse share one scheme: where rules
    differ, that of the first one is taken for all, and where one is kept, all are.
    `ValueError` if the recipe compresses nothing.
    """
    found = kinds_in(manifest, config, known)
    already = method(config) or ("another tool" if "quantized" in found.values() else None)
    specs: dict[str, CodecSpec | None] = {}
    reasons: dict[str, str] = {}
    for tensor in manifest.tensors:
        specs[tensor.name], reasons[tensor.name] = _spec(tensor, found[tensor.name], chosen, already)
    for group in fused(specs):
        _share_one_scheme(group, specs, reasons)
    choices = tuple(
        _choice(manifest, t, found[t.name], specs[t.name], reasons[t.name], chosen.prune) for t in manifest.tensors
    )
    if dequantized is not None:
        choices = tuple(_requantized(choice, dequantized) for choice in choices)
    if not any(choice.codec for choice in choices):
        raise ValueError(_nothing(choices, chosen, already))
    return CompressionPlan(
        chosen.name,
        choices,
        **_sums(choices),
        needs_threshold=chosen.prune is not None,
        requantized=dequantized.by if dequantized is not None else "",
    )


def _requantized(choice: CodecChoice, dequantized: DequantizedWeights) -> CodecChoice:
    """The choice for a weight that is made of quantized ones; `ValueError` if it would be kept, or be no smaller."""
    stored = dequantized.stored.get(choice.name)
    if stored is None:
        return choice
    if choice.codec is None:
        raise ValueError(
            f"tensor {choice.name!r} is quantized by {dequantized.by}, and would be kept as floats ({choice.reason}), though "
            f"its config can speak of one quantization only: name it, or what it is, in include="
        )
    if choice.expected >= stored:
        raise ValueError(
            f"tensor {choice.name!r} has {stored} bytes as it is stored now, quantized by {dequantized.by}, and would have "
            f"{choice.expected}: choose a recipe of fewer bits, or keep the checkpoint as it is"
        )
    return msgspec.structs.replace(choice, stored=stored, reason=f"made of its {dequantized.by} values")


def _spec(tensor: Tensor, kind: Kind, chosen: Recipe, already: str | None) -> tuple[CodecSpec | None, str]:
    """The codec of a tensor, or None and why it is kept."""
    rule = chosen.rule(tensor.name, kind)
    if rule is None:
        return None, _LEFT.get(kind, f"recipes leave {kind} tensors as they are")
    if rule.codec is None:
        return None, "the recipe keeps it"
    named = any(matches(target, tensor.name, kind) for target in rule.targets if target not in KINDS)
    if already and not named:
        return None, f"the checkpoint is quantized already, by {already}, and is kept exactly"
    codec = weight_codec(rule.codec)
    refusal = codec.refuses(tensor.shape, tensor.kind)
    if refusal:
        return None, f"it {refusal}"
    if not codec.exact and not named and not chosen.prune and codec.size(tensor.shape, tensor.kind) >= tensor.nbytes:
        return None, "it would not shrink"
    return rule.codec, ""


_LEFT: Mapping[str, str] = {
    "unknown": "nothing is known of it: it is compressed where it is named",
    "state-space": "it steers a recurrence, which adds up its errors: it is compressed where it is named",
    "quantized": "it is quantized already",
}


def _nothing(choices: Sequence[CodecChoice], chosen: Recipe, already: str | None) -> str:
    """Why a recipe compresses nothing of a model."""
    unknown = next((choice.name for choice in choices if choice.kind == "unknown"), None)
    if already:
        why = (
            f"the checkpoint is quantized already, by {already}, and is kept exactly unless tensors are named (include=[…]), or "
            f"all is compressed from its dequantized values (requantize=True)"
        )
    elif unknown is not None:
        why = f"nothing is known of tensors such as {unknown!r}: name what is to be compressed (include=[{unknown!r}])"
    else:
        why = "let its targets name kinds of tensors that the model has, or patterns of their names"
    return f"recipe {chosen.name!r} compresses none of the {len(choices)} tensors: {why}"


def check_targets(plan: CompressionPlan, given: Mapping[str, Sequence[str]]) -> None:
    """`ValueError` if a target that was given beside the recipe speaks of no tensor: it would do nothing."""
    for option, targets in given.items():
        for target in targets:
            if any(matches(target, choice.name, choice.kind) for choice in plan.choices):
                continue
            if target in KINDS:
                there = ", ".join(sorted({choice.kind for choice in plan.choices}))
                raise ValueError(
                    f"{option}={target!r} has no effect: the model has no tensor of that kind, but {there}"
                )
            raise ValueError(
                f"{option}={target!r} has no effect: no tensor's whole name fits it, such as {plan.choices[0].name!r}; write a "
                f"pattern with * and ?, or a kind ({', '.join(KINDS)})"
            )


def check_requantize(chosen: Recipe, codes: object | None) -> None:
    """`ValueError` if a quantized checkpoint cannot be compressed again so."""
    if codes is not None:
        raise ValueError("codes= are of the original's own weights, and requantize=True makes others: give one of them")
    if any(rule.codec and weight_codec(rule.codec).views for rule in chosen.rules):
        raise ValueError(
            "a ladder stores the original itself again, which is quantized: requantize=True makes variants"
        )


def give_codes(
    plan: CompressionPlan, manifest: Manifest, chosen: Recipe, given: Mapping[str, Given], origin: str
) -> CompressionPlan:
    """A ladder's plan with the int4 codes that weights have been given, whatever their kind; those kept by a rule aside.

    `ValueError` if a weight is not in the model in this form, or the recipe is not a ladder.
    """
    ladders = [rule.codec for rule in chosen.rules if rule.codec]
    if any(spec.name != "ladder" for spec in ladders):
        raise ValueError(f"codes are what a ladder is put on, and recipe {chosen.name!r} is none: give recipe 'ladder'")
    choices = {choice.name: choice for choice in plan.choices}
    for name, found in given.items():
        tensor = manifest.by_name.get(name)
        if tensor is None or tensor.name != name:
            why = "is not in the model" if tensor is None else f"is tied to {tensor.name!r} in the model"
            raise ValueError(f"weight {name!r}, of which {origin} has codes, {why}: give the codes of this very model")
        if (tensor.shape, tensor.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"weight {name!r} is {tensor.dtype} {list(tensor.shape)} in the model, and {origin} has codes of "
                f"{list(found.shape)} with scales of {found.dtype}: give the codes of this very model"
            )
        rule = chosen.rule(name, choices[name].kind)
        if rule and rule.codec is None:
            continue
        spec = (rule and rule.codec) or ladders[0]
        spec = CodecSpec(spec.name, {**spec.params, "codes_group_size": found.group_size})
        refusal = weight_codec(spec).refuses(tensor.shape, tensor.kind)
        if refusal:
            raise ValueError(f"weight {name!r}, of which {origin} has codes, {refusal}, and has no ladder: skip it")
        choices[name] = _choice(manifest, tensor, choices[name].kind, spec, "its int4 codes are given")  # type: ignore[arg-type]
    made = tuple(choices.values())
    return msgspec.structs.replace(plan, choices=made, **_sums(made))


def _sums(choices: Sequence[CodecChoice]) -> dict[str, Any]:
    """Bytes of all choices together: raw, as stored now, and then."""
    return {
        "bytes": sum(choice.bytes for choice in choices),
        "stored": sum(choice.stored for choice in choices),
        "expected": sum(choice.expected for choice in choices),
    }


def _share_one_scheme(group: Sequence[str], specs: dict[str, CodecSpec | None], reasons: dict[str, str]) -> None:
    first = specs[group[0]]
    if all(specs[name] == first for name in group):
        return
    kept = next((name for name in group if specs[name] is None), None)
    for name in group:
        if kept is not None and name != kept and specs[name] is not None:
            specs[name], reasons[name] = None, f"engines fuse it with {kept}, which is kept"
        elif kept is None and specs[name] != first:
            specs[name], reasons[name] = first, f"engines fuse it with {group[0]}, whose scheme it takes"


def _choice(
    manifest: Manifest,
    tensor: Tensor,
    kind: Kind,
    spec: CodecSpec | None,
    reason: str,
    pruned: float | None = None,
) -> CodecChoice:
    stored = int(manifest.length[manifest.rows(tensor)].sum())
    # If a share of all weights is pruned, each tensor is expected to lose that share: its real loss is not known yet.
    sized = CodecSpec("sparse", {"sparsity": pruned}) if spec and pruned is not None else spec
    expected = weight_codec(sized).size(tensor.shape, tensor.kind) if sized else stored
    return CodecChoice(tensor.name, kind, tensor.dtype, tensor.shape, spec, reason, tensor.nbytes, stored, expected)


def tensor_plan(tensor: Tensor, spec: CodecSpec, axis: Callable[[str], int | None] | None) -> TensorPlan:
    """How a tensor is cut and stored by a codec; `axis` says along which dimension ranks will slice it."""
    units = weight_codec(spec).group(tensor.shape)
    return plan_tensor(tensor.name, tensor.dtype, tensor.shape, spec, axis=axis, units=units)


def resolve(value: str | Recipe | Mapping[str, Any], include: Iterable[str] = (), skip: Iterable[str] = ()) -> Recipe:
    """A recipe from a preset's name, plain data or itself; with targets that it compresses, or keeps, as well.

    `ValueError` if there is no such preset or the recipe cannot be meant so.
    """
    if isinstance(value, str):
        made = preset(value)
    elif isinstance(value, Recipe):
        made = as_checked(value)
    elif isinstance(value, Mapping):
        made = recipe(value)
    else:
        raise TypeError(f"a recipe is a preset's name, a Recipe or plain data, not {value!r}")
    codec = next((rule.codec for rule in made.rules if rule.codec), None)
    if codec is None:
        raise ValueError(f"recipe {made.name!r} has no rule with a codec: it would compress nothing")
    method = next((rule.method for rule in made.rules if rule.codec), None)
    rules = [Rule(tuple(skip), None)] * bool(skip) + [Rule(tuple(include), codec, method)] * bool(include)
    made = made.with_rules(*rules)
    check(made)
    for rule in made.rules:  # also one that speaks of no tensor of this model
        if rule.codec:
            weight_codec(rule.codec)
    return made
