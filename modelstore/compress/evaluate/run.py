"""One evaluation from end to end: what is known already, which models are run, what is new."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from modelstore.architecture.sizes import Sizes
from modelstore.compress.evaluate import score as ev
from modelstore.compress.evaluate.metrics import known, publish
from modelstore.compress.evaluate.model import check_runs, class_of, language_config, language_model, tokens
from modelstore.compress.evaluate.streamed import Streamed
from modelstore.compress.stages import Stages
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format.answers.results import Measured
from modelstore.format.digest import name_of
from modelstore.format.names import ORIGINAL
from modelstore.format.progress import Advance, Progress, meter
from modelstore.plan.work import Work
from modelstore.storage.base import Storage

__all__ = ["Choice", "Found", "evaluate", "publish"]

DTYPES = ("float32", "bfloat16", "float16")
_DIGITS = 8  # of what is kept: float32 sums say no more


@dataclass(frozen=True)
class Choice:
    """How a text is read and a model run; see `Store.eval`."""

    context: int
    stride: int
    limit: int | None = None
    batch: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """`ValueError` if the settings cannot be meant so."""
        if self.context < 2:
            raise ValueError(f"context={self.context} is too short: a token is predicted from at least one before it")
        if not 1 <= self.stride <= self.context:
            raise ValueError(f"stride={self.stride} is not between 1 and the context of {self.context} tokens")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit={self.limit} leaves nothing to predict: give 2 tokens or more")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch={self.batch} is not positive")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Found:
    """The evaluation of each variant that was asked for, and those that are new, the original's perhaps among them."""

    all: Mapping[str, Measured]
    fresh: Mapping[str, Measured]


def evaluate(
    models: Mapping[str, Variant],
    variants: Sequence[str],
    name: str,
    text: str,
    choice: Choice,
    baseline: bool,
    work: Work,
    keep: Storage | None,
) -> Found:
    """Evaluate variants of one version; `models` are they and the original, by name.

    `keep`: the store for new results, which is checked for writing before anything is run.

    `ValueError` if the text has fewer than two tokens, or the context is longer than what the model was made for.
    """
    original = models[ORIGINAL]
    config = language_config(original)
    sizes = Sizes(config)
    if sizes.positions is not None and choice.context > sizes.positions:
        raise ValueError(
            f"context={choice.context} is more than the {sizes.positions} positions of model {original.name!r}"
        )
    ids = tokens(original, text)[: choice.limit]
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: give one of two or more, since each is predicted from those before"
        )
    vocabulary = sizes.vocabulary
    if max(ids) >= vocabulary:
        raise ValueError(
            f"the tokenizer of model {original.name!r} knows more tokens than the model's {vocabulary}: save the model with its "
            f"own, files={{'tokenizer.json': …}}"
        )
    windows = ev.windows(len(ids), choice.context, choice.stride)
    blank = Measured(
        name,
        name_of(text.encode()),
        len(ids),
        sum(window.predicted for window in windows),
        choice.context,
        choice.stride,
        choice.dtype,
        None,
    )
    before = {variant: known(model.manifest.metrics, blank) for variant, model in models.items()}
    todo = [v for v in dict.fromkeys(variants) if v != ORIGINAL and not _answers(before[v], baseline)]
    runs_original = (baseline and bool(todo)) or (ORIGINAL in variants and before[ORIGINAL] is None)
    if keep is not None and (todo or runs_original):
        keep.check_writable("keep what is found (keep=False does without)")
    turns = ev.batches(windows, choice.batch or ev.batch_size(choice.context, vocabulary))
    per_token = len(text.encode()) / max(1, blank.predicted)
    maker = _maker(models, config, choice, work)
    count = _counter(work.progress, per_token, blank.predicted * (len(todo) + runs_original), todo)
    rest: dict[str, Any] = {"memory": work.memory // 2, "vocabulary": vocabulary, "count": count}
    made = [maker(variant) for variant in todo]
    score, scores = ev.compare(maker(ORIGINAL) if runs_original else None, made if baseline else [], ids, turns, **rest)
    if not baseline:
        scores = ev.compare(None, made, ids, turns, **rest)[1]
    fresh: dict[str, Measured] = {}
    reference = before[ORIGINAL]
    if score is not None and reference is None:
        fresh[ORIGINAL] = reference = _of_original(blank, score)
    for variant, found in zip(todo, scores, strict=True):
        fresh[variant] = _measured(blank, found, reference, compared=baseline)
    return Found({v: fresh[v] if v in fresh else _there(before[v]) for v in variants}, fresh)


def _of_original(blank: Measured, score: ev.Score) -> Measured:
    at = _rounded(score.perplexity)
    error = _rounded(score.perplexity_error)
    return msgspec.structs.replace(
        blank, perplexity=at, perplexity_error=error, baseline_perplexity=at, kl=0.0, kl_error=0.0, top1=1.0
    )


def _maker(models: Mapping[str, Variant], config: Any, choice: Choice, work: Work) -> Callable[[str], ev.MakeModel]:
    """How a variant is made ready to predict, by its name."""
    streamed = _is_streamed(models[ORIGINAL], choice, work.memory)
    if not streamed:
        check_runs(models[ORIGINAL], config)

    def maker(variant: str) -> ev.MakeModel:
        one = models[variant]
        if streamed:
            return lambda: Streamed(_stages(one, config, work), work.memory // 4)
        return lambda: ev.Whole(language_model(one, config, work.limits, dtype=choice.dtype, device=choice.device))

    return maker


def _is_streamed(original: Variant, choice: Choice, memory: int) -> bool:
    """Whether models are run block by block: where one would not fit into half the memory, beside what is predicted."""
    return 2 * _float32(original) > memory and choice.dtype == "float32" and choice.device == "cpu"


def _float32(model: Variant) -> int:
    """Bytes of the model as float32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in model.manifest.tensors)


def _stages(model: Variant, config: Any, work: Work) -> Stages:
    try:
        return Stages(model, class_of(config), work.limits)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"model {model.name!r} does not fit into the memory given, and {error}: to evaluate it whole, give "
            f"memory={2 * _float32(model)} (bytes) or more",
            model=model.name,
        ) from None


def _answers(found: Measured | None, baseline: bool) -> bool:
    """Whether an evaluation that is there says all that is asked; a KL of None beside a perplexity of None is an answer too."""
    return found is not None and (not baseline or found.top1 is not None)


def _there(found: Measured | None) -> Measured:
    assert found is not None, "what was not known was run"
    return found


def _measured(blank: Measured, score: ev.Score, reference: Measured | None, *, compared: bool) -> Measured:
    divergence = score.divergence / score.predicted
    return msgspec.structs.replace(
        blank,
        perplexity=_rounded(score.perplexity),
        perplexity_error=_rounded(score.perplexity_error),
        baseline_perplexity=reference.perplexity if reference else None,
        kl=_rounded(max(0.0, divergence) if divergence == divergence else None) if compared else None,
        kl_error=_rounded(score.divergence_error) if compared else None,
        top1=_rounded(score.agreed / score.predicted) if compared else None,
    )


def _rounded(value: float | None) -> float | None:
    """A number as it is kept; None for what JSON cannot say."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def _counter(progress: Progress | None, per_token: float, predictions: int, variants: Sequence[str]) -> Advance | None:
    """Tells of bytes of text, so that a bar has the unit of all others."""
    count = meter(progress, round(predictions * per_token), f"evaluating {', '.join(variants) or ORIGINAL}")
    return None if count is None else lambda predicted: count(round(predicted * per_token))
