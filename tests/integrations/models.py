"""A small Llama and small tokenizers, as transformers has them."""

from __future__ import annotations

import json

import pytest
import torch

HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY = 128, 4, 2, 32, 320
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def weights(dtype: torch.dtype = torch.bfloat16, extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A small Llama's tensors; `extra` are parts that others have: "bias", "output bias", "mlp" (its biases), "norm"."""
    random = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(2):
        layer = f"model.layers.{i}."
        rows = {"q_proj": HEADS * WIDTH, "k_proj": KV_HEADS * WIDTH, "v_proj": KV_HEADS * WIDTH}
        for name, n in rows.items():
            shapes[f"{layer}self_attn.{name}.weight"] = (n, HIDDEN)
            if "bias" in extra:
                shapes[f"{layer}self_attn.{name}.bias"] = (n,)
        if "norm" in extra:
            shapes |= {f"{layer}self_attn.q_norm.weight": (WIDTH,), f"{layer}self_attn.k_norm.weight": (WIDTH,)}
        if "output bias" in extra:
            shapes[f"{layer}self_attn.o_proj.bias"] = (HIDDEN,)
        if "mlp" in extra:
            sizes = {"gate_proj": 192, "up_proj": 192, "down_proj": HIDDEN}
            shapes |= {f"{layer}mlp.{name}.bias": (n,) for name, n in sizes.items()}
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HEADS * WIDTH)
        shapes[f"{layer}mlp.gate_proj.weight"] = (192, HIDDEN)
        shapes[f"{layer}mlp.up_proj.weight"] = (192, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, 192)
        shapes[f"{layer}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    made = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random) * (0.1 if len(shape) == 1 else 0.06)
        made[name] = (value + ("norm" in name)).to(dtype)
    return made


SETTINGS = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})

TEXT = [
    "The capital of France is Paris.",
    "It's 12,345 people;  two  spaces",
    "été à l'hôtel naïve 日本",
    "def f(x):\n\treturn x",
]


def byte_level() -> str:
    """A small tokenizer of GPT-2's kind."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return str(made.to_str())


def pieces() -> str:
    """A small tokenizer of Llama 2's kind: pieces of text, and bytes where there is none."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    normal = tokenizers.normalizers
    made.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXT[:2], trainer)
    plain = json.loads(made.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]
    return json.dumps(plain)
