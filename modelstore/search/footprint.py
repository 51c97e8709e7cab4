"""A model's memory in an engine beside its weights: KV cache, activations, logits; by its config alone."""

from __future__ import annotations

from typing import Any

from modelstore.errors import UnsupportedError
from modelstore.format.answers.fitted import Memory

_LOGIT = 4  # bytes: float32
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def footprint(config: Any, context: int, batch: int, number: int) -> Memory:
    """The memory of `batch` sequences of `context` tokens together. config: of the text, as transformers has it; number: bytes
    of one.

    `ValueError` if the model has fewer positions; `UnsupportedError` for layers whose state is not known.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        raise ValueError(f"context={context} is more than the model's {longest} positions")
    tokens = batch * context
    wide = _widest(config)
    return Memory(
        context,
        batch,
        cache=batch * number * _per_token(config) * sum(_lengths(config, context)),
        activations=tokens * wide * number,
        logits=batch * int(config.vocab_size) * _LOGIT,
    )


def _per_token(config: Any) -> int:
    """Numbers that one layer keeps of one token."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank:  # MLA: one latent for keys and values, and the rotated part of the keys
        return int(rank) + int(config.qk_rope_head_dim)
    heads = int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(getattr(config, "num_key_value_heads", None) or heads) * dim


def _lengths(config: Any, context: int) -> list[int]:
    """The tokens that each layer with a cache of its own keeps of a sequence, as transformers' caches decide it."""
    layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        of_all = next((kind for kind, key in _WINDOWS.items() if getattr(config, key, None)), "full_attention")
        kinds = [of_all] * layers
    kinds = list(kinds)[: layers - int(getattr(config, "num_kv_shared_layers", None) or 0)]
    strange = next((kind for kind in kinds if kind not in ("full_attention", "attention", *_WINDOWS)), None)
    if strange is not None:
        raise UnsupportedError(
            f"what layers of {strange!r} keep of a sequence is not known here: without context=, fit= counts bytes as stored"
        )
    return [min(context, int(getattr(config, _WINDOWS[kind]))) if kind in _WINDOWS else context for kind in kinds]


def _widest(config: Any) -> int:
    """Numbers that a token takes at most within a block: what goes around it, and gate and up beside each other."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or hidden // heads)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    each = getattr(config, "moe_intermediate_size", None)
    active = int(getattr(config, "num_experts_per_tok", None) or 1)
    inner = max(inner, int(each) * active) if each else inner * active
    return hidden + max(2 * inner, 3 * heads * dim)
