"""How large a language model is, by its config as transformers has it: asked here, whatever architectures call it."""

from __future__ import annotations

from typing import Any, NamedTuple

_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_WHOLE = ("full_attention", "attention")


class Cached(NamedTuple):
    """A layer that keeps something of each token: what kind it is, the tokens that it looks back at, None where it is all.

    `known`: whether what it keeps is known here, as it is of attention.
    """

    kind: str
    window: int | None
    known: bool


class Sizes:
    """The sizes of the language model within a config of transformers, which has the defaults of its class."""

    def __init__(self, config: Any) -> None:
        nested = getattr(config, "get_text_config", None)
        self._config = nested() if callable(nested) else config

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self._config.vocab_size)

    @property
    def positions(self) -> int | None:
        """The most tokens that it looks at, None where the config does not say it."""
        found = getattr(self._config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def hidden(self) -> int:
        """Numbers that go around a block for each token."""
        return int(self._config.hidden_size)

    @property
    def layers(self) -> int:
        """Its blocks."""
        return int(self._config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Heads of a layer's queries; 1 where the config has none."""
        return self._number("num_attention_heads") or 1

    @property
    def kv_heads(self) -> int:
        """Heads of a layer's keys, and of its values."""
        return self._number("num_key_value_heads") or self.heads

    @property
    def head(self) -> int:
        """Numbers of a head."""
        return self._number("head_dim") or (self._number("hidden_size") or self.heads) // self.heads

    @property
    def latent(self) -> int | None:
        """Numbers of a token's latent for keys and values, with the rotated part of its keys (MLA); None without one."""
        rank = self._number("kv_lora_rank")
        return rank + int(self._config.qk_rope_head_dim) if rank else None

    @property
    def active(self) -> int:
        """Experts that a token goes through; 1 where there are none."""
        return self._number("num_experts_per_tok") or 1

    @property
    def inner(self) -> int:
        """Numbers that a token takes within a block's MLP, its experts side by side."""
        found = self._number("intermediate_size") or self._number("n_inner") or 4 * self.hidden
        each = self._number("moe_intermediate_size")
        return max(found, each * self.active) if each else found * self.active

    @property
    def attention(self) -> tuple[str, ...] | None:
        """The kind of attention of each layer; None if the config has no such list."""
        found = getattr(self._config, "layer_types", None)
        return tuple(found) if found and len(found) == self._number("num_hidden_layers") else None

    def cached(self) -> list[Cached]:
        """The layers with a cache of their own, as transformers' caches decide it."""
        layers = self.layers
        kinds = getattr(self._config, "layer_types", None)
        if kinds is None:
            of_all = next((kind for kind, key in _WINDOWS.items() if self._number(key)), _WHOLE[0])
            kinds = [of_all] * layers
        own = list(kinds)[: layers - self._number("num_kv_shared_layers")]
        return [
            Cached(kind, self._number(_WINDOWS[kind]) if kind in _WINDOWS else None, kind in (*_WHOLE, *_WINDOWS))
            for kind in own
        ]

    def _number(self, key: str) -> int:
        """An entry that is a number; 0 where the config has none."""
        return int(getattr(self._config, key, None) or 0)
