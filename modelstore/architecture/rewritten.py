"""The `config.json` of the smaller model: the counts, and every list that has an entry for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelstore.architecture.config import Config, language
from modelstore.errors import UnsupportedError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "decoder_ffn_dim")
_QUERY = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_KEY = ("num_key_value_heads", "num_kv_heads")
# Entries that hold a layer's number, so that layers below it are of one kind and those from it on of another.
_BORDERS = ("max_window_layers", "first_k_dense_replace")
_KINDS = "layer_types"


@dataclass(frozen=True)
class ShapeCounts:
    """How many layers, neurons of a layer, query heads and key/value heads a model has, and the size of a head.

    None for what is not cut.
    """

    layers: int
    neurons: int | None = None
    query: int | None = None
    key: int | None = None
    head: int | None = None


def rewritten(
    config: Config, before: ShapeCounts, after: ShapeCounts, kept: Sequence[int], kinds: Sequence[str] | None
) -> Config:
    """The config of the model that keeps these layers. `kinds`: the attention kind of each layer of the original, if it has any.

    `UnsupportedError` if the config has no entry for what is cut.
    """
    section = language(config)
    changed = dict(section)
    changed |= _count(section, _LAYERS, "layers", before.layers, after.layers)
    if kinds is not None:
        changed[_KINDS] = list(kinds)
    for key, value in changed.items():
        changed[key] = _by_layer(key, value, before.layers, kept)
    if after.neurons is not None:
        changed |= _count(section, _NEURONS, "neurons of a layer", before.neurons, after.neurons)
    if after.query is not None:
        changed |= _count(section, _QUERY, "attention heads", before.query, after.query)
        if any(key in section for key in _KEY):
            changed |= _count(section, _KEY, "key/value heads", before.key, after.key)
        changed["head_dim"] = before.head  # hidden size divided by heads is no longer the size of a head
    return _replaced(config, section, changed)


def _count(section: Config, keys: Sequence[str], what: str, before: int | None, after: int | None) -> dict[str, Any]:
    """The entry that has a count, with another one. An entry that is null is written out."""
    found = [key for key in keys if section.get(key) == before] or [
        key for key in keys if key in section and section[key] is None
    ]
    if not found:
        raise UnsupportedError(
            f"config.json has no entry for the number of {what} ({before}), so that a smaller model cannot be described"
        )
    return dict.fromkeys(found, after)


def _by_layer(key: str, value: Any, layers: int, kept: Sequence[int]) -> Any:
    """An entry that speaks of layers, as it speaks of those that are kept under their new numbers."""
    if key in _BORDERS and isinstance(value, int):
        return sum(layer < value for layer in kept)
    if not isinstance(value, list):
        return value
    numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if key.endswith("_layers") and numbers and len(set(value)) == len(value) and len(value) != layers:
        return [at for at, layer in enumerate(kept) if layer in value]  # the numbers of layers of a kind
    return [value[layer] for layer in kept] if len(value) == layers else value


def _replaced(config: Config, section: Config, changed: Mapping[str, Any]) -> Config:
    """The config with another language part, wherever it is nested."""
    if section is config:
        return changed
    return {
        key: _replaced(value, section, changed) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
