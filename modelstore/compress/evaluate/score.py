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
from typing import TYPE_CHECKING, Protocol

from modelstore.format.progress import Advance

if TYPE_CHECKING:
    import torch

_ROWS = 64  # predictions that are compared at once, so that what is between fits a cache
_LOGITS = 128 << 20  # bytes of float32 logits that windows of one batch may have


class Predicts(Protocol):
    """A model, whole or block by block."""

    def logits(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """For each batch of tokens (windows, tokens), its logits (windows, tokens, vocabulary), in their order."""


MakeModel = Callable[[], Predicts]


class Whole:
    """A module that is in memory."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def logits(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """As `Predicts.logits`."""
        import torch

        device = next(self._module.parameters()).device
        for ids in batches:
            with torch.inference_mode():
                found: torch.Tensor = self._module(ids.to(device), use_cache=False).logits
            yield found


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
    """Sums over predictions: -log p of the tokens in nats, the divergence from the original, and its likeliest token met.

    `windows`: of each window how many tokens were predicted, and its share of the surprise and of the divergence.
    """

    predicted: int
    surprise: float
    divergence: float = 0.0
    agreed: int = 0
    windows: tuple[tuple[int, float, float], ...] = ()

    @classmethod
    def of(
        cls,
        surprises: Sequence[torch.Tensor],
        work: Sequence[Sequence[Window]],
        divergences: Sequence[torch.Tensor] | None = None,
        agreed: int = 0,
    ) -> Score:
        """The statistics of the surprises, and divergences, of each batch: float64 (windows, predictions of each)."""
        counts = [window.predicted for batch in work for window in batch]
        lost = [float(one) for batch in surprises for one in batch.sum(1)]
        far = [float(one) for batch in divergences or () for one in batch.sum(1)] or [0.0] * len(lost)
        return cls(sum(counts), sum(lost), sum(far), agreed, tuple(zip(counts, lost, far, strict=True)))

    @property
    def perplexity(self) -> float | None:
        """e to the mean surprise; None if the model predicts nothing that is a number."""
        mean = self.surprise / self.predicted
        return math.exp(mean) if mean < 700 else None  # NaN is not below either

    @property
    def perplexity_error(self) -> float | None:
        """The standard error of the perplexity; None with less than two windows, or if it is not a number."""
        error, at = standard_error([(n, s) for n, s, _ in self.windows]), self.perplexity
        return None if error is None or at is None else at * error

    @property
    def divergence_error(self) -> float | None:
        """The standard error of the mean divergence; None with less than two windows, or if it is not a number."""
        return standard_error([(n, d) for n, _, d in self.windows])


def standard_error(windows: Sequence[tuple[int, float]]) -> float | None:
    """That of a mean over predictions, of windows with so many of them and such sums.

    Windows count as independent, the predictions in one as alike as they are: the linearized variance of a ratio.
    """
    count, total = len(windows), sum(n for n, _ in windows)
    if count < 2:
        return None
    mean = sum(value for _, value in windows) / total
    squares = sum((value - mean * n) ** 2 for n, value in windows)
    error = math.sqrt(squares * count / (count - 1)) / total if squares >= 0 else math.nan
    return error if math.isfinite(error) else None


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
    """Windows of the same form, up to `most` together, in their order."""
    made = []
    for _, alike in groupby(found, key=lambda w: (w.stop - w.start, w.first - w.start)):
        run = list(alike)
        made += [run[at : at + most] for at in range(0, len(run), most)]
    return made


def batch_size(context: int, vocabulary: int) -> int:
    """The default number of windows that are run together."""
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

    If the original's predictions (4 bytes for each token of the vocabulary and each prediction) fit into `memory` bytes, they
    are kept: one model is in memory at a time, and the original is run once, however many variants there are. If they do not,
    the original is run beside each variant, batch by batch. `count` hears of tokens as they are predicted.
    """
    if original is None:
        return None, [_alone(make(), tokens, work, count) for make in variants]
    if not variants:
        return _alone(original(), tokens, work, count), []
    if keeps(work, vocabulary, memory):
        kept = list(_answers(original(), tokens, work, count))
        reference = Score.of([_surprises(*one) for one in kept], work)
        return reference, [_against([one[0] for one in kept], make(), tokens, work, count) for make in variants]
    first = original()
    surprises: list[torch.Tensor] = []

    def running() -> Iterator[torch.Tensor]:
        surprises.clear()
        for answers, targets in _answers(first, tokens, work, count):
            surprises.append(_surprises(answers, targets))
            yield answers

    scores = [_against(running(), make(), tokens, work, count) for make in variants]
    return Score.of(surprises, work), scores


def keeps(work: Sequence[Sequence[Window]], vocabulary: int, memory: int) -> bool:
    """Whether what a model predicts fits into so many bytes."""
    return 4 * sum(window.predicted for batch in work for window in batch) * vocabulary <= memory


def _alone(
    model: Predicts,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Score:
    return Score.of([_surprises(*one) for one in _answers(model, tokens, work, count)], work)


def _against(
    reference: Sequence[torch.Tensor] | Iterator[torch.Tensor],
    model: Predicts,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Score:
    import torch

    surprises, divergences, agreed = [], [], 0
    for known, (answers, targets) in zip(reference, _answers(model, tokens, work, count), strict=True):
        surprises.append(_surprises(answers, targets))
        divergences.append(divergence(known, answers).reshape(targets.shape))
        for p, q in zip(torch.split(known, _ROWS), torch.split(answers, _ROWS), strict=True):
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Score.of(surprises, work, divergences, agreed)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log p of each token of the vocabulary, float32 (predictions, vocabulary)."""
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)


def divergence(known: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """KL(known ‖ answers) of each prediction in nats, float64 (predictions), of log p: float32 (predictions, vocabulary)."""
    import torch

    rows = []
    for p, q in zip(torch.split(known, _ROWS), torch.split(answers, _ROWS), strict=True):
        terms = p.exp() * (p - q)
        rows.append(terms.masked_fill_(p == -math.inf, 0).sum(-1).double())
    return torch.cat(rows)


def _answers(
    model: Predicts,
    tokens: Sequence[int],
    work: Sequence[Sequence[Window]],
    count: Advance | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch: log p of every token of the vocabulary, float32 (predictions, vocabulary); and the tokens that came,
    (windows, predictions of each).
    """
    import torch

    batches = [torch.tensor([tokens[w.start : w.stop] for w in batch]) for batch in work]
    for batch, ids, found in zip(work, batches, model.logits(batches), strict=True):
        skip = batch[0].first - batch[0].start
        with torch.inference_mode():
            logits = found[:, skip - 1 : -1]
            answers = log_probabilities(logits)
        yield answers, ids[:, skip:].to(answers.device)
        if count:
            count(len(answers))


def _surprises(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of the tokens that came, float64 (windows, predictions of each)."""
    return -answers.gather(1, targets.reshape(-1, 1)).double().reshape(targets.shape)
