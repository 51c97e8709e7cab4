"""Results of cutting a model: the parts that stay, and their worth."""

from __future__ import annotations

from modelstore.format.answers.brief import Result, Timed
from modelstore.format.answers.results import Saved


class LeftOutLayer(Result, frozen=True):
    """A layer that is left out, by its number in the original, and the loss without it and those left out before.

    `loss`: nats a token of divergence from the original, on the samples; with `by="influence"`, how much the layer changes its
    input: 1 - the mean cosine.
    """

    layer: int
    loss: float


class RestructurePlan(Result, frozen=True):
    """The plan of `restructure`: counts before and after (None for parts that are not cut), bytes of all tensors, and the
    work.

    `passes`: how many times the blocks' weights are read to measure; `by`: how layers are compared, "" if they are not.
    """

    model: str
    version: int
    layers: tuple[int, int]
    neurons: tuple[int, int] | None
    heads: tuple[int, int] | None
    key_heads: tuple[int, int] | None
    bytes: tuple[int, int]
    passes: int
    by: str


class Restructured(Timed, frozen=True):
    """A model that was cut out of `parent`: what was saved, the numbers of the layers that stayed, and those that went, in order.

    `layers`, and of each layer `neurons`, `heads` and `key_heads`, are before and after, None if they were not cut; `bytes`
    those of all tensors.
    """

    parent: str
    saved: Saved
    kept: tuple[int, ...]
    left_out: tuple[LeftOutLayer, ...]
    layers: tuple[int, int]
    neurons: tuple[int, int] | None
    heads: tuple[int, int] | None
    key_heads: tuple[int, int] | None
    bytes: tuple[int, int]
    seconds: float
