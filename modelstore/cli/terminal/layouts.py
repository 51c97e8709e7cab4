"""A rank's part of a model, as it is written on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import reduce
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from modelstore.plan.layout import Layout

_RANKS = re.compile(r"(tp|pp|ep)=(\d{1,6})/(\d{1,6})")
_LAYERS = re.compile(r"layers=(\d{1,6}):(\d{1,6})")
_REGION = re.compile(r"(.+)\[([0-9:,.\s-]*)\]", re.DOTALL)
_HELP = (
    "write tp=RANK/SIZE, pp=STAGE/STAGES, ep=RANK/SIZE, layers=START:STOP, or 'NAME[SLICES]', such as 'head[:, 0:64]'"
)


def layout_of(texts: Iterable[str]) -> Layout:
    """The layout that combines all of these; regions of several tensors are held together. Wrong usage if one cannot be
    read.
    """
    from modelstore.plan.layout import Regions

    layouts: list[Layout] = []
    regions: dict[str, tuple[object, ...]] = {}
    for text in texts:
        try:
            made = _layout(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}: {error}", param_hint="--shard") from None
        if isinstance(made, tuple):
            if made[0] in regions:
                raise typer.BadParameter(f"{text!r}: tensor {made[0]!r} is given twice", param_hint="--shard")
            regions[made[0]] = made[1]
        else:
            layouts.append(made)
    if regions:
        layouts.append(Regions(regions))
    return reduce(lambda one, other: one & other, layouts)


def _layout(text: str) -> Layout | tuple[str, tuple[object, ...]]:
    from modelstore.plan import layout

    ranks: dict[str, Callable[[int, int], Layout]] = {
        "tp": layout.TensorParallel,
        "pp": layout.PipelineStage,
        "ep": layout.ExpertParallel,
    }
    if match := _RANKS.fullmatch(text):
        return ranks[match[1]](int(match[2]), int(match[3]))
    if match := _LAYERS.fullmatch(text):
        return layout.Layers(int(match[1]), int(match[2]))
    if match := _REGION.fullmatch(text):
        return match[1], tuple(_slice(part.strip()) for part in match[2].split(","))
    raise ValueError(f"it is not part of a model: {_HELP}")


def _slice(text: str) -> object:
    if text == "...":
        return ...
    ends = text.split(":")
    if len(ends) != 2 or not all(re.fullmatch(r"\s*(-?\d{1,18})?\s*", end) for end in ends):
        raise ValueError(f"{text!r} is not a range of one axis: {_HELP}")
    start, stop = (int(end) if end.strip() else None for end in ends)
    return slice(start, stop)
