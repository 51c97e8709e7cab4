"""The tokens of a tokenizer.json as GGUF says them: texts in the order of their numbers, what each is, and how they merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelstore.errors import FormatError, UnsupportedError
from modelstore.integrations.gguf.rules import Entries, absurd, entries, objects, whole

_PLAIN = ("lstrip", "rstrip", "single_word")  # how an added token takes what is around it
_UNKNOWN = "unk_token"


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's tokens by number, and what each is; `pieces` of text are merged by `scores`, bytes by `merges`."""

    texts: list[str]
    types: list[int]
    pieces: bool
    scores: list[float]
    merges: list[str]
    numbers: Mapping[str, int]


def tokens_of(tokenizer: Entries, vocabulary: int) -> Tokens:
    """The tokens of a model with so many embeddings; those beyond the tokenizer's get names of their own."""
    model = entries(tokenizer, "model")
    _check(model)
    pieces = model.get("byte_fallback") is True
    added = _added(tokenizer, pieces)
    by_number = _numbered(model) | {number: item["content"] for number, item in added.items()}
    most = max(by_number, default=-1) + 1
    if most > vocabulary:
        raise UnsupportedError(
            f"the tokenizer has {most} tokens and the model {vocabulary} embeddings: it has no GGUF export"
        )
    texts = [by_number.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    numbers = {text: number for number, text in enumerate(texts)}
    if len(numbers) != len(texts):
        raise FormatError("the tokenizer has two tokens of one text: correct it, and save the model again")
    _check_bytes(model, numbers, pieces)
    kinds = [_kind(number, by_number, added, model, pieces) for number in range(vocabulary)]
    pairs = _pairs(model, numbers)
    return Tokens(
        texts,
        kinds,
        pieces,
        _scores(pairs, texts, kinds) if pieces else [],
        [] if pieces else [f"{left} {right}" for left, right in pairs],
        numbers,
    )


def _check(model: Entries) -> None:
    kind = model.get("type")
    if kind != "BPE":
        raise UnsupportedError(f"a tokenizer of the type {str(kind)[:40]!r} has no GGUF export: BPE has")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key) not in (None, 0, ""):
            raise UnsupportedError(f"a tokenizer with {key} {str(model[key])[:40]!r} has no GGUF export")
    for key in ("byte_fallback", "ignore_merges"):
        if model.get(key) not in (None, True, False):
            raise absurd(key, model[key], "true or false")
    if model.get("byte_fallback") and model.get("ignore_merges"):
        raise UnsupportedError("a tokenizer of pieces that takes words whole (ignore_merges) has no GGUF export")
    if not isinstance(model.get(_UNKNOWN), str | None):
        raise absurd(_UNKNOWN, model[_UNKNOWN], "text")


def _numbered(model: Entries) -> dict[int, str]:
    vocabulary = entries(model, "vocab")
    found = {}
    for token, number in vocabulary.items():
        if not whole(number) or number in found:
            raise absurd(f"the token {token[:40]!r}", number, "a number that no other token has")
        found[number] = _text(token)
    return found


def _added(tokenizer: Entries, pieces: bool) -> dict[int, Entries]:
    """The added tokens by number, which are found in a text before any other."""
    found: dict[int, Entries] = {}
    for item in objects(tokenizer, "added_tokens"):
        number: Any = item.get("id")
        text = item.get("content")
        if not whole(number) or not isinstance(text, str) or found.get(number, item) != item:
            raise absurd("added_tokens", dict(item), "a number and a text of its own each")
        for key in (*_PLAIN, "special", "normalized"):
            if item.get(key) not in (None, True, False):
                raise absurd(key, item[key], "true or false")
        takes = [key for key in _PLAIN if item.get(key)]
        if takes:
            raise UnsupportedError(f"a tokenizer whose token {text[:40]!r} has {takes[0]} has no GGUF export")
        if pieces and item.get("normalized") and not item.get("special"):
            raise UnsupportedError(f"a tokenizer whose token {text[:40]!r} is normalized has no GGUF export")
        _text(text)
        found[number] = item
    return found


def _text(token: str) -> str:
    try:
        token.encode()
    except UnicodeEncodeError:
        raise absurd("a token", token, "text in Unicode") from None
    return token


def _check_bytes(model: Entries, numbers: Mapping[str, int], pieces: bool) -> None:
    """Bytes that no token covers must not meet llama.cpp, which then differs from the tokenizer."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if pieces else _alphabet()
    needed = bytes_ if pieces or model.get(_UNKNOWN) is not None else []
    lacks = next((text for text in needed if text not in numbers), None)
    if lacks is not None:
        raise UnsupportedError(f"a tokenizer without a token for each byte ({lacks!r} is missing) has no GGUF export")


def _alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level tokenizers: those that print, and others from 256 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte) for byte in sorted(prints)] + [chr(256 + n) for n in range(256 - len(prints))]


def _kind(number: int, texts: Mapping[int, str], added: Mapping[int, Entries], model: Entries, pieces: bool) -> int:
    import gguf

    kind: Any = gguf.TokenType
    text = texts.get(number)
    if text is None:
        return int(kind.UNUSED)
    if pieces and text == model.get(_UNKNOWN):
        return int(kind.UNKNOWN)
    if number in added:
        return int(kind.CONTROL if added[number].get("special") else kind.USER_DEFINED)
    is_byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return int(kind.BYTE if is_byte else kind.NORMAL)


def _pairs(model: Entries, numbers: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges in their order, as pairs of tokens that make a token."""
    merges = model.get("merges")
    if merges is not None and not isinstance(merges, list):
        raise absurd("merges", merges, "a list")
    found = []
    for merge in merges or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise absurd("merges", merge, "two tokens each")
        left, right = pair
        if " " in left + right or not {left, right, left + right} <= numbers.keys():
            raise absurd("merges", merge, "two tokens each that make one")
        found.append((left, right))
    return found


def _scores(pairs: Sequence[tuple[str, str]], texts: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """For each token, the higher the sooner its parts are merged."""
    import gguf

    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    last = float(len(ranks) + 1)
    normal = int(gguf.TokenType.NORMAL)
    never = next(
        (t for t, kind in zip(texts, kinds, strict=True) if kind == normal and len(t) > 1 and t not in ranks), None
    )
    if never is not None:
        raise UnsupportedError(
            f"a tokenizer of pieces whose token {never[:40]!r} no merge makes has no GGUF export: llama.cpp would make it"
        )
    return [-float(ranks[text] + 1) if text in ranks else -last if len(text) == 1 else 0.0 for text in texts]
