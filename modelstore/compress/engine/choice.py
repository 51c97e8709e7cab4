"""Decides which weights of a variant engines get packed, which dense, and how config.json says so: nothing is written here.

The rule is what transformers and compressed-tensors load, and vLLM's config reader takes: a packed weight is that of an untied
linear layer whose shape its codec has a layout for, in a scheme that `schemes` offers. If a layer could not work without its
weight until the model runs, config.json makes transformers dequantize all of the model while it loads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelstore.architecture.classes.places import Modules, Place
from modelstore.architecture.kinds import is_stack, kinds_in
from modelstore.codecs.weight import EngineView
from modelstore.compress.engine.schemes import EXACT, FLOAT8, Offer, has_zero_points, offered, scheme_key
from modelstore.errors import UnsupportedError
from modelstore.format.objects.manifest import Manifest, Tensor

log = logging.getLogger("modelstore")

_WEIGHT = ".weight"
_DENSE = "export it with dequantize=True"
# How vLLM's kernels for int8 weights need activations described: rounded token by token, when they are there.
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_UNPACKED = (FLOAT8, "int-quantized")  # a layer's codes are its `weight`
# transformers takes experts without scales as they are where their group is of float8, and takes for theirs one whose pattern
# says "experts". This one is not a layer's: it means the model itself; without that, compressed-tensors warns of no meaning.
_DENSE_EXPERTS = "re:(dense experts)?$"
_FLOAT8_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}


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
    early: list[str] = field(default_factory=list)  # packed ones that have to be dequantized while they are loaded
    ignored: list[str] = field(default_factory=list)  # modules that "Linear" could mean, and that are dense
    dense: list[tuple[Tensor, str]] = field(
        default_factory=list
    )  # why a compressed tensor is dense, as the end of "it …"


def choose(
    manifest: Manifest,
    views: Mapping[str, EngineView],
    config: Mapping[str, Any],
    modules: Modules,
    plain: Mapping[str, EngineView],
) -> EngineChoice:
    """Which weights are packed. `UnsupportedError` if none can be.

    `plain`: the same weights without what `views` have beside them, such as int8 activations. Those that transformers makes one
    parameter of are packed so.
    """
    places = {t.name: modules.place(t.name, t.shape) for t in manifest.tensors if t.name.endswith(_WEIGHT)}
    offer = offered(manifest, views, plain, places, modules)
    found = _sorted(manifest, offer, config, places, early=modules.late is None)
    if found.early and len({scheme_key(view) for view in found.packed.values()}) > 1:
        found = _sorted(manifest, offer, config, places, early=False)  # transformers does so for one scheme only
    why = _said(found.dense)
    if not found.packed:
        raise UnsupportedError(f"no weight can be packed for engines ({why or 'none is linear'}): {_DENSE}")
    fused = {name for name, place in places.items() if place.fused is not None}
    groups = _grouped(found.packed, fused)
    whole = _in_loading(found, groups, modules)
    if why:
        kept, size = sum(tensor.nbytes for tensor, _ in found.dense), sum(tensor.nbytes for tensor in manifest.tensors)
        log.warning("%s (%d such, %s bytes of %s)", why, len(found.dense), f"{kept:,}", f"{size:,}")
    dense = any(name not in found.packed for name in fused)
    ignored = _ignored(found, manifest, modules)
    return EngineChoice(found.packed, _quantization(groups, ignored, modules, whole=whole, dense=dense))


def _said(dense: Sequence[tuple[Tensor, str]]) -> str:
    """Which tensor is dense, and why, of the largest one; "" where there is none."""
    if not dense:
        return ""
    tensor, why = max(dense, key=lambda pair: pair[0].nbytes)
    return f"tensor {tensor.name!r} is exported dense: it {why}"


def _in_loading(found: _SortedWeights, groups: Sequence[tuple[EngineView, list[str]]], modules: Modules) -> bool:
    """Whether transformers has to dequantize all weights while it loads them, for which they have one scheme.

    Its compressed layers have a place for zero points of another shape, and no `weight` until they run.
    """
    if modules.early and modules.late:
        raise UnsupportedError(
            f"transformers has to unpack all weights while it loads them ({modules.early}), and {modules.late}: {_DENSE}"
        )
    return bool(modules.early or found.early or any(has_zero_points(view) for view, _ in groups))


def _sorted(
    manifest: Manifest, offer: Offer, config: Mapping[str, Any], places: Mapping[str, Place], *, early: bool
) -> _SortedWeights:
    """The weights; with `early` those are packed, too, that have to be dequantized while they are loaded."""
    found = _SortedWeights()
    kinds = kinds_in(manifest, config)
    for tensor in manifest.tensors:
        view = offer.views.get(tensor.name)
        kind = kinds[tensor.name]
        place = places.get(tensor.name)
        reason = offer.dense.get(tensor.name)
        soon = _early(tensor, view, place) if reason is None else None
        reason = reason if early else reason or soon
        if view is not None and place is not None and reason is None:
            found.packed[tensor.name] = view
            found.modules.add(place.module)
            found.early += [tensor.name] if soon else []
            continue
        if place is not None and kind in ("linear", "head", "router"):
            found.ignored.append(tensor.name.removesuffix(_WEIGHT))
        elif is_stack(tensor.name, tensor.shape, kind):
            found.ignored.append(tensor.name.rpartition(".")[0])  # engines take its module for a linear one
        if view is not None and reason is not None:
            found.dense.append((tensor, reason))
    return found


def _early(tensor: Tensor, view: EngineView | None, place: Place | None) -> str | None:
    """Why a weight has to be dequantized while it is loaded, as the end of "it …"; None if it need not."""
    if view is None or place is None or place.fused is not None:
        return None
    if place.needed and view.format not in _UNPACKED:
        return "is looked at by transformers before it is unpacked"
    if view.format == EXACT and tensor.dtype != "bfloat16":
        return f"is {tensor.dtype}, and compressed-tensors unpacks {view.format} to bfloat16 where it runs"
    return place.early


def _grouped(packed: Mapping[str, EngineView], first: set[str]) -> list[tuple[EngineView, list[str]]]:
    """Weights by scheme; that of experts first, since transformers takes the first group for theirs."""
    groups: dict[str, tuple[EngineView, list[str]]] = {}
    for name, view in packed.items():
        groups.setdefault(scheme_key(view), (view, []))[1].append(name)
    return sorted(groups.values(), key=lambda group: first.isdisjoint(group[1]))


def _ignored(found: _SortedWeights, manifest: Manifest, modules: Modules) -> list[str]:
    """All modules that "Linear" could mean and that are dense, by the names that engines look for them."""
    names = [called for name in found.ignored for called in modules.called(name)]
    for alias in manifest.aliases:
        if alias.endswith(_WEIGHT) and alias not in found.packed:
            names += modules.called(alias.removesuffix(_WEIGHT))
    names += [called for name in modules.linears if name not in found.modules for called in modules.called(name)]
    if "lm_head.weight" not in found.packed:
        names.append("lm_head")  # tied, and then made by the engine
    return list(dict.fromkeys(names))


def _quantization(
    groups: Sequence[tuple[EngineView, list[str]]],
    ignored: Sequence[str],
    modules: Modules,
    *,
    whole: bool,
    dense: bool,
) -> dict[str, Any]:
    """compressed-tensors' account of the packed weights: a group for each scheme.

    `whole`: transformers dequantizes all of them while it loads them; other engines do not read that. `dense`: weights that it
    makes one parameter of, such as experts, are dense.
    """

    def targets(names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(one for name in names for one in modules.called(name.removesuffix(_WEIGHT))))

    described = [
        _group(["Linear"] if len(groups) == 1 else targets(names), view.scheme(), view.format) for view, names in groups
    ]
    if dense and groups[0][0].format != FLOAT8:
        described.append(_group([_DENSE_EXPERTS], _FLOAT8_CHANNEL, FLOAT8))
    formats = {group["format"] for group in described}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignored),
        **({"dequantize": True} if whole else {}),
        "config_groups": {f"group_{at}": group for at, group in enumerate(described)},
    }


def _group(targets: Sequence[str], weights: Mapping[str, Any], format: str) -> dict[str, Any]:
    """A scheme, and which modules have it."""
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _TOKENS if format == "int-quantized" else None,
        "output_activations": None,
        "format": format,
    }
