"""The question of an evaluation, the answers that are known already, and the models that are left to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelstore.compress.evaluate.metrics import known
from modelstore.execute.read.loading import Variant
from modelstore.format.answers.results import Measured, TextTask
from modelstore.format.digest import name_of
from modelstore.format.names import ORIGINAL
from modelstore.format.progress import Advance, meter
from modelstore.plan.work import Work
from modelstore.storage.base import Storage

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
class Question:
    """Which variants of a version are evaluated on which text, and how.

    `models`: the variants and the original, by name. `name`: that of the text. `baseline`: the original is run too. `keep`: the
    store for new results, which is checked for writing before anything is run.
    """

    models: Mapping[str, Variant]
    variants: Sequence[str]
    name: str
    text: str
    choice: Choice
    baseline: bool
    work: Work
    keep: Storage | None

    @property
    def original(self) -> Variant:
        """The original of the variants."""
        return self.models[ORIGINAL]

    def blank(self, task: TextTask, tokens: int, predicted: int) -> Measured:
        """An evaluation of so many tokens of the text, before anything is found."""
        how, digest = self.choice, name_of(self.text.encode())
        return Measured(self.name, digest, tokens, predicted, how.context, how.stride, how.dtype, None, task=task)

    @property
    def whole(self) -> int:
        """Bytes of memory with which the model runs whole: twice those of its weights as float32."""
        return 2 * float32_bytes(self.original)

    def check_tokens(self, highest: int, vocabulary: int) -> None:
        """`ValueError` if a token of the text is none of the model's."""
        if highest >= vocabulary:
            raise ValueError(
                f"the tokenizer of model {self.original.name!r} knows more tokens than the model's {vocabulary}: save the model "
                f"with its own, files={{'tokenizer.json': …}}"
            )

    def is_too_large(self) -> bool:
        """Whether the model does not run whole in the memory given; only what runs on the processor as float32 is asked."""
        return self.choice.dtype == "float32" and self.choice.device == "cpu" and self.whole > self.work.memory


@dataclass(frozen=True)
class Found:
    """The evaluation of each variant that was asked for, and those that are new, the original's perhaps among them."""

    all: Mapping[str, Measured]
    fresh: Mapping[str, Measured]


@dataclass(frozen=True)
class ModelsToRun:
    """The evaluations known `before`, the variants `todo`, and whether the original is run as well."""

    before: Mapping[str, Measured | None]
    todo: list[str]
    runs_original: bool

    @classmethod
    def of(cls, question: Question, blank: Measured) -> ModelsToRun:
        """The models to run for an answer like `blank`; the store is checked for writing if something has to be kept."""
        asked, baseline = question.variants, question.baseline
        before = {variant: known(model.manifest.metrics, blank) for variant, model in question.models.items()}
        todo = [v for v in dict.fromkeys(asked) if v != ORIGINAL and not _answers(before[v], baseline)]
        runs_original = (baseline and bool(todo)) or (ORIGINAL in asked and before[ORIGINAL] is None)
        if question.keep is not None and (todo or runs_original):
            question.keep.check_writable("keep what is found (keep=False does without)")
        return cls(before, todo, runs_original)

    def counter(self, question: Question, units: int) -> Advance | None:
        """Tells of bytes of the text, so that a bar has the unit of all others, as `units` of it are done by each model."""
        nbytes, runs = len(question.text.encode()), len(self.todo) + self.runs_original
        count = meter(question.work.progress, nbytes * runs, f"evaluating {', '.join(self.todo) or ORIGINAL}")
        return None if count is None else lambda done: count(round(done * nbytes / max(1, units)))

    def found(self, variants: Sequence[str], fresh: Mapping[str, Measured]) -> Found:
        """The answer for all variants, of what was known and what is `fresh`."""
        return Found({v: fresh[v] if v in fresh else _there(self.before[v]) for v in variants}, fresh)


def float32_bytes(model: Variant) -> int:
    """Bytes of the model as float32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in model.manifest.tensors)


def rounded(value: float | None) -> float | None:
    """A number as it is kept; None for what JSON cannot say."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def _answers(found: Measured | None, baseline: bool) -> bool:
    """Whether an evaluation that is there says all that is asked; a KL of None beside a perplexity of None is an answer too."""
    return found is not None and (not baseline or found.top1 is not None or found.cosine is not None)


def _there(found: Measured | None) -> Measured:
    assert found is not None, "what was not known was run"
    return found
