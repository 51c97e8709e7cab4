"""The hyper-parameters that llama.cpp needs, from a transformers config: each read as transformers reads it, or refused.

The architectures are those whose exports are proven to compute what transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelstore.architecture.config import Config, absurd, architectures, count, flag, model_type, number, word
from modelstore.architecture.ranks.parallel import key_heads
from modelstore.codecs.numeric.numbers import Floats
from modelstore.errors import UnsupportedError
from modelstore.integrations.gguf.rope import in_float32, rope

Setting = int | float | str | bool

_LARGEST = (1 << 31) - 1  # llama.cpp computes with 32-bit numbers
_WIDEST = 1 << 16
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Family:
    """The defaults of a class of transformers for a config, and the parts of its layers."""

    model_type: str
    arch: str  # llama.cpp's name
    neighbours: bool = False  # it rotates neighbours rather than halves of a head
    width: int | None = None  # None: hidden_size / heads
    windows: bool = False  # every layer has a sliding window, unless the config says null
    window_flag: bool = False  # a sliding window counts where use_sliding_window is true
    biases: tuple[str, ...] = ()  # those that it always has
    optional: tuple[tuple[str, tuple[str, ...]], ...] = ()  # those that a flag of the config gives it
    refused: tuple[str, ...] = ()  # flags that give it what llama.cpp does not load
    norms: bool = False  # of queries and keys


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama", "llama", neighbours=True, optional=(("attention_bias", _ATTENTION), ("mlp_bias", _MLP))
    ),
    "MistralForCausalLM": Family("mistral", "llama", neighbours=True, windows=True),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2", window_flag=True, biases=_ATTENTION[:3]),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3", width=128, window_flag=True, refused=("attention_bias",), norms=True),
}


@dataclass(frozen=True)
class Settings:
    """A model's sizes, and its metadata without the architecture's prefix; `factors`: by what its frequencies are divided."""

    name: str  # of the class
    family: Family
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int  # of a head
    vocabulary: int
    biases: frozenset[str]
    tied: bool
    values: Mapping[str, Setting]
    factors: Floats | None


def settings(config: Config, tensors: int) -> Settings:
    """A config's settings for a model that has so many tensors.

    `UnsupportedError` for what llama.cpp's architecture does not compute, `FormatError` for values that cannot be.
    """
    name, family = _family(config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    kv_heads = key_heads(config, heads, family.model_type)
    width = _optional(config, "head_dim", family.width or hidden // heads, family.width or hidden // heads)
    layers = _size(config, "num_hidden_layers")
    context = _size(config, "max_position_embeddings")
    _fits(config, layers, tensors, heads, kv_heads, hidden, width)
    intermediate, vocabulary = _size(config, "intermediate_size"), _size(config, "vocab_size")
    values, factors = rope(config, width, context)
    window = _window(config, family)
    epsilon = number(config, "rms_norm_eps")
    if epsilon is not None and (epsilon < 0 or not in_float32(epsilon)):
        raise absurd("rms_norm_eps", epsilon, "a small number that is not negative")
    values |= {
        ".context_length": min(context, window or context),  # windows are not known to these architectures
        ".embedding_length": hidden,
        ".block_count": layers,
        ".feed_forward_length": intermediate,
        ".attention.head_count": heads,
        ".attention.head_count_kv": kv_heads,
        ".attention.key_length": width,
        ".attention.value_length": width,
        ".attention.layer_norm_rms_epsilon": 1e-6 if epsilon is None else epsilon,
        ".vocab_size": vocabulary,
        ".rope.dimension_count": width,
    }
    for key in family.refused:
        if flag(config, key):
            raise UnsupportedError(
                f"config.json says {key}, which llama.cpp's {family.arch} does not have: it has no GGUF export"
            )
    biases = {bias for key, given in family.optional if flag(config, key) for bias in given} | {*family.biases}
    return Settings(
        name=name,
        family=family,
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        vocabulary=vocabulary,
        biases=frozenset(biases),
        tied=flag(config, "tie_word_embeddings") is True,
        values=values,
        factors=factors,
    )


def _family(config: Config) -> tuple[str, Family]:
    name = next(iter(architectures(config)), None)
    if name is None:
        raise UnsupportedError("config.json names no architecture: add it, and save the model again")
    family = FAMILIES.get(name)
    if family is None:
        raise UnsupportedError(f"the architecture {name!r} has no GGUF export: {', '.join(FAMILIES)} have")
    kind = model_type(config)
    if kind and kind != family.model_type:
        raise UnsupportedError(
            f"config.json says architecture {name} and model_type {kind!r}, which contradict each other: "
            f"save the model with its own config.json"
        )
    activation = word(config, "hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UnsupportedError(
            f"llama.cpp's {family.arch} computes with silu, and this model with {activation!r}: it has no GGUF export"
        )
    for key in _EXPERTS:
        if (number(config, key) or 0) > 1:
            raise UnsupportedError(
                f"config.json says {key} {config[key]}, and a {name} has no experts: it does not fit"
            )
    return name, family


def _fits(config: Config, layers: int, tensors: int, heads: int, kv_heads: int, hidden: int, width: int) -> None:
    """Refuse numbers that contradict each other, before anything is made of them."""
    if layers > tensors:
        raise UnsupportedError(
            f"config.json says num_hidden_layers {layers}, and the model has {tensors} tensors: it does not fit"
        )
    if heads % kv_heads:
        raise UnsupportedError(
            f"config.json says {heads} heads and {kv_heads} for keys and values, which does not divide them: it does not fit"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise UnsupportedError(
            f"config.json says hidden_size {hidden} and num_attention_heads {heads}, which does not divide it: it does not fit"
        )
    if width > _WIDEST or width % 2 or not width:
        raise UnsupportedError(
            f"config.json says heads of {width} numbers, where even numbers up to {_WIDEST} are known: it does not fit"
        )


def _window(config: Config, family: Family) -> int | None:
    said = count(config, "sliding_window")
    if family.windows:
        return said if said or "sliding_window" in config else 4096
    if family.window_flag and flag(config, "use_sliding_window"):
        return said or 4096
    return None


def _size(config: Config, key: str) -> int:
    value = count(config, key)
    if value is None:
        raise UnsupportedError(f"config.json has no {key}: the model has no GGUF export")
    if value > _LARGEST:
        raise UnsupportedError(
            f"config.json says {key} {value}, more than the {_LARGEST} of llama.cpp: it does not fit"
        )
    return value


def _optional(config: Config, key: str, absent: int, null: int) -> int:
    """A size that a config may leave out, or say is null."""
    if config.get(key) is not None:
        return _size(config, key)
    return null if key in config else absent
