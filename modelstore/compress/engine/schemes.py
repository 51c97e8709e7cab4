"""In which scheme each compressed weight is offered to engines, and which are dense because no engine would take them so.

A weight stays dense for its own reasons (no linear layer has it, its shape does not have a layout), or because of the others.
transformers makes one parameter of all experts of a layer while it loads them, by one scheme for the whole model; and if it
has to unpack all weights while it loads them, it does so by one scheme, too. Zero points that are not taken are left out where
the codes can be written in more bits.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from modelstore.architecture.classes.places import Modules, Place
from modelstore.codecs.integer.view import without_zero_points
from modelstore.codecs.weight import EngineView, matrix
from modelstore.errors import UnsupportedError
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Shape

log = logging.getLogger("modelstore")

Views = Mapping[str, EngineView]
Places = Mapping[str, Place]

# Types that compressed-tensors unpacks to bfloat16: powers of two times numbers of four bits are exact in it, others rounded.
EXACT, ROUNDED = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
FLOAT8 = "float-quantized"
_WORD = 32  # bits, into which the zero points of several rows are packed


@dataclass(frozen=True, slots=True)
class Offer:
    """How each compressed weight is packed, if it is; why the others are dense, as the end of "it …"."""

    views: Views
    dense: Mapping[str, str]


def offered(manifest: Manifest, views: Views, plain: Views, places: Places, modules: Modules) -> Offer:
    """The schemes of a model's compressed weights. `plain`: the views without what is beside them, such as int8 activations."""
    found = {name: _apart(view, plain[name], places.get(name)) for name, view in views.items()}
    changed = [name for name, view in found.items() if view is plain[name] and view is not views[name]]
    if changed:
        log.warning(
            "%d weights such as %r are written for activations as they are: transformers makes one parameter of them while it "
            "loads them, and takes them so only",
            len(changed),
            changed[0],
        )
    dense = _alone(manifest, found, places)
    if modules.late or len(_schemes(manifest, found, dense)) != 1:
        found = {name: without_zero_points(view) or view for name, view in found.items()}
        dense = _alone(manifest, found, places)
        dense |= {
            name: "has zero points, which transformers takes where all weights are packed so"
            for name, view in found.items()
            if has_zero_points(view) and name not in dense
        }
    dense |= _fused(manifest, found, places, dense)
    if modules.early:
        kept = _schemes(manifest, found, dense).most_common(1)
        dense |= {
            name: "is compressed otherwise than most, and transformers unpacks the weights of this model by one scheme"
            for name, view in found.items()
            if name not in dense and scheme_key(view) != kept[0][0]
        }
    return Offer(found, dense)


def scheme_key(view: EngineView) -> str:
    """The same for weights that one group of a config describes."""
    return json.dumps([view.format, view.scheme()], sort_keys=True)


def has_zero_points(view: EngineView) -> bool:
    """Whether codes stand for numbers around another one than 0."""
    return not view.scheme().get("symmetric", True)


def _schemes(manifest: Manifest, views: Views, dense: Mapping[str, str]) -> Counter[str]:
    """The schemes of the weights that are packed, with the bytes of their values."""
    found: Counter[str] = Counter()
    for name, view in views.items():
        if name not in dense:
            found[scheme_key(view)] += manifest.by_name[name].nbytes
    return found


def _apart(view: EngineView, plain: EngineView, place: Place | None) -> EngineView:
    """The view, or the first of those of the same numbers that transformers takes apart where it makes one parameter of many."""
    if place is None or place.fused is None:
        return view
    others = (view, plain, without_zero_points(plain))
    return next((one for one in others if one is not None and _loaded_in_one(one)), view)


def _loaded_in_one(view: EngineView) -> bool:
    """Whether transformers takes weights of that scheme apart before it makes one parameter of them."""
    scheme = view.scheme()
    if view.format == "pack-quantized":
        return bool(scheme["symmetric"])
    return view.format == EXACT or (view.format == FLOAT8 and scheme["strategy"] in ("channel", "tensor"))


def _alone(manifest: Manifest, views: Views, places: Places) -> dict[str, str]:
    """Why weights are dense whatever the others are."""
    found = {name: _reason(manifest.by_name[name], view, places.get(name)) for name, view in views.items()}
    return {name: why for name, why in found.items() if why is not None}


def _reason(tensor: Tensor, view: EngineView, place: Place | None) -> str | None:
    """Why a compressed tensor is not packed, as the end of "it …"; None if it is."""
    if len(tensor.shape) > 2:
        return f"is {len(tensor.shape)}-d, which engines have no packed layout for"
    if place is None:
        return "is not the weight of a layer"
    if place.fused and place.why is None and not _loaded_in_one(view):
        scheme = view.scheme()
        how = "with zero points" if has_zero_points(view) else f"by {scheme['strategy']}"
        return f"is made one parameter with others by transformers, which does not take {view.format} {how} apart"
    if tensor.dtype != "bfloat16" and (view.format == ROUNDED or (view.format == EXACT and place.fused)):
        return f"is {tensor.dtype}, and compressed-tensors unpacks {view.format} to bfloat16 only"
    return _unfit(view, tensor.shape) or place.why


def _unfit(view: EngineView, shape: Shape) -> str | None:
    """Why engines do not take a weight of that shape packed, as the end of "it …"."""
    try:
        view.cells(shape)
    except UnsupportedError as error:
        return f"does not fit: {error}"
    scheme = view.scheme()
    if has_zero_points(view) and shape[0] * scheme["num_bits"] <= _WORD:
        return f"has {shape[0]} rows, whose zero points are one word, which compressed-tensors does not unpack"
    group = scheme.get("group_size")
    columns = matrix(shape)[1]
    if isinstance(group, int) and group > 0 and columns % group:
        return f"has {columns} columns, which are not whole groups of {group}"
    return None


def _fused(manifest: Manifest, views: Views, places: Places, dense: Mapping[str, str]) -> dict[str, str]:
    """Why weights that transformers makes one parameter of are dense for the sake of others that are.

    It takes those of a model in one scheme: of float8 parameter by parameter packed or dense, of any other all of them packed.
    """
    members: dict[str, list[str]] = {}
    for name, place in places.items():
        if place.fused is not None:
            members.setdefault(place.fused, []).append(name)
    whole = {
        name for names in members.values() if all(one in views and one not in dense for one in names) for name in names
    }
    most = _schemes(manifest, {name: views[name] for name in whole}, {}).most_common(1)
    kept = [
        names
        for names in members.values()
        if all(one in whole and scheme_key(views[one]) == most[0][0] for one in names)
    ]
    if kept and len(kept) < len(members) and views[kept[0][0]].format != FLOAT8:
        kept = []
    packed = {name for names in kept for name in names}
    return {
        name: "is made one parameter with others by transformers, which takes them packed if all are so, and in one way"
        for names in members.values()
        for name in names
        if name in views and name not in packed and name not in dense
    }
