"""Small models of several kinds, of random weights, that are cut."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "qwen2": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM Gemma3TextConfig", SMALL | {"head_dim": 16, "sliding_window": 8}),
    "cohere2": ("Cohere2", SMALL | {"sliding_window": 8}),
    "phi3": ("Phi3", SMALL | {"pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoX", NEOX),
    "opt": ("OPT", NEOX | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", SMALL | EXPERTS | {"mlp_only_layers": [1]}),
}


def make(kind: str, vocabulary: int) -> Any:
    """A model of a kind, of random weights."""
    import torch
    import transformers

    named, sizes = KINDS[kind]
    cls, config = named.split() if " " in named else (f"{named}ForCausalLM", f"{named}Config")
    torch.manual_seed(0)
    found = getattr(transformers, config)(vocab_size=vocabulary, **sizes)
    return getattr(transformers, cls)(found).eval()
