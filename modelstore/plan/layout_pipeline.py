"""Pipeline parallelism: a range of layers; embeddings with the first, final norm and head with the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelstore.architecture.blocks import blocks, head_tensors
from modelstore.architecture.config import Config
from modelstore.errors import UnsupportedError
from modelstore.format import given
from modelstore.format.objects.architecture import Architecture
from modelstore.plan.layout_share import Combines, Shapes, Share, whole


@dataclass(frozen=True)
class Layers(Combines):
    """Layers `start` to `stop` (not included), whole.

    Tensors outside the layers go with the first layer (embeddings, towers), or with the last (final norm, heads). If the
    head's weight is tied to the embedding and not stored separately, both the first and the last hold the embedding, under its
    own name. `UnsupportedError` for a model with several stacks of layers (encoder and decoder).
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        given.whole("start", self.start)
        given.whole("stop", self.stop)
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"layers {self.start} to {self.stop}: give 0 <= start <= stop")

    def shares(self, config: Config | None, tensors: Shapes, known: Architecture | None = None) -> dict[str, Share]:
        """The tensors of these layers, whole, with what belongs to the model's ends."""
        layers = _layers(tensors, known)
        count = max(layers.values(), default=-1) + 1
        if self.stop > count:
            raise ValueError(f"layers {self.start} to {self.stop} of a model that has {count}: give 0 to {count}")
        if not count and tensors:
            raise ValueError("the model has no numbered layers: give Regions with what is to be held, or all of it")
        mine = range(self.start, self.stop)
        return _held(tensors, mine, self.start == 0, self.stop == count, config, known)


@dataclass(frozen=True)
class PipelineStage(Combines):
    """Stage `stage` of `stages`, each with as many layers; see `Layers` for tensors outside them.

    If the layers do not divide evenly, the stages before the last take one more each, from the back: the first and the last
    also hold the embedding and the head. `ValueError` if there are more stages than layers.
    """

    stage: int
    stages: int

    def __post_init__(self) -> None:
        given.whole("stage", self.stage)
        given.whole("stages", self.stages)
        if self.stages < 1 or not 0 <= self.stage < self.stages:
            raise ValueError(f"stage {self.stage} of {self.stages}: a stage is at least 0 and below their number")

    def shares(self, config: Config | None, tensors: Shapes, known: Architecture | None = None) -> dict[str, Share]:
        """The tensors of this stage, whole."""
        layers = _layers(tensors, known)
        count = max(layers.values(), default=-1) + 1
        if self.stages > 1 and not count and tensors:
            raise ValueError(f"{self.stages} stages of a model that has no numbered layers: give Regions, or all of it")
        if self.stages > max(count, 1):
            raise ValueError(f"{self.stages} stages of a model that has {count} layers: give no more than {count}")
        each, more = divmod(count, self.stages)
        sizes = [each + (self.stages - 1 - more <= i < self.stages - 1) for i in range(self.stages)]
        start = sum(sizes[: self.stage])
        mine = range(start, start + sizes[self.stage])
        return _held(tensors, mine, self.stage == 0, self.stage == self.stages - 1, config, known)


def _layers(tensors: Shapes, known: Architecture | None) -> Mapping[str, int]:
    """The layer of each tensor that is in one."""
    stacks = blocks(tensors, known).stacks
    if len(stacks) > 1:
        raise UnsupportedError(
            f"the model has several stacks of layers ({', '.join(sorted(stacks))}): give Regions with what this stage holds"
        )
    return next(iter(stacks.values()), {})


def _held(
    tensors: Shapes, mine: range, first: bool, last: bool, config: Config | None, known: Architecture | None
) -> dict[str, Share]:
    layers = _layers(tensors, known)
    ends = set(blocks(tensors, known).after)
    tied = head_tensors(tensors, config, known) if last else set()
    held = {}
    for name, shape in tensors.items():
        if name in layers:
            holds = layers[name] in mine
        elif name in ends:
            holds = last
        else:
            holds = first or name in tied
        if holds:
            held[name] = whole(shape)
    return held
