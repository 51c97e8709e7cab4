"""The part of a tensor that one rank holds, as plain data, and how layouts are combined."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelstore.architecture.config import Config
from modelstore.errors import NotFoundError
from modelstore.format.given import told
from modelstore.format.objects.architecture import Architecture
from modelstore.format.region import Region, Shape, check, from_index, full, intersect, shift
from modelstore.format.suggest import suggestion

Shapes = Mapping[str, Shape]
AxisRange = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's share of one tensor: for each dimension the ranges it holds, put one after another.

    One range a dimension is a box. A fused tensor needs more: of rows q|k|v a rank holds three ranges. The share is
    the product of the ranges of all dimensions, and may be empty (a range of length 0). A 0-d tensor has `ranges == ()`.
    """

    ranges: tuple[tuple[AxisRange, ...], ...]

    @classmethod
    def of(cls, region: Region) -> Share:
        """The share that is one region."""
        return cls(tuple((pair,) for pair in region))

    @property
    def shape(self) -> Shape:
        """The shape of the rank's tensor."""
        return tuple([sum([b - a for a, b in ranges]) for ranges in self.ranges])

    @property
    def region(self) -> Region | None:
        """The share as one region, None if it takes several."""
        return tuple(ranges[0] for ranges in self.ranges) if all(len(r) == 1 for r in self.ranges) else None

    def pieces(self) -> Iterator[tuple[Region, Region]]:
        """(region of the whole tensor, region of the rank's tensor) for each box, in row-major order."""
        for picks in itertools.product(*(_placed(ranges) for ranges in self.ranges)):
            yield tuple(source for source, _ in picks), tuple(target for _, target in picks)

    def within(self, other: Share) -> Share:
        """The parts that both shares of the same tensor hold, in this share's order."""
        return Share(
            tuple(
                _joined([(max(a, c), min(b, d)) for a, b in mine for c, d in theirs])
                for mine, theirs in zip(self.ranges, other.ranges, strict=True)
            )
        )


def overlaps(pieces: Iterable[tuple[Region, Region]], region: Region) -> Iterator[tuple[Region, Region]]:
    """The parts of a region of the tensor that a share's `pieces` hold, as boxes: (region of the whole tensor, region of the
    rank's).
    """
    for stored, placed in pieces:
        both = intersect(region, stored)
        if both is not None:
            inner = shift(both, stored)
            yield both, tuple((a + c, b + c) for (a, b), (c, _) in zip(inner, placed, strict=True))


def whole(shape: Shape) -> Share:
    """The share that is the whole tensor."""
    return Share.of(full(shape))


def cut(shape: Shape, axis: int, ranges: Sequence[AxisRange]) -> Share:
    """The share that holds `ranges` of one axis and everything of the others; ranges that touch become one."""
    return Share(tuple(_joined(ranges) if i == axis else ((0, n),) for i, n in enumerate(shape)))


def _joined(ranges: Sequence[AxisRange]) -> tuple[AxisRange, ...]:
    joined: list[AxisRange] = []
    for a, b in ranges:
        if a >= b:
            continue
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return tuple(joined) or ((0, 0),)


def _placed(ranges: tuple[AxisRange, ...]) -> list[tuple[AxisRange, AxisRange]]:
    placed, at = [], 0
    for a, b in ranges:
        placed.append(((a, b), (at, at + b - a)))
        at += b - a
    return placed


class Layout(Protocol):
    """How a model is divided, seen from one rank."""

    def shares(self, config: Config | None, tensors: Shapes, known: Architecture | None = None) -> dict[str, Share]:
        """The shares that this rank holds of a model with that `config.json` and those tensors, in their order.

        A tensor that is missing from the answer is not held at all; names are kept as they are. `config` is None if the model
        does not have a `config.json`; `known` is what its manifest says of it. `UnsupportedError` if the layout cannot be
        derived, `ValueError` if a tensor cannot be divided this way.
        """
        ...

    def __and__(self, other: Layout) -> Layout:
        """The layout that holds what both hold."""
        ...


class Combines:
    """Gives a layout its `&`."""

    def __and__(self: Layout, other: Layout) -> Layout:
        return Both(self, other)


@dataclass(frozen=True)
class Both(Combines):
    """The parts that two layouts both hold: `PipelineStage(1, 4) & TensorParallel(3, 8)`."""

    one: Layout
    other: Layout

    def shares(self, config: Config | None, tensors: Shapes, known: Architecture | None = None) -> dict[str, Share]:
        """The tensors that both hold, each cut by both."""
        mine = self.one.shares(config, tensors, known)
        theirs = self.other.shares(config, tensors, known)
        return {name: share.within(theirs[name]) for name, share in mine.items() if name in theirs}


class Regions(Combines):
    """Exactly these regions of these tensors, for any model; a tensor that is not listed is not held.

    Each value is a region `((start, stop), …)`, an index (`numpy.s_[:, 1024:2048]`; slices of step 1 and `...`), or None for
    the whole tensor. `NotFoundError` if the model does not have such a tensor, `ValueError` if a region is not within it.
    """

    def __init__(self, regions: Mapping[str, Any]) -> None:
        if not isinstance(regions, Mapping):
            raise TypeError(f"regions maps names of tensors to regions, and is {told(regions)}")
        self.regions = dict(regions)

    def __repr__(self) -> str:
        return f"Regions({self.regions!r})" if len(self.regions) < 9 else f"Regions({len(self.regions):,} tensors)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Regions) and self.regions == other.regions

    __hash__ = None  # type: ignore[assignment]  # holds a dict

    def shares(
        self,
        config: Config | None,  # noqa: ARG002
        tensors: Shapes,
        known: Architecture | None = None,  # noqa: ARG002
    ) -> dict[str, Share]:
        """The listed tensors, in the order of the model."""
        for name in self.regions:
            if name not in tensors:
                raise NotFoundError(
                    f"the model has no tensor {name!r}{suggestion(name, tensors)}: 'modelstore show' lists them with --tensors",
                    tensor=name,
                )
        return {
            name: Share.of(_region(name, self.regions[name], shape))
            for name, shape in tensors.items()
            if name in self.regions
        }


def _region(name: str, index: Any, shape: Shape) -> Region:
    """A user's region of one tensor, as a region of it."""
    if index is None:
        return full(shape)
    try:
        if index and isinstance(index, tuple) and all(isinstance(pair, tuple | list) for pair in index):
            region: Region = tuple((int(a), int(b)) for a, b in index)
            check(region, shape)
            return region
        region, dropped = from_index(index, shape, exact=True)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if dropped:
        raise ValueError(f"{name}: {index!r} drops a dimension; give a range of length 1 (i:i+1) instead")
    return region


Shard = Layout | Mapping[str, Any]


def as_layout(shard: Shard | None) -> Layout | None:
    """A layout; a mapping of names to regions is one, too."""
    return Regions(shard) if isinstance(shard, Mapping) else shard
