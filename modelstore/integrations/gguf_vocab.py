"""A model's tokenizer as GGUF metadata: tokens, merges, and the name of the rule that cuts text before them.

llama.cpp has these rules built in, and a tokenizer.json spells them out: those that are known here are recognised by what they
do, never by a model's name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.errors import UnsupportedError

if TYPE_CHECKING:
    import gguf

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "chat_template.json")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
_SPACE = "▁"


def add_tokenizer(writer: gguf.GGUFWriter, read: Callable[[str], bytes | None], vocabulary: int) -> None:
    """Write the tokenizer's metadata. `read` gives a file of the model, `vocabulary` is the number of the model's embeddings.

    A model without a tokenizer.json gets none, and is then run on token numbers alone. `UnsupportedError` for a tokenizer that
    llama.cpp has no rule for.
    """
    import gguf

    found = {name: data for name in FILES if (data := read(name)) is not None}
    if "tokenizer.json" not in found:
        if read("tokenizer.model") is not None:
            raise UnsupportedError(
                "the tokenizer of this model is a tokenizer.model alone: add the tokenizer.json that transformers' "
                "save_pretrained writes, and save the model again"
            )
        writer.add_tokenizer_model("none")
        return
    tokenizer = json.loads(found["tokenizer.json"])
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(f"a tokenizer of the type {model.get('type')!r} has no GGUF export: BPE has")
    pieces = model.get("byte_fallback") is True
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefixes(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule(tokenizer))
    tokens, types = _tokens(tokenizer, vocabulary, pieces)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(model, tokens))
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in found.items():
            (Path(folder) / name).write_bytes(data)
        special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=len(tokens))
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def rule(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer cuts text; `UnsupportedError` where none is known."""
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    kinds = [step.get("type") for step in steps]
    regex = steps[-1].get("use_regex", True)
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and regex:
        return "smollm"
    if kinds == ["ByteLevel"] and regex:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not regex:
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if pattern in _SPLITS and plain:
            return _SPLITS[pattern]
    raise UnsupportedError(
        "this tokenizer cuts text by a rule of its own, which llama.cpp's are not known to match: the model has no GGUF export"
    )


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int, pieces: bool) -> tuple[list[str], list[int]]:
    """All tokens in their order, and what each is; embeddings beyond the tokenizer's get names of their own."""
    import gguf

    kind = gguf.TokenType
    by_number = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    added = {item["id"]: item for item in tokenizer.get("added_tokens") or ()}
    by_number |= {number: item["content"] for number, item in added.items()}
    if max(by_number, default=0) >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer has {max(by_number) + 1} tokens and the model {vocabulary} embeddings: it has no GGUF export"
        )
    unknown = tokenizer["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocabulary):
        token = by_number.get(number)
        item = added.get(number)
        if token is None:
            token, what = f"[PAD{number}]", kind.UNUSED
        elif token == unknown and pieces:
            what = kind.UNKNOWN
        elif item is not None:
            what = kind.CONTROL if item.get("special") else kind.USER_DEFINED
        elif pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            what = kind.BYTE
        else:
            what = kind.NORMAL
        tokens.append(token)
        types.append(int(what))
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """For each token, the higher the sooner its parts are merged."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = float(len(ranks) + 1)
    return [-float(ranks[token] + 1) if token in ranks else -last if len(token) == 1 else 0.0 for token in tokens]


def _prefixes(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normal = tokenizer.get("normalizer") or {}
    before = tokenizer.get("pre_tokenizer") or {}
    steps = normal.get("normalizers") or [normal]
    if any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps):
        return True
    return before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"
