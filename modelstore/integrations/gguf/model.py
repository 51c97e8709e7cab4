"""A model in llama.cpp's terms: its metadata, and where each of its tensors goes.

Every tensor that the config promises has a place with a shape; a model is written where its tensors are those, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelstore.architecture.config import Config
from modelstore.architecture.quantized import method
from modelstore.codecs.numeric.numbers import Floats
from modelstore.errors import UnsupportedError
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.integrations.gguf.quants import BLOCK
from modelstore.integrations.gguf.settings import Setting, Settings, settings

_SKIPPED = ".rotary_emb.inv_freq"  # computed again by every loader
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    """A model in llama.cpp's terms. `values`: metadata without its architecture's prefix, if the key starts with a dot."""

    arch: str
    values: Mapping[str, Setting]
    tensors: tuple[Named, ...]
    constants: dict[str, Floats] = field(default_factory=dict)  # tensors that are made, not read


@dataclass(frozen=True)
class _TensorPlace:
    """The place of a tensor: its name in the file, its sizes and the config's names of them, the rows of a head to turn."""

    name: str
    sizes: tuple[tuple[str, int], ...]
    head: int = 0


def gguf_model(manifest: Manifest, config: Config | None) -> GgufModel:
    """How a model is written as GGUF; where it cannot be written right, an error says why."""
    if config is None:
        there = any(file.name == "config.json" for file in manifest.files)
        what = "a config.json that can be read (a JSON object of at most 16 MiB)" if there else "a config.json"
        raise UnsupportedError(f"a model without {what} has no GGUF export: save it with its config.json")
    said = settings(config, len(manifest.tensors))
    how = method(config)
    if how is not None and any(tensor.kind.itemsize == 1 for tensor in manifest.tensors):
        raise UnsupportedError(f"the model was quantized before it was saved ({how[:80]}), and has no GGUF export")
    constants = {} if said.factors is None else {"rope_freqs.weight": said.factors}
    return GgufModel(said.family.arch, said.values, _tensors(manifest, said), constants)


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


def _places(said: Settings) -> Iterator[tuple[str, _TensorPlace]]:
    """For each tensor of transformers' class where it goes."""
    hidden, middle = ("hidden_size", said.hidden), ("intermediate_size", said.intermediate)
    vocabulary, width = ("vocab_size", said.vocabulary), ("head_dim", said.width)
    queries = ("num_attention_heads × head_dim", said.heads * said.width)
    keys = ("num_key_value_heads × head_dim", said.kv_heads * said.width)
    yield _EMBEDDING, _TensorPlace("token_embd.weight", (vocabulary, hidden))
    yield "model.norm.weight", _TensorPlace("output_norm.weight", (hidden,))
    yield _HEAD, _TensorPlace("output.weight", (vocabulary, hidden))
    turned = said.width if said.family.neighbours else 0
    weights = {
        "self_attn.q_proj": ("attn_q", (queries, hidden), turned),
        "self_attn.k_proj": ("attn_k", (keys, hidden), turned),
        "self_attn.v_proj": ("attn_v", (keys, hidden), 0),
        "self_attn.o_proj": ("attn_output", (hidden, queries), 0),
        "mlp.gate_proj": ("ffn_gate", (middle, hidden), 0),
        "mlp.up_proj": ("ffn_up", (middle, hidden), 0),
        "mlp.down_proj": ("ffn_down", (hidden, middle), 0),
        "input_layernorm": ("attn_norm", (hidden,), 0),
        "post_attention_layernorm": ("ffn_norm", (hidden,), 0),
    }
    if said.family.norms:
        weights |= {"self_attn.q_norm": ("attn_q_norm", (width,), 0), "self_attn.k_norm": ("attn_k_norm", (width,), 0)}
    for layer in range(said.layers):
        for name, (made, sizes, head) in weights.items():
            yield f"model.layers.{layer}.{name}.weight", _TensorPlace(f"blk.{layer}.{made}.weight", sizes, head)
            if name.rsplit(".", 1)[-1] in said.biases:
                yield f"model.layers.{layer}.{name}.bias", _TensorPlace(f"blk.{layer}.{made}.bias", sizes[:1], head)


def _tensors(manifest: Manifest, said: Settings) -> tuple[Named, ...]:
    places = dict(_places(said))
    named: dict[str, list[str]] = {tensor.name: [tensor.name] for tensor in manifest.tensors}
    for alias, name in manifest.aliases.items():
        named[name].append(alias)
    at: dict[str, Tensor] = {}
    for tensor in manifest.tensors:
        known = [name for name in (_whole(name, places) for name in named[tensor.name]) if name in places]
        if not known and not tensor.name.endswith(_SKIPPED):
            raise UnsupportedError(
                f"tensor {tensor.name!r} has no place in a {said.name} of {said.layers} layers as this config.json says it is: "
                f"the model has no GGUF export",
                tensor=tensor.name,
            )
        for name in known:
            if name in at:
                raise UnsupportedError(f"the model has {name!r} twice: it has no GGUF export", tensor=tensor.name)
            at[name] = tensor
    _tie(at, said)
    missing = [name for name in places if name not in at and not (name == _HEAD and said.tied)]
    if missing:
        raise UnsupportedError(
            f"the model lacks {missing[0]!r}, which a {said.name} of this config.json has: it has no GGUF export",
            tensor=missing[0],
        )
    found = []
    for name, tensor in at.items():
        place = places[name]
        _check(tensor, place)
        found.append(Named(tensor, place.name, place.head))
    return tuple(found)


def _whole(name: str, places: Mapping[str, _TensorPlace]) -> str:
    """The name in a model with a head; those saved without it lack the prefix."""
    return f"model.{name}" if name not in places and f"model.{name}" in places else name


def _tie(at: dict[str, Tensor], said: Settings) -> None:
    """Leave a head out that is the embedding, which llama.cpp then takes for both, as transformers does."""
    embedding, head = at.get(_EMBEDDING), at.get(_HEAD)
    if said.tied and embedding is None and head is not None:
        at[_EMBEDDING] = head
    elif embedding is None or head is None or (head is not embedding and head.digest != embedding.digest):
        return  # transformers does not tie what a checkpoint has two of
    del at[_HEAD]


def _check(tensor: Tensor, place: _TensorPlace) -> None:
    if tensor.kind.kind != "float" or tensor.dtype.startswith("float4"):
        raise UnsupportedError(
            f"tensor {tensor.name!r} ({tensor.dtype}) cannot be {place.name!r} in a GGUF: export floating-point weights",
            tensor=tensor.name,
        )
    if tensor.shape != tuple(size for _, size in place.sizes):
        sizes = ", ".join(f"{name} {size}" for name, size in place.sizes)
        raise UnsupportedError(
            f"tensor {tensor.name!r} has the shape {list(tensor.shape)}, and config.json says {sizes}: "
            f"save the model with its own config.json",
            tensor=tensor.name,
        )
