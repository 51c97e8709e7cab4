"""transformers' names for the tensors of a GGUF file, and the configuration in its metadata, for the Llama family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.format.files.gguf import Header

# llama.cpp's architecture → transformers', its model type, and whether heads' rows are put beside each other (rope).
_KNOWN = {
    "llama": ("LlamaForCausalLM", "llama", True),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", False),
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_WIDEST = 4096  # of a head
_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Names by the file's names, rows of a head whose order changes, files that are made, and what is left out and why."""

    names: Mapping[str, str]
    heads: Mapping[str, int]
    files: Mapping[str, Path | bytes]
    skipped: Mapping[str, str]


def renamed(header: Header) -> CheckpointNames:
    """transformers' names for a file's tensors; none where the architecture, or one of the tensors, is not known."""
    architecture = header.get("general.architecture")
    known = _KNOWN.get(architecture) if isinstance(architecture, str) else None
    nothing = CheckpointNames({}, {}, {}, {})
    if known is None:
        return nothing
    names: dict[str, str] = {}
    for tensor in header.tensors:
        found = _IN_BLOCK.fullmatch(tensor.name)
        if tensor.name in _TOP:
            names[tensor.name] = _TOP[tensor.name]
        elif found and found[2] in _BLOCK:
            names[tensor.name] = f"model.layers.{int(found[1])}.{_BLOCK[found[2]]}.{found[3]}"
        elif tensor.name != _FACTORS:
            return nothing
    config = _config(header, known)
    heads: dict[str, int] = {}
    if known[2]:
        width = config.get("head_dim") if config else None
        for tensor in header.tensors:
            if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
                if not isinstance(width, int) or not 2 <= width <= _WIDEST or width % 2 or tensor.shape[0] % width:
                    return nothing
                heads[tensor.name] = width
    skipped = {}
    if any(tensor.name == _FACTORS for tensor in header.tensors):
        skipped[_FACTORS] = "transformers makes it of its configuration"
    if config is None or skipped or header.get(f"{architecture}.rope.scaling.type", "none") != "none":
        skipped["config.json"] = (
            "the file does not say all that it has: take it from the model that the file was made of"
        )
        return CheckpointNames(names, heads, {}, skipped)
    return CheckpointNames(names, heads, {"config.json": json.dumps(config, indent=2).encode()}, skipped)


def _config(header: Header, known: tuple[str, str, bool]) -> dict[str, Any] | None:
    architecture, of = header.get("general.architecture"), {tensor.name: tensor for tensor in header.tensors}

    def says(key: str, default: Any = None) -> Any:
        return header.get(f"{architecture}.{key}", default)

    hidden, heads = says("embedding_length"), says("attention.head_count")
    embedding = of.get("token_embd.weight")
    if type(hidden) is not int or type(heads) is not int or heads < 1 or embedding is None or len(embedding.shape) != 2:
        return None
    config: dict[str, Any] = {
        "architectures": [known[0]],
        "model_type": known[1],
        "hidden_size": hidden,
        "intermediate_size": says("feed_forward_length"),
        "num_hidden_layers": says("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": says("attention.head_count_kv", heads),
        "head_dim": says("attention.key_length", hidden // heads),
        "max_position_embeddings": says("context_length"),
        "vocab_size": embedding.shape[0],
    }
    if not all(type(value) is int for key, value in config.items() if key not in ("architectures", "model_type")):
        return None
    epsilon, base = says("attention.layer_norm_rms_epsilon", 1e-6), says("rope.freq_base", 10000.0)
    if not isinstance(epsilon, float) or not isinstance(base, float):
        return None
    # The file has float32: the shortest text that is this float32 is what was meant.
    config |= {"rms_norm_eps": _short(epsilon), "rope_theta": _short(base), "hidden_act": "silu"}
    config["tie_word_embeddings"] = "output.weight" not in of
    config["attention_bias"] = any(name.endswith(".attn_q.bias") for name in of)
    for name in ("bos", "eos"):
        token = header.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int:
            config[f"{name}_token_id"] = token
    return config


def _short(number: float) -> float:
    import numpy as np

    return float(str(np.float32(number)))
