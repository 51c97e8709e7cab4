"""A model's tokenizer as GGUF metadata: tokens, merges, special tokens, and the names of the rules around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelstore.architecture.config import Config, parse
from modelstore.errors import FormatError, UnsupportedError
from modelstore.integrations.gguf.rules import Entries, prefixes, rule
from modelstore.integrations.gguf.special import Special, Template, special, template
from modelstore.integrations.gguf.tokens import Tokens, tokens_of

if TYPE_CHECKING:
    import gguf

MAX_TOKENIZER = 128 << 20  # bytes of JSON; the largest ones of the hub, with 262,000 tokens, have 33 MB
MAX_MEMBERS = 1 << 23  # names, values and elements of it
MAX_TEXT = 16 << 20
# Tokenizers in other files than the tokenizer.json that is read.
_OTHERS = (
    "tekken.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)
_ENDS = (".tiktoken", ".bpe.model", ".spm", ".vocab", ".model.v1", ".model.v2", ".model.v3")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms. `rule`: how text is cut, None for pieces, of which `prefix` says more."""

    tokens: Tokens
    rule: str | None
    prefix: bool
    special: Special
    template: Template


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: their sizes by name, and what reads one."""

    sizes: Mapping[str, int]
    read: Callable[[str], bytes]

    def json(self, name: str) -> Entries | None:
        """A file that holds a JSON object, None if there is no such file."""
        if name not in self.sizes:
            return None
        found = None
        if self.sizes[name] <= MAX_TOKENIZER:
            found = parse(self.read(name), MAX_TOKENIZER, MAX_MEMBERS)
        if found is None:
            raise FormatError(
                f"{name} is not a JSON object of at most {MAX_TOKENIZER >> 20} MiB: correct it, and save the model again"
            )
        return found

    def text(self, name: str) -> str | None:
        """A file of text, None if there is no such file."""
        if name not in self.sizes:
            return None
        if self.sizes[name] > MAX_TEXT:
            raise FormatError(f"{name} has more than {MAX_TEXT >> 20} MiB: correct it, and save the model again")
        try:
            return self.read(name).decode()
        except UnicodeDecodeError:
            raise FormatError(f"{name} is not UTF-8: correct it, and save the model again") from None


def add_tokenizer(writer: gguf.GGUFWriter, found: Vocabulary | None) -> None:
    """Write a tokenizer's metadata; a model without a tokenizer is run on token numbers alone."""
    if found is None:
        writer.add_tokenizer_model("none")
        return
    if found.rule is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(found.prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(found.rule)
    writer.add_token_list(found.tokens.texts)
    if found.tokens.scores:
        writer.add_token_scores(found.tokens.scores)
    writer.add_token_types(found.tokens.types)
    if found.tokens.merges:
        writer.add_token_merges(found.tokens.merges)
    for name, number in found.special.tokens.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(found.special.begins)
    writer.add_add_eos_token(found.special.ends)
    if found.template:
        writer.add_chat_template(found.template)


def read_vocabulary(files: ModelFiles, config: Config, vocabulary: int) -> Vocabulary | None:
    """A model's tokenizer, None if it has none; `vocabulary` is the number of the model's embeddings.

    `UnsupportedError` for a tokenizer that llama.cpp does not have a rule for, `FormatError` for one that cannot be.
    """
    tokenizer = files.json("tokenizer.json")
    if tokenizer is None:
        others = sorted(name for name in files.sizes if name in _OTHERS or ("/" not in name and name.endswith(_ENDS)))
        if others:
            raise UnsupportedError(
                f"the tokenizer of this model is in {' and '.join(others[:3])}, without a tokenizer.json: add the tokenizer.json "
                f"that transformers' save_pretrained writes, and save the model again"
            )
        return None
    tokens = tokens_of(tokenizer, vocabulary)
    said = files.json("tokenizer_config.json") or {}
    return Vocabulary(
        tokens,
        None if tokens.pieces else rule(tokenizer),
        tokens.pieces and prefixes(tokenizer),
        special(tokenizer, said, config, tokens),
        template(files.text, files.json("chat_template.json") or {}, said),
    )
