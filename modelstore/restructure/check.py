"""Whether a rewritten config.json describes the model that was cut: its class is built, and compared with the original's.

A config whose lists have the length of before makes a model that loads and is wrong. So each layer must be what it was, but for
its number and what was cut, and each parameter must have the shape that is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from modelstore.architecture.classes.model_class import Built, build
from modelstore.architecture.classes.names import parameters
from modelstore.architecture.classes.skeleton import Skeleton
from modelstore.architecture.config import Config
from modelstore.errors import FormatError, UnsupportedError
from modelstore.restructure.cut import CutTensor

_NUMBERED = ("layer_idx", "layer_id", "layer_number", "block_idx")
_SHAPES = ("in_features", "out_features", "nf", "nx")  # compared with the stored shapes
_PLAIN = (bool, int, float, str, type(None))


def check(
    before: Skeleton,
    config: Config,
    class_name: str,
    cut: Sequence[CutTensor],
    layers: Sequence[int],
    changed: Collection[tuple[int, int]],
) -> None:
    """`UnsupportedError` if transformers makes another model of `config` than the one that was cut.

    before: the original. layers: those that are kept. changed: numbers, such as those of neurons, before and after.
    """
    built = build({**config, "architectures": [class_name]}, len(cut))
    after = Skeleton(built.model.eval())
    if after.count != len(layers):
        raise UnsupportedError(f"its rewritten config.json makes {after.count} layers, where {len(layers)} are kept")
    for place, layer in enumerate(layers):
        _compare(before, after, layer, place, frozenset(changed))
    _shapes(built, {one.name: one.shape for one in cut})


def _compare(before: Skeleton, after: Skeleton, layer: int, place: int, changed: Collection[tuple[int, int]]) -> None:
    there = dict(after.block(place).named_modules())
    for name, module in before.block(layer).named_modules():
        other = there.get(name)
        if other is None or type(other) is not type(module):
            raise UnsupportedError(f"layer {layer} would be of another kind as layer {place}: keep other layers")
        for key, value in _attributes(module):
            now = getattr(other, key, None)
            if now != value and (value, now) not in changed:
                raise UnsupportedError(
                    f"layer {layer} would have {'.'.join((name, key)) if name else key} = {now!r} as layer {place}, where it has "
                    f"{value!r}: keep other layers, or save it with a config.json that names what each layer is"
                )


def _attributes(module: Any) -> Iterable[tuple[str, Any]]:
    """A module's own description in plain values, but for its number and shapes."""
    return (
        (key, value)
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in (*_NUMBERED, *_SHAPES) and isinstance(value, _PLAIN)
    )


def _shapes(built: Built, stored: Mapping[str, tuple[int, ...]]) -> None:
    try:
        made = parameters(built, stored)
    except FormatError as error:
        raise UnsupportedError(f"what is left does not make the model of its rewritten config.json: {error}") from error
    known = built.model.state_dict(keep_vars=True)
    for name, one in made.made.items():
        if one.patterns == ("",) and tuple(known[name].shape) != stored[one.sources[0]]:
            raise UnsupportedError(
                f"{one.sources[0]} would be {list(stored[one.sources[0]])}, and transformers makes it "
                f"{list(known[name].shape)} of the rewritten config.json: this cut cannot be described for such a model"
            )
