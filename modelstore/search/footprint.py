"""A model's memory in an engine beside its weights: KV cache, activations, logits; by its sizes alone."""

from __future__ import annotations

from modelstore.architecture.sizes import Sizes
from modelstore.errors import UnsupportedError
from modelstore.format.answers.fitted import Memory

_LOGIT = 4  # bytes: float32


def footprint(sizes: Sizes, context: int, batch: int, number: int) -> Memory:
    """The memory of `batch` sequences of `context` tokens together. number: bytes of one number.

    `ValueError` if the model has fewer positions; `UnsupportedError` for layers whose state is not known.
    """
    if sizes.positions is not None and context > sizes.positions:
        raise ValueError(f"context={context} is more than the model's {sizes.positions} positions")
    # What goes around a block, and the widest within it: gate and up beside each other, or queries, keys and values.
    wide = sizes.hidden + max(2 * sizes.inner, 3 * sizes.heads * sizes.head)
    each = sizes.latent or 2 * sizes.kv_heads * sizes.head
    return Memory(
        context,
        batch,
        cache=batch * number * each * sum(_lengths(sizes, context)),
        activations=batch * context * wide * number,
        logits=batch * sizes.vocabulary * _LOGIT,
    )


def _lengths(sizes: Sizes, context: int) -> list[int]:
    """The tokens that each layer with a cache of its own keeps of a sequence."""
    layers = sizes.cached()
    strange = next((layer.kind for layer in layers if not layer.known), None)
    if strange is not None:
        raise UnsupportedError(
            f"what layers of {strange!r} keep of a sequence is not known here: without context=, fit= counts bytes as stored"
        )
    return [context if layer.window is None else min(context, layer.window) for layer in layers]
