"""Results of a fit: the format of each layer, at which size, and the expected cost."""

from __future__ import annotations

from typing import Any

from modelstore.format.answers.brief import Result


class Mixed(Result, frozen=True):
    """Tensors that share a format, since engines run them as one, or one alone; `codec` is "" where they are kept.

    `bytes` as stored, `cost` in nats a token: what they are expected to add to the divergence from the original.
    """

    tensors: tuple[str, ...]
    codec: str
    params: dict[str, Any]
    bytes: int
    cost: float


class FrontPoint(Result, frozen=True):
    """The best mix of a size: its bytes as stored, and the divergence in nats a token that is expected of it."""

    bytes: int
    cost: float


class Memory(Result, frozen=True):
    """The memory of an engine beside the weights, for `batch` sequences of `context` tokens, in bytes.

    `cache`: keys and values of all layers; `activations`: the most that exist at a time within a block, if all tokens are read
    in one step; `logits`: those of the last token of each sequence.
    """

    context: int
    batch: int
    cache: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.cache + self.activations + self.logits


class FitPlan(Result, frozen=True):
    """The plan of a fit. `budget`, `smallest` (the least that is possible) and `original` are bytes as stored.

    With `memory` they are bytes that an engine holds: weights, scales, and what `memory` says.

    `measured`: whether it is known what each format costs; where it is not, `passes` over the data (`blocks` blocks there and
    back, with up to `spool` bytes of activations) come first, and what follows is not known. `bytes` and `cost` are those of
    the mix, `recipe` makes it, `front` tells other sizes, `unseen` the tensors of which the data say nothing. `seconds` a token
    are those of a device where its formats were measured.
    """

    model: str
    version: int
    budget: int
    smallest: int
    original: int
    measured: bool
    passes: int
    blocks: int
    spool: int
    bytes: int | None = None
    cost: float | None = None
    recipe: dict[str, Any] | None = None
    groups: tuple[Mixed, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    unseen: tuple[str, ...] = ()
    memory: Memory | None = None
    seconds: float | None = None
