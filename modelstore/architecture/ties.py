"""Which tensors are one and the same: a head that is the embedding."""

from __future__ import annotations

from modelstore.architecture.config import Config, language


def tied(config: Config | None) -> bool | None:
    """Whether the config says that head and embedding are tied; None if it says nothing, False if any part denies it."""
    if config is None:
        return None
    said = [part.get("tie_word_embeddings") for part in (config, language(config))]
    return False if False in said else True if True in said else None
