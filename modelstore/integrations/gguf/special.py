"""Special tokens and the chat template: the start and end of a text, and the form of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.architecture.config import Config, language
from modelstore.errors import FormatError, UnsupportedError
from modelstore.integrations.gguf.rules import Entries, absurd, around, entries, objects
from modelstore.integrations.gguf.tokens import Tokens

Template = str | list[dict[str, str]] | None

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
_NEEDED = ("bos", "eos")


@dataclass(frozen=True)
class Special:
    """Special tokens by purpose, and whether every text starts and ends with one."""

    tokens: Mapping[str, int]
    begins: bool
    ends: bool


def special(tokenizer: Entries, said: Entries, config: Config, tokens: Tokens) -> Special:
    """The special tokens of a tokenizer (`said`: its tokenizer_config.json).

    The tokens around a text are those of tokenizer.json, as transformers 5 has it; `UnsupportedError` if the
    tokenizer_config.json says otherwise, as versions before might have it.
    """
    _check_added(said, tokens)
    found = {kind: number for kind in _KINDS if (number := _number(kind, said, config, tokens)) is not None}
    before, after = around(tokenizer)
    for number in (before, after):
        if number is not None and number >= len(tokens.texts):
            raise absurd("post_processor", number, "the number of a token")
    if before is not None and found.setdefault("bos", before) != before:
        raise UnsupportedError(
            f"the tokenizer begins each text with {tokens.texts[before][:40]!r}, and its bos_token is "
            f"{tokens.texts[found['bos']][:40]!r}: it has no GGUF export"
        )
    if after is not None and found.setdefault("eos", after) != after:
        found |= {"eot": found["eos"], "eos": after}
    if "eos" not in found:
        raise UnsupportedError(
            "the tokenizer names no token that ends a text, and llama.cpp would take another one: add eos_token_id to "
            "config.json, and save the model again"
        )
    for key, does in (("add_bos_token", before is not None), ("add_eos_token", after is not None)):
        wants = said.get(key)
        if wants not in (None, True, False):
            raise absurd(key, wants, "true or false")
        if wants is not None and wants is not does:
            raise UnsupportedError(
                f"tokenizer_config.json says {key} {str(wants).lower()[:8]}, and the post_processor of tokenizer.json does "
                f"otherwise: make them agree, and save the model again"
            )
    return Special(found, before is not None, after is not None)


def template(read: Callable[[str], str | None], processor: Entries, said: Entries) -> Template:
    """The chat template: of chat_template.jinja, else of tokenizer_config.json, else of chat_template.json (`processor`)."""
    found = read("chat_template.jinja")
    for place in (said, processor):
        found = place.get("chat_template") if found is None else found
    if found is None or isinstance(found, str):
        _encoded(found or "")
        return found
    made = []
    for item in objects({"chat_template": found}, "chat_template"):
        name, text = item.get("name"), item.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise absurd("chat_template", dict(item), "a name and a text each")
        _encoded(text)
        made.append({"name": name, "template": text})
    return made


def _encoded(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormatError("the chat template is not text in Unicode: correct it, and save the model again") from None


def _number(kind: str, said: Entries, config: Config, tokens: Tokens) -> int | None:
    """The number of a special token: of the text that the tokenizer's config names, else as the model's config says."""
    text = said.get(f"{kind}_token")
    if isinstance(text, Mapping):
        text = text.get("content")
    if text is not None:
        if not isinstance(text, str):
            raise absurd(f"{kind}_token", text, "text")
        number = tokens.numbers.get(text)
        if number is None and kind in _NEEDED:
            raise UnsupportedError(
                f"tokenizer_config.json names {text[:40]!r} as {kind}_token, which tokenizer.json does not have: "
                f"the model has no GGUF export"
            )
        return number
    key = f"{kind}_token_id"
    value = next((part[key] for part in (config, language(config)) if part.get(key) is not None), None)
    numbers: list[Any] = value if isinstance(value, list) else [value]
    if value is None or value == -1 or not numbers:
        return None
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
        raise FormatError(f"config.json has {key} = {str(value)[:80]!r}: expected the number of a token")
    if 0 <= numbers[0] < len(tokens.texts):
        return int(numbers[0])
    if kind in _NEEDED:
        raise FormatError(f"config.json has {key} = {str(value)[:80]!r}, where there are {len(tokens.texts)} tokens")
    return None


def _check_added(said: Entries, tokens: Tokens) -> None:
    """Refuse tokens that transformers would add to those of the tokenizer.json."""
    for number, item in entries(said, "added_tokens_decoder").items():
        text = item.get("content") if isinstance(item, Mapping) else item
        known = number.isascii() and number.isdigit() and len(number) < 12
        if not known or not isinstance(text, str):
            raise absurd("added_tokens_decoder", {number: item}, "texts of tokens by their numbers")
        if tokens.numbers.get(text) != int(number):
            raise UnsupportedError(
                f"tokenizer_config.json adds the token {text[:40]!r}, which tokenizer.json does not have: it has no GGUF export"
            )
