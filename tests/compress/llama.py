"""A small model of Llama's kind whose linear layers have several chunks, and what an engine makes of its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from modelstore.codecs import registry
from modelstore.codecs.weight import WeightCodec
from modelstore.format.objects.manifest import CodecSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}
FILES = {"config.json": json.dumps(CONFIG).encode()}
LAYER = "model.layers.0."


def llama(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Its tensors; the head is the embedding's other name."""
    torch.manual_seed(seed)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (512, hidden),
        "self_attn.k_proj": (256, hidden),
        "self_attn.v_proj": (256, hidden),
        "self_attn.o_proj": (hidden, 512),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    made = {"model.embed_tokens.weight": torch.randn(320, hidden) * 0.02}
    for name, shape in shapes.items():
        made[f"{LAYER}{name}.weight"] = torch.randn(shape) * torch.logspace(-3, -1, shape[0])[:, None]
    norms = (f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm", "model.norm")
    made |= {f"{norm}.weight": torch.ones(hidden) for norm in norms}
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    return made | {"lm_head.weight": made["model.embed_tokens.weight"]}


def decompressed(parts: Mapping[str, torch.Tensor], name: str, spec: CodecSpec) -> torch.Tensor:
    """What compressed-tensors makes of the parts of one weight, as `load(dequantize=False)` gave them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codec = registry.codec(spec.name, spec.params)
    assert isinstance(codec, WeightCodec)
    view = codec.view
    assert view is not None
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**view.scheme()), format=view.format)
    compressor = BaseCompressor.get_value_from_registry(view.format)
    stem = name.removesuffix("weight")
    mine = {key.removeprefix(stem): tensor for key, tensor in parts.items() if key.startswith(stem)}
    found: torch.Tensor = compressor.decompress(mine, scheme)["weight"]
    return found
