"""One evaluation from end to end: what is known already, which models are run, what is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from modelstore.architecture.sizes import Sizes
from modelstore.compress.evaluate import score as ev
from modelstore.compress.evaluate.metrics import publish
from modelstore.compress.evaluate.model import Evaluated, check_runs, evaluated, ready_model, tokens
from modelstore.compress.evaluate.question import Choice, Found, ModelsToRun, Question, rounded
from modelstore.compress.evaluate.run_passages import passages_evaluated
from modelstore.compress.evaluate.streamed import Streamed
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format.answers.results import Measured
from modelstore.format.names import ORIGINAL

__all__ = ["Choice", "Found", "Question", "evaluate", "publish"]


def evaluate(question: Question) -> Found:
    """Evaluate variants of one version.

    `ValueError` if the text has fewer than two tokens, or the context is longer than what the model was made for.
    """
    what = evaluated(question.original)
    positions, context = Sizes(what.config).positions, question.choice.context
    if positions is not None and context > positions:
        raise ValueError(
            f"context={context} is more than the {positions} positions of model {question.original.name!r}"
        )
    return _predicted(question, what) if what.task == "tokens" else passages_evaluated(question, what)


def _predicted(question: Question, what: Evaluated) -> Found:
    """`evaluate`, of models that predict next tokens."""
    original, choice, baseline, work = question.original, question.choice, question.baseline, question.work
    ids = tokens(original, question.text)[: choice.limit]
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: give one of two or more, since each is predicted from those before"
        )
    vocabulary = Sizes(what.config).vocabulary
    question.check_tokens(max(ids), vocabulary)
    windows = ev.windows(len(ids), choice.context, choice.stride)
    blank = question.blank(what.task, len(ids), sum(window.predicted for window in windows))
    to_run = ModelsToRun.of(question, blank)
    turns = ev.batches(windows, choice.batch or ev.batch_size(choice.context, vocabulary))
    maker = _maker(question, what)
    count = to_run.counter(question, blank.predicted)
    rest: dict[str, Any] = {"memory": work.memory // 2, "vocabulary": vocabulary, "count": count}
    made = [maker(variant) for variant in to_run.todo]
    first = maker(ORIGINAL) if to_run.runs_original else None
    score, scores = ev.compare(first, made if baseline else [], ids, turns, **rest)
    if not baseline:
        scores = ev.compare(None, made, ids, turns, **rest)[1]
    fresh: dict[str, Measured] = {}
    reference = to_run.before[ORIGINAL]
    if score is not None and reference is None:
        fresh[ORIGINAL] = reference = _of_original(blank, score)
    for variant, found in zip(to_run.todo, scores, strict=True):
        fresh[variant] = _measured(blank, found, reference, compared=baseline)
    return to_run.found(question.variants, fresh)


def _of_original(blank: Measured, score: ev.Score) -> Measured:
    at = rounded(score.perplexity)
    error = rounded(score.perplexity_error)
    return msgspec.structs.replace(
        blank, perplexity=at, perplexity_error=error, baseline_perplexity=at, kl=0.0, kl_error=0.0, top1=1.0
    )


def _maker(question: Question, what: Evaluated) -> Callable[[str], ev.MakeModel]:
    """How a variant is made ready to predict, by its name."""
    choice, work, streamed = question.choice, question.work, question.is_too_large()
    if not streamed:
        check_runs(question.original, what.class_name)

    def maker(variant: str) -> ev.MakeModel:
        one = question.models[variant]
        if streamed:
            return lambda: Streamed(_stages(one, what, question), work.memory // 4)
        return lambda: ev.Whole(ready_model(one, what, work.limits, dtype=choice.dtype, device=choice.device))

    return maker


def _stages(model: Variant, what: Evaluated, question: Question) -> Stages:
    try:
        return Stages(model, what.class_name, question.work.limits)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"model {model.name!r} does not fit into the memory given, and {error}: to evaluate it whole, give "
            f"memory={question.whole} (bytes) or more",
            model=model.name,
        ) from None


def _measured(blank: Measured, score: ev.Score, reference: Measured | None, *, compared: bool) -> Measured:
    divergence = score.divergence / score.predicted
    return msgspec.structs.replace(
        blank,
        perplexity=rounded(score.perplexity),
        perplexity_error=rounded(score.perplexity_error),
        baseline_perplexity=reference.perplexity if reference else None,
        kl=rounded(max(0.0, divergence) if divergence == divergence else None) if compared else None,
        kl_error=rounded(score.divergence_error) if compared else None,
        top1=rounded(score.agreed / score.predicted) if compared else None,
    )
