"""Facts about a checkpoint's tensors from the model's own class: its modules are walked once, and each tensor followed to its
module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from modelstore.architecture import kinds as names
from modelstore.architecture.classes.model_class import Built
from modelstore.architecture.ranks.sliced import Met, Slicer
from modelstore.format.objects.architecture import Architecture, folded, general
from modelstore.format.recipe import Kind
from modelstore.format.region import Shape

_LINEARS = ("Conv1D", "QuantLinear")  # that are no `torch.nn.Linear`, and multiply by their weight
_STACKED = re.compile(r".*Experts")
_NORMS = re.compile(r".*Norm\w*")


def walk(built: Built, tensors: Mapping[str, Shape]) -> Architecture | None:
    """The class's facts about tensors, by name; None if it has none of them, or in none of these shapes."""
    model = built.model
    known = dict(model.state_dict(keep_vars=True))
    modules = dict(model.named_modules())
    met = [one for name, shape in tensors.items() if (one := _meet(built, known, modules, name, shape))]
    if not met:
        return None
    head = model.get_output_embeddings()
    slices = Slicer(model, modules).slices(met)
    return Architecture(
        built.by,
        type(model).__name__,
        kinds=folded({one.name: _kind(one, head) for one in met}),
        ties=_ties(model, met),
        blocks=tuple(dict.fromkeys(_blocks(modules, met))),
        slices=None if slices is None else folded(slices),
    )


def _meet(built: Built, known: dict[str, Any], modules: Mapping[str, Any], name: str, shape: Shape) -> Met | None:
    """A tensor with its parameter; None if the model has none for it, or one of another shape."""
    there, source = built.rename(name, known)
    owner = modules.get(there.rpartition(".")[0])
    if there not in known or owner is None:
        return None
    if source is not None:
        return Met(name, shape, there, owner, tuple(type(one).__name__ for one in built.converters[source].operations))
    return Met(name, shape, there, owner) if tuple(known[there].shape) == shape else None


def _kind(one: Met, head: Any) -> Kind | None:
    """A tensor's kind, by the module that owns it; names tell which linear layer is a router, and which is a stem."""
    import torch

    by_name = names.kind_of(one.name, one.shape)
    kind = type(one.owner).__name__
    if len(one.shape) < 2:
        return "norm" if _NORMS.fullmatch(kind) else None
    if isinstance(one.owner, torch.nn.Embedding) and one.last == "weight":
        return "embedding"
    if one.owner is head and one.last == "weight":
        return "head"
    if isinstance(one.owner, torch.nn.Linear) or kind in _LINEARS:
        if one.last != "weight":
            return by_name if by_name == "bias" else "unknown"
        return by_name if by_name in ("head", "router") or names.is_stem(one.name) else "linear"
    if isinstance(one.owner, torch.nn.modules.conv._ConvNd):
        return (
            by_name
            if names.is_stem(one.name)
            else "depthwise"
            if 1 < one.owner.groups == one.shape[0]
            else "convolution"
        )
    if _STACKED.fullmatch(kind):
        return "bias" if "bias" in one.last else by_name if by_name == "router" else "linear"
    return "unknown" if by_name in ("convolution", "depthwise") else by_name


def _ties(model: Any, met: list[Met]) -> dict[str, str]:
    """Names of tied parameters, each with the one that it is, as the checkpoint names them where it has them."""
    stored = {one.parameter: one.name for one in met if not one.steps}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return folded({stored.get(name, name): stored.get(of, of) for name, of in tied.items()})


def _blocks(modules: Mapping[str, Any], met: list[Met]) -> Iterator[str]:
    """The names before the numbers of repeated layers, as the checkpoint has them, in its order."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = {
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 0
        and all(isinstance(one, GradientCheckpointingLayer) for one in module)
    }
    for one in met:
        for stack in stacks:
            rest = one.parameter.removeprefix(stack)
            if rest == one.parameter:
                continue
            number = rest.partition(".")[0]
            at = one.name.find(f".{number}.") if not one.name.startswith(f"{number}.") else -1
            if at > 0 and general(one.name[:at]) == one.name[:at]:
                yield one.name[:at]
