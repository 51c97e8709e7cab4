"""The repeated layers of a model, in order, and what precedes and follows them: from names, or as the model's own class says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from modelstore.architecture.config import Config, architectures
from modelstore.architecture.ranks.parallel_table import BESIDE
from modelstore.architecture.ties import tied
from modelstore.format.objects.architecture import Architecture, general

_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|layer|h|blocks|block))\.(\d+)\.")
_HEAD = re.compile(
    r"(^|\.)(\w*lm_head|embed_out|output_projection|project_out|proj_out|score|classifier|qa_outputs|vocab_\w+|cls|pooler"
    r"|generator_predictions)(\.|$)|^head\.|^decoder\.(weight|bias)$"
)
_HEAD_WEIGHT = re.compile(
    r"(^|\.)(\w*lm_head|lm_head\.decoder|cls\.predictions\.decoder|embed_out|output_projection|proj_out|vocab_projector"
    r"|score|classifier|qa_outputs)\.weight$|^decoder\.weight$"
)
_NORM = re.compile(
    r"(^|\.)((?<!embeddings\.)norm|norm_f|ln_f|final_?layer_?norm|final_norm|decoder\.layer_norm)\.(weight|bias)$"
)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")


@dataclass(frozen=True)
class Blocks:
    """A model's tensors by the layer that they belong to.

    `stacks`: of each stack of layers, such as "model.layers", its tensors with the numbers of their layers; in the order of
    the names. `before` and `after`: the others, towers beside the language model among the first.
    """

    stacks: Mapping[str, Mapping[str, int]]
    before: tuple[str, ...]
    after: tuple[str, ...]


def blocks(names: Iterable[str], known: Architecture | None = None) -> Blocks:
    """The blocks of tensors of these names. `known`: what the model's class says, where it names stacks."""
    stacks: dict[str, dict[str, int]] = {}
    before: list[str] = []
    after: list[str] = []
    said = known.blocks if known else ()
    for name in names:
        at = _place(name, said)
        if at is not None:
            stacks.setdefault(at[0], {})[name] = at[1]
        else:
            (after if _HEAD.search(name) or _NORM.search(name) else before).append(name)
    return Blocks(stacks, tuple(before), tuple(after))


def _place(name: str, said: Iterable[str]) -> tuple[str, int] | None:
    """The stack that a tensor belongs to and the number of its layer; None for a tensor outside, or in a tower beside."""
    found = None
    for stack in said:
        number, dot, _ = name.removeprefix(f"{stack}.").partition(".")
        if dot and number.isdecimal() and name.startswith(f"{stack}."):
            found = stack, int(number)
    if not said and (match := _LAYER.match(name)):
        found = match[1], int(match[2])
    return None if found is None or any(part in BESIDE for part in found[0].split(".")) else found


def head_tensors(names: Collection[str], config: Config | None, known: Architecture | None = None) -> set[str]:
    """The embeddings that are the head, too, where the head's weight is not stored apart."""
    if known is not None:
        given = {general(name) for name in names}
        heads = {of for name, of in known.ties.items() if general(name) not in given}
        return {name for name in names if name in heads}
    if any(_HEAD_WEIGHT.search(name) for name in names) or tied(config) is False:
        return set()
    called = architectures(config or {}) or ["LMHead"]
    if not any(re.search(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining", one) for one in called):
        return set()
    return {name for name in names if _EMBEDDING.search(name)}
