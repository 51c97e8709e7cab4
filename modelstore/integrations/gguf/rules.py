"""The steps of a tokenizer.json on a text before and after its tokens are found, in llama.cpp's terms.

llama.cpp has these rules built in, and a tokenizer.json spells them out: those that are known here are recognised by what they
do, never by a model's name. Any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelstore.errors import FormatError, UnsupportedError

Entries = Mapping[str, Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression that cuts text, whether words that are tokens are taken whole (ignore_merges), and llama.cpp's name for both.
_SPLITS = {
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
}
_SPACE = "▁"
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def rule(tokenizer: Entries) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer cuts text; `UnsupportedError` if none is known.

    Text is taken to be in Unicode's form NFC: llama.cpp does not bring it into that form, and most text is.
    """
    normal = [step.get("type") for step in steps(tokenizer, "normalizer")]
    if normal not in ([], ["NFC"]):
        raise UnsupportedError(f"a tokenizer that changes text first ({_named(normal)}) has no GGUF export")
    found = steps(tokenizer, "pre_tokenizer")
    kinds = [step.get("type") for step in found]
    whole = entries(tokenizer, "model").get("ignore_merges") is True
    last = found[-1] if found else {}
    regex = last.get("use_regex", True) is True
    if kinds and kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is True:
        raise UnsupportedError("a byte-level tokenizer that puts a space before the text has no GGUF export")
    if kinds == ["Digits", "ByteLevel"] and found[0].get("individual_digits") is True and regex and not whole:
        return "smollm"
    if kinds == ["ByteLevel"] and regex and not whole:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not regex:
        known = _SPLITS.get((str(entries(found[0], "pattern").get("Regex")), whole))
        if known and found[0].get("behavior") == "Isolated" and found[0].get("invert") in (None, False):
            return known
    raise UnsupportedError(
        "this tokenizer cuts text by a rule of its own, which llama.cpp's are not known to match: the model has no GGUF export"
    )


def prefixes(tokenizer: Entries) -> bool:
    """Whether a tokenizer of pieces puts a space before the text, and before what follows a special token."""
    normal, before = steps(tokenizer, "normalizer"), steps(tokenizer, "pre_tokenizer")
    kinds = [step.get("type") for step in normal], [step.get("type") for step in before]
    if kinds in ((["Prepend", "Replace"], []), (["Replace"], [])):
        replace = normal[-1]
        space = entries(replace, "pattern").get("String") == " " and replace.get("content") == _SPACE
        if space and (len(normal) == 1 or normal[0].get("prepend") == _SPACE):
            return len(normal) == 2
    if kinds == ([], ["Metaspace"]) and before[0].get("replacement") == _SPACE and before[0].get("split") is False:
        scheme = before[0].get("prepend_scheme", "always")
        if scheme in ("always", "never"):
            return bool(scheme == "always")
    raise UnsupportedError(
        f"a tokenizer of pieces that changes text by {_named([*kinds[0], *kinds[1]])} as this one does is not known to match "
        f"llama.cpp's: the model has no GGUF export"
    )


def around(tokenizer: Entries) -> tuple[int | None, int | None]:
    """The tokens that are put before and after every text; `UnsupportedError` if it is more than one each."""
    found = [step for step in steps(tokenizer, "post_processor") if step.get("type") != "ByteLevel"]
    if not found:
        return None, None
    if [step.get("type") for step in found] != ["TemplateProcessing"]:
        raise UnsupportedError(
            f"a tokenizer that puts tokens around a text by {_named([step.get('type') for step in found])} has no GGUF export"
        )
    numbers = entries(found[0], "special_tokens")
    before: list[int] = []
    after: list[int] = []
    texts = 0
    for item in objects(found[0], "single"):
        if "SpecialToken" in item:
            ids = entries(numbers, str(entries(item, "SpecialToken").get("id"))).get("ids")
            if not isinstance(ids, list) or not all(whole(number) for number in ids):
                raise absurd("post_processor", ids, "the numbers of special tokens")
            (after if texts else before).extend(ids)
        else:
            texts += 1
    if texts != 1 or len(before) > 1 or len(after) > 1:
        raise UnsupportedError("a tokenizer that puts several tokens before or after a text has no GGUF export")
    return (before[0] if before else None), (after[0] if after else None)


def steps(tokenizer: Entries, key: str) -> list[Entries]:
    """The steps of a part of a tokenizer, however it says that there is one, several or none."""
    found = entries(tokenizer, key)
    if found.get("type") == "Sequence":
        inner = objects(found, _STEPS[key])
        return [step for one in inner for step in steps({key: one}, key)]
    return [found] if found else []


def entries(tokenizer: Entries, key: str) -> Entries:
    """An entry that is an object, an empty one where there is none; `FormatError` if it is anything else."""
    value = tokenizer.get(key)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise absurd(key, value, "an object")


def objects(tokenizer: Entries, key: str) -> Sequence[Entries]:
    """An entry that is a list of objects; `FormatError` if it is anything else."""
    value = tokenizer.get(key)
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return value
    raise absurd(key, value, "a list of objects")


def whole(value: object) -> bool:
    """Whether it is a token's number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def absurd(key: str, value: object, expected: str) -> FormatError:
    """The error for an entry of a tokenizer that cannot be."""
    return FormatError(f"the tokenizer has {key[:80]} = {str(value)[:80]!r}: expected {expected}")


def _named(kinds: Sequence[object]) -> str:
    return ", ".join(str(kind)[:40] for kind in kinds[:8]) or "nothing"
