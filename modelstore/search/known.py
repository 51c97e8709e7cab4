"""The measurements of a model are stored with its original: another budget does not need a second measurement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from modelstore.compress.evaluate.metrics import change
from modelstore.format.names import ORIGINAL, Reference
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import CodecSpec
from modelstore.format.objects.sensitivity import Sensitivity
from modelstore.store.repo import Repo

SENSITIVITY = "sensitivity"  # a list, newest first
_KEPT = 4
_DATA = ("digest", "samples", "length", "seed")  # what data are found again by
_DIGITS = 6  # of what is kept


def measured(metrics: Mapping[str, Any]) -> list[Sensitivity]:
    """The measurements among a manifest's metrics, newest first; what is none of ours is passed over."""
    found = []
    kept = metrics.get(SENSITIVITY)
    for item in kept if isinstance(kept, list) else ():
        try:
            one = msgspec.convert(item, prepared(Sensitivity))
        except msgspec.ValidationError:
            continue
        if all(len(costs) == len(one.formats) for costs in one.costs.values()):
            found.append(one)
    return found


def known(
    metrics: Mapping[str, Any],
    formats: Sequence[CodecSpec],
    wanted: Collection[str],
    data: Mapping[str, Any] | None,
    *,
    solved: bool = False,
) -> Sensitivity | None:
    """The newest measurement of these data (of any, where None are given) that says all of these formats and tensors.

    It has these formats, in their order. `solved`: it is to say what solving codes gains, too. None if it was not made yet.
    """
    for one in measured(metrics):
        if solved and one.gains is None:
            continue
        if data is not None and any(one.data.get(key) != data.get(key) for key in _DATA):
            continue
        if all(spec in one.formats for spec in formats) and one.costs.keys() >= set(wanted):
            at = [one.formats.index(spec) for spec in formats]
            costs = {name: tuple(one.costs[name][place] for place in at) for name in wanted}
            return Sensitivity(one.data, tuple(formats), costs, one.gains)
    return None


def found_by(data: Mapping[str, Any]) -> dict[str, Any]:
    """The key that data are found again by."""
    return {key: data.get(key) for key in _DATA}


def rounded(costs: Mapping[str, Sequence[float | None]]) -> dict[str, tuple[float | None, ...]]:
    """Costs with as many digits as are kept."""
    return {
        name: tuple(None if one is None else float(f"{one:.{_DIGITS}g}") for one in each)
        for name, each in costs.items()
    }


def keep(repo: Repo, model: str, version: int, content: str, made: Sensitivity) -> None:
    """Keep a measurement with the original of a version; `content` is that of the manifest that was measured.

    `ConflictError` if it holds other values by now.
    """

    def with_it(metrics: Mapping[str, Any]) -> dict[str, Any]:
        def what(one: Sensitivity) -> tuple[Any, ...]:
            return one.data, one.formats, one.gains is None

        others = [one for one in measured(metrics) if what(one) != what(made)][: _KEPT - 1]
        return {**metrics, SENSITIVITY: [msgspec.to_builtins(one) for one in (made, *others)]}

    change(repo, Reference(model, version=version, variant=ORIGINAL), content, with_it)
