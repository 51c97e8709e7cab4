"""How the usual architectures are cut for tensor parallelism: a table, by `model_type` of `config.json`.

A module is named by the end of its path, with `*` for a number: `model.layers.3.mlp.experts.7.gate_proj.weight` is
found as `experts.*.gate_proj`; the longest entry wins. What is not listed (norms, routers, position embeddings, vision
towers) is replicated: every rank holds the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["query", "key", "even", "pair", "vocabulary"]
"""What lies along an axis, and so where it may be cut.

`query`: attention heads, as many to every rank. `key`: heads of k or v, as many to every rank, or repeated where there
are fewer than ranks. `even`: features, as many to every rank. `pair`: features of which two neighbours belong together
(gate and up interleaved). `vocabulary`: rows cut at multiples of ceil(n / size), so the last ranks may hold fewer.
"""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one module is cut: the axis of its weight, and the parts that lie along it, each cut by itself.

    `bias`: whether the bias is cut too (along its only axis). It is for column-wise modules, whose outputs are
    divided; a row-wise one is replicated, and added once, after the ranks' partial results are summed.
    """

    axis: int
    parts: tuple[Kind, ...]
    bias: bool = True


@dataclass(frozen=True, slots=True)
class Architecture:
    """The cuts of one model type, and how many heads it has where its `config.json` does not say."""

    cuts: MappingProxyType[str, Cut]
    heads: int
    key_heads: int | None = None  # None: as many as `heads`


QUERY = Cut(0, ("query",))
KEY = Cut(0, ("key",))
OUTPUT = Cut(1, ("query",), bias=False)
COLUMN = Cut(0, ("even",))
ROW = Cut(1, ("even",), bias=False)
VOCABULARY = Cut(0, ("vocabulary",))

_EMBEDDING = {"embed_tokens": VOCABULARY, "lm_head": VOCABULARY}
_ATTENTION = {
    "self_attn.q_proj": QUERY,
    "self_attn.k_proj": KEY,
    "self_attn.v_proj": KEY,
    "self_attn.o_proj": OUTPUT,
}
_MLP = {"mlp.gate_proj": COLUMN, "mlp.up_proj": COLUMN, "mlp.down_proj": ROW}
_LLAMA = _EMBEDDING | _ATTENTION | _MLP
_PHI3 = _EMBEDDING | {
    "self_attn.qkv_proj": Cut(0, ("query", "key", "key")),
    "self_attn.o_proj": OUTPUT,
    "mlp.gate_up_proj": Cut(0, ("even", "even")),
    "mlp.down_proj": ROW,
}
_PHI = _EMBEDDING | _ATTENTION | {"self_attn.dense": OUTPUT, "mlp.fc1": COLUMN, "mlp.fc2": ROW}
_STARCODER2 = _EMBEDDING | _ATTENTION | {"mlp.c_fc": COLUMN, "mlp.c_proj": ROW}
_OPT = _EMBEDDING | _ATTENTION | {"self_attn.out_proj": OUTPUT, "fc1": COLUMN, "fc2": ROW}
# Experts one by one, as most checkpoints hold them, and stacked: [experts, gate|up, in] and [experts, out, features]
_EXPERTS = {
    "experts.*.gate_proj": COLUMN,
    "experts.*.up_proj": COLUMN,
    "experts.*.down_proj": ROW,
    "experts.gate_up_proj": Cut(1, ("even", "even")),
    "experts.down_proj": Cut(2, ("even",)),
}
_MOE = _LLAMA | _EXPERTS
_MIXTRAL = _MOE | {"experts.*.w1": COLUMN, "experts.*.w3": COLUMN, "experts.*.w2": ROW}
_QWEN_MOE = _MOE | {
    "shared_expert.gate_proj": COLUMN,
    "shared_expert.up_proj": COLUMN,
    "shared_expert.down_proj": ROW,
}
_GPT_OSS = (
    _EMBEDDING
    | _ATTENTION
    | {
        "self_attn.sinks": Cut(0, ("query",)),
        "experts.gate_up_proj": Cut(2, ("pair",)),
        "experts.gate_up_proj_bias": Cut(1, ("pair",)),
        "experts.gate_up_proj_blocks": Cut(1, ("pair",)),
        "experts.gate_up_proj_scales": Cut(1, ("pair",)),
        "experts.down_proj": Cut(1, ("even",)),
        "experts.down_proj_blocks": Cut(2, ("even",)),
        "experts.down_proj_scales": Cut(2, ("even",)),
    }
)
# Latent attention: the low-rank projections are shared by all heads, what leads to the heads is cut by them
_DEEPSEEK = (
    _EMBEDDING
    | _MLP
    | _EXPERTS
    | {
        "self_attn.q_proj": QUERY,
        "self_attn.q_b_proj": QUERY,
        "self_attn.kv_b_proj": QUERY,
        "self_attn.o_proj": OUTPUT,
        "shared_experts.gate_proj": COLUMN,
        "shared_experts.up_proj": COLUMN,
        "shared_experts.down_proj": ROW,
    }
)
# Conv1D weights are [in, out], so a column-wise cut is along axis 1
_GPT2 = {
    "wte": VOCABULARY,
    "lm_head": VOCABULARY,
    "attn.c_attn": Cut(1, ("query", "query", "query")),
    "attn.c_proj": Cut(0, ("query",), bias=False),
    "mlp.c_fc": Cut(1, ("even",)),
    "mlp.c_proj": Cut(0, ("even",), bias=False),
}
# Rows are [heads, 3, head size], so a cut by heads holds whole q, k and v
_NEOX = {
    "embed_in": VOCABULARY,
    "embed_out": VOCABULARY,
    "lm_head": VOCABULARY,
    "attention.query_key_value": QUERY,
    "attention.dense": OUTPUT,
    "mlp.dense_h_to_4h": COLUMN,
    "mlp.dense_4h_to_h": ROW,
}
_BLOOM = {
    "word_embeddings": VOCABULARY,
    "lm_head": VOCABULARY,
    "self_attention.query_key_value": QUERY,
    "self_attention.dense": OUTPUT,
    "mlp.dense_h_to_4h": COLUMN,
    "mlp.dense_4h_to_h": ROW,
}
_BERT = {
    "embeddings.word_embeddings": VOCABULARY,
    "attention.self.query": QUERY,
    "attention.self.key": QUERY,
    "attention.self.value": QUERY,
    "attention.output.dense": OUTPUT,
    "intermediate.dense": COLUMN,
    "layer.*.output.dense": ROW,
    "cls.predictions": VOCABULARY,
    "cls.predictions.decoder": VOCABULARY,
    "lm_head": VOCABULARY,
    "lm_head.decoder": VOCABULARY,
}
_DISTILBERT = {
    "embeddings.word_embeddings": VOCABULARY,
    "attention.q_lin": QUERY,
    "attention.k_lin": QUERY,
    "attention.v_lin": QUERY,
    "attention.out_lin": OUTPUT,
    "ffn.lin1": COLUMN,
    "ffn.lin2": ROW,
    "vocab_projector": VOCABULARY,
}


def _architecture(cuts: dict[str, Cut], heads: int, key_heads: int | None = None) -> Architecture:
    return Architecture(MappingProxyType(cuts), heads, key_heads)


ARCHITECTURES = MappingProxyType(
    {
        "llama": _architecture(_LLAMA, 32),
        "mistral": _architecture(_LLAMA, 32, 8),
        "qwen2": _architecture(_LLAMA, 32, 32),
        "qwen3": _architecture(_LLAMA, 32, 32),
        "gemma": _architecture(_LLAMA, 16, 16),
        "gemma2": _architecture(_LLAMA, 8, 4),
        "gemma3": _architecture(_LLAMA, 8, 4),
        "gemma3_text": _architecture(_LLAMA, 8, 4),
        "granite": _architecture(_LLAMA, 32),
        "smollm3": _architecture(_LLAMA, 16, 4),
        "cohere": _architecture(_LLAMA, 64),
        "stablelm": _architecture(_LLAMA, 32, 32),
        "phi": _architecture(_PHI, 32),
        "phi3": _architecture(_PHI3, 32),
        "starcoder2": _architecture(_STARCODER2, 24, 2),
        "opt": _architecture(_OPT, 12),
        "mixtral": _architecture(_MIXTRAL, 32, 8),
        "qwen2_moe": _architecture(_QWEN_MOE, 16, 16),
        "qwen3_moe": _architecture(_QWEN_MOE, 32, 4),
        "gpt_oss": _architecture(_GPT_OSS, 64, 8),
        "deepseek_v2": _architecture(_DEEPSEEK, 32),
        "deepseek_v3": _architecture(_DEEPSEEK, 128),
        "gpt2": _architecture(_GPT2, 12),
        "gpt_neox": _architecture(_NEOX, 64),
        "bloom": _architecture(_BLOOM, 8),
        "bert": _architecture(_BERT, 12),
        "roberta": _architecture(_BERT, 12),
        "xlm-roberta": _architecture(_BERT, 12),
        "distilbert": _architecture(_DISTILBERT, 12),
    }
)

# Towers beside the language model have heads of their own: they are replicated
BESIDE = ("vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector")
