"""What llama.cpp calls a model's parts: architecture, hyperparameters and tensor names, from a transformers config.

The architectures are those whose exports are proven to compute what transformers does; their tensor names come from the `gguf`
package's maps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelstore.architecture.config import architectures
from modelstore.codecs.numbers import Floats
from modelstore.errors import UnsupportedError
from modelstore.format.manifest import Manifest, Tensor
from modelstore.format.region import Shape
from modelstore.integrations.gguf_quants import BLOCK

# transformers' architecture → llama.cpp's, and whether that rotates neighbours rather than halves of a head (rope).
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
_WIDEST = 1 << 16
_SKIPPED = (".rotary_emb.inv_freq", ".attn.masked_bias")  # computed again by every loader


@dataclass(frozen=True)
class Named:
    """A tensor of the store, its name in the file, and the rows of a head whose order changes (0: none does)."""

    tensor: Tensor
    name: str
    head: int = 0

    @property
    def wide(self) -> bool:
        """Whether it is a matrix, and so stored in the file's type; all others stay float32."""
        return len(self.tensor.shape) > 1


@dataclass(frozen=True)
class GgufModel:
    """A model in llama.cpp's terms. `values`: metadata without its architecture's prefix, where the key begins with a dot."""

    arch: str
    values: dict[str, int | float | str | bool]
    tensors: tuple[Named, ...]
    constants: dict[str, Floats] = field(default_factory=dict)  # tensors that are made, not read


def gguf_model(manifest: Manifest, config: Mapping[str, Any] | None) -> GgufModel:
    """How a model is written as GGUF; `UnsupportedError` where it is none that is known, and says why."""
    name = next(iter(architectures(config or {})), None)
    known = ARCHITECTURES.get(name) if name is not None else None
    if config is None or known is None:
        what = f"the architecture {name!r}" if config is not None else "a model without a config.json"
        raise UnsupportedError(f"{what} has no GGUF export: {', '.join(ARCHITECTURES)} have")
    arch, neighbours = known
    heads = _int(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    hidden = _int(config, "hidden_size")
    width = int(config.get("head_dim") or hidden // heads)
    if width > _WIDEST:
        raise UnsupportedError(
            f"config.json says heads of {width} numbers, where {_WIDEST} is the limit: it does not fit"
        )
    most = max((tensor.shape[0] for tensor in manifest.tensors if tensor.shape), default=0)
    if _int(config, "vocab_size") > most:
        raise UnsupportedError(
            f"config.json says vocab_size {config['vocab_size']}, and no tensor has as many rows: it does not fit"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"llama.cpp's {arch} computes with silu, and this model with {config['hidden_act']!r}: it has no GGUF export"
        )
    rope, factors = _rope(config, width)
    context = _int(config, "max_position_embeddings")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    values: dict[str, int | float | str | bool] = {
        ".context_length": min(context, int(window)) if window else context,  # windows are not known for these
        ".embedding_length": hidden,
        ".block_count": _int(config, "num_hidden_layers"),
        ".feed_forward_length": _int(config, "intermediate_size"),
        ".attention.head_count": heads,
        ".attention.head_count_kv": kv_heads,
        ".attention.key_length": width,
        ".attention.value_length": width,
        ".attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        ".vocab_size": _int(config, "vocab_size"),
        ".rope.dimension_count": width,
        **rope,
    }
    tensors = _tensors(manifest, config, arch, width if neighbours else 0)
    return GgufModel(arch, values, tensors, {} if factors is None else {"rope_freqs.weight": factors})


def rows_in_order(rows: int, head: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of the file the row of the store, where rows of halves of a head are put beside each other."""
    order = np.arange(rows, dtype=np.int64).reshape(rows // head, 2, head // 2)
    return order.swapaxes(1, 2).reshape(-1)


def type_of(named: Named, kind: str) -> str:
    """The type of a tensor in a file of that type: matrices have it, where their rows are whole blocks."""
    if not named.wide:
        return "F32"
    if kind in ("F32", "F16", "BF16"):
        return kind
    if named.tensor.shape[-1] % BLOCK:
        return "F16"
    # The embedding and the head are what 4 bits hurt most, and llama.cpp's own files keep them wider too.
    return "Q8_0" if named.name in ("token_embd.weight", "output.weight") else kind


def _tensors(manifest: Manifest, config: Mapping[str, Any], arch: str, head: int) -> tuple[Named, ...]:
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, _int(config, "num_hidden_layers", len(manifest.tensors)))
    find: Callable[[str], str | None] = lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))  # noqa: E731
    found: list[Named] = []
    aliases: dict[str, list[str]] = {}
    for alias, name in manifest.aliases.items():
        aliases.setdefault(name, []).append(alias)
    for tensor in manifest.tensors:
        names = [tensor.name, *aliases.get(tensor.name, ())]
        known = {made for made in map(find, names) if made is not None}
        if not known:
            if tensor.name.endswith(_SKIPPED):
                continue
            raise UnsupportedError(
                f"tensor {tensor.name!r} has no place in llama.cpp's {arch}: the model has no GGUF export",
                tensor=tensor.name,
            )
        made = "token_embd.weight" if "token_embd.weight" in known else min(known)  # a tied head is made from it
        if made == "output.weight" and config.get("tie_word_embeddings") is True:
            continue
        _check(tensor, made)
        turned = head if ".attn_q." in made or ".attn_k." in made else 0
        if turned and tensor.shape[0] % turned:
            raise UnsupportedError(
                f"tensor {tensor.name!r} has {tensor.shape[0]} rows, no multiple of a head's {turned}: config.json does not fit",
                tensor=tensor.name,
            )
        found.append(Named(tensor, made, turned))
    twice = [name for name, times in Counter(named.name for named in found).items() if times > 1]
    if twice:
        raise UnsupportedError(f"several tensors would be {min(twice)!r} in the GGUF: the model has no GGUF export")
    return tuple(found)


def _check(tensor: Tensor, made: str) -> None:
    shape: Shape = tensor.shape
    if tensor.kind.kind != "float" or tensor.dtype.startswith("float4") or not 1 <= len(shape) <= 2 or 0 in shape:
        raise UnsupportedError(
            f"tensor {tensor.name!r} ({tensor.dtype}, shape {list(shape)}) cannot be {made!r} in a GGUF: "
            f"export floating-point weights",
            tensor=tensor.name,
        )


def _rope(config: Mapping[str, Any], width: int) -> tuple[dict[str, int | float | str | bool], Floats | None]:
    """Metadata of the rotary embedding, and Llama 3's factors by frequency."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)
    values: dict[str, int | float | str | bool] = {".rope.freq_base": base}
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind == "default":
        return values, None
    if kind == "linear":
        return values | {".rope.scaling.type": "linear", ".rope.scaling.factor": float(said["factor"])}, None
    if kind == "yarn":
        original = said.get("original_max_position_embeddings") or config["max_position_embeddings"]
        scaling: dict[str, int | float | str | bool] = {
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": float(said["factor"]),
            ".rope.scaling.original_context_length": int(original),
        }
        return values | scaling, None
    if kind == "llama3":
        return values, _llama3(said, base, width, int(config["max_position_embeddings"]))
    raise UnsupportedError(
        f"rotary embeddings of the type {kind!r} have no GGUF export: default, linear, yarn, llama3 have"
    )


def _llama3(said: Mapping[str, Any], base: float, width: int, context: int) -> Floats:
    """By what each frequency is divided (Llama 3.1): nothing for short waves, `factor` for long ones, smoothly between."""
    factor, low, high = (float(said[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(said.get("original_max_position_embeddings") or context)
    factors = []
    for i in range(0, width, 2):
        wave = 2 * math.pi * base ** (i / width)
        smooth = (original / wave - low) / (high - low)
        factors.append(1 / ((1 - min(1.0, max(0.0, smooth))) / factor + min(1.0, max(0.0, smooth))))
    return np.array(factors, np.float32)


def _int(config: Mapping[str, Any], key: str, most: int = 1 << 31) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedError(f"config.json has no {key!r} that is a positive number: the model has no GGUF export")
    if value > most:
        raise UnsupportedError(
            f"config.json says {key} {value}, more than the model's {most} tensors allow: it does not fit"
        )
    return value
