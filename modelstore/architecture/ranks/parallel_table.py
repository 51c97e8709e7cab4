"""How the usual architectures are cut for tensor parallelism: a table, by `model_type` of `config.json`.

A module is named by the end of its path, with `*` for a number: `model.layers.3.mlp.experts.7.gate_proj.weight` is found as
`experts.*.gate_proj`; the longest entry wins. All other modules (norms, routers, position embeddings, vision towers) are
replicated: every rank holds the whole of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

Cut = Literal["query", "key", "even", "pair", "vocabulary"]
"""What lies along an axis, and so where it may be cut.

`query`: attention heads, as many to every rank. `key`: heads of k or v, as many to every rank, or repeated where there
are fewer than ranks. `even`: features, as many to every rank. `pair`: features of which two neighbours belong together
(gate and up interleaved). `vocabulary`: rows cut at multiples of ceil(n / size), so the last ranks may hold fewer.
"""


KINDS: tuple[str, ...] = get_args(Cut)


@dataclass(frozen=True, slots=True)
class AxisCut:
    """How one module is cut: the axis of its weight, and the parts along it, each cut by itself.

    `bias`: whether the bias is cut too (along its only axis). It is for column-wise modules, whose outputs are
    divided; a row-wise one is replicated, and added once, after the ranks' partial results are summed. `units`: how many
    units each part has, where it is not the config that says so.
    """

    axis: int
    parts: tuple[Cut, ...]
    bias: bool = True
    units: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """The cuts of one model type, and how many heads it has where its `config.json` does not say."""

    cuts: MappingProxyType[str, AxisCut]
    heads: int
    key_heads: int | None = None  # None: as many as `heads`


QUERY = AxisCut(0, ("query",))
KEY = AxisCut(0, ("key",))
OUTPUT = AxisCut(1, ("query",), bias=False)
COLUMN = AxisCut(0, ("even",))
ROW = AxisCut(1, ("even",), bias=False)
VOCABULARY = AxisCut(0, ("vocabulary",))

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
    "self_attn.qkv_proj": AxisCut(0, ("query", "key", "key")),
    "self_attn.o_proj": OUTPUT,
    "mlp.gate_up_proj": AxisCut(0, ("even", "even")),
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
    "experts.gate_up_proj": AxisCut(1, ("even", "even")),
    "experts.down_proj": AxisCut(2, ("even",)),
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
        "self_attn.sinks": AxisCut(0, ("query",)),
        "experts.gate_up_proj": AxisCut(2, ("pair",)),
        "experts.gate_up_proj_bias": AxisCut(1, ("pair",)),
        "experts.gate_up_proj_blocks": AxisCut(1, ("pair",)),
        "experts.gate_up_proj_scales": AxisCut(1, ("pair",)),
        "experts.down_proj": AxisCut(1, ("even",)),
        "experts.down_proj_blocks": AxisCut(2, ("even",)),
        "experts.down_proj_scales": AxisCut(2, ("even",)),
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
    "attn.c_attn": AxisCut(1, ("query", "query", "query")),
    "attn.c_proj": AxisCut(0, ("query",), bias=False),
    "mlp.c_fc": AxisCut(1, ("even",)),
    "mlp.c_proj": AxisCut(0, ("even",), bias=False),
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
    **{
        f"{attention}.{module}": cut
        for attention in ("attention", "crossattention")
        for module, cut in (
            ("self.query", QUERY),
            ("self.key", QUERY),
            ("self.value", QUERY),
            ("output.dense", OUTPUT),
        )
    },
    "intermediate.dense": COLUMN,
    "layer.*.output.dense": ROW,
    "cls.predictions": VOCABULARY,
    "cls.predictions.decoder": VOCABULARY,
    "lm_head": VOCABULARY,
    "lm_head.decoder": VOCABULARY,
    "generator_lm_head": VOCABULARY,
}
# Decoders, and encoders before them; whose attention to the encoder is cut as that to themselves
_BART = (
    _OPT
    | {f"encoder_attn.{module}": QUERY for module in ("q_proj", "k_proj", "v_proj")}
    | {f"self_attn.{module}": QUERY for module in ("q_proj", "k_proj", "v_proj")}
    | {f"self_attn.self.{module}": QUERY for module in ("query", "key", "value")}
    | {
        "encoder_attn.out_proj": OUTPUT,
        "self_attn.output": OUTPUT,
        "shared": VOCABULARY,
        "proj_out": VOCABULARY,
        "output_projection": VOCABULARY,
        "final_logits_bias": AxisCut(1, ("vocabulary",)),
    }
)
_MODERNBERT = {
    "tok_embeddings": VOCABULARY,
    "decoder": VOCABULARY,
    "attn.Wqkv": AxisCut(0, ("query", "query", "query")),
    **{f"attn.{module}": QUERY for module in ("q_proj", "k_proj", "v_proj")},
    "attn.Wo": OUTPUT,
    "mlp.Wi": AxisCut(0, ("even", "even")),
    "mlp.Wo": ROW,
}
_MPT = {
    "wte": VOCABULARY,
    "lm_head": VOCABULARY,
    "attn.Wqkv": AxisCut(0, ("query", "query", "query")),
    "attn.out_proj": OUTPUT,
    "ffn.up_proj": COLUMN,
    "ffn.down_proj": ROW,
}
_GPT_NEO = {
    "wte": VOCABULARY,
    "lm_head": VOCABULARY,
    **{f"attention.{module}": QUERY for module in ("q_proj", "k_proj", "v_proj")},
    "attention.out_proj": OUTPUT,
    "mlp.c_fc": COLUMN,
    "mlp.c_proj": ROW,
}
# Rows are [heads, 3, head size]
_PERSIMMON = _EMBEDDING | {
    "self_attn.query_key_value": QUERY,
    "self_attn.dense": OUTPUT,
    "mlp.dense_h_to_4h": COLUMN,
    "mlp.dense_4h_to_h": ROW,
}
_XLM = {
    "embeddings": VOCABULARY,
    "pred_layer.proj": VOCABULARY,
    **{f"attentions.*.{module}": QUERY for module in ("q_lin", "k_lin", "v_lin")},
    "attentions.*.out_lin": OUTPUT,
    "ffns.*.lin1": COLUMN,
    "ffns.*.lin2": ROW,
}
_CPMANT = {
    "input_embedding": VOCABULARY,
    "lm_head": VOCABULARY,
    **{f"self_attention.project_{part}": QUERY for part in "qkv"},
    "self_attention.attention_out": OUTPUT,
    "position_bias.relative_attention_bias": AxisCut(1, ("query",)),
    "w_in.w_0": COLUMN,
    "w_in.w_1": COLUMN,
    "ffn.w_out": ROW,
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


def _family(cuts: dict[str, AxisCut], heads: int, key_heads: int | None = None) -> ParallelPlan:
    return ParallelPlan(MappingProxyType(cuts), heads, key_heads)


FAMILIES = MappingProxyType(
    {
        "llama": _family(_LLAMA, 32),
        "mistral": _family(_LLAMA, 32, 8),
        "qwen2": _family(_LLAMA, 32, 32),
        "qwen3": _family(_LLAMA, 32, 32),
        "gemma": _family(_LLAMA, 16, 16),
        "gemma2": _family(_LLAMA, 8, 4),
        "gemma3": _family(_LLAMA, 8, 4),
        "gemma3_text": _family(_LLAMA, 8, 4),
        "granite": _family(_LLAMA, 32),
        "smollm3": _family(_LLAMA, 16, 4),
        "cohere": _family(_LLAMA, 64),
        "stablelm": _family(_LLAMA, 32, 32),
        "phi": _family(_PHI, 32),
        "phi3": _family(_PHI3, 32),
        "starcoder2": _family(_STARCODER2, 24, 2),
        "opt": _family(_OPT, 12),
        "mixtral": _family(_MIXTRAL, 32, 8),
        "qwen2_moe": _family(_QWEN_MOE, 16, 16),
        "qwen3_moe": _family(_QWEN_MOE, 32, 4),
        "gpt_oss": _family(_GPT_OSS, 64, 8),
        "deepseek_v2": _family(_DEEPSEEK, 32),
        "deepseek_v3": _family(_DEEPSEEK, 128),
        "gpt2": _family(_GPT2, 12),
        "gpt_neox": _family(_NEOX, 64),
        "bloom": _family(_BLOOM, 8),
        "bert": _family(_BERT, 12),
        "roberta": _family(_BERT, 12),
        "xlm-roberta": _family(_BERT, 12),
        "distilbert": _family(_DISTILBERT, 12),
        "openai-gpt": _family(_GPT2 | {"tokens_embed": VOCABULARY}, 12),
        "gpt_neo": _family(_GPT_NEO, 16),
        "gpt_neox_japanese": _family(_NEOX, 32),
        "mpt": _family(_MPT, 16),
        "persimmon": _family(_PERSIMMON, 64),
        "cpmant": _family(_CPMANT, 32),
        "xlm": _family(_XLM, 16),
        "modernbert": _family(_MODERNBERT, 12),
        "modernbert-decoder": _family(_MODERNBERT, 12),
        **dict.fromkeys(
            (
                *("big_bird", "camembert", "data2vec-text", "ernie", "roberta-prelayernorm", "roc_bert"),
                "roformer",
            ),
            _family(_BERT, 12),
        ),
        "rembert": _family(_BERT, 18),
        "electra": _family(_BERT, 4),
        "bert-generation": _family(_BERT, 16),
        "megatron-bert": _family(_BERT, 16),
        "xlm-roberta-xl": _family(_BERT, 32),
        **dict.fromkeys(
            ("bart", "bigbird_pegasus", "biogpt", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            _family(_BART, 16),
        ),
        "blenderbot": _family(_BART, 32),
        "plbart": _family(_BART, 12),
        "trocr": _family(_BART, 16),
        "whisper": _family(_BART, 6),
        "xglm": _family(_BART, 16),
    }
)

# Towers beside the language model, and what connects them, have heads of their own: they are replicated
BESIDE = (
    *("vision_tower", "vision_model", "visual", "image_tower", "video_tower", "audio_tower"),
    *("multi_modal_projector", "connector", "qformer"),
)
