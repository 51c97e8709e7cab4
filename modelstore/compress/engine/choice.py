"""Decides which weights of a variant engines get packed, which dense, and how config.json says so: nothing is written here.

The rule is what transformers and compressed-tensors load, and vLLM's config reader takes: a packed weight is that of an untied
linear layer whose shape its codec has a layout for. Weights that transformers makes one parameter of while it loads, such
as experts, are dequantized then, all of a model by one scheme, and for a few schemes only. Where a layer would not bear that
its weight is missing until the model runs, config.json has transformers dequantize all of the model while it loads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelstore.architecture.kinds import kinds_in
from modelstore.architecture.places import Modules, Place
from modelstore.codecs.weight import EngineView, matrix
from modelstore.errors import UnsupportedError
from modelstore.format.manifest import Manifest, Tensor
from modelstore.format.recipe import Kind
from modelstore.format.region import Shape

log = logging.getLogger("modelstore")

_WEIGHT = ".weight"
_DENSE = "export it with dequantize=True"
# What vLLM's kernels for int8 weights want to be told of activations: rounded token by token, when they are there.
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_UNPACKED = ("float-quantized", "int-quantized")  # a layer's codes are its `weight`
# What compressed-tensors unpacks to bfloat16: powers of two times numbers of four bits are exact in it, others are rounded.
_EXACT, _ROUNDED = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
_WORD = 32  # bits, into which the zero points of several rows are packed
_LOADED = "compress with int4, int8, fp8 or mxfp4"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The views of the weights that are packed, by name; what config.json says of it."""

    packed: Mapping[str, EngineView]
    quantization: Mapping[str, Any]


@dataclass
class _SortedWeights:
    """The weights of a checkpoint, sorted."""

    packed: dict[str, EngineView] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    fused: dict[str, dict[str, EngineView | None]] = field(default_factory=dict)  # parameter → its tensors
    dense: list[str] = field(default_factory=list)  # modules that "Linear" could mean
    early: list[str] = field(default_factory=list)  # packed ones that have to be dequantized while they are loaded
    reasons: list[tuple[int, str]] = field(default_factory=list)  # bytes of a tensor, why it is dense


def choose(
    manifest: Manifest,
    views: Mapping[str, EngineView],
    config: Mapping[str, Any],
    modules: Modules,
    plain: Mapping[str, EngineView],
) -> EngineChoice:
    """Which weights are packed. `UnsupportedError` where engines could not load the whole as it would be written.

    `plain`: the same weights without what `views` have beside them, such as int8 activations. Those that transformers makes one
    parameter of are packed so.
    """
    views = _taken_apart(manifest, views, modules, plain)
    found = _sorted(manifest, views, config, modules, early=modules.late is None)
    if found.early and len({_key(view) for view in found.packed.values()}) > 1:
        found = _sorted(manifest, views, config, modules, early=False)  # transformers does so for one scheme only
    why = min(found.reasons)[1] if found.reasons else "none is linear"
    if not found.packed:
        raise UnsupportedError(f"no weight can be packed for engines ({why}): {_DENSE}")
    together = {name for members in found.fused.values() for name in members}
    groups = _grouped(found.packed, together)
    _check_fused(found, together)
    whole = _in_loading(found, groups, modules)
    if found.reasons:
        more = f" (and {len(found.reasons) - 1} more like it)" if len(found.reasons) > 1 else ""
        log.warning("%s%s", why, more)
    return EngineChoice(found.packed, _quantization(groups, _ignored(found, manifest, modules), modules, whole))


def _taken_apart(
    manifest: Manifest, views: Mapping[str, EngineView], modules: Modules, plain: Mapping[str, EngineView]
) -> dict[str, EngineView]:
    """The views, with the plain ones where transformers takes only these apart."""
    found = dict(views)
    for name, view in views.items():
        other = name.endswith(_WEIGHT) and not _loaded_in_one(view) and _loaded_in_one(plain[name])
        if other and modules.place(name, manifest.by_name[name].shape).fused is not None:
            found[name] = plain[name]
    changed = [name for name in views if found[name] is not views[name]]
    if changed:
        log.warning(
            "%d weights such as %r are written for activations as they are: transformers makes one parameter of them while it "
            "loads them, and takes them so only",
            len(changed),
            changed[0],
        )
    return found


def _in_loading(found: _SortedWeights, groups: Sequence[tuple[EngineView, list[str]]], modules: Modules) -> bool:
    """Whether transformers has to dequantize all weights while it loads them, for which they must have one scheme.

    Its compressed layers have a place for zero points of another shape, and no `weight` until they run.
    """
    affine = not all(view.scheme().get("symmetric", True) for view, _ in groups)
    because = modules.early or ("the variant has weights with zero points" if affine else None)
    if because and (len(groups) > 1 or modules.late):
        refused = modules.late or f"it does so for one scheme, and the variant has {len(groups)}"
        raise UnsupportedError(
            f"transformers has to unpack all weights while it loads them ({because}), and {refused}: {_DENSE}"
        )
    return bool(because or found.early)


def _sorted(
    manifest: Manifest, views: Mapping[str, EngineView], config: Mapping[str, Any], modules: Modules, *, early: bool
) -> _SortedWeights:
    """The weights; with `early` those are packed, too, that have to be dequantized while they are loaded."""
    found = _SortedWeights()
    kinds = kinds_in(manifest, config)
    for tensor in manifest.tensors:
        view = views.get(tensor.name)
        kind = kinds[tensor.name]
        place = modules.place(tensor.name, tensor.shape) if tensor.name.endswith(_WEIGHT) else None
        reason = _reason(tensor, view, place)
        soon = _early(tensor, view, place) if reason is None else None
        reason = reason if early else reason or soon
        if view is not None and place is not None and reason is None:
            found.packed[tensor.name] = view
            found.modules.add(place.module)
            found.early += [tensor.name] if soon else []
        else:
            if place is not None and kind in ("linear", "head", "router"):
                found.dense.append(tensor.name.removesuffix(_WEIGHT))
            elif _is_stack(tensor, kind):
                found.dense.append(tensor.name.rpartition(".")[0])  # engines take its module for a linear one
            if view is not None:
                found.reasons.append((-tensor.nbytes, f"tensor {tensor.name!r} is exported dense: it {reason}"))
        if place is not None and place.fused is not None:
            members = found.fused.setdefault(place.fused, {})
            members[tensor.name] = found.packed.get(tensor.name)
    return found


def _reason(tensor: Tensor, view: EngineView | None, place: Place | None) -> str | None:
    """Why a tensor is not packed, as the end of "it …"; None where it is, or is not compressed."""
    if view is None:
        return None
    if len(tensor.shape) > 2:
        return f"is {len(tensor.shape)}-d, which engines have no packed layout for"
    if place is None:
        return "is no layer's weight"
    if tensor.dtype != "bfloat16" and (view.format == _ROUNDED or (view.format == _EXACT and place.fused)):
        return f"is {tensor.dtype}, and compressed-tensors unpacks {view.format} to bfloat16 only"
    return _unfit(view, tensor.shape) or place.why


def _early(tensor: Tensor, view: EngineView | None, place: Place | None) -> str | None:
    """Why a weight has to be dequantized while it is loaded, as the end of "it …"; None where it need not."""
    if view is None or place is None or place.fused is not None:
        return None
    if place.needed and view.format not in _UNPACKED:
        return "is looked at by transformers before it is unpacked"
    if view.format == _EXACT and tensor.dtype != "bfloat16":
        return f"is {tensor.dtype}, and compressed-tensors unpacks {view.format} to bfloat16 where it runs"
    return place.early


def _is_stack(tensor: Tensor, kind: Kind) -> bool:
    """Whether it is several matrices in one, such as those of experts."""
    if len(tensor.shape) != 3 or kind not in ("linear", "unknown"):
        return False
    return "expert" in tensor.name or (tensor.shape[0] > 1 and tensor.shape[1] > 1)


def _unfit(view: EngineView, shape: Shape) -> str | None:
    """Why engines do not take a weight of that shape packed, as the end of "it …"."""
    try:
        view.cells(shape)
    except UnsupportedError as error:
        return f"does not fit: {error}"
    scheme = view.scheme()
    if not scheme.get("symmetric", True) and shape[0] * scheme["num_bits"] <= _WORD:
        return f"has {shape[0]} rows, whose zero points are one word, which compressed-tensors does not unpack"
    group = scheme.get("group_size")
    columns = matrix(shape)[1]
    if isinstance(group, int) and group > 0 and columns % group:
        return f"has {columns} columns, which are not whole groups of {group}"
    return None


def _loaded_in_one(view: EngineView) -> bool:
    """Whether transformers takes weights of that scheme apart before it makes one parameter of them."""
    scheme = view.scheme()
    if view.format == "pack-quantized":
        return bool(scheme["symmetric"])
    return view.format == "mxfp4-pack-quantized" or (
        view.format == "float-quantized" and scheme["strategy"] in ("channel", "tensor")
    )


def _check_fused(found: _SortedWeights, together: set[str]) -> None:
    """`UnsupportedError` where transformers would not load weights that it makes one parameter of."""
    views = {_key(view): view for name in together if (view := found.packed.get(name)) is not None}
    if len(views) > 1:
        raise UnsupportedError(
            f"the experts are compressed in {len(views)} ways, and transformers takes those of a model in one: give all of them "
            f"one codec, or {_DENSE}"
        )
    for view in views.values():
        if not _loaded_in_one(view):
            scheme = view.scheme()
            name = next(name for name in together if name in found.packed)
            how = "with zero points" if not scheme["symmetric"] else f"by {scheme['strategy']}"
            raise UnsupportedError(
                f"transformers makes one parameter of tensors such as {name!r} while it loads them, and does not take those of "
                f"format {view.format} {how} apart: {_LOADED}, or {_DENSE}",
                tensor=name,
            )
    first = next(iter(views.values()), next(iter(found.packed.values())))
    for target, members in found.fused.items():
        dense = [name for name, view in members.items() if view is None]
        if dense and (first.format != "float-quantized" or len(dense) < len(members)):
            raise UnsupportedError(
                f"transformers makes parameter {target!r} of tensors such as {dense[0]!r} while it loads them, and takes them "
                f"packed only, as the others are: compress them too, or {_DENSE}",
                tensor=dense[0],
            )


def _key(view: EngineView) -> str:
    return json.dumps([view.format, view.scheme()], sort_keys=True)


def _grouped(packed: Mapping[str, EngineView], first: set[str]) -> list[tuple[EngineView, list[str]]]:
    """Weights by scheme; that of experts first, since transformers takes the first group for theirs."""
    groups: dict[str, tuple[EngineView, list[str]]] = {}
    for name, view in packed.items():
        groups.setdefault(_key(view), (view, []))[1].append(name)
    return sorted(groups.values(), key=lambda group: first.isdisjoint(group[1]))


def _ignored(found: _SortedWeights, manifest: Manifest, modules: Modules) -> list[str]:
    """All modules that "Linear" could mean and that are dense, by the names that engines look for them."""
    names = [called for name in found.dense for called in modules.called(name)]
    for alias in manifest.aliases:
        if alias.endswith(_WEIGHT) and alias not in found.packed:
            names += modules.called(alias.removesuffix(_WEIGHT))
    names += [called for name in modules.linears if name not in found.modules for called in modules.called(name)]
    if "lm_head.weight" not in found.packed:
        names.append("lm_head")  # tied, and then made by the engine
    return list(dict.fromkeys(names))


def _quantization(
    groups: Sequence[tuple[EngineView, list[str]]], ignored: Sequence[str], modules: Modules, whole: bool
) -> dict[str, Any]:
    """compressed-tensors' account of the packed weights: a group for each scheme.

    `whole`: transformers dequantizes all of them while it loads them; other engines do not read that.
    """
    formats = {view.format for view, _ in groups}

    def targets(names: Sequence[str]) -> Iterator[str]:
        for name in names:
            yield from modules.called(name.removesuffix(_WEIGHT))

    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignored),
        **({"dequantize": True} if whole else {}),
        "config_groups": {
            f"group_{at}": {
                "targets": ["Linear"] if len(groups) == 1 else list(dict.fromkeys(targets(names))),
                "weights": view.scheme(),
                "input_activations": _TOKENS if view.format == "int-quantized" else None,
                "output_activations": None,
                "format": view.format,
            }
            for at, (view, names) in enumerate(groups)
        },
    }
