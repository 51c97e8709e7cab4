"""A model's `config.json`: parsed within bounds, and asked one way for what architectures say in several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.errors import FormatError

Config = Mapping[str, Any]

MAX_CONFIG = 16 << 20  # bytes of JSON that are looked into; the largest ones of the hub, with 21,000 labels, have 2 MB
MAX_MEMBERS = 1 << 18  # names, values and elements: each takes some hundred bytes of memory, however short it is
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_DEEPEST = 4


def parse(content: bytes) -> Config | None:
    """The JSON object in a file of a model; None where it is none, or has more bytes or members than are looked into."""
    if len(content) > MAX_CONFIG or sum(map(content.count, (b"{", b"[", b",", b":"))) > MAX_MEMBERS:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def language(config: Config) -> Config:
    """The part that describes the language model: nested in that of a multimodal model, else the config itself."""
    for _ in range(_DEEPEST):
        inner = next((config[key] for key in _NESTED if isinstance(config.get(key), Mapping)), None)
        if inner is None:
            break
        config = inner
    return config


def model_type(config: Config) -> str:
    """The model type of the config, "" where it names none."""
    found = config.get("model_type")
    return found if isinstance(found, str) else ""


def count(config: Config, *keys: str) -> int | None:
    """The first of those entries that the config has; `FormatError` where it is no positive whole number."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 40:
            raise FormatError(f"config.json has {key} = {str(value)[:80]!r}: expected a positive whole number")
        return value
    return None


def architectures(config: Config) -> Sequence[str]:
    """The names of classes that the config says the model is of."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
