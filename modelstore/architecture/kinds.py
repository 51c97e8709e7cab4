"""What each tensor of a model is for, by its name, its shape and the model's config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modelstore.codecs.weight import FLOATS, is_convolution
from modelstore.format.recipe import Kind
from modelstore.format.region import Shape

_EMBEDDING = re.compile(
    r"(?:.*[._])?(?:wte|wpe|shared|tok_embeddings|(?:\w+_)?embed(?:ding|dings|_tokens|_positions|_in|der)?|pos_embed|cls_token"
    r"|relative_attention_bias)(?:\.weight)?"
)
_HEAD = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|output|score|classifier|qa_outputs|decoder\.bias|head|fc_out)(?:\.weight)?"
)
_ROUTER = re.compile(r".*\.(?:gate|router|router\.\w+|gate\.wg|shared_expert_gate|feed_forward\.gate)(?:\.weight)?")
_NORM = re.compile(r".*(?:norm|ln_?\w*|layernorm|bn\d*)(?:\.(?:weight|bias|gamma|beta))?", re.IGNORECASE)
_SCALE = re.compile(r".*(?:_scale|_scale_inv|_zero_point|_shape|_packed|qzeros|scales|qweight|g_idx|inv_freq)")
_STEM = re.compile(r"(?:.*\.)?(?:patch_embed\w*|conv_proj)\..*")


def kind_of(name: str, dtype: str, shape: Shape, config: Mapping[str, Any] | None = None) -> Kind:
    """What a tensor is for. Only "linear" and "convolution" are compressed unless a recipe asks for more."""
    if dtype not in FLOATS or _SCALE.fullmatch(name):
        return "other"
    if len(shape) < 2:
        last = name.rpartition(".")[2]
        return "norm" if _NORM.fullmatch(name) else "bias" if "bias" in last or last == "b" else "other"
    if _EMBEDDING.fullmatch(name) or _STEM.fullmatch(name):
        return "embedding"
    if _HEAD.fullmatch(name):
        return "head"
    if _ROUTER.fullmatch(name):
        return "router"
    if _NORM.fullmatch(name):
        return "norm"
    vocabulary = (config or {}).get("vocab_size")
    if len(shape) == 2 and isinstance(vocabulary, int) and vocabulary > 1024 and shape[0] == vocabulary:
        return "head"
    return "convolution" if is_convolution(shape) else "linear"
