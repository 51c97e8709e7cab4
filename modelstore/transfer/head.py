"""A language model in two parts: the hidden states of its blocks, and the logits of some of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modelstore.architecture.sizes import Sizes
from modelstore.errors import UnsupportedError

_TRIED = 4  # tokens by which the parts are tried


class SplitModel:
    """A model whose logits are made a few at a time, by its own code: all of vocabulary × tokens is never there.

    `UnsupportedError` if the two parts together are not the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = Sizes(model.config).vocabulary
        whole = model.base_model
        ids = torch.arange(_TRIED, device=model.device)[None] % self.vocabulary
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
            for base in (whole, getattr(whole, "decoder", None)):
                if base is not None and base is not model:
                    self._base = base
                    if torch.equal(self.logits(self.hidden(ids)[0]), wanted[0]):
                        return
        raise UnsupportedError(
            f"the head of a {type(model).__name__} cannot be run apart from its blocks: it is not trained here"
        )

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The input of the head for tokens (windows, length): (windows, length, hidden)."""
        found: torch.Tensor = self._base(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of what the head reads (tokens, hidden)."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with self._given(hidden[None]):
            found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found[0]

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        """While it runs, the blocks give this."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        before = self._base.__dict__.get("forward")
        self._base.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
        try:
            yield
        finally:
            del self._base.forward
            if before is not None:
                self._base.forward = before
