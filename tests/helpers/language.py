"""A small language model with a tokenizer of its own, made from a text in a second."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [
    "the ",
    "sea ",
    "was calm",
    " and ",
    "she said ",
    "that he ",
    "would not ",
    "come again ",
    "before ",
    "winter ",
]
TEXT = "".join(WORDS[(7 * i * i + 3 * i) % len(WORDS)] for i in range(160)) + "."


def make_language_model(out: Path, width: int = 32) -> Path:
    """A folder in Hugging Face layout: a Llama of two layers in bfloat16, 64 positions, and a BPE tokenizer.

    `width`: of its hidden layers; of 128, engines take its weights packed.
    """
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(out)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=width + 16 if width < 128 else 2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out
