"""A model's `config.json`: parsed within bounds, and asked one way for what architectures say in several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.errors import FormatError

Config = Mapping[str, Any]

MAX_CONFIG = 16 << 20  # bytes of JSON that are looked into; the largest ones of the hub, with 21,000 labels, have 2 MB
MAX_MEMBERS = 1 << 18  # names, values and elements: each takes some hundred bytes of memory, however short it is
MAX_NESTED = 64  # objects and lists within each other: Python stops functions that call themselves some hundred times
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_DEEPEST = 4


def parse(content: bytes, most_bytes: int = MAX_CONFIG, most_members: int = MAX_MEMBERS) -> Config | None:
    """The JSON object in a file of a model; None if it is none, or has more bytes or members than are looked into."""
    found = examined(content, most_bytes, most_members)
    return None if isinstance(found, str) else found


def examined(content: bytes, most_bytes: int = MAX_CONFIG, most_members: int = MAX_MEMBERS) -> Config | str:
    """As `parse`, and what is wrong in place of None, in words that follow the file's name."""
    if len(content) > most_bytes:
        return f"has {len(content):,} bytes, more than the {most_bytes:,} that are looked into"
    if sum(map(content.count, (b"{", b"[", b",", b":"))) > most_members:
        return f"has more than the {most_members:,} entries that are looked into"
    if not content.strip():
        return "is empty"
    try:
        found = json.loads(content)
    except RecursionError:
        return "is nested too deeply to be looked into"
    except ValueError as error:
        return f"is not valid JSON ({str(error)[:80]})"
    if _is_deeper(found, MAX_NESTED):
        return "is nested too deeply to be looked into"
    return found if isinstance(found, dict) else "holds no JSON object"


def _is_deeper(found: object, most: int) -> bool:
    """Whether more objects and lists than that are within each other."""
    level = [found]
    for _ in range(most):
        held = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for inners in held for inner in inners]
    return any(isinstance(one, dict | list) for one in level)


def oddity(content: bytes) -> str:
    """The problem with a `config.json`, in words that follow its name; "" if none shows by itself."""
    found = examined(content)
    if isinstance(found, str):
        return found
    named = found.get("model_type")
    if "model_type" not in found or (isinstance(named, str) and named):
        return ""  # others than transformers name what they are otherwise
    return f"has model_type {json.dumps(named)[:40]}, which names no type"


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


def type_told(config: Config) -> str:
    """The model's type in a config, for a message: "model type 'llama'"."""
    found = config.get("model_type")
    if isinstance(found, str) and found:
        return f"model type {found[:80]!r}"
    return "no model type" if "model_type" not in config else f"no model type (model_type is {json.dumps(found)[:40]})"


def count(config: Config, *keys: str) -> int | None:
    """The first of those entries that the config has; `FormatError` if it is not a positive whole number."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 40:
            raise absurd(key, value, "a positive whole number")
        return value
    return None


def number(config: Config, key: str) -> float | None:
    """An entry that is a real number, None if the config has none; `FormatError` if it is anything else."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value):
        return float(value)
    raise absurd(key, value, "a number")


def flag(config: Config, key: str) -> bool | None:
    """An entry that is true or false, None if the config has none; `FormatError` if it is anything else."""
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise absurd(key, value, "true or false")


def word(config: Config, key: str) -> str | None:
    """An entry that is text, None if the config has none; `FormatError` if it is anything else."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    raise absurd(key, value, "text")


def part(config: Config, key: str) -> Config:
    """An entry that is an object, an empty one where the config has none; `FormatError` if it is anything else."""
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise absurd(key, value, "an object")


def absurd(key: str, value: object, expected: str) -> FormatError:
    """The error for an entry that cannot be."""
    return FormatError(f"config.json has {key} = {str(value)[:80]!r}: expected {expected}")


def architectures(config: Config) -> Sequence[str]:
    """The names of classes that the config says the model is of."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
