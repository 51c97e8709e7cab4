"""A text in passages, for models that look at each by itself: the paragraphs of a text, or the records of a JSONL file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec

from modelstore.format.objects.decoding import prepared

_TOGETHER = 32  # passages of a batch


class Passage(msgspec.Struct, frozen=True):
    """A passage, the second one of a pair, and the class it belongs to, where the file says them."""

    text: str
    text_pair: str | None = None
    label: str | int | None = None


@dataclass(frozen=True, slots=True)
class PassageBatch:
    """Passages of equal length, by their places in the text, and what the model reads of each."""

    places: tuple[int, ...]
    inputs: tuple[dict[str, list[int]], ...]


def passages(name: str, content: str) -> list[Passage]:
    """The paragraphs of a text; of a file that ends in .jsonl, its records: {"text": …, "text_pair": …, "label": …}.

    `ValueError`, with the line, for a record that is none.
    """
    if name.endswith(".jsonl"):
        lines = enumerate(content.split("\n"), 1)
        return [_record(name, number, line) for number, line in lines if line.strip()]
    paragraphs = (" ".join(part.split()) for part in content.split("\n\n"))
    return [Passage(paragraph) for paragraph in paragraphs if paragraph]


def batches(inputs: Sequence[dict[str, list[int]]], most: int = _TOGETHER) -> Iterator[PassageBatch]:
    """Batches of equal length, the shortest first: nothing is padded, so no passage depends on its neighbours."""

    def tokens(place: int) -> int:
        return len(inputs[place]["input_ids"])

    for _, alike in groupby(sorted(range(len(inputs)), key=tokens), key=tokens):
        run = tuple(alike)
        for at in range(0, len(run), most):
            places = run[at : at + most]
            yield PassageBatch(places, tuple(inputs[place] for place in places))


def _record(name: str, number: int, line: str) -> Passage:
    try:
        return msgspec.json.decode(line, type=prepared(Passage))
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError(
            f"line {number} of {name} is not a record: "
            f'write {{"text": "a film to see again", "label": "positive"}}, where text_pair and label are optional'
        ) from None
