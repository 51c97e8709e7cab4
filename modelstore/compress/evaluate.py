"""How well a language model predicts a text, and how far its predictions are from the original's.

A text is cut into windows. A window's first token is not predicted, nor are those that an earlier window predicted; every
other token is, from all tokens before it in its window. Perplexity is e to the mean of -log p(token). Between two models, the
Kullback-Leibler divergence KL(original ‖ variant) of their distributions of the next token, in nats, and whether both think
the same token the likeliest, are averaged over the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from modelstore.format.progress import Advance

if TYPE_CHECKING:
    import torch

MakeModel = Callable[[], "torch.nn.Module"]
_ROWS = 64  # predictions that are compared at once, so that what is between fits a cache
_LOGITS = 128 << 20  # bytes of float32 logits that windows of one batch may have


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text, of which those from `first` on are predicted."""

    start: int
    stop: int
    first: int

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return self.stop - self.first


@dataclass(frozen=True)
class Score:
    """Sums over predictions: -log p of the tokens in nats, the divergence from the original, and its likeliest token met."""

    predicted: int
    surprise: float
    divergence: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float | None:
        """e to the mean surprise; None where the model predicts nothing that is a number."""
        mean = self.surprise / self.predicted
        return math.exp(mean) if mean < 700 else None  # NaN is not below either


def windows(tokens: int, context: int, stride: int) -> list[Window]:
    """The windows of `context` tokens, each `stride` tokens after the one before; the last one may be shorter."""
    found = []
    done = 1
    for start in range(0, tokens, stride):
        stop = min(start + context, tokens)
        first = max(done, start + 1)
        if first < stop:
            found.append(Window(start, stop, first))
        done = max(done, stop)
        if stop == tokens:
            break
    return found


def batches(found: Sequence[Window], most: int) -> list[list[Window]]:
    """Windows of the same form, up to `most` at once, in their order."""
    made = []
    for _, alike in groupby(found, key=lambda w: (w.stop - w.start, w.first - w.start)):
        run = list(alike)
        made += [run[at : at + most] for at in range(0, len(run), most)]
    return made


def batch_size(context: int, vocabulary: int) -> int:
    """How many windows are run at once where nobody says."""
    return max(1, min(8, _LOGITS // (4 * context * max(1, vocabulary))))


def compare(
    original: MakeModel | None,
    variants: Sequence[MakeModel],
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    *,
    memory: int,
    vocabulary: int,
    count: Advance | None = None,
) -> tuple[Score | None, list[Score]]:
    """The score of the original, where one is given, and of each variant against it.

    Where the original's predictions (4 bytes for each token of the vocabulary and each prediction) fit into `memory` bytes,
    they are kept: one model is in memory at a time, and the original is run once, however many variants there are. Where
    they do not, the original is run beside each variant, batch by batch. `count` hears of tokens as they are predicted.
    """
    if original is None:
        return None, [_alone(make(), tokens, work, count) for make in variants]
    if not variants:
        return _alone(original(), tokens, work, count), []
    predictions = sum(window.predicted for batch in work for window in batch)
    if 4 * predictions * vocabulary <= memory:
        kept = [(answers, targets) for answers, targets in _answers(original(), tokens, work, count)]
        reference = Score(predictions, sum(_surprise(answers, targets) for answers, targets in kept))
        return reference, [_against([a for a, _ in kept], make(), tokens, work, count) for make in variants]
    first = original()
    surprises: list[float] = []

    def running() -> Iterator[torch.Tensor]:
        surprises.clear()
        for answers, targets in _answers(first, tokens, work, count):
            surprises.append(_surprise(answers, targets))
            yield answers

    scores = [_against(running(), make(), tokens, work, count) for make in variants]
    return Score(predictions, sum(surprises)), scores


def _alone(
    model: torch.nn.Module,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Score:
    predicted, surprise = 0, 0.0
    for answers, targets in _answers(model, tokens, work, count):
        predicted += len(targets)
        surprise += _surprise(answers, targets)
    return Score(predicted, surprise)


def _against(
    reference: Sequence[torch.Tensor] | Iterator[torch.Tensor],
    model: torch.nn.Module,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Score:
    import torch

    predicted, surprise, divergence, agreed = 0, 0.0, 0.0, 0
    for known, (answers, targets) in zip(reference, _answers(model, tokens, work, count), strict=True):
        predicted += len(targets)
        surprise += _surprise(answers, targets)
        for p, q in zip(torch.split(known, _ROWS), torch.split(answers, _ROWS), strict=True):
            terms = p.exp() * (p - q)
            divergence += float(terms.masked_fill_(p == -math.inf, 0).sum(-1).double().sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Score(predicted, surprise, divergence, agreed)


def _answers(
    model: torch.nn.Module,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each batch: log p of every token of the vocabulary, float32 (predictions, vocabulary); and the tokens that came."""
    import torch

    device = next(model.parameters()).device
    for batch in work:
        ids = torch.tensor([tokens[w.start : w.stop] for w in batch], device=device)
        skip = batch[0].first - batch[0].start
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, skip - 1 : -1]
            answers = logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
        yield answers, ids[:, skip:].reshape(-1)
        if count:
            count(len(answers))


def _surprise(answers: torch.Tensor, targets: torch.Tensor) -> float:
    return -float(answers.gather(1, targets[:, None]).double().sum())
