"""Small models of several kinds, of random weights, and the codecs whose exports engines take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 32}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = torch.arange(3, 35)[None]


def llama(**more: Any) -> Any:
    """Dense."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **more))


def mixtral() -> Any:
    """Experts by number in the checkpoint, w1 to w3, and one parameter in the module."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4))


def qwen3_moe() -> Any:
    """The same with other names; its down projection is of 192 columns."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**GROUPED, **experts))


def llava() -> Any:
    """A nested text_config; names in the checkpoint are others than in the module."""
    text, vision = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=300)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    """A nested text_config; transformers initializes linear layers of its vision tower before it unpacks them."""
    text = transformers.Gemma3TextConfig(**GROUPED, sliding_window=32)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=300
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def bert() -> Any:
    """An encoder whose decoder of words is tied."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def gpt_oss() -> Any:
    """Experts in stacks, which no engine has a packed layout for: they are dense beside the packed attention."""
    config = transformers.GptOssConfig(
        **GROUPED | {"intermediate_size": 64}, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


def modernbert() -> Any:
    """An encoder whose layers transformers initializes one by one."""
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SMALL, global_attn_every_n_layers=1))


def roberta() -> Any:
    """A classifier: two rows."""
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL))


def ctrl() -> Any:
    """It casts a table while it runs."""
    sizes = {"n_embd": 128, "dff": 256, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return transformers.CTRLLMHeadModel(transformers.CTRLConfig(vocab_size=320, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
    "llava": llava,
    "gemma3": gemma3,
    "bert": bert,
}
SWEPT = tuple(MODELS)  # with every format
MODELS |= {"modernbert": modernbert, "ctrl": ctrl, "roberta": roberta}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"name": "int", "params": {"bits": 8, "granularity": "channel"}},
    "int8-group": {"name": "int", "params": {"bits": 8, "group_size": 64}},
    "int4": {"name": "int", "params": {"bits": 4, "group_size": 32}},
    "int3": {"name": "int", "params": {"bits": 3, "group_size": 32}},
    "int4-affine": {"name": "int", "params": {"bits": 4, "group_size": 64, "symmetric": False}},
    "fp8": {"name": "fp8", "params": {}},
    "fp8-tensor": {"name": "fp8", "params": {"granularity": "tensor"}},
    "fp8-block": {"name": "fp8", "params": {"granularity": "block"}},
    "mxfp4": {"name": "mxfp4", "params": {}},
    "nvfp4": {"name": "nvfp4", "params": {}},
    "W8A8": {"name": "int", "params": {"bits": 8, "granularity": "channel"}},
}
MIXTURES = ("mixtral", "qwen3-moe")
DENSE_EXPERTS = ("fp8-block", "nvfp4")


def saved(store: ms.Store, name: str, path: Path) -> None:
    """One of the models, of random weights."""
    torch.manual_seed(0)
    MODELS[name]().to(torch.bfloat16).save_pretrained(path / name)
    store.save(name, path / name)


def recipe(codec: dict[str, Any], targets: tuple[str, ...] = ("linear",)) -> dict[str, Any]:
    """One rule."""
    return {"name": "v", "rules": [{"targets": list(targets), "codec": codec}]}


def logits(folder: Path, model: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What transformers computes."""
    made = type(MODELS[model]())
    with torch.no_grad():
        found: torch.Tensor = made.from_pretrained(folder, dtype=dtype).eval()(TOKENS).logits.float()
    return found


def size(folder: Path) -> int:
    """Bytes of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def quantization(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found
