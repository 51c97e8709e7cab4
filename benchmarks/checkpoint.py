"""Makes a checkpoint to measure with: a Llama in Hugging Face layout, bf16, whose weights compress as trained ones do.

A weight is sigma x row factor x column factor x normal, with a few outliers: log-normal factors give the spread of
exponents that trained matrices have. Norms lie near 1. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint16]
SHARD = 256 << 20
_ROWS = 1 << 18  # weights made at once: they stay in the cache
_NORMAL = np.sort(np.random.default_rng(7).standard_normal(1 << 16).astype(np.float32))


def config(gb: float, hidden: int = 2048) -> dict[str, object]:
    """The config.json of a Llama of about `gb` GB in bf16."""
    made = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    sizes = [sum(int(np.prod(s)) * 2 for _, s in shapes({**made, "num_hidden_layers": n})) for n in (0, 1)]
    return {**made, "num_hidden_layers": max(1, round((gb * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))}


def shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in model order."""
    hidden, inner, vocabulary, layers = (
        int(str(config[key])) for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    key_values = int(str(config["num_key_value_heads"])) * 64
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "self_attn.q_proj.weight", (hidden, hidden)
        yield at + "self_attn.k_proj.weight", (key_values, hidden)
        yield at + "self_attn.v_proj.weight", (key_values, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, hidden)
        yield at + "mlp.gate_proj.weight", (inner, hidden)
        yield at + "mlp.up_proj.weight", (inner, hidden)
        yield at + "mlp.down_proj.weight", (hidden, inner)
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def rounded(values: NDArray[np.float32]) -> Words:
    """To bf16, to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def blocks(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[Words]:
    """One tensor's bits, some rows at a time."""
    if len(shape) == 1:
        yield rounded(np.exp(0.12 * rng.standard_normal(shape[0], np.float32)))
        return
    rows, columns = shape
    column = np.exp(0.12 * rng.standard_normal(columns, np.float32))
    column[rng.integers(0, columns, max(1, columns // 500))] *= 3
    for start in range(0, rows, _ROWS // columns):
        n = min(_ROWS // columns, rows - start)
        values = _NORMAL.take(np.frombuffer(rng.bytes(2 * n * columns), np.uint16)).reshape(n, columns)
        values.reshape(-1)[rng.integers(0, values.size, max(1, values.size // 20000))] *= 4
        values *= np.exp(0.2 * rng.standard_normal((n, 1), np.float32)) * np.float32(0.8 / np.sqrt(columns))
        values *= column
        yield rounded(values)


def make(folder: Path, gb: float, seed: int = 0) -> None:
    """Write the checkpoint; nothing where it is there already."""
    made = config(gb)
    there = folder / "config.json"
    if there.exists() and json.loads(there.read_text()) == made:
        return
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for item in shapes(made):
        if groups[-1] and sum(2 * int(np.prod(s)) for _, s in [*groups[-1], item]) > SHARD:
            groups.append([])
        groups[-1].append(item)
    where: dict[str, str] = {}
    number = 0
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, shape in group:
            size = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            where[tensor] = name
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape in group:
                rng = np.random.Generator(np.random.SFC64([seed, number]))
                number += 1
                for block in blocks(rng, shape):
                    file.write(block.data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    there.write_text(json.dumps(made, indent=1))
