"""Evaluating models that look at passages: encoders, by their vectors, and classifiers, by their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from modelstore.architecture.sizes import Sizes
from modelstore.compress.evaluate import classes, vectors
from modelstore.compress.evaluate.model import Evaluated, check_runs, ready_model, tokens_of_each
from modelstore.compress.evaluate.passages import PassageBatch, batches, passages
from modelstore.compress.evaluate.question import Found, ModelsToRun, Question, rounded
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format.answers.results import Measured
from modelstore.format.names import ORIGINAL
from modelstore.format.progress import Advance

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Text:
    """What a model reads of a text, and the numbers of the classes that the text says, None where it says none."""

    inputs: list[dict[str, list[int]]]
    labels: list[int] | None

    @property
    def tokens(self) -> int:
        return sum(len(one["input_ids"]) for one in self.inputs)


def passages_evaluated(question: Question, what: Evaluated) -> Found:
    """`evaluate`, of models that look at each passage by itself; a passage is cut to `context` tokens.

    `ValueError` if the text has no passages, `UnsupportedError` if the model as float32 takes more than half the memory.
    """
    original, choice, work = question.original, question.choice, question.work
    read = _read(question, what)
    if not question.baseline and read.labels is None:
        raise ValueError(
            f"a {what.class_name} is measured against the original, since no labels say what is right: "
            f"evaluate it with the baseline"
        )
    if question.is_too_large():
        raise UnsupportedError(
            f"model {original.name!r} does not fit into the memory given: a {what.class_name} is evaluated whole, so give "
            f"memory={question.whole} (bytes) or more",
            model=original.name,
        )
    blank = question.blank(what.task, read.tokens, len(read.inputs))
    to_run = ModelsToRun.of(question, blank)
    if not (to_run.todo or to_run.runs_original):
        return to_run.found(question.variants, {})
    check_runs(original, what.class_name)
    count = to_run.counter(question, read.tokens)
    head = _head(original, what)

    def outputs(variant: str) -> torch.Tensor:
        module = ready_model(question.models[variant], what, work.limits, dtype=choice.dtype, device=choice.device)
        return _outputs(module, read, head, choice.batch, count)

    reference = outputs(ORIGINAL) if to_run.runs_original else None
    fresh: dict[str, Measured] = {}
    if reference is not None and to_run.before[ORIGINAL] is None:
        fresh[ORIGINAL] = _measured(blank, what, reference, reference, read.labels)
    for variant in to_run.todo:
        fresh[variant] = _measured(blank, what, reference, outputs(variant), read.labels)
    return to_run.found(question.variants, fresh)


def _read(question: Question, what: Evaluated) -> _Text:
    """The passages of the text that have tokens, as many as have `limit` tokens together."""
    original, choice = question.original, question.choice
    found = passages(question.name, question.text)
    each = tokens_of_each(original, [(one.text, one.text_pair) for one in found], choice.context)
    ends = accumulate(len(one["input_ids"]) for one in each)
    kept = [
        (passage, one)
        for passage, one, end in zip(found, each, ends, strict=True)
        if one["input_ids"] and (choice.limit is None or end <= choice.limit)
    ]
    if not kept:
        raise ValueError(
            f"{question.name} has no passages to look at: give paragraphs between empty lines, or records as .jsonl"
        )
    inputs = [one for _, one in kept]
    most = max(max(one["input_ids"]) for one in inputs)
    question.check_tokens(most, Sizes(what.config).vocabulary)
    if what.task == "vectors":
        return _Text(inputs, None)
    labels = [passage.label for passage, _ in kept]
    return _Text(inputs, classes.numbered(labels, what.config.label2id, what.config.num_labels))


def _head(original: Variant, what: Evaluated) -> Callable[[object], torch.Tensor]:
    """What is taken of a model's output: logits of classes, or the vector of a passage, as sentence-transformers pools it."""
    if what.task == "classes":
        return lambda found: found.logits.float()  # type: ignore[attr-defined]
    there = any(file.name == vectors.POOLING_FILE for file in original.manifest.files)
    how = vectors.pooling(original.file(vectors.POOLING_FILE) if there else None)
    return lambda found: vectors.pooled(found.last_hidden_state, how)  # type: ignore[attr-defined]


def _outputs(
    module: torch.nn.Module,
    read: _Text,
    head: Callable[[object], torch.Tensor],
    most: int | None,
    count: Advance | None,
) -> torch.Tensor:
    """The output of each passage, float32 (passages, width), in their order."""
    import torch

    device = next(module.parameters()).device
    rows: dict[int, torch.Tensor] = {}
    for batch in batches(read.inputs, most) if most else batches(read.inputs):
        with torch.inference_mode():
            found = head(module(**_tensors(batch, device)))
        rows |= zip(batch.places, found.cpu(), strict=True)
        if count:
            count(sum(len(one["input_ids"]) for one in batch.inputs))
    return torch.stack([rows[place] for place in range(len(read.inputs))])


def _tensors(batch: PassageBatch, device: torch.device) -> dict[str, torch.Tensor]:
    import torch

    return {key: torch.tensor([one[key] for one in batch.inputs], device=device) for key in batch.inputs[0]}


def _measured(
    blank: Measured, what: Evaluated, original: torch.Tensor | None, variant: torch.Tensor, labels: list[int] | None
) -> Measured:
    """An evaluation of a variant's outputs beside the original's, or alone."""
    made = blank
    if what.task == "vectors":
        assert original is not None, "vectors are measured against the original's"
        near = vectors.nearness(original, variant)
        return msgspec.structs.replace(
            made, cosine=rounded(near.cosine), cosine_error=rounded(near.error), neighbours=rounded(near.neighbours)
        )
    if labels is not None:
        made = msgspec.structs.replace(
            made,
            accuracy=rounded(classes.accuracy(variant, labels)),
            baseline_accuracy=None if original is None else rounded(classes.accuracy(original, labels)),
        )
    if original is not None:
        found = classes.agreement(original, variant)
        made = msgspec.structs.replace(
            made, kl=rounded(max(0.0, found.kl)), kl_error=rounded(found.error), top1=rounded(found.agreed)
        )
    return made
