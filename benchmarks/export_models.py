"""Tiny models of random weights of every class of transformers that a task has, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as known
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Inputs = dict[str, torch.Tensor]

_MASKED = known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
_CLASSES = known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
TASKS: dict[str, list[dict[str, Any]]] = {
    "causal": [known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES],
    "masked": [_MASKED],
    "classify": [{kind: name for kind, name in _CLASSES.items() if kind in _MASKED}],
    "seq2seq": [
        known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        known.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ],
    "vision": [
        known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        known.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
        known.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        known.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    ],
    "multimodal": [known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES],
}
MOST = 30_000_000  # parameters

_TEXT: dict[int, str] = {
    1: "bos_token_id n_shared_experts first_k_dense_replace n_group topk_group",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok decoder_layers "
    "encoder_layers num_kv_heads num_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "mamba_n_heads decoder_attention_heads",
    16: "qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state",
    32: "head_dim q_lora_rank kv_lora_rank v_head_dim mamba_d_head hidden_size_per_layer_input kv_channels",
    64: "sliding_window",
    128: "hidden_size n_embd d_model dim embed_dim max_position_embeddings n_positions n_ctx moe_intermediate_size "
    "shared_expert_intermediate_size moe_ffn_hidden_size mamba_d_ssm word_embed_proj_dim block_size",
    256: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff decoder_ffn_dim",
    320: "vocab_size vocab_size_per_layer_input",
}
_MORE: dict[int, str] = {
    1: "decoder_start_token_id",
    2: "depth num_encoder_layers global_attn_every_n_layers",
    4: "encoder_attention_heads",
    8: "num_queries",
    16: "local_attention patch_size",
    32: "d_kv",
    64: "max_source_positions max_target_positions image_size",
    128: "embedding_size projection_dim out_hidden_size emb_dim encoder_hidden_dim",
    256: "encoder_ffn_dim",
}
_LISTS = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 64, 128]}
_DROPPED: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim", "sliding_window"),
    ("head_dim", "sliding_window", "hidden_sizes", "depths"),
    ("head_dim", "sliding_window", "hidden_sizes", "depths", "image_size", "patch_size", "num_key_value_heads"),
)


def classes(task: str) -> list[tuple[str, str]]:
    """Model types with the names of their classes."""
    found = ((kind, name) for mapping in TASKS[task] for kind, name in mapping.items())
    return list(dict.fromkeys((kind, name if isinstance(name, str) else name[0]) for kind, name in found))


def small(config: Any, task: str, depth: int = 0) -> Any:
    """A config of that class whose model is tiny; the error of the last way to make it where there is none."""
    base = config()
    tables = (_TEXT,) if task == "causal" else (_TEXT, _MORE)
    sizes: dict[str, Any] = {name: n for table in tables for n, names in table.items() for name in names.split()}
    sizes |= {"pad_token_id": 0} | ({} if task == "causal" else _LISTS)
    given = {name: value for name, value in sizes.items() if _fits(base, name, value, task)}
    if task != "causal" and depth < 3:
        given |= _nested(config, base, task, depth)
    for dropped in _DROPPED:
        try:
            return config(**{name: value for name, value in given.items() if name not in dropped})
        except Exception as error:
            last = error
    raise last


def _fits(base: Any, name: str, value: Any, task: str) -> bool:
    """Whether a config has such an entry, and a list where a list is given."""
    if not hasattr(base, name):
        return False
    old = getattr(base, name)
    if name in _LISTS:
        return isinstance(old, list | tuple) and len(old) == len(value)
    return task != "vision" or not isinstance(old, list | tuple)


def _nested(config: Any, base: Any, task: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in (getattr(config, "sub_configs", None) or {}).items():
        inner = type(getattr(base, name)) if kind is transformers.AutoConfig else kind
        if hasattr(inner, "model_type"):
            found[name] = small(inner, task, depth + 1).to_dict()
    if type(getattr(base, "backbone_config", None)).__name__ == "TimmBackboneConfig":  # of another package
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        found["backbone_config"] = transformers.ResNetConfig(**sizes, out_features=["stage4"]).to_dict()
    return found


def made(kind: str, name: str, task: str) -> Any:
    """The model, of random weights, in float32. `ValueError` where it is not tiny."""
    config, model = small(CONFIG_MAPPING[kind], task), getattr(transformers, name)
    with torch.device("meta"):
        parameters = sum(one.numel() for one in model(config).parameters())
    if parameters > MOST:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return model(config)


def inputs(config: Any) -> Iterator[Inputs]:
    """What a model may be given; one after another is tried."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    size = size if isinstance(size, int) else size[0]
    random = torch.Generator().manual_seed(1)
    ids = torch.arange(3, 35)[None]
    images = [torch.randn(1, 3, side, side, generator=random) for side in (size, 64, 224)]
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80) or 80
    sound, decoded = torch.randn(1, mel, 128, generator=random), {"decoder_input_ids": ids[:, :8]}
    yield {"input_ids": ids}
    yield {"input_ids": ids, **decoded}
    yield {"input_ids": ids[:, :16], "pixel_values": images[0]}
    for image in images:
        yield {"pixel_values": image}
    yield {"input_features": sound, **decoded}
    yield {"input_features": sound.transpose(1, 2), **decoded}
    yield {"input_values": torch.randn(1, 4000, generator=random), **decoded}
    yield {"input_ids": ids, "bbox": torch.zeros(1, 32, 4, dtype=torch.long)}
